"""MobileNet, the first one, in its ImageNet form and the one for small images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.backbones import Form, backbone, resolve_form
from models.calls import ModelError
from models.surgery import Part

# Channels and stride of each separable convolution (Howard et al. 2017, table 1; the stride 2 that
# the table prints for the last one contradicts its map sizes).
_LAYERS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


@backbone("mobilenet")
class MobileNet(nn.Module):
    """MobileNet of Howard et al. (2017, arXiv 1704.04861).

    A 3x3 stem and 13 depthwise separable convolutions, each 3x3 depthwise, bn, relu, 1x1, bn, relu.
    `width` is the paper's multiplier of all channels. `form`, by default imagenet above 64 pixels
    and cifar up to there:

    - imagenet: the paper's. 4,231,976 parameters for 1000 classes (published 4.2 M), 568.7 M MACs
      at 224 pixels (published 569 M), published top-1 70.6 %. Width 0.75, 0.5, 0.25: 2.6, 1.3 and
      0.5 M parameters, 325, 149 and 41 M MACs.
    - cifar: the network that ThreshNet compares with, of weiaicunzai/pytorch-cifar100: stem of
      stride 1, biases in the 1x1. 3,315,428 parameters for 100 classes, 46.4 M MACs at 32 pixels
      for 10; published error on CIFAR-10 16.12 %.

    Weights start as PyTorch's defaults.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "linear": "head"}

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
        if 32 * width < 1:
            raise ModelError(f"mobilenet: width must be at least 1/32, not {width}")
        small = resolve_form(form, image_size) == "cifar"
        channels = int(32 * width)
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride=1 if small else 2, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        layers = []
        for out, stride in _LAYERS:
            out_channels = int(out * width)
            layers.append(_SeparableConvolution(channels, out_channels, stride, bias=small))
            channels = out_channels
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.act1(self.bn1(self.conv1(images))))
        logits: Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


class _SeparableConvolution(nn.Sequential):
    """3x3 depthwise convolution and 1x1; `bias` is that of the 1x1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bias: bool) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                in_channels,
                3,
                stride=stride,
                padding=1,
                groups=in_channels,
                bias=False,
            ),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, out_channels, 1, bias=bias),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
