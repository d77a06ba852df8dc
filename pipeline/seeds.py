"""Several runs of one experiment that differ in their seed alone: their mean and deviation.

Each run is one of its own, with its folder, MLflow run and registered version; a folder and an
MLflow run above them hold what they have in common.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import runfolder
from pipeline.config import Experiment, PipelineError
from pipeline.display import Display
from pipeline.materials import Materials, gather
from pipeline.registry.card import with_seeds
from pipeline.registry.promotion import consider
from pipeline.registry.versions import CANDIDATE
from pipeline.runfolder import RunFolder
from pipeline.settings import override
from pipeline.stages import start_tracking, train_and_register, usual_alias
from pipeline.stores import store_errors

if TYPE_CHECKING:
    from pipeline.tracking import Tracker, TrackingStore

#: Of these each run has one, and their mean and deviation are what is asked for.
_FIGURES = ("top1", "best_top1", "validation_top1", "top5", "loss")

#: What is the same in the records of all runs.
_COMMON = (
    *("experiment", "network", "method", "precision", "epochs", "test_images", "parameters"),
    *("stored_bytes", "float32_bytes", "macs", "hardware"),
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over n - 1) of a figure."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class SeedsResult:
    """What the runs of all seeds give.

    Attributes:
        folder: that names the runs and holds their common record.
        runs: record of each run, see ``report.record``, with its ``folder``; by seed.
        spreads: of those of ``top1``, ``best_top1``, ``validation_top1``, ``top5`` and ``loss``
            that each run has.
        tracking_uri: MLflow store; None when tracking is off.
        run_id: MLflow run above those of the seeds; None when tracking is off.
        model: URI of the registered version that stands for all; None when there is none.
        choice: whose version that is, in words.
        champion: as of ``stages.Result``.
    """

    experiment: Experiment
    folder: Path
    runs: list[dict[str, Any]]
    spreads: dict[str, Spread]
    tracking_uri: str | None = None
    run_id: str | None = None
    model: str | None = None
    choice: str = ""
    champion: str = ""


def run_seeds(
    experiment: Experiment, *, resume: bool | str = False, display: Display | None = None
) -> SeedsResult:
    """Run an experiment with ``experiment.seeds`` seeds, one after another.

    Args:
        resume: as of ``stages.run``: what has finished is taken as it is, the run that was
            stopped goes on, the others follow.
        display: where progress goes; standard output by default.

    Raises:
        PipelineError: one line that says what the user can mend, and which seed it concerns.
    """
    seeds = range(experiment.seed, experiment.seed + experiment.seeds)
    members = [override(experiment, [f"seed={seed}", "seeds=1"]) for seed in seeds]
    with display or Display() as shown:
        materials = gather(experiment, shown, resume)
        with materials.run_folder(experiment, resume, f"-seeds{len(members)}") as folder:
            return _Seeds(experiment, members, materials, folder).go()


class _Seeds:
    """The runs of all seeds, which share a folder and an MLflow run above their own."""

    def __init__(
        self,
        experiment: Experiment,
        members: list[Experiment],
        materials: Materials,
        folder: RunFolder,
    ) -> None:
        self.experiment = experiment
        self.members = members
        self.materials = materials
        self.folder = folder
        self.tracker = start_tracking(experiment, materials, folder)

    def go(self) -> SeedsResult:
        """Run what has not finished yet, then put all results together."""
        with self.tracker or contextlib.nullcontext():
            runs = [self._run(number, member) for number, member in enumerate(self.members, 1)]
            result = SeedsResult(self.experiment, self.folder.path, runs, _spreads(runs))
            if self.tracker is not None:
                result = self._tracked(result, self.tracker)
        self.folder.update(status="finished", result=_record(result))
        return result

    def _run(self, number: int, member: Experiment) -> dict[str, Any]:
        """Record of a seed's run, which is begun, continued, or finished already."""
        display, seed = self.materials.display, str(member.seed)
        which = f"seed {seed}, {number} of {len(self.members)}"
        begun: dict[str, str] = self.folder.record.get("runs", {})
        resume: bool | str = False
        if seed in begun:
            found = runfolder.read(self.experiment, begun[seed])
            if found.finished:
                display.stage("seed", f"{which}: run {found.name} has finished")
                return {**found.record["result"], "folder": found.name}
            resume = found.name if found.path.exists() else False
        display.stage("seed", which)
        try:
            with self.materials.run_folder(member, resume) as folder:
                folder.update(part_of=self.folder.name)
                self.folder.update(runs={**begun, seed: folder.name})
                train_and_register(
                    member,
                    self.materials,
                    folder,
                    parent=self.tracker.run_id if self.tracker is not None else None,
                    alias=f"{usual_alias(member)}-seed{seed}",
                )
        except PipelineError as error:
            error.args = (f"{which}: {error}",)  # of the same kind, and still to be continued
            raise
        return {**folder.record["result"], "folder": folder.name}

    def _tracked(self, result: SeedsResult, tracker: Tracker) -> SeedsResult:
        """Log the spreads, and let the alias point to the version that stands for all."""
        for name, spread in result.spreads.items():
            tracker.log_result({f"{name}_mean": spread.mean, f"{name}_deviation": spread.deviation})
        tracker.log_dict("seeds.json", {**_record(result), "runs": result.runs})
        tracker.catch_up()
        chosen, choice = _candidate(result.runs)
        model, champion = None, ""
        if chosen["model_version"] is not None:
            version = int(chosen["model_version"])
            model = self._point_alias(version, tracker.store)
            self._say_on_card(version, result.spreads["top1"], tracker.store)
            if usual_alias(self.experiment) == CANDIDATE:
                champion = consider(tracker.store, self.experiment.name, version)
        return replace(
            result,
            tracking_uri=tracker.store.uri,
            run_id=tracker.run_id,
            model=model,
            choice=choice,
            champion=champion,
        )

    def _point_alias(self, version: int, store: TrackingStore) -> str:
        name, alias = self.experiment.name, usual_alias(self.experiment)
        with store_errors(f"cannot name version {version} of {name} in {store.uri}"):
            store.client.set_registered_model_alias(name, alias, str(version))
        return f"models:/{name}@{alias}"

    def _say_on_card(self, version: int, spread: Spread, store: TrackingStore) -> None:
        """Put mean and deviation on the version that stands for all."""
        name, client, number = self.experiment.name, store.client, str(version)
        with store_errors(f"cannot describe version {version} of {name} in {store.uri}"):
            card = client.get_model_version(name, number).description or ""
            text = with_seeds(card, spread, len(self.members))
            client.update_model_version(name, number, text)
            tags = {"seeds": len(self.members), "top1_mean": spread.mean}
            for key, value in (tags | {"top1_deviation": spread.deviation}).items():
                client.set_model_version_tag(name, number, key, f"{value:.6g}")


