"""Names of a kind of thing, filled by the modules of one package."""

from __future__ import annotations

import ast
import pkgutil
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Generic, Literal, TypeVar

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


@dataclass(frozen=True)
class Declaration:
    """A name as its source declares it: the first line of its docstring, and its note."""

    name: str
    summary: str
    note: str


def declared(kind: Literal["backbone", "method"]) -> list[Declaration]:
    """List the names of a kind by reading the sources, so without importing torch.

    An entry is a class or function under the decorator that carries the name of its kind, with the
    entry's name as a literal.
    """
    folder = Path(__file__).parent / f"{kind}s"
    found = []
    for path in folder.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found += [
                    Declaration(
                        ast.literal_eval(call.args[0]),
                        (ast.get_docstring(node) or "").partition("\n")[0].removesuffix("."),
                        _literal_keyword(call, "note"),
                    )
                    for call in node.decorator_list
                    if isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Name)
                    and call.func.id == kind
                ]
    return sorted(found, key=lambda declaration: declaration.name)


def _literal_keyword(call: ast.Call, name: str) -> str:
    values = [ast.literal_eval(word.value) for word in call.keywords if word.arg == name]
    return values[0] if values else ""
