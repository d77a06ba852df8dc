"""The command line: arguments, what can be looked at without running, and errors in one line."""

from __future__ import annotations

import argparse
import fnmatch
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from models.registry import declared
from pipeline.config import (
    Experiment,
    PipelineError,
    flatten,
    load_yaml,
    nearest,
    override,
    without_effect,
)
from pipeline.experiments import catalog, check_parts, load_experiment

if TYPE_CHECKING:
    from rich.console import Console

    from models import Profile

_DESCRIPTION = "Train an efficient image classifier from raw images to a registered model."
_EPILOG = """\
examples:
  python run.py --experiment digits_lenet5_ternary
  python run.py --experiment mnist_lenet5 train.epochs=3 "method=ternary(expansion=4)"
  python run.py --describe mnist_lenet5_ternary --yaml > mine.yaml
  python run.py --config mine.yaml --dry-run

A name is DATASET_BACKBONE[_METHOD]. Settings are those that --describe shows.
"""


class _Parser(argparse.ArgumentParser):
    """Errors take one line and name the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            options = [option for option in self._option_string_actions if len(option) > 2]
            message = f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], options)}"
        raise PipelineError(message)


def _parser() -> _Parser:
    parser = _Parser(
        prog="run.py",
        usage="run.py --experiment NAME [options] [setting=value ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument("--experiment", metavar="NAME", help="an experiment of the catalog or any")
    what.add_argument("--config", metavar="FILE", type=Path, help="an experiment written as YAML")
    what.add_argument("settings", nargs="*", metavar="setting=value", help="train.epochs=3, ...")
    how = parser.add_argument_group("how to run it")
    how.add_argument("--smoke", action="store_true", help="seconds: made-up images, two steps")
    how.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="RUN",
        help="continue an unfinished run of the same settings",
    )
    how.add_argument("--dry-run", action="store_true", help="say what would happen, write nothing")
    look = parser.add_argument_group("look, do not run")
    look.add_argument(
        "--list", nargs="?", const="*", metavar="GLOB", help="show experiments, networks, methods"
    )
    look.add_argument("--describe", metavar="NAME", help="settings, layers, bits, MACs, size")
    look.add_argument("--yaml", action="store_true", help="with --describe: settings as YAML")
    look.add_argument("--help", "-h", action="store_true", help="show this text")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code (0, 1 failed, 2 bad input, 130 interrupted)."""
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return _dispatch(arguments)
    except PipelineError as error:
        print(f"error: {error}{_how_to_continue(arguments, error.run)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        run = getattr(interrupt, "run", None)
        print(f"interrupted{_how_to_continue(arguments, run)}", file=sys.stderr)
        return 128 + (received[0] if received else signal.SIGINT)
    except BrokenPipeError:
        print("error: nobody reads the output any more", file=sys.stderr)
        return 1


def _how_to_continue(arguments: Sequence[str], run: str | None) -> str:
    """What to add to a message: the command that goes on with this run."""
    if run is None:
        return ""
    words = [word for word in arguments if word != run and not word.startswith("--resume")]
    command = shlex.join([sys.executable, sys.argv[0], *words, "--resume", run])
    return f"; continue with: {command}"


def _dispatch(arguments: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_intermixed_args(list(arguments))
    # `--resume` and `--list` take an optional word; a setting behind them is not that word.
    for name, bare in (("resume", True), ("list", "*")):
        value = getattr(options, name)
        if isinstance(value, str) and "=" in value:
            options.settings.append(value)
            setattr(options, name, bare)
    if options.help or not arguments:
        parser.print_help()
        return 0
    if options.list is not None:
        if len(arguments) > 1 + (options.list != "*"):
            raise PipelineError("--list goes alone, or with a pattern: --list 'mnist*'")
        _list(options.list)
        return 0
    if options.resume is not False and (options.dry_run or options.describe):
        raise PipelineError("--resume runs; it does not go with --dry-run or --describe")
    if options.describe and options.dry_run:
        raise PipelineError("give one of --describe and --dry-run, not both")
    experiment = _experiment(options)
    if options.describe:
        _describe(experiment, options.yaml)
    elif options.dry_run:
        _dry_run(experiment, options.settings)
    else:
        _run(experiment, options)
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    named = [name for name in ("experiment", "config", "describe") if getattr(options, name)]
    if len(named) != 1:
        if not named:
            raise PipelineError("name an experiment: --experiment NAME; --list shows the catalog")
        raise PipelineError(f"give one of --{' and --'.join(named)}, not both")
    if options.yaml and not options.describe:
        raise PipelineError("--yaml goes with --describe NAME")
    base = (
        load_yaml(options.config)
        if options.config
        else load_experiment(options.experiment or options.describe)
    )
    if options.smoke:
        base = smoke(base)
    experiment = override(base, options.settings)
    check_parts(experiment)
    return experiment


def smoke(experiment: Experiment) -> Experiment:
    """The experiment's smoke form: its own network and recipe, two steps on made-up images.

    It runs in this process and keeps its runs and registered models in a store of their own.
    """
    runs = experiment.tracking.runs / "smoke"
    return override(
        experiment,
        [
            "train.epochs=1",
            "train.batch_size=8",
            "train.warmup_epochs=0",
            "data.synthetic=[16,16]",
            "scaling.launcher=local",
            f"tracking.runs={runs}",
            f"tracking.uri=sqlite:///{runs.absolute() / 'mlflow.db'}",
        ],
    )


def _run(experiment: Experiment, options: argparse.Namespace) -> None:
    from pipeline.display import Display
    from pipeline.report import next_commands, summary
    from pipeline.stages import run

    display = Display(_console())
    for line in without_effect(experiment, options.settings):
        display.note(line)
    if not experiment.tuned:
        display.note(f"{experiment.name} is untuned: no curated recipe, the default one is used")
    result = run(experiment, resume=options.resume, display=display)
    display.console.print(summary(result))
    for label, command in next_commands(result):
        # Whole and literal, so that it can be copied from a narrow terminal too.
        display.console.print(f"{label:<8}{command}", markup=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    # Without a terminal there is no width to keep; lines stay whole for grep and log files.
    return Console(
        highlight=False,
        soft_wrap=not sys.stdout.isatty(),
        width=None if sys.stdout.isatty() else 160,
    )


def _list(pattern: str) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    experiments = Table(box=SIMPLE)
    experiments.add_column("experiment", style="bold", no_wrap=True)
    experiments.add_column("reproduces")
    experiments.add_column("published top-1", justify="right")
    for name, entry in catalog().items():
        if fnmatch.fnmatch(name, pattern):
            assert entry.reference is not None
            published = f"{entry.reference.top1:.2f}" if entry.reference.top1 else "-"
            what = entry.reference.what
            if entry.reference.source:
                what += f" ({entry.reference.source})"
            experiments.add_row(name, what, published)
    tables = [experiments]
    parts = {"network": declared("backbone"), "method": declared("method")}
    for kind, declarations in parts.items():
        table = Table(box=SIMPLE)
        table.add_column(kind, style="bold", no_wrap=True)
        table.add_column("what it is")
        for declaration in declarations:
            if fnmatch.fnmatch(declaration.name, pattern):
                note = f" ({declaration.note})" if declaration.note else ""
                table.add_row(declaration.name, declaration.summary + note)
        tables.append(table)
    found = [table for table in tables if table.row_count]
    if not found:
        raise PipelineError(
            f"no experiment, network or method matches {pattern!r}{nearest(pattern, catalog())}"
        )
    for table in found:
        _console().print(table)


def _describe(experiment: Experiment, as_yaml: bool) -> None:
    if as_yaml:
        print(experiment.to_yaml(), end="")
        return
    console = _console()
    for key, value in flatten(experiment.model_dump(mode="json")).items():
        console.print(f"{key:<28}{'none' if value is None else value}", markup=False)
    _print_layers(console, experiment)


def _print_layers(console: Console, experiment: Experiment) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    profile = _profile(experiment)
    table = Table(box=SIMPLE)
    table.add_column("layer", style="bold")
    for title in ("kind", "output", "parameters", "bits", "scheme", "MACs", "stored bytes"):
        left = title in ("kind", "output", "scheme")
        table.add_column(title, justify="left" if left else "right")
    for layer in profile.layers:
        table.add_row(
            layer.name,
            layer.kind,
            "x".join(str(size) for size in layer.output_shape),
            f"{layer.parameters:,}",
            f"{layer.bits:g}",
            layer.scheme,
            f"{layer.macs:,}",
            f"{layer.stored_bytes:,}",
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        "",
        f"{profile.parameters:,}",
        "",
        "",
        f"{profile.macs:,}",
        f"{profile.stored_bytes:,}",
    )
    console.print(table)
    for line in _costs(profile):
        console.print(line)


def _costs(profile: Profile) -> list[str]:
    """What the layers add up to, where it is more than the sum of a column."""
    learned = f"{profile.learned:,} learned"
    if profile.frozen:
        learned += f", {profile.frozen:,} frozen"
    if profile.masked:
        learned += f"; {profile.masked:,} pre-defined zeros are not among them"
    by_bits = ", ".join(f"{count:,} at {bits:g} bits" for bits, count in profile.by_bits.items())
    stored = (
        f"{profile.stored_bytes:,} bytes against {profile.float32_bytes:,} as float32: "
        f"{profile.ratio:.1f}x smaller"
    )
    for name, size in profile.by_format.items():
        if size < profile.stored_bytes:
            stored += f"; {size:,} as {name}"
    operations = f"MACs       {profile.macs:,}"
    if profile.nominal_macs != profile.macs:
        operations += f", {profile.nominal_macs:,} with the taps that see only padding"
    if profile.executed_macs != profile.macs:
        operations += f", {profile.executed_macs:,} executed"
    if profile.kept_macs != profile.nominal_macs:
        operations += f", {profile.kept_macs:,} without pre-defined zeros"
    return [
        f"parameters {learned}",
        f"by bits    {by_bits}",
        operations,
        f"memory     {profile.activation_bytes:,} bytes of activations, "
        f"at least {profile.peak_activation_bytes:,} at a time",
        f"stored     {stored}",
    ]


def _profile(experiment: Experiment) -> Profile:
    import data_prep
    import models
    from pipeline.loop import build_model

    return models.profile(
        build_model(experiment), data_prep.get_dataset(experiment.dataset).image_size
    )


def _dry_run(experiment: Experiment, settings: Sequence[str]) -> None:
    from pipeline.stages import check, data_options, training_images

    check(experiment)
    import data_prep
    import models
    from pipeline import launch
    from pipeline.loop import build_model

    lines = [("note", line) for line in without_effect(experiment, settings)]
    try:
        plan = data_prep.plan(experiment.dataset, **data_options(experiment))
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in plan.files.items())
    how = "ready in" if plan.ready else f"would be made from {plan.source} in"
    lines.append(("prepare", f"{files} {how} {plan.folder}"))
    epochs, batch = experiment.train.epochs, experiment.train.batch_size
    steps = training_images(experiment) // batch
    where = launch.device_description(launch.worker_count(experiment))
    total = f"{epochs * steps:,} in all, on {where}"
    lines.append(("train", f"{epochs} epochs of {steps:,} steps of {batch} images, {total}"))
    quantized = [name for name, _ in models.quantized_layers(build_model(experiment))]
    names = ", ".join(quantized) or "none"
    lines.append(("layers", f"{len(quantized)} quantized by {experiment.method}: {names}"))
    runs = experiment.tracking.runs.absolute()
    folder = runs / experiment.name
    lines.append(("run", f"a new folder in {folder}, a checkpoint per epoch"))
    if experiment.tracking.enabled:
        uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        address = re.sub("//[^/@]*@", "//", uri) if uri else runs / "mlflow.db"
        lines.append(("track", f"MLflow, {address}"))
        if experiment.tracking.register_model:
            lines.append(("register", f"models:/{experiment.name}"))
    console = _console()
    for name, text in [*lines, ("", "nothing was written")]:
        console.print(f"{name:<9}{text}", markup=False)
