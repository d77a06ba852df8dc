"""Convolutions with periodic masks, computed without their zeros: for inference on the CPU."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.calls import ModelError
from models.layers import CompressedConv2d
from models.masks import WeightMask
from models.surgery import fold, replace_modules


class PeriodicConv2d(nn.Module):
    """A convolution under a periodic mask as P small matrix products.

    All filters o with the same a = o mod P have the same mask (models.methods.sparse), so they read
    the same K values, of channels and positions, for each output pixel. With x_a those rows of the
    im2col matrix, over all images and pixels, and W_a the kept weights of those filters,

        y[a::P] = W_a x_a            W_a (O / P, K), x_a (K, N H' W')

    which is one multiplication per kept weight and pixel, and needs no index per weight. Where P
    divides neither channels nor filters, W_a is filled up with zeros.

    Input (N, I, H, W), output (N, O, H', W'), equal to the masked convolution up to the order of
    summation. The weights are constants.
    """

    positions: Tensor
    weights: Tensor
    bias: Tensor | None

    def __init__(self, layer: CompressedConv2d, mask: WeightMask) -> None:
        super().__init__()
        assert not isinstance(layer.padding, str)
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        self.filters = layer.out_channels
        weight = layer.used_weight().detach().flatten(1)
        kept = mask.full().flatten(1).bool()
        active = [kept[phase].nonzero().flatten() for phase in range(mask.phases)]
        most = max(len(positions) for positions in active)
        positions = torch.zeros(mask.phases, most, dtype=torch.int64, device=weight.device)
        weights = weight.new_zeros(mask.phases, -(-self.filters // mask.phases), most)
        for phase, used in enumerate(active):
            rows = weight[phase :: mask.phases, used]
            positions[phase, : len(used)] = used
            weights[phase, : len(rows), : len(used)] = rows
        self.register_buffer("positions", positions)
        self.register_buffer("weights", weights)
        bias = layer.used_bias()
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        height, width = (self._output_size(input.shape[axis + 2], axis) for axis in (0, 1))
        columns = functional.unfold(
            input, self.kernel_size, self.dilation, self.padding, self.stride
        )
        columns = columns.transpose(0, 1).flatten(1)  # (I kh kw, N H' W')
        read = columns.index_select(0, self.positions.flatten()).unflatten(0, self.positions.shape)
        output = torch.bmm(self.weights, read).transpose(0, 1).flatten(0, 1)[: self.filters]
        output = output.unflatten(1, (len(input), height, width)).transpose(0, 1)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)

    def _output_size(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1


def fold_periodic(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a folded copy whose periodic convolutions leave out the zeros where that is faster.

    Which is faster depends on the machine and on the shapes, so every such layer is timed in both
    forms on what it reads for `images`, (N, C, H, W); one that reads nothing stays dense. The copy
    is in eval mode, for inference; see models.fold, whose outputs it has up to the order of
    summation. Small maps of few images gain: VGG16 and ResNet-18 on one image of 32 pixels took 0.9
    (PSD2_P8), 0.7 (PSD1_P16) and 0.5 to 0.6 (PS1_P9) of the dense time, on one core, against the
    better memory layout of the dense network.

        network = create_model("vgg16", "sparse-ps1p9", num_classes=10, image_size=32)
        logits = fold_periodic(network, images[:1])(images)

    Raises ModelError for a network or images that are not on the CPU.
    """
    if any(tensor.device.type != "cpu" for tensor in (images, *model.parameters())):
        raise ModelError("fold_periodic is for inference on the CPU: move network and images there")
    folded = fold(model).eval()
    candidates = {
        name: PeriodicConv2d(module, module.mask)
        for name, module in model.named_modules()
        if isinstance(module, CompressedConv2d)
        and module.mask is not None
        and _can_leave_out_zeros(module, module.mask)
    }
    inputs = _inputs(folded, list(candidates), images)
    faster: dict[nn.Module, nn.Module] = {}
    for name, read in inputs.items():
        dense, candidate = folded.get_submodule(name), candidates[name]
        if _seconds(candidate, read) < _seconds(dense, read):
            faster[dense] = candidate
    replace_modules(folded, faster)
    return folded


def _can_leave_out_zeros(layer: CompressedConv2d, mask: WeightMask) -> bool:
    plain = layer.groups == 1 and layer.padding_mode == "zeros" and layer.input_quantizer is None
    return plain and not isinstance(layer.padding, str) and mask.phases < layer.out_channels


@torch.inference_mode()
def _inputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, list[Tensor]]:
    """Return what the named modules read, in each of their calls, when the model sees the images.

    A module that is not called is not in the answer.
    """
    inputs: dict[str, list[Tensor]] = {}

    def remember(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, []).append(arguments[0])

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [remember(name) for name in names]
    model(images)
    for handle in handles:
        handle.remove()
    return inputs


@torch.inference_mode()
def _seconds(module: nn.Module, inputs: list[Tensor]) -> float:
    """Return the best time of a few runs over the inputs, after one that does not count."""
    times = []
    for _ in range(6):
        started = time.perf_counter()
        for input in inputs:
            module(input)
        times.append(time.perf_counter() - started)
    return min(times[1:])
