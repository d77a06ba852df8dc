"""The blur in front of what skips pixels, as a part of the layer that skips them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle


class BlurPool2d(nn.Module):
    """A fixed low-pass filter for each channel: (N, C, H, W) to (N, C, H', W').

    With k = [1, 2, 1] and zeros around the map,

        y[i, j] = sum over a, b of k[a] k[b] / 16 * x[s i + a - 1, s j + b - 1]

    and H' = ceil(H / s) for the stride s. With `ceil_mode` and an even H there is one row more, in
    which the window stands beyond the map with its middle, and alike for columns; this is the size
    that a pool of the same mode has.

    Zeros, as in the networks of ffcv-imagenet, because they cost nothing: a reflected border (the
    paper) is a copy of the map, cannot be made of a single pixel, and has a gradient on GPUs that
    is not deterministic. The filter is a constant: not saved, not broadcast, not learned.
    """

    filter: Tensor

    def __init__(self, stride: int = 1, ceil_mode: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.ceil_mode = ceil_mode
        row = torch.tensor([1.0, 2.0, 1.0], device="cpu") / 4
        self.register_buffer("filter", row.outer(row).view(1, 1, 3, 3), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[1]
        if self.ceil_mode:
            beyond = [(size - 1) % self.stride for size in reversed(input.shape[2:])]
            input = functional.pad(input, (0, beyond[0], 0, beyond[1]))
        filters = self.filter.expand(channels, -1, -1, -1)
        return functional.conv2d(input, filters, None, self.stride, 1, 1, channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlurPool2d:
        """Move the filter with the network, but keep its values, also from the meta device."""
        values = self.filter
        super()._apply(fn, recurse)
        self.filter = values if self.filter.is_meta else self.filter.copy_(values)
        return self

    def extra_repr(self) -> str:
        return f"stride={self.stride}" + (", ceil_mode=True" if self.ceil_mode else "")


def blur_input(layer: nn.Module, blur: BlurPool2d) -> None:
    """Let a layer blur its input first; of layers in sequence, the first one."""
    if isinstance(layer, nn.Sequential):
        blur_input(layer[0], blur)
        return
    _attach(layer, blur, layer.register_forward_pre_hook(_blurred_input))


def blur_output(layer: nn.Module, blur: BlurPool2d) -> None:
    """Let a layer blur its output."""
    _attach(layer, blur, layer.register_forward_hook(_blurred_output))


def _attach(layer: nn.Module, blur: BlurPool2d, hook: RemovableHandle) -> None:
    """Put the blur into the layer, on the device and in the dtype of its weight."""
    weight = next(layer.parameters(), None)
    layer.blur = blur if weight is None else blur.to(weight.device, weight.dtype)
    # A handle that is pickled with its hook keeps the hook's number from being given again.
    object.__setattr__(layer, "blur_hook", hook)


def _blurred_input(layer: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    blurred: Tensor = layer.get_submodule("blur")(*arguments)
    return blurred


def _blurred_output(layer: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    blurred: Tensor = layer.get_submodule("blur")(output)
    return blurred
