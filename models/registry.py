"""Names of a kind of thing, filled by the modules of one package."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from typing import Generic, TypeVar

from models.calls import ModelError, nearest

Entry = TypeVar("Entry")

_NAME = re.compile(r"[a-z][a-z0-9]*")


class Registry(Generic[Entry]):
    """What a package offers, by name.

    Every module of the package is imported on the first look-up, and adds its own entries. So a
    new file in the package is enough to offer a new name.
    """

    def __init__(self, kind: str, package: str) -> None:
        self._kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def add(self, name: str, entry: Entry) -> None:
        """Add an entry. Names are lower-case letters and digits, since experiments join them."""
        if _NAME.fullmatch(name) is None:
            raise ValueError(f"{self._kind} name {name!r} is not lower-case letters and digits")
        if name in self._entries:
            raise ValueError(f"two entries share the {self._kind} name {name!r}")
        self._entries[name] = entry

    def names(self) -> list[str]:
        """Return all names in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """Return the entry of that name. Raises ModelError with the nearest name."""
        self._load()
        if name not in self._entries:
            names = self.names()
            raise ModelError(
                f"unknown {self._kind} {name!r}{nearest(name, names)}; "
                f"known {self._kind}s: {', '.join(names)}"
            )
        return self._entries[name]

    def _load(self) -> None:
        if self._loaded:
            return
        package = import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"{self._package}.{module.name}")
        self._loaded = True
