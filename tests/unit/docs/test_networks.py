"""The table of published counts is what its program writes, and explains every difference."""

from __future__ import annotations

import re

import pytest

from docs.write_networks import NETWORKS, PUBLISHED, document, write
from models import list_backbones

OURS = re.compile(r"[\d,.]+, ours [\d,.]+")


def section(text: str, title: str) -> str:
    """The part of a document below a heading, with the heading."""
    return text[text.index(f"## {title}\n") :].split("\n## ", 2)[0] + "\n"


@pytest.mark.parametrize("title", ["Binary networks", "Pre-defined sparse kernels: VGG16"])
def test_committed_section_equals_a_fresh_one(title: str) -> None:
    fresh, figures = write(section(PUBLISHED.read_text(), title))
    assert section(NETWORKS.read_text(), title) == fresh, "run `make docs`"
    assert len(figures) >= 15


@pytest.mark.slow
def test_committed_document_equals_a_fresh_one() -> None:
    assert NETWORKS.read_text() == document(), "run `make docs`"


def test_every_difference_has_a_note_and_every_note_a_difference() -> None:
    text = NETWORKS.read_text()
    notes = set(re.findall(r"^(\[\^[\w-]+\]):", text, flags=re.MULTILINE))
    marked = re.findall(OURS.pattern + r"(\[\^[\w-]+\])", text)
    assert len(marked) == len(OURS.findall(text)) > 0
    assert set(marked) == notes
    published = PUBLISHED.read_text()
    assert len(re.findall(r"\d\[\^[\w-]+\]", published)) == len(marked)


def test_every_network_is_compared_with_something_published() -> None:
    text = NETWORKS.read_text()
    missing = [name for name in list_backbones() if re.search(rf"`{name}[(`]", text) is None]
    assert not missing


def lenet5(title: str, **quantities: str) -> str:
    """A section with one row: LeNet5 and these figures."""
    names = ["network", "method", "classes", "image", *quantities]
    cells = ["`lenet5`", "`float`", "10", "1x28x28", *quantities.values()]
    header = f"| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
    return f"## {title}\n\n{header}| {' | '.join(cells)} |\n\nBehind.\n"


def test_a_difference_is_shown_beside_the_published_figure() -> None:
    quantities = {"parameters": "878,155[^slip]", "MACs (M)": "6.57"}
    text, figures = write(lenet5("LeNet5", **quantities))
    assert [figure.equal for figure in figures] == [False, True]
    assert not any(figure.derived or figure.plotted for figure in figures)
    assert "| 878,155, ours 878,154[^slip] |     6.57 |" in text
    assert text.startswith("## LeNet5\n\n|")
    assert text.endswith("|\n\nBehind.\n")


def test_derived_and_plotted_figures_are_told_apart_from_printed_ones() -> None:
    _, derived = write(lenet5("LeNet5: derived", parameters="878,154"))
    assert [(figure.derived, figure.plotted) for figure in derived] == [(True, False)]
    name = "plotted FLOPs (G)"
    _, plotted = write(
        lenet5("LeNet5: plotted", **{name: "0.0065"}) + lenet5("LeNet5", **{name: "0.0067"})
    )
    assert [(figure.derived, figure.plotted) for figure in plotted] == 2 * [(False, True)]
    assert [figure.equal for figure in plotted] == [False, False]
    _, (near,) = write(lenet5("LeNet5", **{name: "0.00655"}))
    assert near.ours == "0.00657" and near.equal


def test_a_cell_that_is_neither_a_figure_nor_nothing_is_an_error() -> None:
    assert write(lenet5("LeNet5", parameters="-"))[1] == []
    with pytest.raises(ValueError, match="lenet5 float: parameters is '878,154!', which is no"):
        write(lenet5("LeNet5", parameters="878,154!"))
