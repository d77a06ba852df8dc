"""The conventions of torchstat, the counter behind the complexity tables of ThreshNet and HarDNet.

github.com/Swall0w/torchstat, for one image in eval mode. It looks at leaf modules only, and a
module that is called several times counts with its last call:

    module               FLOPs                    MAdd                      read + written
    Conv2d               MACs (+ out with bias)   2 MACs - out (+ out)      in + parameters + out
    Linear               MACs                     2 MACs - out              in + parameters + out
    BatchNorm2d          2 in (in if not affine)  4 in                      2 in + 2 channels
    ReLU, ReLU6          in                       in                        2 in
    LeakyReLU, ELU       in                       0                         2 in
    PReLU                in                       0                         2 in + parameters
    MaxPool2d            in                       (k^2 - 1) out             in + out
    AvgPool2d            in                       k^2 out                   in + out
    Upsample             out                      0                         0
    others we have       0                        0                         0

where `in` and `out` are elements of the first input and of the output, and MACs are those of the
whole kernel at each output position. Torchstat has rules for more modules, which occur in no
network here. `memory` is the output of every leaf module, 4 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

_MEBIBYTE = 2**20


@dataclass(frozen=True)
class Torchstat:
    """Totals, or one module's part in them. Bytes are those of float32 values."""

    flops: int = 0
    madd: int = 0
    memory_bytes: int = 0
    traffic_bytes: int = 0

    def __add__(self, other: Torchstat) -> Torchstat:
        return Torchstat(
            self.flops + other.flops,
            self.madd + other.madd,
            self.memory_bytes + other.memory_bytes,
            self.traffic_bytes + other.traffic_bytes,
        )

    @property
    def memory_mb(self) -> float:
        """The column "memory(MB)", in units of 2**20 bytes."""
        return self.memory_bytes / _MEBIBYTE

    @property
    def traffic_mb(self) -> float:
        """The column "MemR+W", in units of 2**20 bytes."""
        return self.traffic_bytes / _MEBIBYTE


def count_call(module: nn.Module, input: Tensor, output: Tensor) -> Torchstat:
    """Count one call of a leaf module by the table above."""
    taken, given = input.numel(), output.numel()
    flops, madd, traffic = 0, 0, 0
    match module:
        case nn.Conv2d():
            macs = given * module.weight[0].numel()
            bias = 0 if module.bias is None else given
            flops, madd = macs + bias, 2 * macs - given + bias
            traffic = taken + _parameters(module) + given
        case nn.Linear():
            macs = given * module.in_features
            flops, madd = macs, 2 * macs - given
            traffic = taken + _parameters(module) + given
        case nn.BatchNorm2d():
            flops, madd = (2 if module.affine else 1) * taken, 4 * taken
            traffic = 2 * taken + 2 * input.shape[1]
        case nn.ReLU() | nn.ReLU6():
            flops, madd, traffic = taken, taken, 2 * taken
        case nn.LeakyReLU() | nn.ELU() | nn.PReLU():
            flops, traffic = taken, 2 * taken + _parameters(module)
        case nn.MaxPool2d():
            flops, madd = taken, (_taps(module) - 1) * given
            traffic = taken + given
        case nn.AvgPool2d():
            flops, madd = taken, _taps(module) * given
            traffic = taken + given
        case nn.Upsample():
            flops = given
    return Torchstat(flops, madd, 4 * given, 4 * traffic)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _taps(pool: nn.MaxPool2d | nn.AvgPool2d) -> int:
    size = pool.kernel_size
    return size**2 if isinstance(size, int) else prod(size)
