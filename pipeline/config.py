"""What a run is made of: the Experiment and its parts.

Everything here is frozen and plain data, so that an Experiment can be hashed, written as YAML,
shipped through Ray and logged by MLflow. No torch, Ray, FFCV or MLflow is imported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from data_prep.datasets import NORMALIZATIONS
from pipeline.sections import Address, Folder, PipelineError, Section, flatten, nearest

__all__ = [
    "Address",
    "Data",
    "Experiment",
    "Folder",
    "PipelineError",
    "Recipe",
    "Reference",
    "Scaling",
    "Section",
    "Tracking",
    "flatten",
    "nearest",
]


def _workers(value: Any) -> Any:
    """``8`` as it is, ``4..16`` as its two ends."""
    if isinstance(value, str):
        least, dots, most = value.partition("..")
        if dots and least.isdecimal() and most.isdecimal():
            return int(least), int(most)
        raise PydanticCustomError("workers", "must be a number, or a range as 4..16")
    return value


#: Number of workers: fixed, a range that Ray chooses from, or by the machine.
Workers = Annotated[PositiveInt | tuple[PositiveInt, PositiveInt] | None, BeforeValidator(_workers)]


class Recipe(Section):
    """How to train. Durations are in epochs and are converted to steps once, in ``optim.py``."""

    epochs: PositiveInt = Field(10, description="passes over the training split")
    batch_size: PositiveInt = Field(128, description="images per step over all workers")
    accumulation: PositiveInt = Field(1, description="parts that a worker's share is computed in")
    validation: NonNegativeInt = Field(
        0, description="training images held out; the best epoch on them is kept, not the last"
    )
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop", "lamb"] = Field(
        "sgd", description="update rule"
    )
    lr: PositiveFloat = Field(0.1, description="peak learning rate")
    lr_batch_size: PositiveInt | None = Field(
        None, description="batch that lr is meant for, scaled linearly to others; none: any"
    )
    momentum: NonNegativeFloat = Field(0.9, lt=1, description="of sgd and rmsprop")
    nesterov: bool = Field(True, description="of sgd")
    weight_decay: NonNegativeFloat = Field(5e-4, description="of weights")
    latent_weight_decay: NonNegativeFloat | None = Field(
        None, description="of latent quantized weights; none: as weight_decay"
    )
    norm_weight_decay: NonNegativeFloat | None = Field(
        0.0, description="of norms and biases; none: as weight_decay"
    )
    latent_regularization: NonNegativeFloat = Field(
        0.0, description="pull of latent weights to -1 and +1: factor of the sum of 1 - w^2"
    )
    clip_norm: PositiveFloat | None = Field(None, description="longest gradient; none: any")
    schedule: Literal["constant", "cosine", "multistep", "plateau"] = Field(
        "cosine", description="learning rate over the steps"
    )
    schedule_unit: Literal["step", "epoch"] = Field(
        "step", description="how often the schedule moves"
    )
    warmup_epochs: NonNegativeFloat = Field(0.0, description="linear rise from zero")
    milestones: tuple[PositiveFloat, ...] = Field((), description="of multistep, in epochs")
    gamma: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        0.1, description="factor at each milestone or plateau, or one for each milestone"
    )
    patience: NonNegativeInt = Field(
        5, description="of plateau: epochs without a lower loss on held-out images"
    )
    loss: Literal["cross-entropy", "square-hinge"] = Field(
        "cross-entropy", description="that is minimized"
    )
    label_smoothing: NonNegativeFloat = Field(0.0, lt=1, description="of the cross-entropy")
    mixup: NonNegativeFloat = Field(0.0, description="augmentation: alpha; 0: none")
    cutmix: NonNegativeFloat = Field(0.0, description="augmentation: alpha; 0: none")
    teacher: str | None = Field(
        None, description="to distill from: models:/NAME@ALIAS, torchvision's weights, a run folder"
    )
    teacher_weight: PositiveFloat = Field(0.5, le=1, description="of the teacher in the loss")
    temperature: PositiveFloat = Field(1.0, description="that softens teacher and student")
    ema_decay: PositiveFloat | None = Field(
        None, lt=1, description="of the average of weights that is kept; none: no average"
    )
    normalization: str = Field(
        "dataset", description="of pixels, by name; dataset: as the data set is known for"
    )
    image_size: PositiveInt | None = Field(
        None, description="height and width of images in pixels; none: the data set's"
    )
    first_image_size: PositiveInt | None = Field(
        None, description="of the first epochs, growing to image_size; none: no growth"
    )
    growth_epochs: tuple[NonNegativeFloat, NonNegativeFloat] = Field(
        (0.0, 0.0), description="between which image_size grows in multiples of 32"
    )
    test_size: PositiveInt | None = Field(
        None, description="height and width in evaluation and use; none: image_size"
    )
    shift: NonNegativeInt = Field(0, description="augmentation: random shift, in pixels")
    padding: Literal["black", "edge"] = Field("black", description="what a shift moves in")
    flip: bool = Field(False, description="augmentation: random horizontal flip")
    crop_area: tuple[PositiveFloat, PositiveFloat] | None = Field(
        None, description="augmentation: random window, share of the area; none: the whole image"
    )
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = Field(
        (3 / 4, 4 / 3), description="of that window: width over height"
    )
    test_crop: PositiveFloat | None = Field(
        None, le=1, description="central square, share of the shorter side; none: whole image"
    )
    blurpool: bool = Field(False, description="blur before layers that skip pixels")
    sync_batchnorm: bool = Field(
        False, description="batch norm over the batches of all workers; needs GPUs"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of activations"
    )
    compile: Literal["none", "model", "quantizers"] = Field(
        "none", description="what torch.compile makes faster; the first step takes minutes"
    )

    @model_validator(mode="after")
    def _sensible_schedule(self) -> Recipe:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"train.warmup_epochs={self.warmup_epochs:g} is longer than the whole training, "
                f"train.epochs={self.epochs}"
            )
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError(
                "train.schedule=multistep needs train.milestones, for example [80,120]"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"train.milestones={list(self.milestones)} must rise")
        if self.schedule == "plateau" and not self.validation:
            raise ValueError(
                "train.schedule=plateau watches held-out images; set train.validation to their "
                "number"
            )
        if isinstance(self.gamma, tuple):
            wanted = len(self.milestones) if self.schedule == "multistep" else 1
            if len(self.gamma) != wanted:
                raise ValueError(
                    f"train.gamma={list(self.gamma)} must be one number, or one for each of "
                    f"train.milestones={list(self.milestones)}"
                )
        return self

    @model_validator(mode="after")
    def _sensible_loss(self) -> Recipe:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError(
                "train.nesterov=true needs train.momentum above 0; set train.nesterov=false"
            )
        if self.precision == "float16" and self.optimizer in ("rmsprop", "lamb"):
            raise ValueError(
                f"train.precision=float16 does not go with train.optimizer={self.optimizer}, which "
                "would wait for the device in every step; take bfloat16, or sgd, adam or adamw"
            )
        if self.sync_batchnorm and self.compile != "none":
            raise ValueError(
                f"train.sync_batchnorm=true does not go with train.compile={self.compile}: a "
                "worker that cannot compile would leave the others waiting"
            )
        if self.loss == "square-hinge":
            for name in ("label_smoothing", "mixup", "cutmix", "teacher"):
                if getattr(self, name):
                    raise ValueError(
                        f"train.{name}={getattr(self, name)} needs train.loss=cross-entropy"
                    )
        return self

    @model_validator(mode="after")
    def _sensible_images(self) -> Recipe:
        if self.normalization not in ("dataset", *NORMALIZATIONS):
            known = nearest(self.normalization, ["dataset", *NORMALIZATIONS])
            raise ValueError(f"unknown train.normalization={self.normalization!r}{known}")
        if self.crop_area is not None and not self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(
                f"train.crop_area={list(self.crop_area)} must be two shares that rise to at most "
                "1, as [0.08,1]"
            )
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError(f"train.crop_ratio={list(self.crop_ratio)} must rise")
        begin, end = self.growth_epochs
        if self.first_image_size is not None and not begin < end <= self.epochs:
            raise ValueError(
                f"train.growth_epochs={[begin, end]} must rise and end by train.epochs="
                f"{self.epochs}, for example [{0.7 * self.epochs:g},{0.85 * self.epochs:g}]"
            )
        return self


class Data(Section):
    """Where images come from, how they are kept prepared, and how they are read."""

    root: Folder | None = Field(
        None, description="raw data sets, a folder each; none: TERNFORGE_DATA, else ./data"
    )
    raw: Folder | None = Field(
        None, description="this data set's folder, zip or tar; none: its folder below root"
    )
    check_raw: bool = Field(True, description="compare raw files with their published checksums")
    max_per_class: PositiveInt | None = Field(
        None, description="images of each class and split; none: all"
    )
    bad_share: NonNegativeFloat = Field(
        0.001, le=1, description="of a split's images that may be set aside as unreadable"
    )
    prepared: Folder = Field(Path("prepared"), description="folder of verified, prepared data")
    location: Literal["shared", "node"] = Field(
        "shared", description="prepared folder: one for all nodes of a cluster, or one on each"
    )
    side: PositiveInt | None = Field(
        None,
        ge=32,
        le=65_535,
        description="longer side kept, in pixels; none: the data set's default",
    )
    format: Literal["jpg", "raw", "mixed"] | None = Field(
        None, description="of prepared images; none: the data set's default"
    )
    quality: Annotated[int, Field(ge=10, le=100)] | None = Field(
        None, description="of prepared JPEGs; none: the data set's default"
    )
    passthrough: bool | None = Field(
        None, description="keep fitting JPEGs byte for byte; none: the data set's default"
    )
    processes: PositiveInt | None = Field(
        None, description="that prepare images; none: one per core"
    )
    backend: Literal["auto", "ffcv", "torch"] = Field(
        "auto", description="reader; auto: ffcv where it is installed"
    )
    threads: PositiveInt | None = Field(
        None, description="that read images, per worker; none: 1, with GPUs the cores they leave"
    )
    cache: Literal["auto", "page", "process"] = Field(
        "auto", description="of prepared files; auto: page where memory holds the file"
    )
    synthetic: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="made-up images (train, test) in place of the data set"
    )


class Scaling(Section):
    """On what the training runs."""

    launcher: Literal["ray", "local"] = Field("ray", description="local: in this process, no Ray")
    workers: Workers = Field(
        None, description="DDP processes, 8, or 4..16 as many as there are; none: one per GPU, or 2"
    )
    nodes: PositiveInt | None = Field(
        None, description="machines that workers are spread over; none: as few as hold them"
    )
    cores: PositiveInt | None = Field(
        None, description="CPU cores for each worker; none: 1, with GPUs their share"
    )
    gpu: str | None = Field(
        None, description="GPU type that workers need, as Ray names it: H100; none: any"
    )
    max_failures: NonNegativeInt = Field(
        3, description="restarts after lost workers in a row, without a new checkpoint"
    )
    timeout: float = Field(
        300.0, ge=1, le=86_400, description="seconds until a silent worker is lost, at most"
    )

    @model_validator(mode="after")
    def _rising_range(self) -> Scaling:
        if isinstance(self.workers, tuple) and self.workers[0] >= self.workers[1]:
            raise ValueError(f"scaling.workers={self.workers[0]}..{self.workers[1]} must rise")
        return self


class Checkpointing(Section):
    """How often the state of a training is kept, and where; after each epoch it always is."""

    minutes: PositiveFloat | None = Field(
        10.0, description="between two within an epoch; none: only after epochs"
    )
    steps: PositiveInt | None = Field(
        None, description="between two within an epoch, whatever the minutes; none: by minutes"
    )
    keep: PositiveInt = Field(2, description="newest ones kept, beside the best")
    folder: Address | None = Field(
        None, repr=False, description="folder, or URI as s3://bucket/folder; none: the run folder"
    )


class Tracking(Section):
    """What is kept of a run, and where."""

    enabled: bool = Field(True, description="log to MLflow")
    register_model: bool = Field(True, description="put the folded model in the MLflow registry")
    uri: Address | None = Field(
        None,
        repr=False,
        description="MLflow server; none: MLFLOW_TRACKING_URI, else sqlite under runs",
    )
    runs: Folder = Field(
        Path("runs"), description="folder of run folders and of the MLflow database"
    )


class Reference(Section):
    """What a curated experiment is, and the published figure that it stands beside."""

    what: str = Field(description="in a few words")
    top1: float | None = Field(None, description="published top-1 accuracy in percent")
    top5: float | None = Field(None, description="published top-5 accuracy in percent")
    best_on: Literal["test", "validation"] | None = Field(
        None, description="images on which the epoch of that figure was the best; none: the last"
    )
    source: str = Field("", description="who published it; empty: an experiment of our own")

    @property
    def text(self) -> str:
        """What it is, and whether the figure is of the best epoch."""
        if self.source and self.top1 is None and self.top5 is None:
            return f"{self.what}; figure not published"
        if self.best_on is None:
            return self.what
        images = "the test" if self.best_on == "test" else "held-out"
        return f"{self.what}; best epoch on {images} images"


class Experiment(Section):
    """One training run, in full: data set, backbone, method and recipe, and where it runs."""

    # It names folders and the registered model, which MLflow wants without / : . % and quotes.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_()=,+-]*$")
    dataset: str
    backbone: str = Field(description="call string, for example resnet50(form=cifar)")
    method: str = Field("float", description="call string, for example ternary(expansion=4)")
    init_from: str | None = Field(
        None, description="weights to begin with: a file, torchvision's, models:/NAME@ALIAS"
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="of weights, order and augmentation")
    seeds: PositiveInt = Field(1, description="runs, of this seed and those after it")
    train: Recipe = Recipe()
    data: Data = Data()
    scaling: Scaling = Scaling()
    checkpoint: Checkpointing = Checkpointing()
    tracking: Tracking = Tracking()
    reference: Reference | None = None

    @property
    def tuned(self) -> bool:
        """Whether the catalog curates this experiment (otherwise its recipe is a default)."""
        return self.reference is not None

    def identity(self, data: str) -> str:
        """Hash of what is trained, on what and how, as 12 hex digits.

        ``data`` stands for the images as the network sees them, see ``checkpoint.run_identity``.
        Where a run is computed and kept (scaling, checkpoint, tracking, folders) is left out: the
        same identity means that a checkpoint of one run can be continued by the other.
        """
        parts = self.model_dump(
            mode="json", include={"dataset", "backbone", "method", "seed", "train"}
        )
        text = json.dumps({**parts, "data": data}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_yaml(self) -> str:
        """The resolved experiment as YAML that ``--config`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
