"""One forward pass of a network without data: what each module was called with and computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.calls import ModelError
from models.layers import StoresWeight
from models.torchstat import Torchstat, count_call

_FLOAT_BYTES = 4


@dataclass
class Calls:
    """What one module did, over all its calls.

    `macs` are the multiply-accumulates of the convolutions and matrix products that it executed
    itself, outside of its submodules. `positions` counts the places at which a weight was applied:
    pixels of the output of a convolution, rows of the output of a linear layer.
    """

    output_shape: tuple[int, ...] = ()
    elements: int = 0
    positions: int = 0
    macs: int = 0


@dataclass
class Trace:
    """What the modules did, by name, and the totals that only the calls themselves can tell."""

    modules: dict[str, Calls] = field(default_factory=dict)
    torchstat: Torchstat = field(default_factory=Torchstat)
    peak_activation_bytes: int = 0


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the weight that a layer applies at each position of its input, if it has one."""
    if not isinstance(module, nn.Conv2d | nn.Linear | StoresWeight):
        return None
    weight = module.weight
    return weight if isinstance(weight, Tensor) else None


def trace(model: nn.Module, input_shape: tuple[int, int, int]) -> Trace:
    """Follow one image (C, H, W) through a copy of the network on the meta device, in eval mode.

    Neither the network nor any of its tensors is touched or copied. Raises ModelError when the
    network does not take such an image.
    """
    shadow = without_data(model).eval()
    result = Trace()
    running: list[Calls] = []
    counted: dict[nn.Module, Torchstat] = {}
    for name, module in shadow.named_modules():
        calls = result.modules[name] = Calls()
        module.register_forward_pre_hook(_starts(calls, running))
        module.register_forward_hook(_ends(calls, running))
    for leaf in _leaves(shadow):
        leaf.register_forward_hook(_counts(result, counted))
    try:
        with torch.no_grad(), _CountProducts(running):
            shadow(torch.empty(1, *input_shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, input_shape))
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} does not take images of {shape}: {reason}"
        ) from error
    result.torchstat = sum(counted.values(), start=Torchstat())
    return result


def without_data(model: nn.Module) -> nn.Module:
    """Return a copy with float32 parameters and buffers on the meta device."""
    tensors: dict[int, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, tensors)


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that are counted whole: layers with a weight, and what has no submodules."""
    children = list(module.children())
    if isinstance(module, nn.Conv2d | nn.Linear) or not children:
        yield module
        return
    for child in children:
        yield from _leaves(child)


def _starts(calls: Calls, running: list[Calls]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, inputs: Any) -> None:
        running.append(calls)

    return hook


def _ends(calls: Calls, running: list[Calls]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop()
        if not isinstance(output, Tensor):
            return
        calls.output_shape = tuple(output.shape[1:])
        calls.elements += output.numel()
        if weight_of(module) is not None:
            channels = output.shape[1] if output.dim() == 4 else output.shape[-1]
            calls.positions += output.numel() // channels

    return hook


def _counts(
    result: Trace, counted: dict[nn.Module, Torchstat]
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not tensors or not isinstance(output, Tensor):
            return
        counted[module] = count_call(module, tensors[0], output)
        live = _FLOAT_BYTES * (sum(tensor.numel() for tensor in tensors) + output.numel())
        result.peak_activation_bytes = max(result.peak_activation_bytes, live)

    return hook


#: Matrix products, and which of their arguments is the left factor.
_MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.baddbmm.default: 1,
}

#: Which argument of aten.convolution says that it is a transposed one.
_TRANSPOSED = 6


class _CountProducts(TorchDispatchMode):
    """Charges each convolution and matrix product to the module that runs at that moment."""

    def __init__(self, running: list[Calls]) -> None:
        super().__init__()
        self._running = running

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            # Each element of the output is a product with one filter; where the convolution is
            # transposed, each element of the input is.
            transposed = args[_TRANSPOSED]
            elements = args[0].numel() if transposed else output.numel()
            self._running[-1].macs += elements * prod(args[1].shape[1:])
        elif func in _MATRIX_PRODUCTS:
            left = args[_MATRIX_PRODUCTS[func]]
            self._running[-1].macs += output.numel() * left.shape[-1]
        return output
