"""TripleNet: a dense block, three harmonic blocks and residual bottlenecks.

Ju et al.: Efficient Convolutional Neural Networks on Raspberry Pi for Image Classification, Journal
of Real-Time Image Processing 2023 (arXiv 2204.00943). Tables follow the authors' code
(RuiyangJu/TripleNet). CIFAR-10 test error as published: 13.05 % (S), 12.97 % (B).

Deviation: the authors call the ReLUs of the residual bottlenecks as functions, which torchstat does
not see. Here they are modules, and torchstat's memory at 224 pixels is 90.63 MB for S, not 90.25,
and 92.04 MB for B, not 91.33.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from models.backbones import backbone
from models.backbones.harmonic import Block, Design, HarmonicNet, Stem

Version = Literal["paper", "repository"]

_TRIPLENET_S = Design(
    stem=(32, 64),
    blocks=(
        Block(6, 14, 128, halve=True),
        Block(16, 16, 192),
        Block(16, 20, 256, halve=True),
        Block(16, 40, 320, halve=True),
    ),
    dense_blocks=1,
    bottlenecks=(160, 240),
    dropout=0.1,
)

_TRIPLENET_B = {
    "paper": replace(_TRIPLENET_S, bottlenecks=(160, 240, 360)),
    "repository": replace(
        _TRIPLENET_S,
        blocks=(
            Block(8, 14, 160, halve=True),
            Block(16, 16, 256),
            Block(18, 20, 320, halve=True),
            Block(24, 40, 480, halve=True),
        ),
        bottlenecks=(240, 360),
    ),
}


@backbone("triplenets")
def triplenets(
    *, num_classes: int, in_channels: int, image_size: int, stem: Stem = "original"
) -> HarmonicNet:
    """TripleNet-S: the smaller of the two.

    9,679,224 parameters (published, cut off: 9.67 M) and 4.14 G MACs at 224 pixels and 1000
    classes; 8,965,434 at ten.
    """
    return HarmonicNet(
        _TRIPLENET_S,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


@backbone("triplenetb")
def triplenetb(
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    version: Version = "paper",
    stem: Stem = "original",
) -> HarmonicNet:
    """TripleNet-B: the larger of the two.

    12,638,064 parameters (published, cut off: 12.63 M) and 4.27 G MACs at 224 pixels and 1000
    classes; 11,567,874 at ten. That is the paper's table and an early commit (d76203a). The last
    state of the authors' repository holds a larger network under the same name:
    `version=repository`, 15,212,716 and 14,142,526 parameters.
    """
    return HarmonicNet(
        _TRIPLENET_B[version],
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )
