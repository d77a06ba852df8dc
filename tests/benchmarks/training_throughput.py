"""How fast networks train: the whole stack against a bare torch loop on the same network.

The whole stack is a run's own training loop on prepared files: FFCV where it is installed,
augmentation, the learning rate of each step, meters, reports. The bare loop (tests/bare_loop.py)
has its images in memory. Each lives in a process of its own; they take turns epoch by epoch, so
that a noisy machine disturbs all alike. The first round is not counted, nor are evaluations and
checkpoints; ratios are of medians over the rounds.

Where the time of a step goes is measured apart, with torch's profiler and every kernel waited for.
At the end the whole stack runs under Ray with one worker and with several, and beside them the bare
loop in as many processes under DistributedDataParallel.

    PYTHONPATH=. python tests/benchmarks/training_throughput.py
    PYTHONPATH=. python tests/benchmarks/training_throughput.py --steps 30 train.crop_area=none

Settings are those of an experiment; a GPU trains in bfloat16 with batch 256 unless they say
otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from data_prep import DataError
from pipeline import inputs, launch
from pipeline.config import Experiment, PipelineError
from pipeline.experiments import check_parts
from pipeline.recipes import default_recipe
from pipeline.settings import override
from tests.bare_loop import Task, bare_epochs, distributed_bare_epochs, images_in_memory

#: As the training loop labels them for the profiler.
PARTS = ("data", "forward", "backward", "optimizer", "report")

#: Made-up test images: the loop evaluates after each epoch, which is not measured.
TEST_IMAGES = 64

#: Epochs of a session with several workers, whose first one is not counted, and its turns.
SESSION_EPOCHS, TURNS = 3, 2

Event = dict[str, Any]


def peak_bytes() -> int:
    """Most bytes in use at a time: of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve_bare_loop(task: Task, connection: Connection) -> None:
    """Train an epoch whenever asked, and answer with images per second; at the end, with bytes."""
    images, labels = images_in_memory(task)
    epochs = bare_epochs(task, images, labels)
    for _ in range(task.experiment.train.epochs):
        connection.recv()
        connection.send(next(epochs))
    connection.send(peak_bytes() - images.nbytes)


class Turns:
    """Stops the whole stack after each epoch until it is asked for the next one."""

    def __init__(self, task: Task, connection: Connection) -> None:
        self._task, self._connection = task, connection
        self._started = self._wait()

    def _wait(self) -> float:
        self._connection.recv()
        return time.perf_counter()

    def __call__(self, event: Event) -> None:
        if event["kind"] != "epoch":
            return
        seconds = time.perf_counter() - self._started
        for what in ("evaluate_seconds", "checkpoint_seconds"):
            seconds -= event["metrics"][what]
        self._connection.send(self._task.images / seconds)
        if event["epoch"] < self._task.experiment.train.epochs:
            self._started = self._wait()


def serve_whole_stack(task: Task, connection: Connection) -> None:
    """As ``serve_bare_loop``."""
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(task, connection)
        launch.train_locally(task.experiment, task.manifest, Path(folder), turns)
    connection.send(peak_bytes())


class Shares:
    """Profiles the second epoch of the whole stack.

    Attributes:
        parts: shares of that epoch by part; the rest of it is "other".
    """

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def __call__(self, event: Event) -> None:
        if event["kind"] != "epoch":
            return
        if event["epoch"] == 1:
            self._profiler.start()
            return
        self._profiler.stop()
        microseconds = {row.key: row.cpu_time_total for row in self._profiler.key_averages()}
        total = 1e6 * event["metrics"]["train_seconds"]
        self.parts = {part: microseconds[part] / total for part in PARTS}
        self.parts["other"] = 1 - sum(self.parts.values())


