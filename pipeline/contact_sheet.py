"""What the network sees: training batches as pictures, with labels and the count of each class."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep import Manifest
from data_prep.datasets import DataError, named_normalization, one_line_for_os_errors
from pipeline.config import Experiment, PipelineError
from pipeline.inputs import check_images, make_loader, split_images

_BLUE, _ORANGE = "#3b6fb6", "#d9782d"

#: Images to a row, and rows.
_COLUMNS, _ROWS = 10, 6

#: Up to this many classes the histogram names each.
_MOST_NAMES = 40

#: Longer class names are cut under an image, and under a bar.
_NAME_LENGTH, _BAR_NAME_LENGTH = 14, 24


def write_contact_sheet(experiment: Experiment, manifest: Manifest, path: Path) -> None:
    """Write the first images of the first epoch's training batches, and the class histogram.

    The pixels are those of the batches, as the network gets them, with the normalization undone.

    Args:
        path: of the PNG file; its folder is made.

    Raises:
        PipelineError: one line, when the prepared files cannot be read, the recipe does not fit
            them, or the picture cannot be written.
    """
    try:
        images, labels = _first_images(experiment, manifest)
        with one_line_for_os_errors("cannot write the picture", path), warnings.catch_warnings():
            # A class name in letters that the font lacks shows as boxes, which is seen anyway.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            path.parent.mkdir(parents=True, exist_ok=True)
            _draw(experiment, manifest, images, labels).savefig(path, dpi=110)
    except DataError as error:
        raise PipelineError(str(error)) from None


def _draw(
    experiment: Experiment, manifest: Manifest, images: np.ndarray, labels: list[int]
) -> Figure:
    height = 1.25 * _ROWS + 3.6
    figure = Figure(figsize=(12, height), layout="constrained")
    sheet, histogram = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25 * _ROWS, 3.6))[
        :, 0
    ]
    size = images.shape[1]
    sheet.suptitle(
        f"{manifest.dataset}: training images of epoch 1 as the network sees them, {size}x{size}, "
        f"normalization {experiment.train.normalization!r} undone"
    )
    for number, axes in enumerate(sheet.subplots(_ROWS, _COLUMNS).ravel()):
        axes.set_axis_off()
        if number < len(images):
            axes.imshow(images[number].squeeze(), cmap="gray", vmin=0, vmax=1)
            name = manifest.class_names[labels[number]]
            axes.set_title(_shortened(name, _NAME_LENGTH), fontsize=8, pad=2, parse_math=False)
    _draw_histogram(histogram.subplots(), manifest)
    return figure


def _first_images(experiment: Experiment, manifest: Manifest) -> tuple[np.ndarray, list[int]]:
    """Images, float (N, H, W, C) from 0 to 1, and labels of the first training batches."""
    batch_size = min(experiment.train.batch_size, split_images(experiment, manifest, "train"))
    recipe = experiment.train.model_copy(update={"batch_size": batch_size})
    experiment = experiment.model_copy(update={"train": recipe})
    check_images(experiment, manifest)
    loader = make_loader(experiment, manifest, "train", training=True)
    mean, std = named_normalization(experiment.train.normalization, manifest.normalization)
    pictures, labels = [], []
    with loader.epoch(0) as batches:
        for images, targets in batches:
            pixels = images.permute(0, 2, 3, 1).numpy()
            pictures.append((pixels * std + mean).clip(0, 1))
            labels += targets.tolist()
            if len(labels) >= _ROWS * _COLUMNS:
                break
    return np.concatenate(pictures)[: _ROWS * _COLUMNS], labels[: _ROWS * _COLUMNS]


def _draw_histogram(axes: Axes, manifest: Manifest) -> None:
    """Images of each class in the training split, and in the test split below the axis."""
    counts = manifest.class_histogram
    classes = range(manifest.classes)
    width = 0.8 if manifest.classes <= _MOST_NAMES else 1.0
    axes.bar(classes, counts["train"], width=width, color=_BLUE, label="train")
    axes.bar(classes, [-n for n in counts["test"]], width=width, color=_ORANGE, label="test")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_ylabel("images")
    axes.margins(x=0.01)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if manifest.classes <= _MOST_NAMES:
        names = [_shortened(name, _BAR_NAME_LENGTH) for name in manifest.class_names]
        turned = 90 if sum(map(len, names)) > 120 else 0
        axes.set_xticks(list(classes), names, rotation=turned, fontsize=8, parse_math=False)
    else:
        axes.set_xlabel("class")
    spread = "; ".join(f"{split}: {_spread(of_class)}" for split, of_class in counts.items())
    axes.set_title(f"{manifest.classes:,} classes; {spread}", fontsize=10)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)


def _spread(counts: list[int]) -> str:
    least, most = min(counts), max(counts)
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"{sum(counts):,} images, {each} of each class"


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
