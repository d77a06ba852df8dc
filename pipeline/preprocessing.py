"""How an image becomes the input of a network, as plain data that travels with the network.

Whoever uses a network sees images as its evaluation did: the same part of them, at the same size,
with the same normalization. So a registered accuracy holds for what is predicted later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import data_prep
from data_prep.datasets import Storage, named_normalization
from pipeline.errors import PipelineError
from pipeline.inputs import evaluation_size

if TYPE_CHECKING:
    from data_prep import Manifest
    from pipeline.config import Experiment

#: What ``to_dict`` says to people; it follows from the rest.
_TEXTS = ("input", "resize", "scale")

Share = Annotated[float, Field(gt=0, le=1)]
Deviation = Annotated[float, Field(ge=1e-6)]


class Preprocessing(BaseModel):
    """What happens to an image before a network sees it, and what its outputs mean."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(ge=1, le=4096, description="height and width of the input in pixels")
    channels: Literal[1, 3] = Field(description="gray, or red, green, blue")
    crop: Share | None = Field(
        description="central square, share of the shorter side; none: the whole image"
    )
    # How images of files were kept, which may have reduced and encoded them.
    side: Annotated[int, Field(ge=1)] | None = Field(description="longer side, reduced to at most")
    format: Literal["jpg", "raw", "mixed"] | None = Field(description="none: pixel by pixel")
    quality: Annotated[int, Field(ge=1, le=100)] | None = Field(description="of JPEGs")
    passthrough: bool | None = Field(description="JPEGs that fit were kept byte for byte")
    mean: tuple[float, ...] = Field(description="by channel, of pixels scaled to [0, 1]")
    std: tuple[Deviation, ...] = Field(description="by channel, divides what the mean leaves")
    class_names: tuple[str, ...] = Field(min_length=1, description="in the order of the outputs")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std are not of {self.channels} channels")
        kept = (self.format, self.quality, self.passthrough)
        if None in kept and (kept != (None, None, None) or self.side is not None):
            raise ValueError("side, format, quality and passthrough go together")
        return self

    @classmethod
    def of(cls, experiment: Experiment, manifest: Manifest) -> Preprocessing:
        """That of an experiment's evaluation on its prepared data."""
        recipe = experiment.train
        mean, std = named_normalization(recipe.normalization, manifest.normalization)
        storage = manifest.spec["storage"] or dict.fromkeys(
            ("side", "format", "quality", "passthrough")
        )
        return cls(
            size=evaluation_size(recipe, manifest),
            channels=manifest.channels,
            crop=recipe.test_crop,
            mean=mean,
            std=std,
            class_names=manifest.class_names,
            **storage,
        )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return self.channels, self.size, self.size

    @property
    def storage(self) -> Storage | None:
        """How images of files were kept; None: pixel by pixel, as large as they are."""
        if self.format is None or self.quality is None or self.passthrough is None:
            return None
        return Storage(self.side, self.format, self.quality, self.passthrough)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: some for people, then those that ``from_dict`` reads."""
        window = "the whole image"
        if self.crop is not None:
            window = f"the central square of {self.crop:g} of the shorter side"
        texts = {
            "input": f"float32 (N, {self.channels}, {self.size}, {self.size})",
            "resize": f"{window}, to {self.size}x{self.size}, area filter",
            "scale": "pixel / 255",
        }
        return texts | self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """What ``to_dict`` gave.

        Raises:
            PipelineError: for anything else, naming the first entry that is wrong.
        """
        own = {key: value for key, value in values.items() if key not in _TEXTS}
        try:
            return cls.model_validate_json(json.dumps(own), strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            entry = ".".join(str(part) for part in problem["loc"]) or "entries"
            raise PipelineError(f"preprocessing: {entry}: {problem['msg']}") from None

    def pixels(self, image: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """An image as it is seen, before its normalization: uint8 (size, size, C).

        Args:
            image: content of a file, or pixels, (H, W), (H, W, 1) or (H, W, 3), which are taken
                for what was kept of a file.

        Raises:
            DataError: with the reason, when it is no usable image.
        """
        if isinstance(image, bytes):
            decoded = data_prep.decode_image(image, self.storage, self.channels)
        else:
            decoded = data_prep.as_channels(image, self.channels)
        return data_prep.view_image(decoded, data_prep.CentralCrop(self.crop), self.size)

    def normalize(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Images as ``pixels`` gives them, (..., H, W, C), as inputs, float32 (..., C, H, W)."""
        mean, std = (np.asarray(values, dtype=np.float32) for values in (self.mean, self.std))
        return np.moveaxis(data_prep.normalized(pixels, mean, std), -1, -3)

    def prepare(self, image: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """One image as an input, float32 (C, H, W); see ``pixels``.

        An evaluation sees the same, to the bit where nothing is resized; FFCV's filter may differ
        by one of 255 levels elsewhere.
        """
        return self.normalize(self.pixels(image))