def serve_shares(task: Task, connection: Connection) -> None:
    """Answer with the share of each part."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # read when the device is first used
    shares = Shares()
    task = task.with_settings("train.epochs=2")
    with tempfile.TemporaryDirectory() as folder:
        launch.train_locally(task.experiment, task.manifest, Path(folder), shares)
    connection.send(shares.parts)


class Contestant:
    """A process that serves a task."""

    def __init__(self, serve: Callable[[Task, Connection], None], task: Task) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(task, theirs))
        self._process.start()
        theirs.close()  # so that nobody waits for a process that has failed

    def ask(self) -> Any:
        """Let it go on; returns its answer."""
        self._connection.send(None)
        return self.answer()

    def answer(self) -> Any:
        return self._connection.recv()

    def end(self) -> None:
        self._connection.close()
        self._process.join()


def race(tasks: dict[str, Task], rounds: int) -> dict[str, dict[str, Any]]:
    """Images per second and memory of both loops on each task, all in turns."""
    serves = {"bare": serve_bare_loop, "stack": serve_whole_stack}
    racing = {
        (name, side): Contestant(serve, task.with_settings(f"train.epochs={rounds + 1}"))
        for name, task in tasks.items()
        for side, serve in serves.items()
    }
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in racing}
    results: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    try:
        for number in range(rounds + 1):
            # Nobody always comes after the same one.
            for key in list(racing)[:: 1 if number % 2 else -1]:
                speed = racing[key].ask()
                if number:
                    speeds[key].append(speed)
        for (name, side), contestant in racing.items():
            results[name][side] = statistics.median(speeds[name, side])
            results[name][f"{side}_bytes"] = contestant.answer()
    finally:
        for contestant in racing.values():
            contestant.end()
    return results


def shares(task: Task) -> dict[str, float]:
    """Share of an epoch of each part of the whole stack."""
    contestant = Contestant(serve_shares, task)
    try:
        return contestant.answer()
    finally:
        contestant.end()


def stack_under_ray(task: Task, workers: int) -> list[float]:
    """Images per second of each epoch of the whole stack, as it reports them."""
    speeds: list[float] = []

    def tell(event: Event) -> None:
        if event["kind"] == "epoch":
            speeds.append(event["metrics"]["images_per_second"])

    task = task.with_settings(f"scaling.workers={workers}", f"train.epochs={SESSION_EPOCHS}")
    with tempfile.TemporaryDirectory() as folder:
        launch.train_on_ray(task.experiment, task.manifest, Path(folder), tell)
    return speeds


def race_workers(task: Task, workers: int) -> dict[str, float]:
    """Median images per second with one worker and with several."""
    contestants: dict[str, Callable[[], list[float]]] = {
        "whole stack, 1 worker": lambda: stack_under_ray(task, 1),
        f"whole stack, {workers} workers": lambda: stack_under_ray(task, workers),
        f"bare loop, {workers} processes": lambda: distributed_bare_epochs(
            task, workers, SESSION_EPOCHS
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(TURNS):
        for name, session in contestants.items():
            speeds[name] += session()[1:]
    return {name: statistics.median(values) for name, values in speeds.items()}


def make_task(arguments: argparse.Namespace, network: str, method: str, folder: Path) -> Task:
    """The experiment of a network and a method, and its prepared images."""
    dataset = arguments.dataset or ("imagenet" if torch.cuda.is_available() else "tinyimagenet")
    experiment = Experiment(
        name="throughput",
        dataset=dataset,
        backbone=network,
        method=method,
        train=default_recipe(dataset),
    )
    # A small rate: what is learned does not matter, and must not become infinite.
    settings = ["train.lr=0.001", "train.batch_size=32", f"data.prepared={folder}"]
    if torch.cuda.is_available():
        settings += ["train.batch_size=256", "train.precision=bfloat16"]
    experiment = override(experiment, [*settings, *arguments.settings])
    if experiment.train.precision == "float16":
        raise PipelineError("train.precision=float16: the bare loop has no scaler; take bfloat16")
    check_parts(experiment)
    if not any(word.startswith("data.synthetic=") for word in arguments.settings):
        images = arguments.steps * experiment.train.batch_size
        experiment = override(experiment, [f"data.synthetic=[{images},{TEST_IMAGES}]"])
    manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *_: None)
    return Task(experiment, manifest)


def title(task: Task) -> str:
    """What all networks have in common."""
    cuda = torch.cuda.is_available()
    recipe = task.experiment.train
    reader = {"ffcv": "FFCV", "torch": "Pillow"}[inputs.backend(task.experiment)]
    return ", ".join(
        [
            torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores",
            f"{inputs.image_size(recipe, task.manifest)} px",
            f"batch {recipe.batch_size}",
            recipe.precision + (" compiled" if recipe.compile != "none" else ""),
            f"read by {reader}",
        ]
    )


def print_network(row: dict[str, Any]) -> None:
    parts = "".join(f"{100 * row['parts'][part]:8.1f} %" for part in (*PARTS, "other"))
    print(
        f"{row['network']:<28}{row['method']:<10}{row['stack']:9,.1f}{row['bare']:9,.1f}"
        f"{row['stack'] / row['bare']:8.3f}{row['stack_bytes'] / 1e6:8,.0f}"
        f"{row['bare_bytes'] / 1e6:8,.0f} {parts}",
        flush=True,
    )


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """All networks, then the workers, printed as they come; returns the title and the record."""
    tasks = {
        network: {
            method: make_task(arguments, network, method, folder) for method in arguments.methods
        }
        for network in arguments.networks
    }
    first = tasks[arguments.networks[0]][arguments.methods[0]]
    heading = title(first)
    steps = first.images // first.experiment.train.batch_size
    print(f"{heading}: images/s, {steps} steps an epoch, {arguments.rounds} rounds; memory in MB")
    columns = "".join(f"{part:>10}" for part in (*PARTS, "other"))
    print(f"{'':<38}{'stack':>9}{'bare':>9}{'ratio':>8}{'stack':>8}{'bare':>8} {columns}")
    rows = []
    for network, of_network in tasks.items():
        for method, result in race(of_network, arguments.rounds).items():
            parts = shares(of_network[method])
            rows.append({"network": network, "method": method, **result, "parts": parts})
            print_network(rows[-1])
    record: dict[str, Any] = {"networks": rows, "workers": {}}
    if arguments.workers > 1:
        record["workers"] = race_workers(first, arguments.workers)
    for name, speed in record["workers"].items():
        print(f"{arguments.networks[0]} {arguments.methods[0]}, {name}: {speed:,.1f} images/s")
    return heading, record


def default_workers() -> int:
    """The GPUs, or two workers without one; one without Ray."""
    if importlib.util.find_spec("ray") is None:
        return 1
    return torch.cuda.device_count() or 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", help="of the experiment, as train.batch_size=64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    networks = ["resnet18(form=imagenet)", "resnet50(form=imagenet)"]
    parser.add_argument("--networks", nargs="+", default=networks)
    parser.add_argument("--methods", nargs="+", default=["float", "ternary"])
    parser.add_argument("--dataset", help="its images, made up; imagenet, or tinyimagenet on a CPU")
    parser.add_argument("--steps", type=int, default=8, help="in an epoch")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workers", type=int, help="one per GPU, or 2; 1: do not compare workers")
    parser.add_argument("--record", type=Path, help="JSON file to add to, docs/training.json")
    arguments = parser.parse_intermixed_args()
    # Without a GPU the profiler would complain that it finds none.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if arguments.workers is None:
        arguments.workers = default_workers()
    try:
        with tempfile.TemporaryDirectory() as folder:
            heading, record = measure(arguments, Path(folder))
    except (PipelineError, DataError) as error:
        parser.exit(2, f"{error}\n")
    if arguments.record:
        known = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        arguments.record.write_text(json.dumps(known | {heading: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
