"""The plain float network under StepNet, the STeP paper's own design."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from models.backbones import backbone
from models.calls import ModelError
from models.surgery import Part


@backbone("stepnet", smallest_image=16)
class StepNet(nn.Module):
    """StepNet with learned convolutions: ten blocks and a 1x1 convolution to the classes.

    The network of Kyrkou (TNNLS 2024, arXiv 2407.14831) before the method `step` freezes its
    convolutions. A block is a convolution of stride 1, batch norm and LeakyReLU(0.1); there are
    four of 5x5 with 64, 64, 128 and 128 channels and six of 3x3 with 256. A 2x2 max-pool follows
    blocks 4, 6, 8 and 10. The logits are the means of the class maps: there is no linear layer.
    Weights start as PyTorch's defaults.

    Input (N, in_channels, H, W) with H = W = image_size >= 16 (24 for the original), output logits
    (N, num_classes). The same network is used at 32, 64 and 224 pixels.

    The authors' code pads every convolution by 1: the 5x5 ones shrink their map by two, and the
    1x1 one surrounds the class maps with constant cells. It gives the class maps a batch norm and
    a LeakyReLU, and all convolutions a bias, which the batch norms cancel. `original=true` builds
    that. By default padding keeps the size of a map, the class maps are what the last convolution
    gives, and only that one has a bias.

    Published, with frozen patterns: CIFAR-10 88.83 %, CIFAR-100 60.51 %, ImageNet16 87.375 %.
    """

    roles: ClassVar[dict[str, Part]] = {"block1.conv": "stem", "block11.conv": "head"}

    def __init__(
        self, *, num_classes: int, in_channels: int, image_size: int, original: bool = False
    ) -> None:
        super().__init__()
        if original and image_size < 24:
            raise ModelError(
                f"stepnet: original=true needs images of at least 24 pixels, not {image_size}"
            )
        self.block1 = _block(in_channels, 64, 5, original)
        self.block2 = _block(64, 64, 5, original)
        self.block3 = _block(64, 128, 5, original)
        self.block4 = _block(128, 128, 5, original)
        self.pool4 = nn.MaxPool2d(2)
        self.block5 = _block(128, 256, 3, original)
        self.block6 = _block(256, 256, 3, original)
        self.pool6 = nn.MaxPool2d(2)
        self.block7 = _block(256, 256, 3, original)
        self.block8 = _block(256, 256, 3, original)
        self.pool8 = nn.MaxPool2d(2)
        self.block9 = _block(256, 256, 3, original)
        self.block10 = _block(256, 256, 3, original)
        self.pool10 = nn.MaxPool2d(2)
        if original:
            self.block11 = _block(256, num_classes, 1, original)
        else:
            self.block11 = nn.Sequential(OrderedDict(conv=nn.Conv2d(256, num_classes, 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool4(self.block4(self.block3(self.block2(self.block1(images)))))
        x = self.pool6(self.block6(self.block5(x)))
        x = self.pool8(self.block8(self.block7(x)))
        x = self.pool10(self.block10(self.block9(x)))
        return self.flatten(self.avgpool(self.block11(x)))


def _block(in_channels: int, out_channels: int, kernel_size: int, original: bool) -> nn.Sequential:
    padding = 1 if original else kernel_size // 2
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=original)
    return nn.Sequential(
        OrderedDict(
            conv=convolution,
            bn=nn.BatchNorm2d(out_channels),
            activation=nn.LeakyReLU(0.1, inplace=True),
        )
    )
