"""The runs that there are of an experiment, for one who has to choose: state and differences."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Experiment, PipelineError, flatten

if TYPE_CHECKING:
    from rich.table import Table

#: How the names of settings begin that decide what a run trains.
_DECISIVE = ("dataset", "backbone", "method", "seed", "train.", "data.synthetic")

#: Settings of the data that have no say in how the images look.
_NO_SAY = {f"data.{key}" for key in ("check_raw", "prepared", "location", "processes")} | {
    f"data.{key}" for key in ("backend", "threads", "cache", "bad_share")
}

_MOST_ROWS, _MOST_DIFFERENCES = 10, 3


@dataclass(frozen=True)
class ListedRun:
    """A run in words: its name, what it is doing, and in what it differs from another one."""

    name: str
    state: str
    differences: Sequence[str]

    @property
    def begun(self) -> str:
        """When it began, by its name."""
        try:
            moment = datetime.datetime.strptime(self.name[:15], "%Y%m%d-%H%M%S")
        except ValueError:
            return ""
        return f"{moment:%Y-%m-%d %H:%M}"


class UnclearRunError(PipelineError):
    """`--resume` does not say which run it means, or means none.

    Args:
        problem: to which the newest runs are added.
        runs: that there are, newest first.
    """

    def __init__(self, problem: str, runs: Sequence[ListedRun]) -> None:
        names = ", ".join(run.name for run in runs[:3])
        older = f" and {len(runs) - 3} older ones" if len(runs) > 3 else ""
        hint = f"there are {names}{older}" if runs else "there are no runs of it yet"
        super().__init__(f"{problem}; {hint}")
        self.runs = runs

    def table(self) -> Table:
        """The runs to choose from."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        table = Table("run", "begun", "state", "differs in", box=SIMPLE)
        table.columns[0].no_wrap = True
        for run in self.runs[:_MOST_ROWS]:
            shown = ", ".join(run.differences[:_MOST_DIFFERENCES])
            more = len(run.differences) - _MOST_DIFFERENCES
            differing = f"{shown}, and {more} more" if more > 0 else shown or "nothing"
            table.add_row(*map(Text, (run.name, run.begun, run.state, differing)))
        if len(self.runs) > _MOST_ROWS:
            table.caption = f"and {len(self.runs) - _MOST_ROWS} older ones"
        return table


def state(folder: Path, trained: Experiment, record: Mapping[str, Any], holder: str | None) -> str:
    """What a run is doing, or how far it came.

    Args:
        trained: the experiment of the run.
        record: of the run, as in its run.json.
        holder: process that trains in it; None where there is none.
    """
    if holder is not None:
        return f"running, {holder}"
    if record["status"] == "finished":
        top1 = (record.get("result") or {}).get("top1")
        return f"finished, top-1 {top1:.2f} %" if isinstance(top1, float) else "finished"
    if trained.seeds > 1:
        return f"stopped in run {max(1, len(record.get('runs', {})))} of {trained.seeds}"
    place = trained.checkpoint.folder
    if place is not None and "://" in place:  # to ask there may take long
        return "stopped"
    return f"stopped {_newest_position(folder, trained)}"


def _newest_position(folder: Path, trained: Experiment) -> str:
    """Where the newest checkpoint of a run is, in words."""
    from pipeline.checkpoints.storage import storage_of
    from pipeline.checkpoints.store import Position

    names = storage_of(trained, folder).names()
    positions = [position for name in names if (position := Position.parse(name)) is not None]
    newest = max(positions, default=Position(0))
    if newest.done:
        return f"at step {newest.done:,} of epoch {newest.epoch + 1} of {trained.train.epochs}"
    if newest.epoch:
        return f"after epoch {newest.epoch} of {trained.train.epochs}"
    return "before its first checkpoint"


def setting_differences(record: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Settings that decide what is trained, as far as the run of the record has others."""
    return [row for key, row in _changed(record, experiment) if key.startswith(_DECISIVE)]


def differences(
    record: Mapping[str, Any], experiment: Experiment, made_of: Mapping[str, Any]
) -> list[str]:
    """All that makes another run of this experiment than the one of the record.

    Args:
        made_of: data and weights of this experiment, as `Materials.record` gives them.
    """
    rows = setting_differences(record, experiment)
    images, others = made_of.get("data"), record.get("data")
    if images is not None and others is not None and images != others:
        settings = [
            row
            for key, row in _changed(record, experiment)
            if key.startswith("data.") and not key.startswith(_DECISIVE) and key not in _NO_SAY
        ]
        was, now = others["fingerprint"][:8], images["fingerprint"][:8]
        cause = "other raw files or versions" if was != now else "another mean or deviation"
        if not any("data.synthetic" in row for row in rows):
            rows += settings or [f"its images: {cause} (fingerprint {was}, now {now})"]
    for key, weights in (made_of.get("sources") or {}).items():
        before = (record.get("sources") or {}).get(key)
        was, now = (None if w is None else w["digest"][:8] for w in (before, weights))
        if was != now:
            rows.append(f"the tensors of {key} (SHA-256 {was or 'of none'}, now {now or 'none'})")
    return rows


def _changed(record: Mapping[str, Any], experiment: Experiment) -> list[tuple[str, str]]:
    """Each setting that the run of the record has otherwise, and a text that says so."""
    old, new = flatten(record["experiment"]), flatten(experiment.model_dump(mode="json"))
    return [
        (key, f"{key}={setting_text(old.get(key))} (now {setting_text(new.get(key))})")
        for key in {**new, **old}
        if old.get(key) != new.get(key)
    ]


def setting_text(value: Any) -> str:
    """A value as the user would write it."""
    words = {None: "none", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
