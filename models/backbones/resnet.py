"""Residual networks: torchvision's, also with a stem for small images, and the CIFAR family.

The two forms of resnet18, 34, 50 and 101 differ in the stem and the initial weights alone:

- imagenet: torchvision's network, so its checkpoints load: 7x7 convolution of stride 2, max-pool,
  He-normal weights. The ternary paper (He, Gong and Fan, WACV 2019) trains it.
- cifar: 3x3 convolution of stride 1, no max-pool, PyTorch's default weights. The STeP paper
  (Kyrkou, TNNLS 2024) trains resnet50 so, at 32, 64 and 224 pixels; the parameter counts that the
  pSConv papers (Kundu et al., IEEE TC 2020) give for their ResNet18 are those of resnet18 so.

resnet20, 32, 44 and 56 are those of He et al. (CVPR 2016, arXiv 1512.03385, section 4.2), as the
ternary paper trains them. Published accuracies of the imagenet form and of these four are those
that the ternary paper's repository gives.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from models.backbones import Form, backbone, resolve_form
from models.backbones.initialization import he_normal
from models.surgery import Part


@backbone("resnet18")
def resnet18(
    *, num_classes: int, in_channels: int, image_size: int, form: Form | None = None
) -> nn.Module:
    """ResNet-18: basic blocks, shortcuts of 1x1 convolutions.

    imagenet at 1000 classes: 11,689,512 parameters, 1,814,073,344 multiply-accumulates at 224
    pixels, published top-1 / top-5 69.75 / 89.07 %. cifar at 10 classes: 11,173,962 parameters;
    published for it on CIFAR-10 92.84 % (pSConv papers, read from a plot).
    """
    form = resolve_form(form, image_size)
    return _resnet(BasicBlock, [2, 2, 2, 2], num_classes, in_channels, form)


@backbone("resnet34")
def resnet34(
    *, num_classes: int, in_channels: int, image_size: int, form: Form | None = None
) -> nn.Module:
    """ResNet-34: basic blocks, shortcuts of 1x1 convolutions.

    imagenet at 1000 classes: 21,797,672 parameters, 3,663,761,408 multiply-accumulates at 224
    pixels, published top-1 / top-5 73.31 / 91.42 %.
    """
    form = resolve_form(form, image_size)
    return _resnet(BasicBlock, [3, 4, 6, 3], num_classes, in_channels, form)


@backbone("resnet50")
def resnet50(
    *, num_classes: int, in_channels: int, image_size: int, form: Form | None = None
) -> nn.Module:
    """ResNet-50: bottleneck blocks with the stride on the 3x3 convolution.

    imagenet at 1000 classes: 25,557,032 parameters, 4,089,184,256 multiply-accumulates at 224
    pixels, published top-1 / top-5 76.13 / 92.86 %. cifar at 10 classes: 23,520,842 parameters,
    published on CIFAR-10 95.83 %, on CIFAR-100 79.24 % (STeP repository).
    """
    form = resolve_form(form, image_size)
    return _resnet(Bottleneck, [3, 4, 6, 3], num_classes, in_channels, form)


@backbone("resnet101")
def resnet101(
    *, num_classes: int, in_channels: int, image_size: int, form: Form | None = None
) -> nn.Module:
    """ResNet-101: bottleneck blocks with the stride on the 3x3 convolution.

    imagenet at 1000 classes: 44,549,160 parameters, 7,801,405,440 multiply-accumulates at 224
    pixels, published top-1 / top-5 77.37 / 93.55 %.
    """
    form = resolve_form(form, image_size)
    return _resnet(Bottleneck, [3, 4, 23, 3], num_classes, in_channels, form)


def _resnet(
    block: type[BasicBlock | Bottleneck],
    blocks: list[int],
    num_classes: int,
    in_channels: int,
    form: Form,
) -> nn.Module:
    """Build torchvision's network and give it the stem of the form."""
    network = ResNet(block, blocks, num_classes=num_classes)
    if form == "cifar":
        network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
    elif in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        he_normal(network.conv1)
    network.roles = {"conv1": "stem", "fc": "head", "layer*.downsample.0": "shortcut"}
    if block is Bottleneck:
        network.roles["layer*.conv2"] = "bottleneck"
    return network


@backbone("resnet20")
def resnet20(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNet-20 for CIFAR: three blocks a stage, shortcuts without weights.

    269,722 parameters and 40,551,040 multiply-accumulates at 10 classes and 32 pixels; published
    on CIFAR-10: float 91.70 %, ternary 91.65 %.
    """
    return CifarResNet(3, num_classes, in_channels)


@backbone("resnet32")
def resnet32(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNet-32 for CIFAR: five blocks a stage, shortcuts without weights.

    464,154 parameters and 68,862,592 multiply-accumulates at 10 classes and 32 pixels; published
    on CIFAR-10: float 92.36 %, ternary 92.48 %.
    """
    return CifarResNet(5, num_classes, in_channels)


@backbone("resnet44")
def resnet44(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNet-44 for CIFAR: seven blocks a stage, shortcuts without weights.

    658,586 parameters and 97,174,144 multiply-accumulates at 10 classes and 32 pixels; published
    on CIFAR-10: float 92.47 %, ternary 92.71 %.
    """
    return CifarResNet(7, num_classes, in_channels)


@backbone("resnet56")
def resnet56(*, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ResNet-56 for CIFAR: nine blocks a stage, shortcuts without weights.

    853,018 parameters and 125,485,696 multiply-accumulates at 10 classes and 32 pixels; published
    on CIFAR-10: float 92.68 %, ternary 92.86 %.
    """
    return CifarResNet(9, num_classes, in_channels)


class CifarResNet(nn.Module):
    """The network of He et al. for CIFAR, of depth 6 blocks + 2, as the ternary paper trains it.

    A 3x3 convolution, three stages of basic blocks with 16, 32 and 64 channels, the mean of each
    map, a linear layer. The second and third stage begin with stride 2. Convolutions have no bias;
    weights start He-normal (models.backbones.initialization).

    Input (N, in_channels, H, W) of any size, output logits (N, num_classes). Deviation from the
    ternary paper's code: its fixed 8x8 average pool fits 32 pixels only, and the zeros of its
    shortcuts are x * 0, which turns infinity into NaN.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "fc": "head"}

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, 16, 16)
        self.layer2 = _stage(blocks, 16, 32)
        self.layer3 = _stage(blocks, 32, 64)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)
        he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))


class ZeroPaddedShortcut(nn.Module):
    """Option A of He et al.: every second pixel, and zeros for the channels that are new.

    (N, C, H, W) to (N, C + new_channels, ceil(H / 2), ceil(W / 2)).
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, input: Tensor) -> Tensor:
        return functional.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


def _stage(blocks: int, in_channels: int, channels: int) -> nn.Sequential:
    """Stack basic blocks; where the stage widens the maps, the first block halves them."""
    if channels == in_channels:
        first = BasicBlock(channels, channels)
    else:
        shortcut = ZeroPaddedShortcut(channels - in_channels)
        first = BasicBlock(in_channels, channels, stride=2, downsample=shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))
