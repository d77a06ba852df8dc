"""EfficientNet-B0 in torchvision's form and in the one for small images of the STeP paper."""

from __future__ import annotations

from typing import ClassVar

import torchvision
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from models.backbones import Form, backbone, resolve_form
from models.backbones.initialization import he_normal
from models.calls import ModelError
from models.surgery import Part

# Per stage: expansion, channels, blocks, kernel, first stride (Tan and Le 2019, table 1), with the
# strides of the form for small images.
_STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
_DROPOUT = 0.2
_DROP_CONNECT = 0.2


@backbone("efficientnetb0")
def efficientnetb0(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    original: bool = False,
) -> nn.Module:
    """EfficientNet-B0 of Tan and Le (ICML 2019, arXiv 1905.11946).

    `form`, by default imagenet above 64 pixels and cifar up to there:

    - imagenet: torchvision's network, with its state-dict keys. 5,288,548 parameters for 1000
      classes, 385.8 M MACs at 224 pixels; torchvision's top-1 77.69 %.
    - cifar: the network of the STeP paper, of kuangliu/pytorch-cifar, which ThreshNet compares with
      too: stem of stride 1, no 1280-channel layer before the pooling, PyTorch's default weights.
      3,598,598 parameters for 10 classes, 30.33 M MACs at 32 pixels; published top-1 on CIFAR-10
      91.40 %, on CIFAR-100 70.41 % (STeP repository).

    Deviations of form cifar from that code, undone by `original=true`: the first block owned a 1x1
    and a batch norm that it never used (1,088 parameters, with which the published 3,599,686 is
    reached), and the rate of the drop-connect was multiplied by a counter that stayed zero. Here
    block b of 16 drops its branch for a whole image with probability 0.2 b / 16, as torchvision's.
    """
    if resolve_form(form, image_size) == "cifar":
        return SmallEfficientNetB0(
            num_classes=num_classes, in_channels=in_channels, original=original
        )
    if original:
        raise ModelError("efficientnetb0: original=true belongs to form=cifar, not form=imagenet")
    network = torchvision.models.efficientnet_b0(num_classes=num_classes)
    if in_channels != 3:
        stem = nn.Conv2d(in_channels, 32, 3, stride=2, padding=1, bias=False)
        he_normal(stem)
        network.features[0][0] = stem
    network.roles = {
        "features.0.0": "stem",
        "features.1.0.block.2.0": "projection",
        "features.*.block.3.0": "projection",
        "classifier.1": "head",
    }
    return network


class SmallEfficientNetB0(nn.Module):
    """The form for small images: (N, in_channels, H, W) to (N, num_classes)."""

    roles: ClassVar[dict[str, Part]] = {
        "conv1": "stem",
        "layers.*.conv3": "projection",
        "linear": "head",
    }

    def __init__(self, *, num_classes: int, in_channels: int, original: bool) -> None:
        super().__init__()
        channels = 32
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.SiLU(inplace=True)
        total = sum(count for _, _, count, _, _ in _STAGES)
        blocks: list[nn.Module] = []
        for expansion, out_channels, count, kernel, stride in _STAGES:
            for index in range(count):
                blocks.append(
                    _MobileBottleneck(
                        channels,
                        out_channels,
                        expansion=expansion,
                        kernel=kernel,
                        stride=stride if index == 0 else 1,
                        drop_rate=0.0 if original else _DROP_CONNECT * len(blocks) / total,
                        unused_expansion=original,
                    )
                )
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(_DROPOUT)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.act1(self.bn1(self.conv1(images))))
        logits: Tensor = self.linear(self.dropout(self.flatten(self.pool(x))))
        return logits


class _MobileBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, linear 1x1 projection.

    (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)). The input is
    added where the shapes agree. Without an expansion the first 1x1 is left out, or, with
    `unused_expansion`, owned and neither used nor trained.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        drop_rate: float,
        unused_expansion: bool,
    ) -> None:
        super().__init__()
        inner = expansion * in_channels
        self.expands = expansion != 1
        if self.expands or unused_expansion:
            self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(inner)
            self.act1 = nn.SiLU(inplace=True)
        if unused_expansion and not self.expands:  # DDP would wait for their gradients
            self.conv1.requires_grad_(False)
            self.bn1.requires_grad_(False)
        self.conv2 = nn.Conv2d(
            inner, inner, kernel, stride=stride, padding=kernel // 2, groups=inner, bias=False
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.SiLU(inplace=True)
        self.se = _SqueezeExcitation(inner, in_channels // 4)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.adds_input = stride == 1 and in_channels == out_channels
        self.drop_connect = StochasticDepth(drop_rate, "row")

    def forward(self, input: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(input))) if self.expands else input
        x = self.se(self.act2(self.bn2(self.conv2(x))))
        output: Tensor = self.bn3(self.conv3(x))
        return self.drop_connect(output) + input if self.adds_input else output


class _SqueezeExcitation(nn.Module):
    """x * sigmoid(W2 swish(W1 mean(x) + b1) + b2), the mean over each map of (N, C, H, W)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.se1 = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.SiLU(inplace=True)
        self.se2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, input: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.se2(self.act(self.se1(self.pool(input)))))
        return input * gate
