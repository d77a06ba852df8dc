"""VGGNet7 as in the study of binary networks by Stadtmann, Latotzke and Gemmeke."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.backbones import backbone
from models.backbones.initialization import xavier_normal
from models.blocks import BlockNetwork, BlockOrder
from models.calls import ModelError
from models.layers import TrimmedConv2d
from models.surgery import Part


@backbone("vggnet7", smallest_image=10)
class VGGNet7(BlockNetwork):
    """VGGNet7 of the binary paper: six 3x3 convolutions, three linear layers.

    The float network of Stadtmann et al. (ICMLA 2020, doi 10.1109/ICMLA51294.2020.00024), after
    BinaryNet's network for CIFAR-10. Convolutions of 128, 128, 256, 256, 512 and 512 channels, a
    2x2 max-pool in every second block; linear layers of 1024, 1024 and the classes. Each layer is
    followed by batch norm and ReLU, the last by a batch norm without affine parameters. The first
    convolution is not padded, the others by one replicated pixel: with binary activations a padded
    value is then -1 or +1 too. Weights start Xavier-normal. State-dict keys are those of the
    authors' code.

    Input (N, in_channels, H, W) with H = W = image_size >= 10, output logits (N, num_classes).
    `width` multiplies the channels of the convolutions (the authors' code has 0.5 for SVHN, and 2
    and 4); `bias` is for all nine layers; `order` says where the blocks pool (see BlockNetwork).

    For 3x32x32 images and ten classes: 10,363,530 parameters, 10,359,680 without biases,
    514,072,064 multiply-accumulates. Published accuracy on CIFAR-10: float 94.05 %, binary
    89.85 %.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "fc3": "head"}

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: float = 1.0,
        bias: bool = True,
        order: BlockOrder | None = None,
    ) -> None:
        super().__init__(order)
        narrow, middle, wide = int(128 * width), int(256 * width), int(512 * width)
        if narrow < 1:
            raise ModelError(f"vggnet7: width must be at least 1/128, not {width}")
        side = (image_size - 2) // 8
        self.conv1 = nn.Conv2d(in_channels, narrow, 3, bias=bias)
        self.conv2 = _padded_convolution(narrow, narrow, bias)
        self.conv3 = _padded_convolution(narrow, middle, bias)
        self.conv4 = _padded_convolution(middle, middle, bias)
        self.conv5 = _padded_convolution(middle, wide, bias)
        self.conv6 = _padded_convolution(wide, wide, bias)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(wide * side * side, 1024, bias=bias)
        self.fc2 = nn.Linear(1024, 1024, bias=bias)
        self.fc3 = nn.Linear(1024, num_classes, bias=bias)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.bn3 = nn.BatchNorm2d(middle)
        self.bn4 = nn.BatchNorm2d(middle)
        self.bn5 = nn.BatchNorm2d(wide)
        self.bn6 = nn.BatchNorm2d(wide)
        self.bn7 = nn.BatchNorm1d(1024)
        self.bn8 = nn.BatchNorm1d(1024)
        self.bn9 = nn.BatchNorm1d(num_classes, affine=False)
        self.activation1 = nn.ReLU()
        self.activation2 = nn.ReLU()
        self.activation3 = nn.ReLU()
        self.activation4 = nn.ReLU()
        self.activation5 = nn.ReLU()
        self.activation6 = nn.ReLU()
        self.activation7 = nn.ReLU()
        self.activation8 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.pool4 = nn.MaxPool2d(2)
        self.pool6 = nn.MaxPool2d(2)
        xavier_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.activation1(self.bn1(self.conv1(images)))
        x = self.finish_block(self.conv2(x), self.bn2, self.activation2, self.pool2)
        x = self.activation3(self.bn3(self.conv3(x)))
        x = self.finish_block(self.conv4(x), self.bn4, self.activation4, self.pool4)
        x = self.activation5(self.bn5(self.conv5(x)))
        x = self.finish_block(self.conv6(x), self.bn6, self.activation6, self.pool6)
        x = self.activation7(self.bn7(self.fc1(self.flatten(x))))
        x = self.activation8(self.bn8(self.fc2(x)))
        return self.bn9(self.fc3(x))


def _padded_convolution(in_channels: int, out_channels: int, bias: bool) -> nn.Conv2d:
    return TrimmedConv2d(
        in_channels, out_channels, 3, padding=1, padding_mode="replicate", bias=bias
    )
