"""From names to a network: a backbone with a method applied to it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.backbones import BACKBONES
from models.blurpool import add_blurpool
from models.calls import ModelError, Option, bind, options, parse_call
from models.methods import METHODS, Kind, Method, resolve_methods
from models.surgery import Part, mark_constant_buffers, set_blueprint
from models.tracing import without_data

_FROM_DATA = ("num_classes", "in_channels", "image_size")


def create_model(
    backbone: str,
    method: str = "float",
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int,
    seed: int = 0,
    blurpool: bool = False,
) -> nn.Module:
    """Build a network for images (N, in_channels, image_size, image_size) and apply a method.

    `backbone` and `method` are call strings: `lenet5(width=2)`, `ternary(expansion=4)`; methods
    compose with a plus sign. The initial weights depend on `seed` (modulo 2**64) and the backbone
    alone, those of layers that a method adds on the method too, and the global random state is left
    as it was. `blurpool` blurs before layers that skip pixels (see models.add_blurpool). Output:
    logits (N, num_classes). The network remembers these arguments (models.surgery.blueprint).
    Raises ModelError, also when there is not enough memory.
    """
    for name, value in zip(_FROM_DATA, (num_classes, in_channels, image_size), strict=True):
        if type(value) is not int:
            raise ModelError(f"{name} must be a whole number, not {value!r}")
        if value < 1:
            raise ModelError(f"{name} must be at least 1, not {value}")
    call = parse_call(backbone)
    network = BACKBONES.get(call.name)
    arguments = bind(call, network.build, reserved=_FROM_DATA)
    if image_size < network.smallest_image:
        raise ModelError(
            f"{call.name} needs images of at least {network.smallest_image} pixels, "
            f"not {image_size}"
        )
    steps = resolve_methods(method)  # before a large network is built, if it is wrong
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every accelerator, which fork_rng then must restore.
        torch.random.default_generator.manual_seed(seed % 2**64)
        try:
            model = network.build(
                num_classes=num_classes, in_channels=in_channels, image_size=image_size, **arguments
            )
        # No memory for so many weights; a size beyond 64 bits is a TypeError of torch.
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{backbone} cannot be built: {reason}") from error
        _apply(model, steps, method)
        if blurpool:
            add_blurpool(model)
    set_blueprint(
        model,
        {
            "backbone": backbone,
            "method": method,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "seed": seed,
            "blurpool": blurpool,
        },
    )
    return model


def apply_method(
    model: nn.Module, method: str, *, roles: Mapping[str, Part] | None = None
) -> nn.Module:
    """Apply a method to any plain network, in place, and return it.

    `roles` says which layers are stem, head or shortcut, for a network that does not declare it
    itself (see models.surgery.Layer). The network must call its layers as modules: one that reads
    the weight of an nn.Linear and computes with it itself goes on with the latent weight. Raises
    ModelError, also when a method finds no layer to change, and then leaves the network as it was.
    """
    steps = resolve_methods(method)
    rehearsal = without_data(model)
    for network in (rehearsal, model):
        if roles is not None:
            object.__setattr__(network, "roles", dict(roles))  # plain data, no part of the module
        _apply(network, steps, method)
    return model


def _apply(model: nn.Module, steps: list[Method], method: str) -> None:
    for step in steps:
        if not step.apply(model) and step.kind is not Kind.IDENTITY:
            within = f" in {method}" if len(steps) > 1 else ""
            raise ModelError(
                f"{step.name} finds no layer of {type(model).__name__} to change{within}"
            )
    mark_constant_buffers(model)


def list_backbones() -> list[str]:
    """Return the names of all backbones in alphabetical order."""
    return BACKBONES.names()


def backbone_note(backbone: str) -> str:
    """Return what should stand beside a backbone's name, or nothing. Takes a call string."""
    return BACKBONES.get(parse_call(backbone).name).note


def list_methods() -> list[str]:
    """Return the names of all methods in alphabetical order."""
    return METHODS.names()


@dataclass(frozen=True)
class Explanation:
    """What is to be known of a network or method: its text, its options, its short forms."""

    kind: Literal["network", "method"]
    text: str
    note: str
    options: list[Option]
    short_forms: list[str]


def explain(name: str) -> Explanation:
    """Explain the network or method of that name. Raises ModelError for an unknown one."""
    if name in list_methods():
        method = METHODS.get(name)
        forms = [f"{name}-{short}" for short in method.short_forms]
        return Explanation("method", inspect.getdoc(method) or "", "", options(method), forms)
    network = BACKBONES.get(name)
    text = inspect.getdoc(network.build) or ""
    return Explanation("network", text, network.note, options(network.build, _FROM_DATA), [])
