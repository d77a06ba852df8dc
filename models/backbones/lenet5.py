"""LeNet5 as in the study of binary networks by Stadtmann, Latotzke and Gemmeke."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.backbones import backbone
from models.backbones.initialization import xavier_normal
from models.blocks import BlockNetwork, BlockOrder
from models.calls import ModelError
from models.surgery import Part


@backbone("lenet5", smallest_image=12)
def lenet5(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: int = 1,
    bias: bool = True,
    order: BlockOrder | None = None,
    xnor: bool = False,
) -> LeNet5:
    """LeNet5 of the binary paper: two 5x5 convolutions, two linear layers.

    Input (N, in_channels, H, W) with H = W = image_size >= 12, output logits (N, num_classes).
    `width` multiplies the channels of both convolutions; `bias` is for all four layers; `order`
    says where the blocks pool (see BlockNetwork); `xnor` builds XnorLeNet5.
    """
    if width < 1:
        raise ModelError(f"lenet5: width must be at least 1, not {width}")
    network = XnorLeNet5 if xnor else LeNet5
    return network(num_classes, in_channels, image_size, width, bias, order)


class LeNet5(BlockNetwork):
    """The float network of Stadtmann et al. (ICMLA 2020, doi 10.1109/ICMLA51294.2020.00024).

    conv 5x5 (zero padding 2), bn, relu, pool; conv 5x5 (no padding), bn, relu, pool; fc 512, bn,
    relu; fc to the classes and a bn without affine parameters on the logits. Weights start
    Xavier-normal. State-dict keys are those of the authors' code.

    For 1x28x28 images and ten classes: 878,154 parameters, 877,536 without biases, 6,571,520
    multiply-accumulates. Published accuracy on MNIST: float 99.50 %, binary 99.16 %.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "fc2": "head"}

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int,
        bias: bool,
        order: BlockOrder | None,
    ) -> None:
        super().__init__(order)
        side = (image_size // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 32 * width, 5, padding=2, bias=bias)
        self.bn1 = nn.BatchNorm2d(32 * width)
        self.activation1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32 * width, 64 * width, 5, bias=bias)
        self.bn2 = nn.BatchNorm2d(64 * width)
        self.activation2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * width * side * side, 512, bias=bias)
        self.bn3 = nn.BatchNorm1d(512)
        self.activation3 = nn.ReLU()
        self.fc2 = nn.Linear(512, num_classes, bias=bias)
        self.bn4 = nn.BatchNorm1d(num_classes, affine=False)
        xavier_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.finish_block(self.conv1(images), self.bn1, self.activation1, self.pool1)
        x = self.finish_block(self.conv2(x), self.bn2, self.activation2, self.pool2)
        x = self.activation3(self.bn3(self.fc1(self.flatten(x))))
        return self.bn4(self.fc2(x))


class XnorLeNet5(LeNet5):
    """LeNet5 with the order of layers that the authors' code calls XNOR.

    Each convolution is followed by a ReLU of its own, the first by a batch norm (bn5) before it;
    the last layer reads real values, from a ReLU that is no `activation<k>`, and its logits have
    no batch norm. Without biases it has 877,600 parameters for 1x28x28 images and ten classes.

    Deviation: the authors' code has bn5 in both orders but uses it in CPBA alone; here it is used
    in both, so that no parameter is dead.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int,
        bias: bool,
        order: BlockOrder | None,
    ) -> None:
        super().__init__(num_classes, in_channels, image_size, width, bias, order)
        del self.activation3, self.bn4
        self.bn5 = nn.BatchNorm2d(32 * width)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.relu3 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn5(self.conv1(images)))
        x = self.finish_block(x, self.bn1, self.activation1, self.pool1)
        x = self.finish_block(self.relu2(self.conv2(x)), self.bn2, self.activation2, self.pool2)
        x = self.relu3(self.bn3(self.fc1(self.flatten(x))))
        return self.fc2(x)
