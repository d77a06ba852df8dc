"""The record of a checkpoint: all in it that is no tensor, checked whoever has written it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.checkpoints.state import Snapshot

_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Number = Annotated[int | float, Field(ge=0, lt=1e38)]


class Record(BaseModel):
    """What ``state.json`` holds. Attributes as of Progress and Snapshot."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    identity: str = Field(max_length=200)
    epoch: _Count
    done: _Count
    step: _Count
    history: list[dict[str, float]]
    counters: dict[str, _Number]
    scaler: dict[str, _Number]

    @model_validator(mode="after")
    def _plausible(self) -> Record:
        if len(self.history) != self.epoch:
            raise ValueError(f"metrics of {len(self.history)} epochs where {self.epoch} are done")
        if self.step < self.epoch + self.done:
            raise ValueError(f"{self.step} steps in {self.epoch} epochs and {self.done} steps")
        return self


def write_record(snapshot: Snapshot, identity: str) -> bytes:
    """The content of ``state.json`` for a training at one moment.

    Raises:
        ValueError: one line, when a number is not finite, or not possible.
    """
    progress = snapshot.progress
    try:
        record = Record(
            identity=identity,
            epoch=progress.epoch,
            done=progress.done,
            step=progress.step,
            history=progress.history,
            counters=snapshot.counters,
            scaler=snapshot.scaler,
        )
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    return record.model_dump_json().encode()


def read_record(content: bytes) -> Record:
    """A record as it was written.

    Raises:
        ValueError: one line, for anything else.
    """
    try:
        return Record.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part)[:40] for part in problem["loc"])
    text = str(problem.get("ctx", {}).get("error", problem["msg"]))
    return f"{place}: {text}" if place else text
