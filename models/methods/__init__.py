"""Methods: in-place transforms of a plain network, chosen by predicate on its layers.

A new file here with a decorated subclass of Method is a new method. Its class is a frozen
dataclass: the fields are the arguments that a call string may give.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

from torch import nn

from models.calls import Call, ModelError, bind, nearest, parse_calls
from models.registry import Registry


class Kind(IntEnum):
    """What a method changes. Composed methods are applied in this order, whatever the text says."""

    IDENTITY = 0
    LAYER_SWAP = 1
    ACTIVATION = 2
    MASK = 3
    QUANTIZER = 4


class Method(ABC):
    """A transform of a network.

    `short_forms` maps a suffix to the arguments it stands for, so that experiment names can say
    `ternary-x4` for `ternary(expansion=4)`.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    short_forms: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def apply(self, model: nn.Module) -> list[str]:
        """Change the network in place and return the names of the layers touched."""


METHODS: Registry[type[Method]] = Registry("method", __name__)

MethodClass = TypeVar("MethodClass", bound=type[Method])


def method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Offer a subclass of Method under that name."""

    def add(cls: MethodClass) -> MethodClass:
        METHODS.add(name, cls)
        cls.name = name
        return cls

    return add


def resolve_methods(text: str) -> list[Method]:
    """Read `a+b(x=1)` into methods in the order of application. Raises ModelError."""
    by_kind: dict[Kind, str] = {}
    methods = []
    for call in map(_expand_short_forms, parse_calls(text)):
        cls = METHODS.get(call.name)
        if cls.kind in by_kind:
            raise ModelError(_clash(text, by_kind[cls.kind], call.name, cls.kind))
        by_kind[cls.kind] = call.name
        methods.append(cls(**bind(call, cls)))
    if Kind.IDENTITY in by_kind and len(methods) > 1:
        raise ModelError(
            f"{text}: {by_kind[Kind.IDENTITY]} leaves the network as it is, "
            "so it cannot be composed with another method"
        )
    return sorted(methods, key=lambda step: step.kind)


def _expand_short_forms(call: Call) -> Call:
    name, *suffixes = call.name.split("-")
    arguments = dict(call.arguments)
    for suffix in suffixes:
        short_forms = METHODS.get(name).short_forms
        if suffix not in short_forms:
            forms = ", ".join(f"{name}-{form}" for form in short_forms) or "none"
            raise ModelError(
                f"{name} has no short form {suffix!r}{nearest(suffix, short_forms)}; "
                f"short forms: {forms}"
            )
        for argument, value in short_forms[suffix].items():
            if argument in arguments:
                raise ModelError(f"{call.name} already sets {argument}; it cannot be set twice")
            arguments[argument] = value
    return Call(name, arguments)


def _clash(text: str, first: str, second: str, kind: Kind) -> str:
    if first == second:
        return f"{text}: {first} is named twice"
    return (
        f"{text}: {first} and {second} are both of kind {kind.name.lower()}; "
        "a network takes one method of each kind"
    )
