"""ThreshNet: dense blocks up to a threshold, harmonic blocks behind it.

Ju, Lin, Jian, Chiang, Yang: ThreshNet: An Efficient DenseNet Using Threshold Mechanism to Reduce
Connections (arXiv 2201.03013). Tables follow the authors' code (RuiyangJu/ThreshNet).

The threshold. Before each block the paper decides for dense or harmonic connections, and once
harmonic, never goes back. In the authors' code that is a constant of the design, neither learned
nor computed from data: of five blocks the first three are dense. Here it is the option
`dense_blocks`, from 0 (a HarDNet) to 5 (a DenseNet). The paper's rule behind the constant is not in
its code; that a block's input channels exceed 257 to 288, that 35 to 42 layers lie before its end,
or that its number exceeds 3 all give the published networks.

The widths k of blocks 4 and 5 (40 and 160) and the `growth` of the dense blocks (32) are the
paper's. The k of blocks 1 to 3, in use only below dense_blocks=3, are our choice (HarDNet-68's), as
is that a block has the same number of layers whichever kind it is.

CIFAR-10 test error as published, the best epoch on the test set: 14.75 % (28), 13.66 % (79) and
13.31 % (95). Operations and memory of the authors' tables are torchstat's at 224 pixels.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from models.backbones import backbone
from models.backbones.harmonic import Block, Design, HarmonicNet, Stem

_THRESHNET79 = Design(
    stem=(32, 64),
    blocks=(
        Block(6, 14, 128, halve=True),
        Block(8, 16, 192, halve=True),
        Block(12, 20, 288),
        Block(16, 40, 480, halve=True),
        Block(4, 160, 960),
    ),
    activation=nn.ReLU,
)

_THRESHNET95 = replace(
    _THRESHNET79,
    blocks=(
        Block(6, 14, 128, halve=True),
        Block(12, 16, 256, halve=True),
        Block(16, 20, 384),
        Block(16, 40, 480, halve=True),
        Block(4, 160, 960),
    ),
)

_THRESHNET28 = replace(
    _THRESHNET79,
    blocks=(
        Block(4, 14, 192),
        Block(1, 16, 256, halve=True),
        Block(2, 20, 288, halve=True),
        Block(2, 160, 480, halve=True),
        Block(5, 160, 480),
    ),
)


@backbone("threshnet28", note="our reconstruction; the authors never published theirs")
def threshnet28(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    dense_blocks: int = 3,
    growth: int = 32,
    stem: Stem = "original",
) -> HarmonicNet:
    """ThreshNet28: 28 convolutions, of which 14 are in dense blocks.

    The authors published four totals, and no network. Ours is what a search over designs like
    theirs found nearest to all four: 28 convolutions, five blocks, dense before harmonic, k of 40
    or 160, sixteen usual transition widths, any layers and pools. With 1000 classes at 224 pixels
    (operations and memory are torchstat's; ten classes: 9,687,270 parameters):

        parameters  10.163 M   published 10.18 M    -0.16 %
        FLOPs        2.279 G              2.28 G    -0.04 %
        MAdd         4.543 G              4.55 G    -0.15 %
        memory      83.22 MB             83.26 MB   -0.05 %

    So the published errors (CIFAR-10 14.75 %, SVHN 6.34 %) are not claims about this network.
    """
    return HarmonicNet(
        replace(_THRESHNET28, dense_blocks=dense_blocks),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
        growth=growth,
    )


@backbone("threshnet79")
def threshnet79(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    dense_blocks: int = 3,
    growth: int = 32,
    stem: Stem = "original",
) -> HarmonicNet:
    """ThreshNet79: 79 convolutions, of which 52 are in dense blocks.

    14,371,858 parameters at ten classes (the authors' table has a slip of the pen, 14.31 M),
    15,323,248 at 1000; 3.42 G MACs at 224 pixels.
    """
    return HarmonicNet(
        replace(_THRESHNET79, dense_blocks=dense_blocks),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
        growth=growth,
    )


@backbone("threshnet95")
def threshnet95(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    dense_blocks: int = 3,
    growth: int = 32,
    stem: Stem = "original",
) -> HarmonicNet:
    """ThreshNet95: 95 convolutions, of which 68 are in dense blocks.

    16,189,202 parameters at ten classes, 17,140,592 at 1000; 4.03 G MACs at 224 pixels.
    """
    return HarmonicNet(
        replace(_THRESHNET95, dense_blocks=dense_blocks),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
        growth=growth,
    )
