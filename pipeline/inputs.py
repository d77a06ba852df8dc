"""What goes into the network: an experiment's data set, how it is prepared, its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import data_prep
from data_prep.datasets import (
    NORMALIZATIONS,
    DataError,
    Dataset,
    Normalization,
    Storage,
    named_normalization,
)

if TYPE_CHECKING:
    import torch

    from data_prep import Loader, Manifest
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
    """Height and width of the images that the network is made for, in pixels."""
    return recipe.image_size or inputs.image_size


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
    """The experiment with its folders as this machine means them, for another one."""
    data = experiment.data
    folders = {key: getattr(data, key) for key in ("root", "raw", "prepared")}
    absolute = {key: path.absolute() for key, path in folders.items() if path is not None}
    return experiment.model_copy(update={"data": data.model_copy(update=absolute)})


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
    images = training_images(experiment, dataset)
    if images is not None and images < recipe.batch_size:
        raise DataError(
            f"train.batch_size={recipe.batch_size} is more than the {images} training images of "
            f"{name}"
        )
    size = image_size(recipe, dataset)
    smallest = recipe.first_image_size or size
    if smallest > size:
        raise DataError(
            f"train.first_image_size={smallest} is more than the {size} pixels of the last epochs"
        )
    if recipe.shift >= smallest:
        raise DataError(
            f"train.shift={recipe.shift} moves the whole image out of sight; it has {smallest} "
            "pixels"
        )
    is_resized = {smallest, size} != {dataset.image_size} or recipe.crop_area or recipe.test_crop
    if dataset.channels == 1 and is_resized:
        raise DataError(
            f"the gray images of {name} are not resized: leave train.image_size, "
            "train.first_image_size, train.crop_area and train.test_crop at none"
        )
    of_any = Normalization((0.0,) * dataset.channels, (1.0,) * dataset.channels)
    named_normalization(recipe.normalization, dataset.normalization or of_any)


def training_images(experiment: Experiment, dataset: Dataset | Manifest) -> int | None:
    """Images of the training split as far as it is known without reading it."""
    data = experiment.data
    if data.synthetic is not None:
        return data.synthetic[0]
    count = dataset.counts.get("train")
    if count is None or data.max_per_class is None or dataset.classes is None:
        return count
    return min(count, data.max_per_class * dataset.classes)


def backend(experiment: Experiment) -> str:
    """The data backend that ``data.backend=auto`` means here."""
    if experiment.data.backend != "auto":
        return experiment.data.backend
    return "ffcv" if data_prep.ffcv_available() else "torch"


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

    Raises:
        DataError: when the prepared files are not as they were written.
    """
    recipe, data = experiment.train, experiment.data
    size = image_size(recipe, manifest)
    view: data_prep.View = data_prep.CentralCrop(recipe.test_crop)
    first = size
    if training:
        first = recipe.first_image_size or size
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
        view=view,
        resolution=data_prep.Resolution(first, size, recipe.growth_epochs),
        normalize=recipe.normalization,
        seed=experiment.seed,
        rank=rank,
        world_size=world_size,
        device=device,
        reading=data_prep.Reading(backend(experiment), data.threads, data.cache),
    )
