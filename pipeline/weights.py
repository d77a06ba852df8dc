"""Weights from elsewhere, in a network: to begin a training with (`init_from`), or a teacher's.

What `pipeline.weight_sources` has found arrives here, on each worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

import models
from data_prep.datasets import Normalization, named_normalization
from models.surgery import weight_layers
from models.tracing import trace
from pipeline import inputs
from pipeline.config import Experiment, PipelineError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

    from data_prep import Dataset, Manifest

#: Batch norms count their batches; old files do not have it, and nothing here reads it.
_COUNTER = "num_batches_tracked"

#: Of torchvision's networks: they take ImageNet's normalization and change it inside, but only
#: when they are built to.
_NORMALIZE_THEMSELVES = ("googlenet", "inception_v3")

_SHOWN = 3  # tensors that an error names


@dataclass(frozen=True)
class Weights:
    """Tensors in a file. Plain data, which travels to the workers.

    Attributes:
        source: as the user wrote it.
        origin: the same for people, with the version or the epoch that it turned out to be.
        file: safetensors, below the folder of all runs, named by its content.
        digest: SHA-256 of the file, 64 hex digits; the same for the same tensors.
        experiment: that trained them, where it is known.
        torchvision: their full name, where they are torchvision's.
    """

    source: str
    origin: str
    file: Path
    digest: str
    experiment: Experiment | None = None
    torchvision: str | None = None

    def read(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU.

        Raises:
            PipelineError: when the file is not there, or is not as it was written.
        """
        try:
            with self.file.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise PipelineError(
                f"cannot read {self.file}, the weights of {self.origin}: {error.strerror}; "
                "tracking.runs must be a folder that all workers see"
            ) from None
        if digest != self.digest:
            raise PipelineError(
                f"{self.file}, the weights of {self.origin}, was changed after it was written; "
                "start again, which writes it anew"
            )
        return load_file(self.file)


@dataclass(frozen=True)
class Sources:
    """The weights from elsewhere of a training: to begin with, and a teacher's."""

    initial: Weights | None = None
    teacher: Weights | None = None


#: Of an experiment that names none.
NO_SOURCES = Sources()


def load_into(model: nn.Module, weights: Weights) -> str:
    """Give a network the weights, strictly, and return a line that says what was loaded.

    Every tensor must be there, with the same name and shape, and no other. The one exception is the
    head: where only its number of classes differs it stays as it is. What is masked in the network
    becomes zero. Scales that its quantizers learn follow from the weights where these have none.

    Raises:
        PipelineError: the weights are another network's; this one is then not to be used.
    """
    tensors = weights.read()
    fresh, note = _new_head(model, tensors)
    given = {name: tensor for name, tensor in tensors.items() if name not in fresh}
    own = model.state_dict()
    _load(model, weights, given, but_for=fresh)
    counters = sum(name.endswith(_COUNTER) for name in own.keys() - given.keys() - fresh)
    if counters:
        note += f"; {counters} batch norms count their batches anew"
    derived = len(own.keys() - given.keys() - fresh) - counters
    if derived:
        note += f"; {derived} learned scales follow from these weights"
    return f"init_from {weights.origin}: {len(given)} of {len(own)} tensors{note}"


