"""From names to a network: a backbone with a method applied to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from models.backbones import BACKBONES
from models.calls import ModelError, bind, parse_call
from models.methods import METHODS, Kind, resolve_methods
from models.surgery import Part, constant_buffers

_FROM_DATA = ("num_classes", "in_channels", "image_size")


def create_model(
    backbone: str,
    method: str = "float",
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int,
    seed: int = 0,
) -> nn.Module:
    """Build a network for images (N, in_channels, image_size, image_size) and apply a method.

    `backbone` and `method` are call strings: `lenet5(width=2)`, `ternary(expansion=4)`; methods
    compose with a plus sign. The initial weights depend on `seed` (modulo 2**64) and the backbone
    alone, those of layers that a method adds on the method too, and the global random state is left
    as it was. Output: logits (N, num_classes). Raises ModelError, also when there is not enough
    memory.
    """
    for name, value in zip(_FROM_DATA, (num_classes, in_channels, image_size), strict=True):
        if value < 1:
            raise ModelError(f"{name} must be at least 1, not {value}")
    call = parse_call(backbone)
    network = BACKBONES.get(call.name)
    options = bind(call, network.build, reserved=_FROM_DATA)
    if image_size < network.smallest_image:
        raise ModelError(
            f"{call.name} needs images of at least {network.smallest_image} pixels, "
            f"not {image_size}"
        )
    resolve_methods(method)  # a wrong method is reported before a large network is built
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every accelerator, which fork_rng then must restore.
        torch.random.default_generator.manual_seed(seed % 2**64)
        try:
            model = network.build(
                num_classes=num_classes, in_channels=in_channels, image_size=image_size, **options
            )
        # No memory for so many weights; a size beyond 64 bits is a TypeError of torch.
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{backbone} cannot be built: {reason}") from error
        return apply_method(model, method)


def apply_method(
    model: nn.Module, method: str, *, roles: Mapping[str, Part] | None = None
) -> nn.Module:
    """Apply a method to any plain network, in place, and return it.

    `roles` says which layers are stem, head or shortcut, for a network that does not declare it
    itself (see models.surgery.Layer). Raises ModelError, also when a method touches no layer.
    """
    if roles is not None:
        object.__setattr__(model, "roles", dict(roles))  # plain data, not a part of the module
    for step in resolve_methods(method):
        if not step.apply(model) and step.kind is not Kind.IDENTITY:
            raise ModelError(f"{method} touches no layer of {type(model).__name__}")
    # DDP reads this attribute of the network that it wraps.
    object.__setattr__(model, "_ddp_params_and_buffers_to_ignore", constant_buffers(model))
    return model


def list_backbones() -> list[str]:
    """Return the names of all backbones in alphabetical order."""
    return BACKBONES.names()


def backbone_note(backbone: str) -> str:
    """Return what should stand beside a backbone's name, or nothing. Takes a call string."""
    return BACKBONES.get(parse_call(backbone).name).note


def list_methods() -> list[str]:
    """Return the names of all methods in alphabetical order."""
    return METHODS.names()