def _spreads(runs: list[dict[str, Any]]) -> dict[str, Spread]:
    """Of each figure that all runs have."""
    values = {name: [run[name] for run in runs] for name in _FIGURES}
    return {
        name: Spread(statistics.mean(figures), statistics.stdev(figures))
        for name, figures in values.items()
        if None not in figures
    }


def _candidate(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The run whose version stands for all, and why; test images have no say in it."""
    if all(run["validation_top1"] is not None for run in runs):
        best = max(runs, key=lambda run: float(run["validation_top1"]))
        return best, f"of seed {best['seed']}, the best on the held-out images"
    return runs[0], f"of seed {runs[0]['seed']}, the first: the test images do not choose"


def _record(result: SeedsResult) -> dict[str, Any]:
    """As of one run, with means in place of its figures."""
    return {
        **{name: result.runs[0][name] for name in _COMMON},
        **{name: round(spread.mean, 6) for name, spread in result.spreads.items()},
        "deviations": {name: round(spread.deviation, 6) for name, spread in result.spreads.items()},
        "seeds": [run["seed"] for run in result.runs],
        "seconds": round(sum(run["seconds"] for run in result.runs), 1),
        "images_per_second": round(
            statistics.mean(run["images_per_second"] for run in result.runs)
        ),
    }
