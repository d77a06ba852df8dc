"""MobileNetV2 in the forms that the papers train: ImageNet's, and two for small images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models.backbones import backbone, resolve_form
from models.backbones.initialization import he_normal
from models.calls import ModelError
from models.surgery import Part

# Per stage: expansion, channels, blocks. All forms share it (Sandler et al. 2018, table 2).
_STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


@dataclass(frozen=True)
class _SmallForm:
    """What the two networks for small images do differently.

    `strides` has the first stride of each stage. With `convolved_shortcut` every block of stride 1
    adds its input, through a 1x1 where the widths differ; without, only blocks of equal widths do.
    """

    stem_kernel: int
    strides: tuple[int, ...]
    activation: type[nn.ReLU | nn.ReLU6]
    bias: bool
    convolved_shortcut: bool


_SMALL_FORMS = {
    "cifar": _SmallForm(
        stem_kernel=3,
        strides=(1, 1, 2, 2, 1, 2, 1),
        activation=nn.ReLU,
        bias=False,
        convolved_shortcut=True,
    ),
    "cifar100": _SmallForm(
        stem_kernel=1,
        strides=(1, 2, 2, 2, 1, 1, 1),
        activation=nn.ReLU6,
        bias=True,
        convolved_shortcut=False,
    ),
}


def round_channels(channels: float, divisor: int) -> int:
    """Return the multiple of `divisor` nearest to `channels`, at least 90 % of it and not zero.

    The rule by which MobileNets keep their widths multiples of 8, and GhostNet of 4.
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * channels else nearest + divisor


@backbone("mobilenetv2")
def mobilenetv2(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Literal["imagenet", "cifar", "cifar100"] | None = None,
    width: float = 1.0,
    head: Literal["pooled", "flattened"] = "pooled",
) -> nn.Module:
    """MobileNetV2 of Sandler et al. (CVPR 2018, arXiv 1801.04381).

    `form`, by default imagenet above 64 pixels and cifar up to there:

    - imagenet: torchvision's network, with its state-dict keys. 3,504,872 parameters for 1000
      classes, 300.8 M MACs at 224 pixels; torchvision's top-1 71.88 %.
    - cifar: the network of the STeP and the pSConv papers, which is that of kuangliu/pytorch-cifar:
      3x3 stem and first two stages of stride 1, ReLU, a 1x1 on the shortcut where a block of
      stride 1 changes the width, and an expansion layer also where it expands by one. 2,296,922
      parameters for 10 classes, 91.15 M MACs at 32 pixels; published top-1 on CIFAR-10 92.75 %, on
      CIFAR-100 72.82 % (STeP repository), on CIFAR-10 90.35 % (pSConv papers).
    - cifar100: the network that ThreshNet compares with, which is that of
      weiaicunzai/pytorch-cifar100: stem of one padded 1x1, ReLU6, biases in all convolutions, total
      stride 8. 2,369,380 parameters for 100 classes, 64.8 M MACs at 32 pixels for 10; published
      error on CIFAR-10 14.06 %. Its last layer is linear here, a 1x1 on the pooled map there.

    The weights of the small forms start as PyTorch's defaults, as in that code.
    `width` multiplies all channels, rounded to multiples of 8; the last 1x1 has at least 1280.
    `head=flattened` (form cifar) averages windows of 4x4 instead of the whole map, as pSConv does
    on Tiny ImageNet: 5120 features at 64 pixels, 3,308,312 parameters for 200 classes.
    """
    chosen = form or resolve_form(None, image_size)
    if width < 0.1:  # no multiple of the divisor is near any more
        raise ModelError(f"mobilenetv2: width must be at least 0.1, not {width}")
    if head == "flattened" and chosen != "cifar":
        raise ModelError(f"mobilenetv2: head=flattened belongs to form=cifar, not to form={chosen}")
    if chosen == "imagenet":
        return _imagenet(num_classes, in_channels, width)
    return SmallMobileNetV2(
        num_classes=num_classes,
        in_channels=in_channels,
        form=_SMALL_FORMS[chosen],
        width=width,
        image_size=image_size if head == "flattened" else None,
    )


def _imagenet(num_classes: int, in_channels: int, width: float) -> nn.Module:
    network = torchvision.models.MobileNetV2(num_classes=num_classes, width_mult=width)
    if in_channels != 3:
        stem = nn.Conv2d(
            in_channels, network.features[0][0].out_channels, 3, stride=2, padding=1, bias=False
        )
        he_normal(stem)
        network.features[0][0] = stem
    network.roles = {
        "features.0.0": "stem",
        "features.1.conv.1": "projection",
        "features.*.conv.2": "projection",
        "classifier.1": "head",
    }
    return network


class SmallMobileNetV2(nn.Module):
    """The forms for small images. `image_size` sizes a flattened head; None pools to one pixel."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        form: _SmallForm,
        width: float,
        image_size: int | None,
    ) -> None:
        super().__init__()
        channels = round_channels(32 * width, 8)
        last = round_channels(1280 * max(1.0, width), 8)
        self.conv1 = nn.Conv2d(in_channels, channels, form.stem_kernel, padding=1, bias=form.bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = form.activation(inplace=True)
        blocks = []
        for (expansion, out, count), stride in zip(_STAGES, form.strides, strict=True):
            out_channels = round_channels(out * width, 8)
            for index in range(count):
                blocks.append(
                    _InvertedResidual(
                        channels, out_channels, expansion, stride if index == 0 else 1, form
                    )
                )
                channels = out_channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, last, 1, bias=form.bias)
        self.bn2 = nn.BatchNorm2d(last)
        self.act2 = form.activation(inplace=True)
        self.pooled = image_size is None
        features = last if image_size is None else last * _windows(image_size) ** 2
        self.linear = nn.Linear(features, num_classes)
        self.roles: dict[str, Part] = {
            "conv1": "stem",
            "layers.*.conv3": "projection",
            "linear": "head",
        }
        if form.convolved_shortcut:
            self.roles["layers.*.shortcut.0"] = "shortcut"

    def forward(self, images: Tensor) -> Tensor:
        x = self.layers(self.act1(self.bn1(self.conv1(images))))
        x = self.act2(self.bn2(self.conv2(x)))
        # Not a module, as in the originals: torchstat counts the outputs of modules.
        x = x.mean((2, 3)) if self.pooled else functional.avg_pool2d(x, 4).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


class _InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection, and the input where added.

    (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, form: _SmallForm
    ) -> None:
        super().__init__()
        inner = expansion * in_channels
        same = in_channels == out_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=form.bias)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = form.activation(inplace=True)
        self.conv2 = nn.Conv2d(
            inner, inner, 3, stride=stride, padding=1, groups=inner, bias=form.bias
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = form.activation(inplace=True)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=form.bias)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.adds_input = stride == 1 and (same or form.convolved_shortcut)
        self.shortcut: nn.Module | None = None
        if self.adds_input and not same:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=form.bias),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, input: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(input)))
        x = self.act2(self.bn2(self.conv2(x)))
        output: Tensor = self.bn3(self.conv3(x))
        if not self.adds_input:
            return output
        return output + (input if self.shortcut is None else self.shortcut(input))


def _windows(image_size: int) -> int:
    """Return how many 4x4 windows the last map of form cifar is wide: its total stride is 8."""
    windows = -(-image_size // 8) // 4
    if windows == 0:
        raise ModelError(
            f"mobilenetv2: head=flattened needs images of at least 25 pixels, not {image_size}"
        )
    return windows
