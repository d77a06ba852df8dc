"""What goes into the network: an experiment's data set, how it is prepared, its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import data_prep
from data_prep.datasets import (
    NORMALIZATIONS,
    VALIDATION,
    DataError,
    Dataset,
    Normalization,
    Storage,
    named_normalization,
)

if TYPE_CHECKING:
    import torch

    from data_prep import Loader, Manifest, Reading
    from pipeline.config import Experiment, Recipe


class Inputs(Protocol):
    """What a network has to know of its images; rows of data sets and manifests know it."""

    @property
    def classes(self) -> int | None:
        """How many."""
        ...

    @property
    def channels(self) -> int:
        """1 (gray) or 3 (red, green, blue)."""
        ...

    @property
    def image_size(self) -> int:
        """Height and width in pixels, where the recipe says nothing else."""
        ...


def image_size(recipe: Recipe, inputs: Inputs) -> int:
    """Height and width of the training images, for which the network is made, in pixels."""
    return recipe.image_size or inputs.image_size


def first_image_size(recipe: Recipe, inputs: Inputs) -> int:
    """Height and width of the images of the first epoch, in pixels."""
    return recipe.first_image_size or image_size(recipe, inputs)


def training_sizes(recipe: Recipe, inputs: Inputs) -> list[int]:
    """Height and width of the images of each epoch, without repetition, the smallest first."""
    growing = _resolution(recipe, inputs)
    return sorted({growing.at(epoch) for epoch in range(recipe.epochs)})


def _resolution(recipe: Recipe, inputs: Inputs) -> data_prep.Resolution:
    """Size of the training images by epoch."""
    first, last = first_image_size(recipe, inputs), image_size(recipe, inputs)
    return data_prep.Resolution(first, last, recipe.growth_epochs)


def evaluation_size(recipe: Recipe, inputs: Inputs) -> int:
    """Height and width of the images that the network is evaluated on and used with, in pixels.

    Random windows show objects larger than the whole image does, so that a network does best on
    images somewhat larger than those of its training: the train-test resolution effect (Touvron
    et al. 2019).
    """
    return recipe.test_size or image_size(recipe, inputs)


def dataset_of(experiment: Experiment) -> Dataset:
    """The experiment's data set, with the classes of a folder of the user's own filled in.

    Raises:
        DataError: for an unknown data set, or a folder that is not there.
    """
    row = data_prep.get_dataset(experiment.dataset)
    data = experiment.data
    if row.classes is not None:
        return row
    if data.synthetic is not None:
        # Nothing is known of the folder, nor has to be.
        return replace(row, classes=2, normalization=NORMALIZATIONS["imagenet"])
    return data_prep.look(row, data_prep.raw_place(row, data.root, data.raw))


def storage_of(experiment: Experiment) -> Storage | None:
    """How images are kept prepared: the data set's default with the experiment's changes."""
    storage = data_prep.get_dataset(experiment.dataset).storage
    if storage is None or experiment.data.synthetic is not None:
        return None
    keys = ("side", "format", "quality", "passthrough")
    wanted = {key: getattr(experiment.data, key) for key in keys}
    return replace(storage, **{key: value for key, value in wanted.items() if value is not None})


def source_options(experiment: Experiment) -> dict[str, Any]:
    """Arguments of ``data_prep.prepare`` and ``data_prep.plan`` that decide what is prepared."""
    data = experiment.data
    return {
        "root": data.root,
        "raw": data.raw,
        "prepared": data.prepared.absolute(),
        "synthetic": data.synthetic,
        "storage": storage_of(experiment),
        "max_per_class": data.max_per_class,
        "check_raw": data.check_raw,
    }


def with_absolute_folders(experiment: Experiment) -> Experiment:
    """The experiment with its folders as this machine means them, for another process."""
    data, kept = experiment.data, experiment.checkpoint.folder
    folders = {key: getattr(data, key) for key in ("root", "raw", "prepared")}
    absolute = {key: path.absolute() for key, path in folders.items() if path is not None}
    changes: dict[str, Any] = {"data": data.model_copy(update=absolute)}
    if kept is not None and "://" not in kept:
        folder = str(Path(kept).expanduser().absolute())
        changes["checkpoint"] = experiment.checkpoint.model_copy(update={"folder": folder})
    return experiment.model_copy(update=changes)


def prepare(
    experiment: Experiment, dataset: Dataset, progress: Callable[[str, int, int], None]
) -> Manifest:
    """Prepare the data on this machine, or check what is there; see ``data_prep.prepare``.

    Raises:
        DataError: one line, when that cannot be done.
    """
    return data_prep.prepare(
        dataset,
        **source_options(experiment),
        bad_share=experiment.data.bad_share,
        processes=experiment.data.processes,
        progress=progress,
    )


def check_images(experiment: Experiment, dataset: Dataset | Manifest) -> None:
    """Refuse a batch, a shift or a size that the data set's images do not bear.

    Args:
        dataset: the row, or the manifest of its prepared files.

    Raises:
        DataError: one line with the nearest right thing.
    """
    recipe = experiment.train
    name = experiment.dataset
    _check_counts(experiment, dataset)
    size, tested = image_size(recipe, dataset), evaluation_size(recipe, dataset)
    smallest = first_image_size(recipe, dataset)
    if smallest > size:
        raise DataError(
            f"train.first_image_size={smallest} is more than the {size} pixels of the last epochs"
        )
    if recipe.shift >= smallest:
        raise DataError(
            f"train.shift={recipe.shift} moves the whole image out of sight; it has {smallest} "
            "pixels"
        )
    is_resized = {smallest, size, tested} != {dataset.image_size}
    if dataset.channels == 1 and (is_resized or recipe.crop_area or recipe.test_crop):
        raise DataError(
            f"the gray images of {name} are not resized: leave train.image_size, "
            "train.first_image_size, train.test_size, train.crop_area and train.test_crop at none"
        )
    of_any = Normalization((0.0,) * dataset.channels, (1.0,) * dataset.channels)
    named_normalization(recipe.normalization, dataset.normalization or of_any)


def _check_counts(experiment: Experiment, dataset: Dataset | Manifest) -> None:
    recipe, name = experiment.train, experiment.dataset
    images = _images_to_share(experiment, dataset)
    if images is None:
        return
    if recipe.validation >= images:
        raise DataError(
            f"train.validation={recipe.validation} leaves none of the {images} training images of "
            f"{name} to train with"
        )
    if images - recipe.validation < recipe.batch_size:
        rest = " that train.validation leaves" if recipe.validation else ""
        raise DataError(
            f"train.batch_size={recipe.batch_size} is more than the {images - recipe.validation} "
            f"training images of {name}{rest}"
        )


def _images_to_share(experiment: Experiment, dataset: Dataset | Manifest) -> int | None:
    """Images to train and to validate with, as far as it is known without reading them."""
    data = experiment.data
    if data.synthetic is not None:
        return data.synthetic[0]
    count = dataset.counts.get("train")
    if count is None or data.max_per_class is None or dataset.classes is None:
        return count
    return min(count, data.max_per_class * dataset.classes)


def training_images(experiment: Experiment, dataset: Dataset | Manifest) -> int | None:
    """Images of an epoch, without those held out, as far as it is known without reading them."""
    images = _images_to_share(experiment, dataset)
    return None if images is None else images - experiment.train.validation


def split_images(experiment: Experiment, manifest: Manifest, split: str) -> int:
    """Images of a split: ``train`` is without those held out, which are ``validation``.

    Raises:
        KeyError: for an unknown split.
    """
    held_out = experiment.train.validation
    if split == VALIDATION:
        return held_out
    return manifest.counts[split] - (held_out if split == "train" else 0)


def backend(experiment: Experiment) -> str:
    """The data backend that ``data.backend=auto`` means here."""
    if experiment.data.backend != "auto":
        return experiment.data.backend
    return "ffcv" if data_prep.ffcv_available() else "torch"


def reading(experiment: Experiment, device: torch.device | str) -> Reading:
    """What reads the images; beside a GPU, on the cores of a worker that training leaves."""
    data, cores = experiment.data, experiment.scaling.cores
    threads = data.threads
    if threads is None and cores is not None and str(device).startswith("cuda"):
        threads = max(1, cores - 1)
    return data_prep.Reading(backend(experiment), threads, data.cache)


def make_loader(
    experiment: Experiment,
    manifest: Manifest,
    split: str,
    *,
    training: bool,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Loader:
    """Batches of a split as the recipe wants them.

    Args:
        split: ``train`` without the images that the recipe holds out, ``validation`` with these
            alone, or ``test``.
        training: shuffled, augmented, and of the epoch's size, or else each image once as it is
            seen in use.

    Raises:
        DataError: when the prepared files are not as they were written, or ``validation`` has no
            images.
    """
    recipe = experiment.train
    view: data_prep.View = data_prep.CentralCrop(recipe.test_crop)
    resolution = data_prep.Resolution.constant(evaluation_size(recipe, manifest))
    if training:
        resolution = _resolution(recipe, manifest)
        view = data_prep.Augmentation(
            shift=recipe.shift,
            padding=recipe.padding,
            flip=recipe.flip,
            crop_area=recipe.crop_area,
            crop_ratio=recipe.crop_ratio,
        )
    return data_prep.make_loader(
        manifest,
        split,
        batch_size=recipe.batch_size,
        training=training,
        held_out=recipe.validation,
        view=view,
        resolution=resolution,
        normalize=recipe.normalization,
        seed=experiment.seed,
        rank=rank,
        world_size=world_size,
        device=device,
        reading=reading(experiment, device),
    )