def _new_head(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[set[str], str]:
    """Names of all tensors of a head that tells other classes apart there, and a note on them."""
    for layer in weight_layers(model, frozen=True):
        theirs = tensors.get(f"{layer.name}.weight")
        if layer.part != "head" or theirs is None:
            continue
        weight = layer.module.weight
        if theirs.shape[1:] != weight.shape[1:] or len(theirs) == len(weight):
            continue
        own = [f"{layer.name}.{name}" for name in layer.module.state_dict()]
        also = [name for name in tensors if name.startswith(f"{layer.name}.")]
        classes = f"{len(theirs):,} classes there, {len(weight):,} here"
        begin = "begin" if len(own) > 1 else "begins"
        return {*own, *also}, f"; {' and '.join(own)} ({classes}) {begin} anew"
    return set(), ""


def _load(
    model: nn.Module, weights: Weights, tensors: dict[str, Tensor], but_for: Set[str] = frozenset()
) -> None:
    """Load tensors, all that the network has `but_for` some names, and no other."""
    own = model.state_dict()
    misfits = [
        f"{name} is {_shape(tensor)} there and {_shape(own[name])} here"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    surplus = [name for name in tensors if name not in own and not name.endswith(_COUNTER)]
    missing = [name for name in own if name not in tensors]
    if not misfits and not surplus:
        try:  # Quantizers that learn scales make those that are missing from the weights.
            missing = model.load_state_dict(tensors, strict=False).missing_keys
        except RuntimeError as error:  # layers refuse their tensors: a headline, then a line each
            _, first, *others = [line.strip() for line in str(error).splitlines()]
            misfits = [first.rstrip(",") + (f" (so do {len(others)} more)" if others else "")]
    missing = [name for name in missing if name not in but_for and not name.endswith(_COUNTER)]
    problems = [_first_few(misfits, "; ")] if misfits else []
    problems += [f"they lack {_first_few(missing)}"] if missing else []
    problems += [f"the network here has no {_first_few(surplus)}"] if surplus else []
    if not problems:
        return
    if weights.torchvision is not None:
        problems.append("only networks laid out as torchvision's take them, with form=imagenet")
    elif weights.experiment is not None:
        trained = weights.experiment
        problems.append(f"they are of {trained.backbone} with method {trained.method}")
    raise PipelineError(f"the weights of {weights.origin} do not fit: {'; '.join(problems)}")


def _first_few(names: list[str], separator: str = ", ") -> str:
    rest = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def classification_weights() -> dict[str, tuple[str, WeightsEnum]]:
    """Torchvision's weights for classification: its name of the network and entry, by full name."""
    from torchvision.models import get_model_weights, list_models

    return {
        f"{entries.__name__}.{member}": (network, entry)
        for network in list_models(module=torchvision.models)
        for entries in [get_model_weights(network)]
        for member, entry in entries.__members__.items()
    }


class Teacher(nn.Module):
    """A trained network that is only asked.

    Images float32 (N, C, H, W), normalized as the student gets them, to logits float32
    (N, classes). It is in eval mode and without gradients.

    Args:
        given: normalization of the images.
        wanted: normalization that the network was trained with.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Normalization, wanted: Normalization) -> None:
        super().__init__()
        self.network = network
        self.is_normalized = given == wanted
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(values).view(1, -1, 1, 1) for values in normalization)
            for normalization in (given, wanted)
        )
        # (pixel - own_mean) / own_std, where pixel = image * std + mean
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        if not self.is_normalized:
            images = images * self.scale + self.shift
        logits: Tensor = self.network(images)
        return logits.float()


def build_teacher(
    weights: Weights, experiment: Experiment, images: Dataset | Manifest
) -> nn.Module:
    """The teacher that has the weights, for an experiment's images and classes, on the CPU.

    It is a Teacher: images as the student gets them, to logits float32.

    A network of ours is folded, so that nothing is quantized anew for every batch. The global
    random state is left as it was.

    Args:
        experiment: of the student.
        images: its data set, or the manifest of its prepared data.

    Raises:
        PipelineError: it is not known which network has the weights, it tells other classes apart,
            or it does not take the student's images.
    """
    own = images.normalization
    assert own is not None, "of a folder of the user's own it has to be measured first"
    given = named_normalization(experiment.train.normalization, own)
    if weights.torchvision is not None:
        network, wanted = _torchvision_network(weights, weights.torchvision, images)
    elif weights.experiment is not None:
        network = _trained_network(weights, weights.experiment, experiment, images)
        wanted = named_normalization(weights.experiment.train.normalization, own)
    else:
        raise PipelineError(
            f"train.teacher={weights.source} does not say which network its weights are of; take a "
            "run folder, models:/NAME@ALIAS, or torchvision's weights"
        )
    recipe = experiment.train
    for size in {inputs.first_image_size(recipe, images), inputs.image_size(recipe, images)}:
        try:
            trace(network, (images.channels, size, size))
        except (models.ModelError, AssertionError) as error:  # the latter from torchvision's
            raise PipelineError(
                f"teacher {weights.origin} does not take the images of {size} pixels: {error}"
            ) from None
    return Teacher(network, given, wanted)


def _trained_network(
    weights: Weights, trained: Experiment, student: Experiment, images: Dataset | Manifest
) -> nn.Module:
    """A network of ours that was trained on the student's data set."""
    from pipeline.loop import build_model

    if trained.dataset != student.dataset:
        raise PipelineError(
            f"teacher {weights.origin} was trained on {trained.dataset}, whose classes are not "
            f"those of {student.dataset}"
        )
    network = build_model(trained, images)
    _load(network, weights, weights.read())
    return models.fold(network)


def _torchvision_network(
    weights: Weights, full_name: str, images: Dataset | Manifest
) -> tuple[nn.Module, Normalization]:
    """A network of torchvision, and the normalization that it was trained with."""
    name, entry = classification_weights()[full_name]
    classes = len(entry.meta["categories"])
    if name in _NORMALIZE_THEMSELVES:
        raise PipelineError(f"torchvision's {name} cannot be a teacher: take another network")
    if (images.channels, images.classes) != (3, classes):
        raise PipelineError(
            f"teacher {weights.origin} tells {classes:,} classes of color images apart; here are "
            f"{images.classes:,}, {images.channels} channel(s)"
        )
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced at once
        network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    _load(network, weights, weights.read())
    preset = entry.transforms()
    return network, Normalization(tuple(preset.mean), tuple(preset.std))
