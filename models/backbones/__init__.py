"""Plain float networks. A new file here that uses the decorator is a new backbone.

A backbone takes `num_classes`, `in_channels` and `image_size` by keyword, and options of its own
with defaults. It may declare which of its layers play a special part in an attribute `roles`
(see models.surgery.Layer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from models.registry import Registry

BACKBONES: Registry[Callable[..., nn.Module]] = Registry("backbone", __name__)

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def backbone(name: str) -> Callable[[Builder], Builder]:
    """Offer a class or function as the backbone of that name."""

    def add(builder: Builder) -> Builder:
        BACKBONES.add(name, builder)
        return builder

    return add
