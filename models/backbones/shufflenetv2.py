"""ShuffleNetV2 in torchvision's form and the one for small images."""

from __future__ import annotations

from typing import ClassVar

import torch
import torchvision
from torch import Tensor, nn

from models.backbones import Form, backbone, resolve_form
from models.backbones.shufflenet import shuffle_channels
from models.calls import ModelError
from models.surgery import Part

# Channels of stem, stages 2 to 4 and last 1x1 by width. Torchvision's and the small form agree.
_CHANNELS = {
    0.5: (24, 48, 96, 192, 1024),
    1.0: (24, 116, 232, 464, 1024),
    1.5: (24, 176, 352, 704, 1024),
    2.0: (24, 244, 488, 976, 2048),
}
_STAGE_UNITS = (4, 8, 4)


@backbone("shufflenetv2")
def shufflenetv2(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    width: float = 1.0,
) -> nn.Module:
    """ShuffleNetV2 of Ma et al. (ECCV 2018, arXiv 1807.11164).

    `width` is 0.5, 1, 1.5 or 2. `form`, by default imagenet above 64 pixels and cifar up to there:

    - imagenet: torchvision's network, with its state-dict keys. 1,366,792, 2,278,604, 3,503,624
      and 7,393,996 parameters for 1000 classes; 40.5, 144.9, 295.8 and 583.3 M MACs at 224 pixels
      (41, 146, 299 and 591 in the paper). Torchvision's top-1 for width 1: 69.36 %.
    - cifar: the network that ThreshNet compares with, of weiaicunzai/pytorch-cifar100: stem of
      stride 1 without activation and pooling, biases in all convolutions, PyTorch's default
      weights. 1,360,896 parameters for 100 classes, 43.6 M MACs at 32 pixels; published error on
      CIFAR-10 18.07 %.
    """
    if width not in _CHANNELS:
        raise ModelError(f"shufflenetv2: width is 0.5, 1, 1.5 or 2, not {width}")
    channels = _CHANNELS[width]
    if resolve_form(form, image_size) == "cifar":
        return SmallShuffleNetV2(
            num_classes=num_classes, in_channels=in_channels, channels=channels
        )
    network = torchvision.models.ShuffleNetV2(
        list(_STAGE_UNITS), list(channels), num_classes=num_classes
    )
    if in_channels != 3:
        network.conv1[0] = nn.Conv2d(in_channels, channels[0], 3, stride=2, padding=1, bias=False)
    network.roles = {
        "conv1.0": "stem",
        "stage*.0.branch1.*": "shortcut",
        "fc": "head",
    }
    return network


class SmallShuffleNetV2(nn.Module):
    """The form for small images: (N, in_channels, H, W) to (N, num_classes)."""

    roles: ClassVar[dict[str, Part]] = {
        "conv1": "stem",
        "layers.*.shortcut.*": "shortcut",
        "linear": "head",
    }

    def __init__(self, *, num_classes: int, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        stem, *stages, last = channels
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(stem)
        units: list[nn.Module] = []
        width = stem
        for out_channels, count in zip(stages, _STAGE_UNITS, strict=True):
            units.append(_DownUnit(width, out_channels))
            units.extend(_Unit(out_channels) for _ in range(count - 1))
            width = out_channels
        self.layers = nn.Sequential(*units)
        self.conv5 = nn.Conv2d(width, last, 1)
        self.bn5 = nn.BatchNorm2d(last)
        self.act5 = nn.ReLU(inplace=True)
        self.linear = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.bn1(self.conv1(images)))
        x = self.act5(self.bn5(self.conv5(x)))
        # Not a module, as in the original: torchstat counts the outputs of modules.
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class _Unit(nn.Module):
    """The second half of the channels goes through the branch; then both halves are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.shortcut = nn.Identity()
        self.branch = nn.Sequential(
            *_pointwise(half, half), *_depthwise(half, 1), *_pointwise(half, half)
        )

    def forward(self, input: Tensor) -> Tensor:
        kept, worked = input.chunk(2, dim=1)
        return shuffle_channels(torch.cat([self.shortcut(kept), self.branch(worked)], dim=1), 2)


class _DownUnit(nn.Module):
    """Two branches of stride 2 over all channels: (N, C, H, W) to half the size, out_channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.shortcut = nn.Sequential(*_depthwise(in_channels, 2), *_pointwise(in_channels, half))
        self.branch = nn.Sequential(
            *_pointwise(in_channels, in_channels),
            *_depthwise(in_channels, 2),
            *_pointwise(in_channels, half),
        )

    def forward(self, input: Tensor) -> Tensor:
        joined = torch.cat([self.shortcut(input), self.branch(input)], dim=1)
        return shuffle_channels(joined, 2)


def _pointwise(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels),
        nn.BatchNorm2d(channels),
    ]
