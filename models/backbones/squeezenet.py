"""SqueezeNet in torchvision's forms and, with bypass, for small images."""

from __future__ import annotations

from typing import ClassVar

import torch
import torchvision
from torch import Tensor, nn

from models.backbones import Form, backbone, resolve_form
from models.calls import ModelError
from models.surgery import Part

# torchvision's name of each version, and the smallest image that its poolings leave a pixel of.
_VERSIONS = {1.0: ("1_0", 21), 1.1: ("1_1", 17)}


@backbone("squeezenet", smallest_image=8)
def squeezenet(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    version: float = 1.1,
) -> nn.Module:
    """SqueezeNet of Iandola et al. (2016, arXiv 1602.07360).

    `form`, by default imagenet above 64 pixels and cifar up to there:

    - imagenet: torchvision's network, with its state-dict keys. `version` 1.1 has 1,235,496
      parameters for 1000 classes and 349.2 M MACs at 224 pixels, 1.0 (the paper's, without
      bypass) 1,248,424 and 818.9 M; torchvision's top-1 58.18 and 58.09 %.
    - cifar: the network that ThreshNet compares with, of weiaicunzai/pytorch-cifar100: simple
      bypass around fires 3, 5 and 7 (the paper's around 9 too), stem 3x3 of stride 1, batch norm
      after every convolution but the last, PyTorch's default weights. 781,156 parameters for 100
      classes, 52.5 M MACs at 32 pixels for 10; published error on CIFAR-10 14.25 %.
    """
    if version not in _VERSIONS:
        raise ModelError(f"squeezenet: version is 1.0 or 1.1, not {version}")
    if resolve_form(form, image_size) == "cifar":
        if version != 1.1:
            raise ModelError("squeezenet: version belongs to form=imagenet, not to form=cifar")
        return BypassSqueezeNet(num_classes=num_classes, in_channels=in_channels)
    name, smallest = _VERSIONS[version]
    if image_size < smallest:
        raise ModelError(
            f"squeezenet(form=imagenet, version={version}) needs images of at least {smallest} "
            f"pixels, not {image_size}"
        )
    network = torchvision.models.SqueezeNet(name, num_classes=num_classes)
    if in_channels != 3:
        old = network.features[0]
        stem = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, stride=2)
        nn.init.kaiming_uniform_(stem.weight)
        stem.bias = old.bias  # zeros
        network.features[0] = stem
    network.roles = {
        "features.0": "stem",
        "features.*.expand3x3": "bottleneck",
        "classifier.1": "head",
    }
    return network


class BypassSqueezeNet(nn.Module):
    """The form for small images: (N, in_channels, H, W) to (N, num_classes), H and W at least 8."""

    roles: ClassVar[dict[str, Part]] = {
        "stem.0": "stem",
        "fire*.expand3x3.0": "bottleneck",
        "classifier": "head",
    }

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _convolution(in_channels, 96, 3)
        self.stem_pool = nn.MaxPool2d(2)
        self.fire2 = _Fire(96, 128)
        self.fire3 = _Fire(128, 128)
        self.fire4 = _Fire(128, 256)
        self.fire5 = _Fire(256, 256)
        self.fire6 = _Fire(256, 384)
        self.fire7 = _Fire(384, 384)
        self.fire8 = _Fire(384, 512)
        self.fire9 = _Fire(512, 512)
        self.fire_pool = nn.MaxPool2d(2)
        self.classifier = nn.Conv2d(512, num_classes, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        x = self.fire2(self.stem_pool(self.stem(images)))
        x = self.fire4(self.fire3(x) + x)
        x = self.fire_pool(x)
        x = self.fire6(self.fire5(x) + x)
        x = self.fire8(self.fire7(x) + x)
        x = self.fire9(self.fire_pool(x))
        logits: Tensor = self.flatten(self.pool(self.classifier(x)))
        return logits


class _Fire(nn.Module):
    """1x1 squeeze to an eighth of the output, then 1x1 and 3x3 side by side, half of it each."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.squeeze = _convolution(in_channels, out_channels // 8, 1)
        self.expand1x1 = _convolution(out_channels // 8, out_channels // 2, 1)
        self.expand3x3 = _convolution(out_channels // 8, out_channels // 2, 3)

    def forward(self, input: Tensor) -> Tensor:
        x = self.squeeze(input)
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1)


def _convolution(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
