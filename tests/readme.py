"""The blocks of code in the README, and the marks that say what each of them needs."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
#: Each with its `mark`, None where there is none, its `kind` (bash, python), and its `text`.
BLOCKS = [match.groupdict() for match in _BLOCK.finditer(README)]


def commands_marked(mark: str | None) -> list[str]:
    """The lines of the shell's blocks with a mark."""
    return [
        line
        for block in BLOCKS
        if block["kind"] == "bash" and block["mark"] == mark
        for line in block["text"].splitlines()
    ]
