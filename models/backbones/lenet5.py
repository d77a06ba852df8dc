"""LeNet5 as in the study of binary networks by Stadtmann, Latotzke and Gemmeke."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from models.backbones import backbone
from models.calls import ModelError
from models.surgery import Part

_SMALLEST_IMAGE = 12


@backbone("lenet5")
class LeNet5(nn.Module):
    """The float network of Stadtmann et al. (ICMLA 2020, doi 10.1109/ICMLA51294.2020.00024).

    conv 5x5 (zero padding 2), bn, relu, pool; conv 5x5 (no padding), bn, relu, pool; fc 512, bn,
    relu; fc to the classes and a bn without affine parameters on the logits. Weights start
    Xavier-normal. 878,154 parameters for 1x28x28 images and ten classes.

    Input (N, in_channels, H, W) with H = W = image_size >= 12, output logits (N, num_classes).
    `width` multiplies the channels of both convolutions; `bias` is for all four layers.
    """

    roles: ClassVar[dict[str, Part]] = {"conv1": "stem", "fc2": "head"}

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        width: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if image_size < _SMALLEST_IMAGE:
            raise ModelError(
                f"lenet5 needs images of at least {_SMALLEST_IMAGE} pixels, not {image_size}"
            )
        if width < 1:
            raise ModelError(f"lenet5: width must be at least 1, not {width}")
        side = (image_size // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 32 * width, 5, padding=2, bias=bias)
        self.bn1 = nn.BatchNorm2d(32 * width)
        self.conv2 = nn.Conv2d(32 * width, 64 * width, 5, bias=bias)
        self.bn2 = nn.BatchNorm2d(64 * width)
        self.fc1 = nn.Linear(64 * width * side * side, 512, bias=bias)
        self.bn3 = nn.BatchNorm1d(512)
        self.fc2 = nn.Linear(512, num_classes, bias=bias)
        self.bn4 = nn.BatchNorm1d(num_classes, affine=False)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.xavier_normal_(layer.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(images))), 2)
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2)
        x = functional.relu(self.bn3(self.fc1(x.flatten(1))))
        logits: Tensor = self.bn4(self.fc2(x))
        return logits
