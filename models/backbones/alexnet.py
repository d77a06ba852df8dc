"""AlexNet with batch norm, as in the study of ternary networks by He, Gong and Fan."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from models.backbones import backbone
from models.backbones.initialization import he_normal
from models.surgery import Part


@backbone("alexnet", smallest_image=63)
class AlexNet(nn.Module):
    """AlexNet of the ternary paper: batch norm, no dropout, no grouping.

    The float network of He, Gong and Fan (WACV 2019, arXiv 1807.07948), after Krizhevsky et al.
    2012: convolutions of 96 (11x11, stride 4), 256 (5x5), 384, 384 and 256 channels (3x3), linear
    layers of 4096, 4096 and the classes. Each but the last is followed by batch norm and ReLU, the
    first, second and fifth by a 3x3 max-pool of stride 2 too. Only the last layer has a bias.
    Weights start He-normal (models.backbones.initialization).

    Input (N, in_channels, H, W) with H = W = image_size >= 63, output logits (N, num_classes). The
    first linear layer reads 256 maps of 6x6 values for 224 pixels, of 1x1 for 63 to 94.

    For 3x224x224 images and 1000 classes: 62,387,912 parameters, 1,135,256,096
    multiply-accumulates. Published accuracy on ImageNet (top-1 / top-5): float 61.78 / 82.87 %,
    ternary 57.21 / 79.41 %.
    """

    roles: ClassVar[dict[str, Part]] = {"features.0": "stem", "classifier.6": "head"}

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(in_channels, 96, 11, stride=4, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_convolution(96, 256, 5, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_convolution(256, 384, 3, padding=1),
            *_convolution(384, 384, 3, padding=1),
            *_convolution(384, 256, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
        )
        side = (image_size - 7) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(256 * side * side, 4096, bias=False),
            nn.BatchNorm1d(4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, 4096, bias=False),
            nn.BatchNorm1d(4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.features(images)))


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int
) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
