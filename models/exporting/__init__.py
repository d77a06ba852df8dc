"""Networks in the forms of other programs: torch.export, ONNX, and ONNX in eight bits."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from models.activations import QuantizedActivation
from models.calls import ModelError
from models.exporting.int8 import quantize
from models.exporting.onnx_graph import (
    IMAGES,
    PIXELS,
    InputNormalization,
    onnx_bytes,
    onnx_graph,
    onnx_session,
    read_pixels,
)
from models.exporting.program import export_program, no_buffer_warning, program_bytes
from models.surgery import fold

Format = Literal["pt2", "onnx", "onnx-int8"]
#: What a file computes, batch by batch, from normalized images (N, C, H, W) to logits.
Run = Callable[[Tensor], Tensor]

#: Largest difference of a logit from the network's, as a share of the largest logit (at least 1).
TOLERANCES: dict[Format, float] = {"pt2": 1e-5, "onnx": 1e-4}
#: Of a network with binary activations, where the last bit of a sum may decide a sign, so large a
#: share of the images may differ more.
_FLIPPED = 0.02
_BATCH = 32


@dataclass(frozen=True)
class Exported:
    """A file that has been compared with the network it was made of.

    `difference` is the largest difference of a logit over `images` images, as a share of their
    largest logit (at least 1); `agreement` the share of images for which both name the same class.
    """

    path: Path
    format: Format
    bytes: int
    images: int
    difference: float
    agreement: float
    seconds: float


def export(
    model: nn.Module,
    path: str | Path,
    format: Format,
    *,
    image_shape: tuple[int, int, int],
    preprocessing: InputNormalization | None = None,
    calibration: Iterable[Tensor] | None = None,
    images: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write the folded form of a network to a file that runs without this project.

        pt2         torch.export: torch alone reads it
        onnx        float32, for ONNX Runtime and others; batch norms folded where they can be
        onnx-int8   eight bits, see models.exporting.int8.quantize

    The input of a file is `images`, float32 (N, C, H, W) of the shape `image_shape` (C, H, W),
    normalized as in training, with any N; its output is `logits`, (N, classes). With
    `preprocessing`, an ONNX file normalizes by itself: its input is `pixels`, uint8 (N, H, W, C).

    The file is compared with the network on `images`, normalized, (N, C, H, W) float32, by default
    a few random ones; float formats must give its logits (see TOLERANCES). `calibration`, batches
    of normalized training images, is what onnx-int8 takes the ranges of activations from.
    `metadata` are texts to keep in the file: properties of an ONNX model, extra files of a pt2.

    The file appears at `path` whole or not at all, in the place of one that is there. Raises
    ModelError for a network that cannot be exported or whose file gives other logits.
    """
    started = time.perf_counter()
    if format not in get_args(Format):
        raise ModelError(f"unknown format {format!r}; known: {', '.join(get_args(Format))}")
    if preprocessing is not None and format == "pt2":
        raise ModelError("a pt2 takes normalized images; preprocessing goes with onnx, onnx-int8")
    if (calibration is None) == (format == "onnx-int8"):
        raise ModelError(f"{format} {'needs' if calibration is None else 'has no'} calibration")
    folded = fold(model).cpu().eval()
    if images is None:
        images = torch.randn(7, *image_shape, generator=torch.Generator().manual_seed(0))
    if format == "pt2":
        content = program_bytes(export_program(folded, image_shape), metadata or {})
    else:
        graph = onnx_graph(folded, image_shape)
        if calibration is not None:
            _check(folded, "onnx", _opened(onnx_bytes(graph, {}), "onnx"), images)
            graph = quantize(graph, (batch.numpy() for batch in calibration))
        if preprocessing is not None:
            read_pixels(graph, image_shape, preprocessing)
            images = _seen(_pixels(images, preprocessing), preprocessing)
        content = onnx_bytes(graph, metadata or {})
    run = _opened(content, format, preprocessing)
    difference, agreement = _check(folded, format, run, images)
    write_whole(Path(path), content)
    seconds = time.perf_counter() - started
    return Exported(Path(path), format, len(content), len(images), difference, agreement, seconds)


def open_exported(
    path: str | Path, format: Format, preprocessing: InputNormalization | None = None
) -> Run:
    """Open a file that `export` wrote with this format and preprocessing, to run it on the CPU.

    What it returns takes normalized images, float32 (N, C, H, W), in any case. Open only a pt2 of
    your own: torch executes code that such a file may hold.
    """
    return _opened(Path(path).read_bytes(), format, preprocessing)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen in part. Raises ModelError where that cannot be."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelError(f"cannot write {path}: {error.strerror}") from error


def _opened(content: bytes, format: Format, preprocessing: InputNormalization | None = None) -> Run:
    if format == "pt2":
        with no_buffer_warning():
            program: Run = torch.export.load(io.BytesIO(content)).module()
        return program
    session = onnx_session(content)

    def run(images: Tensor) -> Tensor:
        if preprocessing is None:
            feed = {IMAGES: images.numpy()}
        else:
            feed = {PIXELS: _pixels(images, preprocessing).numpy()}
        return torch.from_numpy(np.asarray(session.run(None, feed)[0]))

    return run


def _pixels(images: Tensor, normalization: InputNormalization) -> Tensor:
    """Return the pixels, uint8 (N, H, W, C), that come nearest to normalized images."""
    mean, std = (torch.tensor(values) for values in (normalization.mean, normalization.std))
    values = (images.permute(0, 2, 3, 1) * std + mean) * 255
    return values.round().clamp(0, 255).to(torch.uint8)


def _seen(pixels: Tensor, normalization: InputNormalization) -> Tensor:
    """Return pixels as a network sees them, (N, C, H, W)."""
    mean, std = (torch.tensor(values) for values in (normalization.mean, normalization.std))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def _check(folded: nn.Module, format: Format, run: Run, images: Tensor) -> tuple[float, float]:
    """Compare a file with the network; returns the largest difference and the agreement."""
    run(images[:1])  # the batch size that an example in the graph would have frozen
    expected = torch.cat([folded(batch) for batch in images.split(_BATCH)])
    given = torch.cat([run(batch) for batch in images.split(_BATCH)])
    differences = (given - expected).abs().amax(dim=1) / expected.abs().max().clamp_min(1)
    agreement = (given.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
    allowed = TOLERANCES.get(format)
    if allowed is not None:
        is_binary = any(isinstance(module, QuantizedActivation) for module in folded.modules())
        # Not `>`, which a NaN would pass.
        wrong = (~(differences <= allowed)).sum().item()
        if wrong > (max(1, _FLIPPED * len(images)) if is_binary else 0):
            raise ModelError(
                f"the {format} file gives other logits than the network for {wrong} of "
                f"{len(images)} images: they differ by {differences.max():.2g} of the largest, "
                f"{allowed:.2g} is allowed"
            )
    return differences.max().item(), agreement
