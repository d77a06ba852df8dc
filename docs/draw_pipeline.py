"""Draw the picture of the pipeline that the README shows: `make docs` writes docs/pipeline.svg.

The same matplotlib draws the same bytes, so a test can compare the committed picture with a fresh
drawing.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDTH, HEIGHT = 12.0, 5.5  # inches; also the coordinates of everything below
INK, FAINT, PAPER, BORDER = "#1f2933", "#5f6c7b", "#ffffff", "#c5ced8"
TRACKING = "#0f766e"
STAGE_BOTTOM, STAGE_HEIGHT = 3.83, 1.42
STAGE_TITLE_DROP, FIRST_LINE_DROP, LINE_STEP = 0.26, 0.58, 0.215


@dataclass(frozen=True)
class Stage:
    """One box of the upper row: where it stands and what it says."""

    title: str
    lines: tuple[str, ...]
    source: str
    left: float
    width: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def center(self) -> float:
        return self.left + self.width / 2


@dataclass(frozen=True)
class Axis:
    """One of the four things that an experiment names."""

    title: str
    examples: str
    source: str
    color: str
    fill: str
    left: float


RAW = Stage("Raw images", ("folders, archives,", "downloads"), "TERNFORGE_DATA", 0.25, 1.35)
PREPARE = Stage(
    "Prepare", ("every image checked,", "FFCV .beton", "+ manifest"), "data_prep/", 1.93, 1.6
)
TRAIN = Stage(
    "Train",
    ("Ray Train + DDP + FFCV,", "a checkpoint per epoch"),
    "pipeline/ + models/",
    3.86,
    2.25,
)
EVALUATE = Stage(
    "Evaluate", ("every test image", "exactly once"), "pipeline/evaluate.py", 6.44, 1.55
)
REGISTER = Stage(
    "Fold + register", ("a plain network,", "no pickle"), "pipeline/registry/", 8.32, 1.55
)
LOAD = Stage(
    "Load anywhere", ("without Ternforge,", "any batch size"), "mlflow.pytorch", 10.2, 1.55
)
STAGES = (RAW, PREPARE, TRAIN, EVALUATE, REGISTER, LOAD)

AXES = (
    Axis("data set", "digits  mnist  …", "data_prep/datasets.py", "#1d4ed8", "#e8effd", 0.6),
    Axis("backbone", "lenet5  …", "models/backbones/", "#15803d", "#e7f5ec", 3.4),
    Axis("method", "float  ternary  …", "models/methods/", "#b45309", "#fdf1e0", 6.2),
    Axis("recipe", "optimizer, epochs, …", "pipeline/recipes.py", "#7e22ce", "#f4eafc", 9.0),
)
AXIS_WIDTH = 2.4


def box(
    axes: Axes,
    left: float,
    bottom: float,
    width: float,
    height: float,
    *,
    edge: str,
    fill: str = PAPER,
    line: float = 1.2,
) -> None:
    """Add a rounded box; positions and sizes in inches."""
    shape = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.09",
        edgecolor=edge,
        facecolor=fill,
        linewidth=line,
    )
    axes.add_patch(shape)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], *, color: str = INK
) -> None:
    """Add a straight arrow from start to end, in inches."""
    shape = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=11,
        color=color,
        linewidth=1.4,
        shrinkA=0,
        shrinkB=0,
    )
    axes.add_patch(shape)


def label(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = 9.5,
    color: str = INK,
    weight: str = "normal",
    family: str = "DejaVu Sans",
    align: str = "center",
) -> None:
    """Write one line of text, vertically centered on y."""
    axes.text(
        x, y, text, fontsize=size, color=color, weight=weight, family=family, ha=align, va="center"
    )


def draw_stages(axes: Axes) -> None:
    """The upper row: what a run does, in the order in which it does it."""
    top = STAGE_BOTTOM + STAGE_HEIGHT
    for stage in STAGES:
        box(axes, stage.left, STAGE_BOTTOM, stage.width, STAGE_HEIGHT, edge=INK)
        label(axes, stage.center, top - STAGE_TITLE_DROP, stage.title, size=11, weight="bold")
        for row, line in enumerate(stage.lines):
            label(axes, stage.center, top - FIRST_LINE_DROP - LINE_STEP * row, line, size=9)
        label(
            axes,
            stage.center,
            STAGE_BOTTOM - 0.14,
            stage.source,
            size=8,
            color=FAINT,
            family="DejaVu Sans Mono",
        )
    middle = STAGE_BOTTOM + STAGE_HEIGHT / 2
    for before, after in itertools.pairwise(STAGES):
        arrow(axes, (before.right + 0.05, middle), (after.left - 0.05, middle))


def draw_workers(axes: Axes) -> None:
    """Inside the training box: the workers of the group."""
    width, gap = 0.64, 0.08
    left = TRAIN.center - (3 * width + 2 * gap) / 2
    for name in ("worker 0", "…", "worker N-1"):
        box(axes, left, STAGE_BOTTOM + 0.15, width, 0.3, edge=FAINT, fill="#eef2f6", line=0.8)
        label(axes, left + width / 2, STAGE_BOTTOM + 0.3, name, size=7.5)
        left += width + gap


def draw_tracking(axes: Axes) -> None:
    """The bar under the stages that report to MLflow."""
    left, right, bottom, height = TRAIN.left + 0.65, REGISTER.right, 2.85, 0.5
    box(axes, left, bottom, right - left, height, edge=TRACKING, fill="#e6f4f2")
    text = "config, commit, metrics per epoch, data fingerprint, pictures, model"
    label(axes, left + 0.15, bottom + height / 2, "MLflow", weight="bold", size=11, align="left")
    label(axes, left + 0.9, bottom + height / 2, text, size=9, align="left")
    for stage in (TRAIN, EVALUATE, REGISTER):
        start, end = STAGE_BOTTOM - 0.27, bottom + height + 0.04
        arrow(axes, (stage.center, start), (stage.center, end), color=TRACKING)


def draw_experiment(axes: Axes) -> None:
    """The lower panel: the experiment, and the four axes that it names."""
    top = 2.35
    box(axes, 0.25, 0.25, WIDTH - 0.5, top - 0.25, edge=BORDER, fill="#f7f9fb")
    below = STAGE_BOTTOM - 0.27
    arrow(axes, (PREPARE.center, top), (PREPARE.center, below), color=AXES[0].color)
    arrow(axes, (TRAIN.left + 0.3, top), (TRAIN.left + 0.3, STAGE_BOTTOM - 0.04))
    label(axes, PREPARE.center + 0.1, 2.62, "which images", size=9, color=FAINT, align="left")
    label(
        axes, TRAIN.left + 0.4, 2.62, "what is trained, and how", size=9, color=FAINT, align="left"
    )
    label(axes, 0.6, 2.05, "Experiment", size=11, weight="bold", align="left")
    draw_name(axes, 1.75, 2.05)
    label(
        axes,
        WIDTH - 0.6,
        2.05,
        "any legal combination runs; files grow as a sum, not as a product",
        size=9,
        color=FAINT,
        align="right",
    )
    for axis in AXES:
        center = axis.left + AXIS_WIDTH / 2
        box(axes, axis.left, 0.72, AXIS_WIDTH, 0.95, edge=axis.color, fill=axis.fill)
        label(axes, center, 1.4, axis.title, size=11, weight="bold", color=axis.color)
        label(axes, center, 1.02, axis.examples, size=9)
        label(axes, center, 0.54, axis.source, size=8, color=FAINT, family="DejaVu Sans Mono")
    for before in AXES[:-1]:
        label(
            axes,
            before.left + AXIS_WIDTH + 0.2,
            1.2,
            "\N{MULTIPLICATION SIGN}",
            size=14,
            color=FAINT,
        )


def draw_name(axes: Axes, left: float, y: float) -> None:
    """The name of an experiment, each part in the color of its axis."""
    letter = 0.0836 * 10.5 / 10  # width of a DejaVu Sans Mono letter at 10.5 points, in inches
    parts = (("digits", AXES[0].color), ("_", FAINT), ("lenet5", AXES[1].color))
    for text, color in (*parts, ("_", FAINT), ("ternary", AXES[2].color)):
        label(
            axes,
            left,
            y,
            text,
            size=10.5,
            color=color,
            weight="bold",
            family="DejaVu Sans Mono",
            align="left",
        )
        left += letter * len(text)


def draw() -> bytes:
    """Return the picture as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "ternforge", "svg.fonttype": "path"}):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, WIDTH)
        axes.set_ylim(0, HEIGHT)
        axes.set_axis_off()
        box(axes, 0.04, 0.04, WIDTH - 0.08, HEIGHT - 0.08, edge=BORDER)
        draw_stages(axes)
        draw_workers(axes)
        draw_tracking(axes)
        draw_experiment(axes)
        picture = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": "The Ternforge pipeline"}
        figure.savefig(picture, format="svg", transparent=True, metadata=metadata)
    return picture.getvalue()


if __name__ == "__main__":
    Path(__file__).with_name("pipeline.svg").write_bytes(draw())
