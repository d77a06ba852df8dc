"""ShuffleNet, the first one, in its ImageNet form and the one for small images."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from models.backbones import Form, backbone, resolve_form
from models.calls import ModelError
from models.surgery import Part

# Channels of stage 2 by number of groups, doubled in stages 3 and 4 (Zhang et al. 2018, table 1).
_STAGE_CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
_STAGE_UNITS = (4, 8, 4)
_STEM_CHANNELS = 24


@backbone("shufflenet")
class ShuffleNet(nn.Module):
    """ShuffleNet of Zhang et al. (CVPR 2018, arXiv 1707.01083).

    `groups` are those of the 1x1 convolutions; more groups come with more channels, so that the
    complexity stays the same. `width` is the paper's scale factor s; the stem is rounded up to a
    multiple of the groups. Weights start as PyTorch's defaults. `form`, by default imagenet above
    64 pixels and cifar up to there:

    - imagenet: the paper's. For 1000 classes, groups 1, 2, 3, 4, 8: 1,531,936, 1,733,848,
      1,865,728, 1,968,344, 2,434,768 parameters (equal to osmr/imgclsmob's; 1.9 M for 3 and 2.4 M
      for 8 groups in megvii-model/ShuffleNet-Series), 143.1, 140.8, 137.5, 134.3, 138.4 M MACs at
      224 pixels (143, 140, 137, 133, 137 in the paper's table 1). Published top-1 error with 3
      groups: 32.6 %.
    - cifar: the network that ThreshNet compares with, of weiaicunzai/pytorch-cifar100: stem of
      stride 1 and no pooling, biases in all convolutions, groups also in the first 1x1 of stage 2.
      1,012,108 parameters for 100 classes and 3 groups, 41.7 M MACs at 32 pixels; published error
      on CIFAR-10 13.35 %.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "linear": "head"}

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        form: Form | None = None,
        groups: Literal[1, 2, 3, 4, 8] = 3,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        small = resolve_form(form, image_size) == "cifar"
        out_channels = round(_STAGE_CHANNELS[groups] * width)
        if out_channels < 1 or out_channels % (4 * groups):
            raise ModelError(
                f"shufflenet: width={width} gives stage 2 {out_channels} channels, but with "
                f"groups={groups} they must be a multiple of {4 * groups}"
            )
        channels = -(-int(_STEM_CHANNELS * width) // groups) * groups
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride=1 if small else 2, padding=1, bias=small
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.pool1 = None if small else nn.MaxPool2d(3, stride=2, padding=1)
        units: list[nn.Module] = []
        for count in _STAGE_UNITS:
            for index in range(count):
                units.append(
                    _ShuffleUnit(
                        channels,
                        out_channels,
                        stride=2 if index == 0 else 1,
                        groups=groups,
                        first_groups=groups if units or small else 1,
                        bias=small,
                    )
                )
                channels = out_channels
            out_channels *= 2
        self.layers = nn.Sequential(*units)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(images)))
        if self.pool1 is not None:
            x = self.pool1(x)
        # Flattening is no module here, as in the original: torchstat counts modules' outputs.
        logits: Tensor = self.linear(self.pool(self.layers(x)).flatten(1))
        return logits


class _ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, 3x3 depthwise convolution, grouped 1x1, and the shortcut.

    A unit of stride 1 adds its input; one of stride 2 is joined to the averaged input along the
    channels, (N, in_channels, H, W) to (N, out_channels, ceil(H / 2), ceil(W / 2)). The inner
    convolutions have a quarter of the output's channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        groups: int,
        first_groups: int,
        bias: bool,
    ) -> None:
        super().__init__()
        inner = out_channels // 4
        joined = stride == 2
        added = out_channels - in_channels if joined else out_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=first_groups, bias=bias)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.shuffle = ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, groups=inner, bias=bias)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, added, 1, groups=groups, bias=bias)
        self.bn3 = nn.BatchNorm2d(added)
        self.act3 = nn.ReLU(inplace=True)
        self.joined = joined
        self.shortcut = nn.AvgPool2d(3, stride=2, padding=1) if joined else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        x = self.shuffle(self.act1(self.bn1(self.conv1(input))))
        x = self.bn3(self.conv3(self.bn2(self.conv2(x))))
        shortcut = self.shortcut(input)
        x = torch.cat([shortcut, x], dim=1) if self.joined else shortcut + x
        output: Tensor = self.act3(x)
        return output


def shuffle_channels(input: Tensor, groups: int) -> Tensor:
    """Move channel c of (N, C, H, W) to (c mod n) * groups + c // n, where n = C / groups.

    The channels are dealt as the last dimension, so that the result is in channels_last order. In
    torchvision's function it never is, and the convolution that follows converts it back.
    """
    dealt = input.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).transpose(3, 4).flatten(3)
    return dealt.permute(0, 3, 1, 2)


class ChannelShuffle(nn.Module):
    """`shuffle_channels` as a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        return shuffle_channels(input, self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
