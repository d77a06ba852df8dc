"""GhostNet, with a stem of stride 1 for small images."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import Form, backbone, resolve_form
from models.backbones.mobilenetv2 import round_channels
from models.calls import ModelError
from models.surgery import Part

# Per stage its blocks: kernel, inner channels, channels, squeeze-and-excitation, stride (Han et al.
# 2020, table 1).
_STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    (
        (5, 960, 160, False, 1),
        (5, 960, 160, True, 1),
        (5, 960, 160, False, 1),
        (5, 960, 160, True, 1),
    ),
)
_LAST_INNER, _LAST = 960, 1280
_DROPOUT = 0.2


@backbone("ghostnet")
class GhostNet(nn.Module):
    """GhostNet of Han et al. (CVPR 2020, arXiv 1911.11907).

    Half of each layer's maps come from a 1x1, the others from a depthwise 3x3 over the first half.
    State-dict keys are those of the authors' code (huawei-noah). 5,182,508 parameters for 1000
    classes (published 5.2 M), 141.2 M MACs at 224 pixels. `width` multiplies all channels but the
    last 1280, rounded to multiples of 4: 2.59 M and 42.3 M for 0.5, 7.36 M and 227.0 M for 1.3
    (published 2.6 and 42, 7.3 and 226). Weights start as PyTorch's defaults. Published top-1 for
    width 1: 73.98 %.

    `form=cifar`, the default up to 64 pixels, has a stem of stride 1; it is ours, the paper has no
    such network.
    """

    roles: ClassVar[dict[str, Part]] = {
        "conv_stem": "stem",
        "blocks.*.ghost2.primary_conv.0": "projection",
        "blocks.*.shortcut.*": "shortcut",
        "classifier": "head",
    }

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        form: Form | None = None,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        if width < 0.1:  # no multiple of the divisor is near any more
            raise ModelError(f"ghostnet: width must be at least 0.1, not {width}")
        stride = 1 if resolve_form(form, image_size) == "cifar" else 2
        channels = round_channels(16 * width, 4)
        self.conv_stem = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        stages = []
        for stage in _STAGES:
            blocks = []
            for kernel, inner, out, excited, stride in stage:
                out_channels = round_channels(out * width, 4)
                blocks.append(
                    _GhostBottleneck(
                        channels,
                        round_channels(inner * width, 4),
                        out_channels,
                        kernel=kernel,
                        stride=stride,
                        excited=excited,
                    )
                )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        last_inner = round_channels(_LAST_INNER * width, 4)
        stages.append(nn.Sequential(_Pointwise(channels, last_inner)))
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(last_inner, _LAST, 1)
        self.act2 = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(_LAST, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(images))))
        x = self.act2(self.conv_head(self.global_pool(x))).flatten(1)
        logits: Tensor = self.classifier(functional.dropout(x, _DROPOUT, self.training))
        return logits


class _GhostModule(nn.Module):
    """A 1x1 to half of the output channels and a depthwise 3x3 over them for the other half."""

    def __init__(self, in_channels: int, out_channels: int, *, activation: bool) -> None:
        super().__init__()
        half = out_channels // 2  # all widths are multiples of 4
        self.primary_conv = nn.Sequential(
            nn.Conv2d(in_channels, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True) if activation else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True) if activation else nn.Identity(),
        )

    def forward(self, input: Tensor) -> Tensor:
        primary = self.primary_conv(input)
        return torch.cat([primary, self.cheap_operation(primary)], dim=1)


class _GhostBottleneck(nn.Module):
    """Expanding ghost module, depthwise convolution where strided, linear ghost module; shortcut.

    (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)). The shortcut is
    the input, or a depthwise convolution and a 1x1 where the shapes differ.
    """

    def __init__(
        self,
        in_channels: int,
        inner: int,
        out_channels: int,
        *,
        kernel: int,
        stride: int,
        excited: bool,
    ) -> None:
        super().__init__()
        self.ghost1 = _GhostModule(in_channels, inner, activation=True)
        self.strided = stride > 1
        if self.strided:
            self.conv_dw = _depthwise(inner, kernel, stride)
            self.bn_dw = nn.BatchNorm2d(inner)
        self.se = _SqueezeExcitation(inner) if excited else None
        self.ghost2 = _GhostModule(inner, out_channels, activation=False)
        self.shortcut = nn.Sequential()
        if self.strided or in_channels != out_channels:
            self.shortcut.extend(
                [
                    _depthwise(in_channels, kernel, stride),
                    nn.BatchNorm2d(in_channels),
                    nn.Conv2d(in_channels, out_channels, 1, bias=False),
                    nn.BatchNorm2d(out_channels),
                ]
            )

    def forward(self, input: Tensor) -> Tensor:
        x = self.ghost1(input)
        if self.strided:
            x = self.bn_dw(self.conv_dw(x))
        if self.se is not None:
            x = self.se(x)
        output: Tensor = self.ghost2(x) + self.shortcut(input)
        return output


class _SqueezeExcitation(nn.Module):
    """x * h(W2 relu(W1 mean(x) + b1) + b2), where h(u) = min(max(u + 3, 0), 6) / 6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = round_channels(channels / 4, 4)
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        x = self.conv_expand(self.act1(self.conv_reduce(self.avg_pool(input))))
        return input * functional.hardsigmoid(x)


class _Pointwise(nn.Module):
    """1x1, bn, relu."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.act1(self.bn1(self.conv(input)))
        return output


def _depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=channels,
        bias=False,
    )
