"""The network as the backbone made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from models.methods import Kind, Method, method


@method("float")
@dataclass(frozen=True)
class Float(Method):
    """Leave every layer in float32: the baseline that the other methods are compared with."""

    kind: ClassVar[Kind] = Kind.IDENTITY

    def apply(self, model: nn.Module) -> list[str]:
        return []
