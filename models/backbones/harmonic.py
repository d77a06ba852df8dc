"""Networks of dense and harmonic blocks: HarDNet, ThreshNet and TripleNet are tables of this one.

In a dense block each layer sees all earlier ones, in a harmonic block only those at a distance that
is a power of two and divides its number. State-dict keys are those of HarDNet's published
checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.calls import ModelError
from models.layers import TrimmedConv2d
from models.surgery import Part

Stem = Literal["original", "small"]

#: Channels that a layer of a dense block adds, in DenseNet-BC and ThreshNet.
_GROWTH = 32


@dataclass(frozen=True)
class Block:
    """One row of a table: a block, the 1x1 transition behind it, and whether the map then halves.

    `width` is the base width k of the block's layers where the block is harmonic.
    """

    layers: int
    width: int
    transition: int
    halve: bool = False


@dataclass(frozen=True)
class Design:
    """A table and what goes with it.

    The first `dense_blocks` of the blocks are dense, the others harmonic with the given
    `multiplier`. Residual bottlenecks of the inner widths `bottlenecks` follow the blocks.
    `depthwise` is HarDNet's DS form. `dropout` acts before the classifier, `late_dropout` before
    the last transition. `activation` is that of all layers but the dense and residual ones (ReLU).
    """

    stem: tuple[int, int]
    blocks: tuple[Block, ...]
    dense_blocks: int = 0
    multiplier: float = 1.7
    bottlenecks: tuple[int, ...] = ()
    activation: type[nn.Module] = nn.ReLU6
    depthwise: bool = False
    dropout: float = 0.0
    late_dropout: float = 0.0


def harmonic_links(layer: int) -> list[int]:
    """Return the layers that a layer >= 1 of a harmonic block sees, the nearest first.

    L(l) = [l - 2^i for each 2^i that divides l]; layer 0 is the block's input (HarDNet, section 3).
    """
    links = []
    distance = 1
    while layer % distance == 0:
        links.append(layer - distance)
        distance *= 2
    return links


def harmonic_width(layer: int, width: int, multiplier: float) -> int:
    """Return the channels of a layer >= 1 of a harmonic block with base width k = `width`.

    k m^v, rounded to an even number as 2 floor(floor(k m^v + 1) / 2), where 2^v is the largest
    power of two that divides the layer's number. The product is taken one factor at a time, since
    its rounding decides.
    """
    channels = float(width)
    while layer % 2 == 0:
        channels *= multiplier
        layer //= 2
    return 2 * (int(channels + 1) // 2)


def conv_norm_act(
    in_channels: int, out_channels: int, kernel: int, activation: type[nn.Module], stride: int = 1
) -> nn.Sequential:
    """Return convolution without bias, batch norm, activation; stride 1 keeps the map's size."""
    convolution = nn.Conv2d if kernel == 1 else TrimmedConv2d
    return nn.Sequential(
        OrderedDict(
            conv=convolution(
                in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False
            ),
            norm=nn.BatchNorm2d(out_channels),
            relu=activation(inplace=True),
        )
    )


def depthwise_norm(channels: int, stride: int = 1) -> nn.Sequential:
    """Return HarDNet-DS's depthwise 3x3 and batch norm, without activation."""
    return nn.Sequential(
        OrderedDict(
            dwconv=TrimmedConv2d(
                channels, channels, 3, stride, padding=1, groups=channels, bias=False
            ),
            norm=nn.BatchNorm2d(channels),
        )
    )


class DenseBlock(nn.Sequential):
    """DenseNet-BC's block (Huang et al., CVPR 2017) as ThreshNet uses it: no dropout, no last BN.

        new = conv3x3(relu(bn(conv1x1(relu(bn(x))))))      4 growth channels between the two
        x   = concat(x, new)                               what is raw stays raw

    (N, C, H, W) to (N, C + layers * growth, H, W); the first C channels are the input. Writing all
    layers into one buffer, to copy less in inference, was slower: the norms read strided slices.
    """

    def __init__(self, in_channels: int, layers: int, growth: int) -> None:
        out_channels = in_channels + layers * growth
        seen = range(in_channels, out_channels, growth)
        super().__init__(*(_dense_layer(channels, growth) for channels in seen))
        self.out_channels = out_channels

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = torch.cat([input, layer(input)], 1)
        return input


def _dense_layer(in_channels: int, growth: int) -> nn.Sequential:
    inner = 4 * growth
    return nn.Sequential(
        OrderedDict(
            norm1=nn.BatchNorm2d(in_channels),
            relu1=nn.ReLU(inplace=True),
            conv1=nn.Conv2d(in_channels, inner, 1, bias=False),
            norm2=nn.BatchNorm2d(inner),
            relu2=nn.ReLU(inplace=True),
            conv2=TrimmedConv2d(inner, growth, 3, padding=1, bias=False),
        )
    )


