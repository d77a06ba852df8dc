"""What settings are made of: frozen groups of plain data, and errors of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.errors import PipelineError as PipelineError


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint, ``; did you mean X?``, or all the choices where none is near."""
    options = list(choices)
    found = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; valid are {', '.join(options)}" if len(options) <= 30 else ""


#: A folder of the user's; ``~`` is the home folder, as in a shell.
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


def without_credentials(address: str) -> str:
    """An address as it may be shown and kept: no user, no password, nothing after a ``?``.

    A path, also one behind ``file://`` or ``sqlite://``, stays as it is.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or rest.startswith("/"):
        return address
    place, _, query = rest.partition("?")
    if "@" in query:  # then the question mark may be one of a password
        place = "..."
    return f"{scheme}://{place.rpartition('@')[2]}"


#: A folder or a URI. Written down (as YAML, JSON, parameters) it has lost its credentials.
Address = Annotated[str, PlainSerializer(without_credentials, when_used="json-unless-none")]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error, true is not taken for 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        is_switch = bool in (annotation, *get_args(annotation))
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
