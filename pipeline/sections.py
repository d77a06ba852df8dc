"""What settings are made of: frozen groups of plain data, and errors of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class PipelineError(Exception):
    """A failure that the user can mend: one line that says what, where, and what would be right.

    Attributes:
        exit_code: of the process: 2 for bad input, 1 for a run that failed.
        run: name of the run that can be continued; None where there is none.
    """

    exit_code = 2
    run: str | None = None


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint, ``; did you mean X?``, or all the choices where none is near."""
    options = list(choices)
    found = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; valid are {', '.join(options)}" if len(options) <= 30 else ""


#: A folder of the user's; ``~`` is the home folder, as in a shell.
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, true is not taken for 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) and not is_switch:
            raise PydanticCustomError("boolean", "must be a value, not true or false")
        return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys: ``{"a": {"b": 1}}`` gives ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
