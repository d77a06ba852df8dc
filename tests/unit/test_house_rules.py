"""What keeps the house small and free of any one machine: sizes, file names, addresses."""

from __future__ import annotations

import ast
import re
from itertools import chain
from pathlib import Path

import pytest

import data_prep
import models

ROOT = Path(__file__).parents[2]
SOURCE_FOLDERS = ("pipeline", "models", "data_prep", "tune", "infra", "docs")
SOURCES = [ROOT / "run.py", *chain(*((ROOT / name).rglob("*.py") for name in SOURCE_FOLDERS))]
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_RUN = 400, 60, 60

TEXT_SUFFIXES = {"", ".py", ".sh", ".md", ".toml", ".lock", ".yaml", ".yml", ".json", ".cfg"}
TEXT_FILES = [
    path
    for folder in (*SOURCE_FOLDERS, "tests", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix in TEXT_SUFFIXES
] + [path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT_SUFFIXES]
MACHINE_ADDRESS = re.compile(
    r"(?<![\w.~])/(?:home|root|work|Users)/\w"  # somebody's folder
    r"|\.\./shared"
    r"|(?:index-url|find-links)[ =]"  # where a machine fetches its packages
    r"|pypi\.|pythonhosted\."
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def long_functions(source: str) -> list[str]:
    """Names of the functions in `source` that are longer than the rule allows."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= LONGEST_FUNCTION
    ]


def axes_in(stem: str) -> set[str]:
    """The axes (data set, backbone, method) of which a file's stem carries a name."""
    names = {
        "data set": set(data_prep.DATASETS),
        "backbone": set(models.list_backbones()),
        "method": set(models.list_methods()),
    }
    words = set(re.split(r"[_.-]", stem))
    return {axis for axis, known in names.items() if words & known}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_is_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= (LONGEST_RUN if path.name == "run.py" else LONGEST_FILE)
    assert long_functions(source) == []


def test_long_function_is_found() -> None:
    body = "    pass\n"
    assert long_functions("def short():\n" + body * (LONGEST_FUNCTION - 1)) == []
    assert long_functions("def long():\n" + body * LONGEST_FUNCTION) == ["long"]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_file_name_joins_two_axes(path: Path) -> None:
    assert len(axes_in(path.stem)) <= 1


def test_joined_file_name_is_found() -> None:
    assert axes_in("lenet5_ternary") == {"backbone", "method"}
    assert axes_in("train_mnist-lenet5") == {"data set", "backbone"}
    assert axes_in("ternary") == {"method"}
    assert axes_in("quantizers") == set()


@pytest.mark.parametrize("path", TEXT_FILES, ids=relative)
def test_file_names_no_machine(path: Path) -> None:
    assert MACHINE_ADDRESS.findall(path.read_text()) == []


def test_machine_address_is_found() -> None:
    folder = "/".join(["", "home", "ann", "images"])
    option = "--extra-index" + "-url https://example.org"
    for text in (f"root = '{folder}'", option, "https://" + "pypi" + ".org/simple"):
        assert MACHINE_ADDRESS.search(text), text
    for text in ("~/images", "docs/home/index", "https://github.com/libffcv/ffcv", "/tmp/x"):
        assert not MACHINE_ADDRESS.search(text), text