class HarmonicBlock(nn.Module):
    """HarDNet's block (Chao et al., ICCV 2019): conv3x3-BN-activation layers with harmonic links.

        a_l = act(bn(conv3x3(concat of a_j for j in harmonic_links(l))))     l = 1..n, a_0 = input
        out = concat of a_l for all odd l and l = n

    The input is no part of the output. Depthwise (DS): conv1x1-BN-activation, depthwise 3x3-BN.
    An a_j is dropped after the last layer that sees it.
    """

    def __init__(
        self,
        in_channels: int,
        layers: int,
        width: int,
        multiplier: float,
        activation: type[nn.Module],
        depthwise: bool,
    ) -> None:
        super().__init__()
        numbers = range(1, layers + 1)
        widths = [in_channels, *(harmonic_width(number, width, multiplier) for number in numbers)]
        self.links = [harmonic_links(number) for number in numbers]
        self.outputs = [number for number in numbers if number % 2 or number == layers]
        self.out_channels = sum(widths[number] for number in self.outputs)
        last_use = {seen: number for number in numbers for seen in self.links[number - 1]}
        self.finished = [
            [seen for seen, last in last_use.items() if last == number and seen not in self.outputs]
            for number in numbers
        ]
        self.layers = nn.ModuleList()
        for number in numbers:
            seen, made = sum(widths[link] for link in self.links[number - 1]), widths[number]
            if depthwise:
                pointwise = conv_norm_act(seen, made, 1, activation)
                layer = nn.Sequential(OrderedDict(layer1=pointwise, layer2=depthwise_norm(made)))
            else:
                layer = conv_norm_act(seen, made, 3, activation)
            self.layers.append(layer)

    def forward(self, input: Tensor) -> Tensor:
        made = {0: input}
        for number, layer in enumerate(self.layers, start=1):
            made[number] = layer(_concat([made[link] for link in self.links[number - 1]]))
            for finished in self.finished[number - 1]:
                del made[finished]
        return _concat([made[number] for number in self.outputs])


def _concat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)


class ResidualBottleneck(nn.Module):
    """ResNet's bottleneck with expansion 3, as TripleNet ends with it.

    relu(bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))) + shortcut(x)), p, p and 3p channels;
    the shortcut is a 1x1 with bias and a BN where the channels change. The authors call the ReLU as
    a function; here it is a module, so that methods find it.
    """

    EXPANSION = 3

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        out_channels = self.EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = TrimmedConv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1))
            self.shortcut.append(nn.BatchNorm2d(out_channels))
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(input)))
        x = self.relu2(self.bn2(self.conv2(x)))
        output: Tensor = self.relu3(self.bn3(self.conv3(x)) + self.shortcut(input))
        return output


class HarmonicNet(nn.Module):
    """Stem, blocks with their transitions, residual bottlenecks, global average pool, classifier.

    Stem: conv3x3 of stride 2, conv3x3, max-pool 3x3 of stride 2; DS: the second one is 1x1, and
    each pool a depthwise 3x3 of stride 2. `stem="small"` leaves out its stride and its pool.
    Transition: conv1x1-BN-activation behind every block, then, where the table says so, a 2x2
    max-pool. On images so small that the map is one pixel already, it is left out; from 29 pixels
    on (8 with the small stem) all are there. The state-dict keys do not depend on the image size.

    Input (N, in_channels, H, W) with H = W = image_size, output logits (N, num_classes). Weights
    start as torch's layers do, which is what the authors' code does.

    Late maps of small images are a single pixel, where all but the centre tap of a 3x3 kernel sees
    only padding: 5,725,952 weights of either ThreshNet at 32 pixels never get a gradient, as in the
    originals. TrimmedConv2d spares their operations.
    """

    def __init__(
        self,
        design: Design,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        stem: Stem,
        growth: int = _GROWTH,
    ) -> None:
        super().__init__()
        if not 0 <= design.dense_blocks <= len(design.blocks):
            raise ModelError(
                f"threshnet: dense_blocks must be between 0 and {len(design.blocks)}, "
                f"not {design.dense_blocks}"
            )
        if growth != _GROWTH and design.dense_blocks == 0:
            raise ModelError("threshnet: growth has no effect with dense_blocks=0")
        if growth < 1:
            raise ModelError(f"threshnet: growth must be at least 1, not {growth}")
        self.base = nn.Sequential(*_stem(design, in_channels, stem))
        channels = design.stem[1]
        side = image_size if stem == "small" else (image_size + 3) // 4
        for index, row in enumerate(design.blocks):
            if index < design.dense_blocks:
                block: DenseBlock | HarmonicBlock = DenseBlock(channels, row.layers, growth)
            else:
                block = HarmonicBlock(
                    channels,
                    row.layers,
                    row.width,
                    design.multiplier,
                    design.activation,
                    design.depthwise,
                )
            self.base.append(block)
            if design.late_dropout and index == len(design.blocks) - 1:
                self.base.append(nn.Dropout(design.late_dropout))
            self.base.append(
                conv_norm_act(block.out_channels, row.transition, 1, design.activation)
            )
            channels = row.transition
            if row.halve:
                self.base.append(_halving(design, channels, side))
                side = max(1, side // 2)
        for width in design.bottlenecks:
            self.base.append(ResidualBottleneck(channels, width))
            channels = ResidualBottleneck.EXPANSION * width
        dropout = [nn.Dropout(design.dropout)] if design.dropout else []
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *dropout, nn.Linear(channels, num_classes)]
        self.base.append(nn.Sequential(*head))
        self.roles = self._roles(design)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.base(images)
        return logits

    def _roles(self, design: Design) -> dict[str, Part]:
        roles: dict[str, Part] = {"base.0.conv": "stem", f"base.{len(self.base) - 1}.*": "head"}
        if design.dense_blocks or design.bottlenecks:
            roles["base.*.conv2"] = "bottleneck"
        if design.bottlenecks:
            roles["base.*.shortcut.0"] = "shortcut"
        return roles


def _stem(design: Design, in_channels: int, stem: Stem) -> list[nn.Module]:
    first, second = design.stem
    pool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
    if design.depthwise:
        pool = depthwise_norm(second, stride=2)
    if stem == "small":
        pool = nn.Identity()
    return [
        conv_norm_act(in_channels, first, 3, design.activation, stride=1 if stem == "small" else 2),
        conv_norm_act(first, second, 1 if design.depthwise else 3, design.activation),
        pool,
    ]


def _halving(design: Design, channels: int, side: int) -> nn.Module:
    if design.depthwise:
        return depthwise_norm(channels, stride=2)
    return nn.MaxPool2d(2) if side > 1 else nn.Identity()
