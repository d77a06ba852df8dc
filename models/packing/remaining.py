"""What inference needs of a network beside its weights: biases, norms and the like."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.storage import FloatFormat
from models.tracing import weight_of

#: Added to a variance of one it is lost, also in float64: torch refuses an epsilon of zero.
_NO_EPSILON = 1e-30

#: What float16 may change of a value: half a unit in its last place, or, where the value is below
#: the normal range, this share of the tensor's largest one.
_ROUNDING, _SHARE_OF_LARGEST = 2.0**-11, 2.0**-16

_Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm

#: State that inference does not read: a counter, and a digest that the description holds.
_UNUSED = ("num_batches_tracked", "bank_sha256")


def folded_norm(module: nn.Module) -> _Norm | None:
    """Return a batch norm that is a scale and a shift in inference, None for another module."""
    return module if isinstance(module, _Norm) and module.running_mean is not None else None


def remaining_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are stored of a module, without its weight and its submodules.

    They are its parameters and its persistent buffers by name. Of a batch norm they are `scale` and
    `shift`, (channels,) each.
    """
    norm = folded_norm(module)
    if norm is not None:
        return dict(zip(("scale", "shift"), _scale_and_shift(norm), strict=True))
    weight = weight_of(module)
    return {
        name: value.detach()
        for name, value in _state(module)
        if value is not weight and name not in _UNUSED
    }


def without_quantizers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules but weight quantizers: what they hold is in the weight's own scales."""
    quantizers: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in quantizers:
            continue
        quantizer = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, nn.Module):
            quantizers.update(quantizer.modules())
        yield name, module


def set_norm(norm: _Norm, scale: Tensor, shift: Tensor) -> None:
    """Let a batch norm compute scale * x + shift, by the arithmetic that it has."""
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
    norm.affine = True
    norm.eps = _NO_EPSILON
    norm.running_mean, norm.running_var = torch.zeros_like(scale), torch.ones_like(scale)
    norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)


def fits_float16(values: Tensor) -> bool:
    """Return whether float16 changes the values by no more than its own rounding.

    Nothing may overflow. Values below its normal range, which it rounds to multiples of 6e-8, may
    move by 1/65,536 of the tensor's largest value. Without values, on the meta device, it is true.
    """
    if values.is_meta or not values.numel():
        return True
    rounded = values.half().float()
    allowed = (values.abs() * _ROUNDING).clamp_min_(values.abs().amax() * _SHARE_OF_LARGEST)
    return bool(((rounded - values).abs() <= allowed).all())


def is_finite(values: Tensor) -> bool:
    """Return whether no value is infinite or NaN."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def stored_float(values: Tensor, rest: FloatFormat) -> Tensor:
    """Return float values in the form in which they are stored."""
    return values.half() if rest == "float16" and fits_float16(values) else values


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


@torch.no_grad()
def _scale_and_shift(norm: _Norm) -> tuple[Tensor, Tensor]:
    """Return the terms alpha and beta of y = alpha x + beta, to the bit those that torch uses.

        alpha = weight / sqrt(var + eps)        beta = bias - mean * alpha

    How torch rounds them depends on the processor (whether it multiplies and adds at once), so its
    own kernel is asked: beta is what it makes of zeros, and alpha, with mean and bias zero, what it
    makes of ones. On the CPU a norm that set_norm has given these terms then equals the original in
    every bit where it reads contiguous or channels-last memory. For other strides, as of slices, on
    other devices, and where a compiler takes norms apart, the last bit may differ.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.running_var.is_meta:
        return torch.empty_like(norm.running_mean), torch.empty_like(norm.running_var)
    mean, variance = norm.running_mean.cpu(), norm.running_var.cpu()
    weight = None if norm.weight is None else norm.weight.cpu()
    bias = None if norm.bias is None else norm.bias.cpu()
    zeros = torch.zeros_like(mean)
    ones = torch.ones_like(mean).unsqueeze(0)
    alpha = functional.batch_norm(ones, zeros, variance, weight, None, eps=norm.eps)
    beta = functional.batch_norm(ones * 0, mean, variance, weight, bias, eps=norm.eps)
    return alpha[0], beta[0]
