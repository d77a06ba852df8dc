"""HarDNet, the harmonic densely connected network, in its four published sizes.

Chao, Kao, Ruan, Huang, Lin: HarDNet: A Low Memory Traffic Network, ICCV 2019 (arXiv 1909.00948).
Tables and dropout follow the authors' code (PingoLH/Pytorch-HarDNet), whose checkpoints load. Their
ImageNet top-1 accuracies: 76.5 % (68), 78.0 % (85), 72.1 % (39DS), 74.3 % (68DS). The stem has a
stride of 4 whatever the image size; `stem=small` has none.
"""

from __future__ import annotations

from dataclasses import replace

from models.backbones import backbone
from models.backbones.harmonic import Block, Design, HarmonicNet, Stem

_HARDNET68 = Design(
    stem=(32, 64),
    blocks=(
        Block(8, 14, 128, halve=True),
        Block(16, 16, 256),
        Block(16, 20, 320, halve=True),
        Block(16, 40, 640, halve=True),
        Block(4, 160, 1024),
    ),
    dropout=0.1,
)

_HARDNET85 = Design(
    stem=(48, 96),
    blocks=(
        Block(8, 24, 192, halve=True),
        Block(16, 24, 256),
        Block(16, 28, 320, halve=True),
        Block(16, 36, 480),
        Block(16, 48, 720, halve=True),
        Block(4, 256, 1280),
    ),
    dropout=0.2,
    late_dropout=0.1,
)

_HARDNET39DS = Design(
    stem=(24, 48),
    blocks=(
        Block(4, 16, 96, halve=True),
        Block(16, 20, 320, halve=True),
        Block(8, 64, 640, halve=True),
        Block(4, 160, 1024),
    ),
    multiplier=1.6,
    depthwise=True,
    dropout=0.05,
)


@backbone("hardnet39ds")
def hardnet39ds(
    *, num_classes: int, in_channels: int, image_size: int, stem: Stem = "original"
) -> HarmonicNet:
    """HarDNet-39DS: depthwise separable harmonic layers.

    3,488,228 parameters and 0.43 G MACs at 224 pixels and 1000 classes.
    """
    return HarmonicNet(
        _HARDNET39DS,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


@backbone("hardnet68")
def hardnet68(
    *, num_classes: int, in_channels: int, image_size: int, stem: Stem = "original"
) -> HarmonicNet:
    """HarDNet-68: 67 convolutions in five harmonic blocks.

    17,565,348 parameters and 4.25 G MACs at 224 pixels and 1000 classes.
    """
    return HarmonicNet(
        _HARDNET68,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


@backbone("hardnet68ds")
def hardnet68ds(
    *, num_classes: int, in_channels: int, image_size: int, stem: Stem = "original"
) -> HarmonicNet:
    """HarDNet-68DS: HarDNet-68 with depthwise separable harmonic layers.

    4,180,602 parameters and 0.78 G MACs at 224 pixels and 1000 classes.
    """
    return HarmonicNet(
        replace(_HARDNET68, depthwise=True, dropout=0.05),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


@backbone("hardnet85")
def hardnet85(
    *, num_classes: int, in_channels: int, image_size: int, stem: Stem = "original"
) -> HarmonicNet:
    """HarDNet-85: 84 convolutions in six harmonic blocks.

    36,670,212 parameters and 9.07 G MACs at 224 pixels and 1000 classes.
    """
    return HarmonicNet(
        _HARDNET85,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )
