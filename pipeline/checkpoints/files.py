"""The files of a checkpoint: what may be in them, and what has to be.

Tensors travel as safetensors, all else as JSON: nothing here could execute. A checkpoint may come
from elsewhere, so what is read has to be what this very training would have written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.checkpoints.state import Snapshot
from pipeline.checkpoints.storage import Content, DamagedError
from pipeline.checkpoints.tensor_files import (
    Description,
    described,
    read_header,
    read_tensors,
    serialized,
)

if TYPE_CHECKING:
    from pipeline.checkpoints.record import Record

_STATE = "state.json"
_PARTS = {part: f"{part}.safetensors" for part in ("model", "average", "optimizer", "ranks")}

#: Names that the files of a checkpoint may have.
FILES = frozenset({_STATE, *_PARTS.values()})

#: Of the state: a history of thousands of epochs.
_STATE_BYTES = 1 << 24


def written(snapshot: Snapshot, identity: str) -> dict[str, Content]:
    """The content of the files of a checkpoint, by name.

    Raises:
        ValueError: one line, when a number of the record is not finite, or not possible.
    """
    from pipeline.checkpoints.record import write_record

    record = write_record(snapshot, identity)
    parts = {_PARTS[part]: serialized(tensors) for part, tensors in snapshot.tensors.items()}
    return {_STATE: [record], **parts}


def check_finite(snapshot: Snapshot) -> None:
    """Refuse tensors that are not finite, which they stay: they shall not replace good ones.

    Raises:
        FloatingPointError: one line that says after which step.
    """
    for part, tensors in snapshot.tensors.items():
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            what = "the state of the optimizer was" if part == "optimizer" else "the weights were"
            progress = snapshot.progress
            raise FloatingPointError(
                f"{what} not finite after {progress.step} steps (epoch "
                f"{progress.epoch + bool(progress.done)}); lower train.lr or raise "
                "train.warmup_epochs"
            )


class CheckpointFiles:
    """A checkpoint that is read.

    Args:
        files: by name, each as it was written; what is in them is not believed.

    Attributes:
        record: all that is no tensor.

    Raises:
        DamagedError: here and in every method, when a file is missing, or is not what it should be.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        for name in (_STATE, _PARTS["model"], _PARTS["optimizer"]):
            self._path(name)
        state = self._path(_STATE)
        if state.stat().st_size > _STATE_BYTES:
            raise DamagedError(f"{_STATE} holds more than {_STATE_BYTES:,} bytes")
        from pipeline.checkpoints.record import read_record

        try:
            self.record: Record = read_record(state.read_bytes())
        except ValueError as error:
            raise DamagedError(f"{_STATE} is damaged: {error}") from None

    @property
    def kept_part(self) -> str:
        """The part with the network that is kept: the average, where there is one."""
        return "average" if _PARTS["average"] in self._files else "model"

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self._path(_PARTS[part])

    def tensors(self, part: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a part, of the names, shapes and dtypes of the expected ones."""
        found, wanted = read_header(self.path(part)), described(expected)
        if part == "optimizer":  # keeps nothing of a parameter that never got a gradient
            known = {_parameter(name) for name in found}
            wanted = {name: value for name, value in wanted.items() if _parameter(name) in known}
        self._check_header(part, found, wanted)
        return read_tensors(self.path(part))

    def rank_state(self, row: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What differs from rank to rank, (world size, ...) each.

        Args:
            row: what is expected of one rank, (...) each.
        """
        found = read_header(self.path("ranks"))
        counts = {shape[:1] for _, shape in found.values()}
        count = min(counts, default=())
        if len(counts) != 1 or count in ((), (0,)):
            raise DamagedError(f"{_PARTS['ranks']} is not of any number of ranks")
        wanted = {name: (dtype, count + shape) for name, (dtype, shape) in described(row).items()}
        self._check_header("ranks", found, wanted)
        return read_tensors(self.path("ranks"))

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise DamagedError(f"{name} is missing")
        return self._files[name]

    def _check_header(
        self, part: str, found: Mapping[str, Description], wanted: Mapping[str, Description]
    ) -> None:
        for name in sorted(found.keys() | wanted.keys()):
            there, here = found.get(name), wanted.get(name)
            if there != here:
                raise DamagedError(
                    f"{_PARTS[part]} has {_words(there)} as {name[:80]!r}, not {_words(here)}"
                )


def _words(description: Description | None) -> str:
    if description is None:
        return "no tensor"
    dtype, shape = description
    return f"{dtype} {'x'.join(map(str, shape[:8])) or 'scalar'}"


def _parameter(name: str) -> str:
    return name.partition(".")[0]
