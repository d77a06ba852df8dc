"""Plain float networks. A new file here that uses the decorator is a new backbone.

A backbone takes `num_classes`, `in_channels` and `image_size` by keyword, and options of its own
with defaults. It may declare which of its layers play a special part in an attribute `roles`
(see models.surgery.Layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from models.registry import Registry

Form = Literal["imagenet", "cifar"]

#: Images up to this many pixels get a network's small form: STeP and pSConv train their CIFAR
#: networks on Tiny ImageNet's 64 pixels too.
SMALL_IMAGE = 64


@dataclass(frozen=True)
class Backbone:
    """How to build a network, the smallest image it takes, and what a list should say of it."""

    build: Callable[..., nn.Module]
    smallest_image: int
    note: str


BACKBONES: Registry[Backbone] = Registry("backbone", __name__)

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def backbone(name: str, *, smallest_image: int = 1, note: str = "") -> Callable[[Builder], Builder]:
    """Offer a class or function as the backbone of that name.

    Smaller images than `smallest_image` pixels are refused before it is called. `note` is shown
    beside the name in lists and reports.
    """

    def add(builder: Builder) -> Builder:
        BACKBONES.add(name, Backbone(builder, smallest_image, note))
        return builder

    return add


def resolve_form(form: Form | None, image_size: int) -> Form:
    """Return the form that was asked for, or else the one that suits the image size."""
    if form is not None:
        return form
    return "cifar" if image_size <= SMALL_IMAGE else "imagenet"
