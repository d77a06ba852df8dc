"""Call strings: how a backbone or a method is named together with its arguments.

    call      = name [ "(" argument=value { "," argument=value } ")" ]
    calls     = call { "+" call }

A value is a number, a bare or quoted word, true, false, none, or a list of values. This module
only reads and checks text, so it does not need torch.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_CALL = re.compile(r"([A-Za-z][\w-]*)\s*(?:\((.*)\))?", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}
_EXAMPLE = "write NAME or NAME(argument=value), for example 'ternary(expansion=4)'"


class ModelError(ValueError):
    """A model that cannot be built as asked; the message is one line for the user."""


@dataclass(frozen=True)
class Call:
    """A name and its arguments, read from text but not yet checked against a target."""

    name: str
    arguments: Mapping[str, Any]


def parse_calls(text: str) -> list[Call]:
    """Read `a(x=1)+b` into its calls, in the order written. Raises ModelError."""
    parts = _split_at_plus(text)
    if not all(part.strip() for part in parts):
        raise ModelError(f"cannot read {text!r}: {_EXAMPLE}")
    return [parse_call(part) for part in parts]


def parse_call(text: str) -> Call:
    """Read one call such as `ternary(expansion=4, first_last=float)`. Raises ModelError."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise ModelError(f"cannot read {text!r}: {_EXAMPLE}")
    name, arguments = match.group(1), match.group(2)
    if arguments is None:
        return Call(name, {})
    try:
        call = ast.parse(f"call({arguments})", mode="eval").body
    except (SyntaxError, ValueError):
        leading_zero = re.search(r"(?<![\w.])0\d+", arguments)
        hint = f"put digits in quotes, '{leading_zero.group()}'" if leading_zero else _EXAMPLE
        raise ModelError(f"cannot read {text!r}: {hint}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ModelError(f"cannot read {text!r}: {_EXAMPLE}")  # a(x=1)(x=2) or a(x=1).b(x=2)
    if call.args:
        raise ModelError(f"cannot read {text!r}: arguments are written argument=value")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ModelError(f"cannot read {text!r}: arguments are written argument=value")
        if keyword.arg in values:
            raise ModelError(f"cannot read {text!r}: {keyword.arg} is given twice")
        values[keyword.arg] = _value(keyword.value, text)
    return Call(name, values)


def bind(call: Call, target: Callable[..., Any], reserved: Iterable[str] = ()) -> dict[str, Any]:
    """Check a call's arguments against a target's signature and convert them to its types.

    `reserved` names parameters that are not the caller's to give. Raises ModelError for an unknown
    argument (with the nearest one) and for a value of the wrong type (with the right one).
    """
    reserved = set(reserved)
    parameters = inspect.signature(target, eval_str=True).parameters
    names = [name for name in parameters if name not in reserved]
    bound: dict[str, Any] = {}
    for name, value in call.arguments.items():
        if name in reserved:
            raise ModelError(f"{call.name}: {name} follows from the data and cannot be set here")
        if name not in names:
            takes = f"it takes {', '.join(names)}" if names else "it takes no arguments"
            raise ModelError(f"{call.name} has no argument {name!r}{nearest(name, names)}; {takes}")
        annotation = parameters[name].annotation
        try:
            bound[name] = _convert(value, annotation)
        except _MismatchError:
            raise ModelError(
                f"{call.name}: {name}={_show(value)} is not valid"
                f"{_nearest_choice(value, annotation)}; {name} is {_describe(annotation)}"
            ) from None
    return bound


@dataclass(frozen=True)
class Option:
    """An argument that a call may give: its default and its values, as they are written."""

    name: str
    default: str
    values: str


def options(target: Callable[..., Any], reserved: Iterable[str] = ()) -> list[Option]:
    """List the arguments that `bind` accepts for a target, in their order."""
    parameters = inspect.signature(target, eval_str=True).parameters
    return [
        Option(name, _show(parameter.default), _describe(parameter.annotation))
        for name, parameter in parameters.items()
        if name not in set(reserved)
    ]


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the choice closest to a name, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _MismatchError(Exception):
    """A value does not fit an annotation."""


def _split_at_plus(text: str) -> list[str]:
    """Split at the plus signs that are outside parentheses (1e+3 may stand inside)."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=word):
            return _WORDS.get(word.lower(), word)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(_value(element, text) for element in elements)
    raise ModelError(f"cannot read {ast.unparse(node)!r} in {text!r}: put text in quotes")


def _convert(value: Any, annotation: Any) -> Any:
    """Return the value as the annotated type, or raise _MismatchError. Nothing is rounded."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return _convert(value, option)
            except _MismatchError:
                continue
    elif origin is Literal:
        for option in arguments:
            if type(option) is type(value) and option == value:
                return option
    elif origin is tuple:
        values = value if isinstance(value, tuple) else (value,)
        return tuple(_convert(element, arguments[0]) for element in values)
    elif annotation is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif annotation is NoneType:
        if value is None:
            return None
    elif type(value) is annotation:
        return value
    raise _MismatchError


def _describe(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(_show, arguments))}"
    if origin is tuple:
        return f"a list, each entry {_describe(arguments[0])}"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a word, or text in quotes",
    }
    return "none" if annotation is NoneType else names[annotation]


def _nearest_choice(value: Any, annotation: Any) -> str:
    if get_origin(annotation) is not Literal:
        return ""
    return nearest(str(value), [str(option) for option in get_args(annotation)])


def _show(value: Any) -> str:
    """Write a value the way it is written in a call string."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))})"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
