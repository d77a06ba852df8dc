"""Names of files: in archives, in listings, and for people."""

from __future__ import annotations

import os
import re


def printable(name: str) -> str:
    """A name for people, on one line: bytes that are no text are shown as ``\\xff``."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def is_shown(name: str) -> bool:
    """Whether a file or folder is neither hidden nor an addition of macOS to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def leaves_folder(name: str) -> bool:
    """Whether a member of an archive would be unpacked elsewhere than below it."""
    parts = re.split(r"[/\\]", name)
    return ".." in parts or not parts[0] or re.match("[A-Za-z]:$", parts[0]) is not None
