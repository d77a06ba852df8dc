"""VGG networks: torchvision's for large images, and the form for small ones.

- imagenet: torchvision's network, so its checkpoints load: two hidden linear layers of 4096 with
  dropout on 7x7 maps.
- cifar: the same convolutions, with bias and batch norm, and one linear layer. The STeP paper
  (Kyrkou, TNNLS 2024) trains vgg16 so at 32, 64 and 224 pixels, the pSConv papers (Kundu et al.,
  IEEE TC 2020, arXiv 2001.10710) at 32 and 64.

Both are after Simonyan and Zisserman (ICLR 2015, arXiv 1409.1556), configurations A, B, D and E.
Input (N, in_channels, H, W) with H = W = image_size >= 32, output logits (N, num_classes).
Options that all depths have:

- `batch_norm=false` leaves out the batch norms, as Simonyan and Zisserman did;
- `init`, of the cifar form: `pytorch` is PyTorch's default weights (STeP), `xavier` those of the
  pSConv papers' code;
- `head`, of the cifar form: `pooled` takes the mean of each of the 512 last maps, `flattened` reads
  their every value, so 2048 for 64 pixels (the pSConv papers do not say which; at 32 pixels the
  two are the same).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.models import vgg as torchvision_vgg

from models.backbones import Form, backbone, resolve_form
from models.calls import ModelError
from models.surgery import Part

Init = Literal["pytorch", "xavier"]
Head = Literal["pooled", "flattened"]
Plan = list[str | int]


@backbone("vgg11", smallest_image=32)
def vgg11(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    batch_norm: bool = True,
    init: Init = "pytorch",
    head: Head = "pooled",
) -> nn.Module:
    """VGG-11: eight 3x3 convolutions with batch norm.

    imagenet at 1000 classes: 132,868,840 parameters. cifar at 10 classes: 9,231,114.
    """
    features = _features("A", in_channels, batch_norm)
    return _vgg(features, num_classes, image_size, form, init, head)


@backbone("vgg13", smallest_image=32)
def vgg13(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    batch_norm: bool = True,
    init: Init = "pytorch",
    head: Head = "pooled",
) -> nn.Module:
    """VGG-13: ten 3x3 convolutions with batch norm.

    imagenet at 1000 classes: 133,053,736 parameters. cifar at 10 classes: 9,416,010.
    """
    features = _features("B", in_channels, batch_norm)
    return _vgg(features, num_classes, image_size, form, init, head)


@backbone("vgg16", smallest_image=32)
def vgg16(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    batch_norm: bool = True,
    init: Init = "pytorch",
    head: Head = "pooled",
) -> nn.Module:
    """VGG-16: thirteen 3x3 convolutions with batch norm.

    imagenet at 1000 classes: 138,365,992 parameters. cifar at 10 classes: 14,728,266 parameters,
    313.2 M multiply-accumulates at 32 pixels; published on CIFAR-10 93.82 % (STeP repository) and
    92.76 % (pSConv papers, read from a plot).
    """
    features = _features("D", in_channels, batch_norm)
    return _vgg(features, num_classes, image_size, form, init, head)


@backbone("vgg19", smallest_image=32)
def vgg19(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    form: Form | None = None,
    batch_norm: bool = True,
    init: Init = "pytorch",
    head: Head = "pooled",
) -> nn.Module:
    """VGG-19: sixteen 3x3 convolutions with batch norm.

    imagenet at 1000 classes: 143,678,248 parameters. cifar at 10 classes: 20,040,522.
    """
    features = _features("E", in_channels, batch_norm)
    return _vgg(features, num_classes, image_size, form, init, head)


def _features(plan: str, in_channels: int, batch_norm: bool) -> nn.Sequential:
    """Build the convolutions of a configuration with torchvision's names."""
    features = torchvision_vgg.make_layers(torchvision_vgg.cfgs[plan], batch_norm)
    if in_channels != 3:
        features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
    return features


def _vgg(
    features: nn.Sequential,
    num_classes: int,
    image_size: int,
    form: Form | None,
    init: Init,
    head: Head,
) -> nn.Module:
    form = resolve_form(form, image_size)
    if form == "cifar":
        return CifarVGG(features, num_classes, image_size, init, head)
    for name, value, default in (("init", init, "pytorch"), ("head", head, "pooled")):
        if value != default:
            raise ModelError(f"vgg: {name}={value} is for form=cifar, and this is form={form}")
    network = torchvision_vgg.VGG(features, num_classes=num_classes)
    network.roles = {"features.0": "stem", "classifier.6": "head"}
    return network


class CifarVGG(nn.Module):
    """VGG's convolutions and one linear layer (see the module's text)."""

    roles: ClassVar[dict[str, Part]] = {"features.0": "stem", "classifier": "head"}

    def __init__(
        self, features: nn.Sequential, num_classes: int, image_size: int, init: Init, head: Head
    ) -> None:
        super().__init__()
        self.features = features
        side = image_size // 32 if head == "flattened" else 1
        self.avgpool = nn.AdaptiveAvgPool2d(1) if head == "pooled" else nn.Identity()
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(512 * side * side, num_classes)
        if init == "xavier":
            _xavier(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.avgpool(self.features(images))))


def _xavier(network: CifarVGG) -> None:
    """Draw the weights as the pSConv papers' code does.

    Convolution (O, I, 3, 3): uniform within 0.5 sqrt(6 / (9 I + 9 O)), on the dense fans whatever
    will be masked. Batch norm: weight 0.5. Linear: normal with deviation 0.01. Biases are zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, gain=0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
