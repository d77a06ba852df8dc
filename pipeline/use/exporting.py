"""Writing a model for other programs, compared with the network on real images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

import data_prep
import models
from pipeline import inputs
from pipeline.config import PipelineError
from pipeline.display import Display, duration
from pipeline.materials import find_data, prepare
from pipeline.use.model import UsableModel
from pipeline.use.options import ActionSettings

if TYPE_CHECKING:
    from data_prep import Manifest
    from models.exporting import Format
#: The suffix that the readers of each format expect.
SUFFIXES = {"onnx": ".onnx", "onnx-int8": ".onnx", "packed": ".safetensors", "pt2": ".pt2"}

#: Training images that the ranges of eight-bit activations are taken from.
_CALIBRATION = 256
#: Images that logits are compared on, and that a network sees together.
_COMPARED, _BATCH = 256, 32
#: Test images for the accuracy, which in eight bits is another one.
_TESTED = {"onnx": _COMPARED, "pt2": _COMPARED, "onnx-int8": 2000}

_ACTS_ON = {
    "images": ("onnx", "onnx-int8", "pt2"),
    "pixels": ("onnx", "onnx-int8"),
    "weights": ("packed",),
    "rest": ("packed",),
}


class ExportSettings(ActionSettings):
    """How a file is written, and how many images it is tried on."""

    images: Annotated[int, Field(ge=1)] | None = None
    pixels: bool = False
    weights: str | None = None
    rest: Literal["float32", "float16"] = "float32"

    @classmethod
    def read(cls, words: Sequence[str], format: str) -> ExportSettings:
        """Settings from the command line.

        Raises:
            PipelineError: one line, for an unknown one and one without effect on the format.
        """
        settings = cls.parse("export", words)
        for key in sorted(settings.model_fields_set):
            if format not in _ACTS_ON[key]:
                formats = ", ".join(_ACTS_ON[key])
                raise PipelineError(f"{key} has no effect on {format}, only on {formats}")
        return settings


@dataclass(frozen=True)
class ModelExport:
    """A written file and how it compares.

    Attributes:
        path, format, bytes: of the file.
        compared: images that logits were compared on, which were real ones; 0 of a packed file.
        real: whether these were test images, and not noise.
        difference: of logits at most, as a share of the largest one.
        agreement: share of the compared images for which file and network name the same class.
        tested: test images of the accuracies; 0 without test images.
        accuracy, network_accuracy: in percent, of the file and of the network that it is made of.
        seconds: that it took.
    """

    path: Path
    format: str
    bytes: int
    seconds: float
    compared: int = 0
    real: bool = False
    difference: float = 0.0
    agreement: float = 1.0
    tested: int = 0
    accuracy: float | None = None
    network_accuracy: float | None = None

    def lines(self) -> Iterator[tuple[str, str]]:
        """What to tell, line by line: a word, and what of it."""
        yield "file", f"{self.path} ({self.format}, {self.bytes:,} bytes)"
        if self.compared:
            images = "test images" if self.real else "random images"
            yield (
                "compared",
                f"logits differ by {self.difference:.2g} of the largest at most, same class for "
                f"{100 * self.agreement:.2f} % of {self.compared:,} {images}",
            )
        if self.accuracy is not None:
            yield (
                "accuracy",
                f"{self.accuracy:.2f} % of {self.tested:,} test images, the network itself "
                f"{self.network_accuracy:.2f} %",
            )
        yield "took", duration(self.seconds)


def export_model(
    model: UsableModel,
    format: Format | Literal["packed"],
    path: Path,
    display: Display,
    settings: ExportSettings | None = None,
) -> ModelExport:
    """Write a model as ``onnx``, ``onnx-int8``, ``packed`` or ``pt2``.

    An existing file of that kind is replaced, as compilers do; files with another suffix than the
    format's are not written. ONNX and pt2 are compared with the network on test images, or on
    random ones where the data are not prepared. Eight bits need training images, see
    ``models.export``.

    Raises:
        PipelineError: one line, when that cannot be done; then nothing has been written.
    """
    started = time.monotonic()
    settings = settings or ExportSettings()
    _check_path(path, format)
    try:
        if format == "packed":
            packed = models.repack(
                model.packed.path, path, weights=settings.weights, rest=settings.rest
            )
            return ModelExport(path, format, packed.file_bytes, time.monotonic() - started)
        written = _export(model, format, path, display, settings)
    except (models.ModelError, data_prep.DataError) as error:
        raise PipelineError(str(error)) from None
    return replace(written, seconds=time.monotonic() - started)


def _check_path(path: Path, format: str) -> None:
    """Refuse a place where no file of this format can be, before work is done for it."""
    if path.suffix != SUFFIXES[format]:
        raise PipelineError(
            f"{path} has another suffix than {format} files: name it {path.stem}{SUFFIXES[format]}"
        )
    if path.is_dir():
        raise PipelineError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise PipelineError(f"there is no folder {path.parent} for {path.name}")


class _Images:
    """The prepared images of a model's data set, as the model sees them."""

    def __init__(self, model: UsableModel, manifest: Manifest) -> None:
        seen = model.preprocessing
        if manifest.class_names != seen.class_names:
            raise PipelineError(f"{manifest.dataset} has other classes here than {model.origin}")
        self._experiment = model.experiment
        self._manifest = replace(manifest, mean=seen.mean, std=seen.std)
        self._view = data_prep.CentralCrop(seen.crop)
        self._resolution = data_prep.Resolution.constant(seen.size)

    def batches(self, split: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of a split: all, or about `count` drawn from the whole of it."""
        held_out = self._experiment.train.validation if split == "train" else 0
        is_part = count < self._manifest.counts[split] - held_out
        loader = data_prep.make_loader(
            self._manifest,
            split,
            batch_size=min(_BATCH, count),
            training=is_part,  # shuffled; nothing but the view changes an image
            held_out=held_out,
            view=self._view,
            resolution=self._resolution,
            reading=inputs.reading(self._experiment, "cpu"),
        )
        with loader.epoch(0) as batches:
            for images, labels in batches:
                # The loader's buffers are used again.
                yield images[:count].clone(memory_format=torch.contiguous_format), labels[:count]
                count -= len(images)
                if count <= 0:
                    return


def _open_images(model: UsableModel, format: Format, display: Display) -> _Images | None:
    """The data set's images; None where they are not prepared, and need not be.

    Eight bits cannot do without them.
    """
    experiment = model.experiment
    is_needed = format == "onnx-int8"
    try:
        dataset = find_data(experiment)
        is_ready = data_prep.plan(dataset, **inputs.source_options(experiment)).ready
        if is_ready or is_needed:
            return _Images(model, prepare(experiment, dataset, display))
    except (PipelineError, data_prep.DataError) as error:
        if is_needed:
            raise PipelineError(f"{error} (onnx-int8 is made with training images)") from None
    display.note(
        f"{experiment.dataset} is not prepared here, so the file is compared on random images; "
        f"--prepare {experiment.dataset} prepares it"
    )
    return None


def _export(
    model: UsableModel, format: Format, path: Path, display: Display, settings: ExportSettings
) -> ModelExport:
    images = _open_images(model, format, display)
    display.stage("export", f"{model.origin} as {format}")
    compared = calibration = None
    tested = settings.images or _TESTED[format]
    if images is not None:
        compared = torch.cat([batch for batch, _ in images.batches("test", min(tested, _COMPARED))])
        if format == "onnx-int8":
            calibration = _shown(images.batches("train", _CALIBRATION), display)
    preprocessing = model.preprocessing if settings.pixels else None
    exported = models.export(
        model.network,
        path,
        format,
        image_shape=model.preprocessing.input_shape,
        preprocessing=preprocessing,
        calibration=calibration,
        images=compared,
        metadata=_metadata(model),
    )
    written = ModelExport(
        path,
        format,
        exported.bytes,
        exported.seconds,
        compared=exported.images,
        real=images is not None,
        difference=exported.difference,
        agreement=exported.agreement,
    )
    if images is None:
        return written
    run = models.open_exported(path, format, preprocessing)
    total = hits = network_hits = 0
    with torch.inference_mode():
        for batch, labels in images.batches("test", tested):
            hits += int((run(batch).argmax(dim=1) == labels).sum())
            network_hits += int((model.network(batch).argmax(dim=1) == labels).sum())
            total += len(labels)
            display.progress("test", total, tested, f"{100 * hits / total:.2f} %")
    display.close_bar()
    return replace(
        written,
        tested=total,
        accuracy=100 * hits / total,
        network_accuracy=100 * network_hits / total,
    )


def _shown(batches: Iterable[tuple[Tensor, Tensor]], display: Display) -> Iterator[Tensor]:
    """The images of batches, while the display shows how many have been used."""
    done = 0
    for images, _ in batches:
        display.progress("calibrate", done, _CALIBRATION, "training images")
        yield images
        done += len(images)
    display.close_bar()


def _metadata(model: UsableModel) -> dict[str, str]:
    """What a file says of its model, as JSON texts."""
    kept = ("experiment", "data", "evaluation", "source_run", "git_commit")
    said = {key: model.packed.metadata.get(key) for key in kept}
    said["preprocessing"] = model.preprocessing.to_dict()
    said["origin"] = model.origin
    return {key: json.dumps(value) for key, value in said.items() if value is not None}
