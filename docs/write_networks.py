"""Write docs/networks.md: the published counts of every network, and ours where they differ.

    python -m docs.write_networks

The published figures stand in docs/published.md. Each network named there is built without data, so
that this takes seconds, and its profile is compared with them to the last digit printed; those that
were read off a plot, as closely as that can be done. Figures in sections that are called "derived"
nobody has published: they are what a paper's formula gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from models import Profile, create_model, profile

PUBLISHED = Path(__file__).with_name("published.md")
NETWORKS = Path(__file__).with_name("networks.md")

_CALLS = ("network", "method")
_BUILD = (*_CALLS, "classes", "image")
_NOTHING = "-"
_FIGURE = re.compile(r"(?P<printed>[\d,]+(?:\.(?P<decimals>\d+))?)(?P<note>\[\^[\w-]+\])?")

_QUANTITIES: dict[str, Callable[[Profile], float]] = {
    "parameters": lambda p: p.parameters,
    "parameters (M)": lambda p: p.parameters / 1e6,
    "learned": lambda p: p.learned,
    "frozen": lambda p: p.frozen,
    "float parameters": lambda p: p.parameters - p.quantized_weights,
    "quantized weights": lambda p: p.quantized_weights,
    "quantized layers": lambda p: sum(row.scheme != "float32" for row in p.layers),
    "size (MB)": lambda p: p.parameter_bits("2-bit") / 8e6,
    "weight bytes": lambda p: sum(
        row.storage.stored_bytes(row.storage.published_format)
        for row in p.layers
        if row.storage and row.storage.levels
    ),
    "ratio": lambda p: p.ideal_ratio,
    "times fewer parameters": lambda p: (p.parameters + p.masked) / p.parameters,
    "reduction (%)": lambda p: 100 * p.masked / (p.parameters + p.masked),
    "MACs": lambda p: p.kept_macs,
    "MACs (M)": lambda p: p.kept_macs / 1e6,
    "MACs (G)": lambda p: p.kept_macs / 1e9,
    "convolution MACs (M)": lambda p: sum(
        row.kept_macs / 1e6 for row in p.layers if row.kind != "linear"
    ),
    "frozen MACs (M)": lambda p: sum(row.kept_macs for row in p.layers if row.frozen) / 1e6,
    "times fewer MACs": lambda p: p.nominal_macs / p.kept_macs,
    "FLOPs (G)": lambda p: p.torchstat.flops / 1e9,
    "MAdd (G)": lambda p: p.torchstat.madd / 1e9,
    "memory (MB)": lambda p: p.torchstat.memory_mb,
    "memory R+W (MB)": lambda p: p.torchstat.traffic_mb,
    "plotted FLOPs (G)": lambda p: p.kept_macs / 1e9,
}

#: How far a figure may be from ours, as a share of it; none where it is printed.
_TOLERANCES = {"plotted FLOPs (G)": 0.01}


@dataclass(frozen=True)
class Figure:
    """One published figure, ours in as many digits, and the mark of the note beside it, if any.

    One that is `derived` has not been published, but follows from what has been.
    """

    network: str
    quantity: str
    printed: str
    ours: str
    note: str
    derived: bool = False

    @property
    def plotted(self) -> bool:
        return self.quantity in _TOLERANCES

    @property
    def equal(self) -> bool:
        printed, ours = (float(text.replace(",", "")) for text in (self.printed, self.ours))
        return abs(ours - printed) <= _TOLERANCES.get(self.quantity, 0) * printed

    def cell(self) -> str:
        """What the table shows."""
        return self.printed if self.equal else f"{self.printed}, ours {self.ours}{self.note}"


@cache
def measure(network: str, method: str, classes: int, image: str) -> Profile:
    """Build a network without data and profile it for images such as `3x32x32`."""
    channels, size, _ = map(int, image.split("x"))
    with torch.device("meta"):
        model = create_model(
            network, method, num_classes=classes, in_channels=channels, image_size=size
        )
    return profile(model, size)


def compare(headings: list[str], cells: list[str], derived: bool) -> Iterator[Figure | None]:
    """Yield a figure for each quantity of a row, None where nothing was published."""
    network, method, classes, image = (cell.strip("`") for cell in cells[: len(_BUILD)])
    for quantity, cell in list(zip(headings, cells, strict=True))[len(_BUILD) :]:
        if cell == _NOTHING:
            yield None
            continue
        match = _FIGURE.fullmatch(cell)
        if match is None:
            raise ValueError(f"{network} {method}: {quantity} is {cell!r}, which is no figure")
        ours = _QUANTITIES[quantity](measure(network, method, int(classes), image))
        decimals = len(match["decimals"] or "")
        yield Figure(
            f"{network} {method}",
            quantity,
            match["printed"],
            f"{ours:,.{decimals}f}",
            match["note"] or "",
            derived,
        )


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Split a text into pieces: prose, and behind it the cells of the table that follows."""
    for piece in re.split(r"(?m)(?<=^$\n)(?=\| )", text):
        lines = piece.splitlines(keepends=True)
        count = sum(line.startswith("|") for line in lines)
        cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines[:count]]
        yield "".join(lines[count:]), cells


def layout(rows: list[list[str]]) -> str:
    """Return a Markdown table with aligned columns: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = len(_CALLS)
    lines = [
        [text.ljust(width) for text, width in zip(cells[:words], widths[:words], strict=True)]
        + [text.rjust(width) for text, width in zip(cells[words:], widths[words:], strict=True)]
        for cells in rows
    ]
    rule = ["-" * width for width in widths[:words]] + ["-" * (w - 1) + ":" for w in widths[words:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


def write(published: str) -> tuple[str, list[Figure]]:
    """Return the published tables with ours where they differ, and all figures compared."""
    figures: list[Figure] = []
    written = []
    derived = False
    for prose, cells in tables(published):
        if cells:
            headings, _, *rows = cells
            shown = [headings]
            for row in rows:
                compared = list(compare(headings, row, derived))
                figures += [figure for figure in compared if figure is not None]
                shown.append(
                    row[: len(_BUILD)]
                    + [figure.cell() if figure else _NOTHING for figure in compared]
                )
            written.append(layout(shown))
        written.append(prose)
        # A table stands in the section whose heading came last.
        for heading in re.findall(r"(?m)^## (.*)$", prose):
            derived = heading.endswith(": derived")
    return "".join(written), figures


def _agreement(figures: list[Figure]) -> str:
    return f"{sum(figure.equal for figure in figures)} of {len(figures)} figures are equal"


def document() -> str:
    """Return the text of docs/networks.md."""
    published = PUBLISHED.read_text()
    body, figures = write(published[published.index("## ") :])
    derived = [figure for figure in figures if figure.derived]
    plotted = [figure for figure in figures if figure.plotted]
    printed = [figure for figure in figures if not (figure.derived or figure.plotted)]
    return f"""# Networks and their published counts

Written by `docs/write_networks.py` from [published.md](published.md); nothing here is typed. A
figure that stands alone is the published one and ours, equal in every digit printed. Where ours
differs it stands beside it, with a note that says why.

- Published, or measured by running the authors' code: {_agreement(printed)}.
- Read off plots, and within 1 % of ours: {_agreement(plotted)}.
- Derived from a paper's formula, not published: {_agreement(derived)}.

FLOPs, MAdd and memory are in torchstat's conventions (`models/torchstat.py`). MACs count whole
kernels, also at edges, but no pre-defined zeros.

{body}"""


if __name__ == "__main__":
    NETWORKS.write_text(document())
