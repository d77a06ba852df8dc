"""The picture in the README is the one that its program draws."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from docs.draw_pipeline import draw

PICTURE = Path(__file__).parents[3] / "docs" / "pipeline.svg"


def test_committed_picture_equals_a_fresh_drawing() -> None:
    assert PICTURE.read_bytes() == draw(), "run `make docs`"


def test_picture_brings_its_own_background() -> None:
    """It must be readable on a dark page: the first shape fills the page with white."""
    picture = ElementTree.fromstring(PICTURE.read_bytes())
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    first = picture.find(".//svg:g[@id='patch_2']/svg:path", namespace)
    assert first is not None
    assert "fill: #ffffff" in first.attrib["style"]
