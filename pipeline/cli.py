"""The command line: arguments, what can be looked at without running, and errors in one line."""

from __future__ import annotations

import argparse
import io
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.config import Experiment, PipelineError, nearest
from pipeline.describe import console, describe, dry_run, list_parts
from pipeline.experiments import check_parts, data_only, load_experiment, untuned_note
from pipeline.runlist import UnclearRunError
from pipeline.sections import without_credentials
from pipeline.settings import load_yaml, override, parse_overrides, without_effect
from pipeline.use.options import add_options, read_request

_DESCRIPTION = "Train an efficient image classifier from raw images to a registered model."
_EPILOG = """\
examples:
  python run.py --experiment digits_lenet5_ternary
  python run.py --experiment mnist_lenet5 train.epochs=3 "method=ternary(expansion=4)"
  python run.py --describe mnist_lenet5_ternary --yaml > mine.yaml
  python run.py --config mine.yaml --dry-run
  python run.py --prepare folder data.raw=~/pictures/birds
  python run.py --predict digits_lenet5_ternary digit.png

A name is DATASET_BACKBONE[_METHOD[_RECIPE]]. Settings are those that --describe shows.
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
    what.add_argument(
        "--prepare", metavar="DATASET", help="only prepare a data set, or an experiment's"
    )
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
        "--list",
        nargs="?",
        const="*",
        metavar="GLOB",
        help="show experiments, data sets, networks, methods, recipes",
    )
    look.add_argument("--describe", metavar="NAME", help="settings, layers, bits, MACs, size")
    look.add_argument(
        "--inspect", metavar="DATASET", help="a picture of training batches, of an experiment too"
    )
    look.add_argument("--yaml", action="store_true", help="with --describe: settings as YAML")
    look.add_argument("--help", "-h", action="store_true", help="show this text")
    add_options(parser)
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
        if isinstance(error, UnclearRunError) and error.runs:
            console().print(error.table())
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
    words, said = [], []
    for word, before in zip(arguments, ["", *arguments], strict=False):
        is_run = before == "--resume" and "=" not in word and not word.startswith("-")
        if is_run or word.partition("=")[0] == "--resume":
            continue
        key, equals, value = word.partition("=")
        words.append(f"{key}{equals}{without_credentials(value)}")
        if words[-1] != word:
            said.append(key)
    command = shlex.join([sys.executable, sys.argv[0], *words, "--resume", run])
    note = f" (with the password of {' and '.join(said)})" if said else ""
    return f"; continue with: {command}{note}"


def _dispatch(arguments: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_intermixed_args(list(arguments))
    # These take an optional word; a setting behind them is not that word.
    for name, bare in (("resume", True), ("list", "*"), ("models", "*")):
        value = getattr(options, name)
        if isinstance(value, str) and "=" in value:
            options.settings.append(value)
            setattr(options, name, bare)
    if options.help or not arguments:
        parser.print_help()
        return 0
    request = read_request(options)
    if request is not None:
        from pipeline.use.commands import carry_out

        carry_out(request)
        return 0
    if options.list is not None:
        if len(arguments) > 1 + (options.list != "*"):
            raise PipelineError("--list goes alone, or with a pattern: --list 'mnist*'")
        list_parts(options.list)
        return 0
    if options.resume is not False and (options.dry_run or options.describe):
        raise PipelineError("--resume runs; it does not go with --dry-run or --describe")
    if options.describe and options.dry_run:
        raise PipelineError("give one of --describe and --dry-run, not both")
    if options.prepare or options.inspect:
        _prepare(options)
        return 0
    experiment = _experiment(options)
    if options.yaml:
        print(experiment.to_yaml(), end="")
    elif options.describe:
        describe(experiment, _notes(experiment, options))
    elif options.dry_run:
        dry_run(experiment, _notes(experiment, options))
    else:
        _run(experiment, options)
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    named = [name for name in ("experiment", "config", "describe") if getattr(options, name)]
    if len(named) != 1:
        if not named:
            word = next((word for word in options.settings if "=" not in word), "NAME")
            raise PipelineError(f"name an experiment: --experiment {word}; --list has the catalog")
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


def _notes(experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """What is to be known of the experiment beforehand, a line each."""
    notes = without_effect(experiment, options.settings)
    untuned = untuned_note(experiment)
    if options.config and untuned:
        untuned = f"{experiment.name} is untuned: no curated experiment; recipe of {options.config}"
    return [*notes, untuned] if untuned else notes


def _prepare(options: argparse.Namespace) -> None:
    """Prepare the data of a data set or an experiment; with ``--inspect`` draw its batches."""
    others = ("prepare", "inspect", "experiment", "config", "describe", "dry_run", "resume")
    named = [name for name in (*others, "smoke", "yaml") if getattr(options, name)]
    if len(named) > 1:
        raise PipelineError(f"--{named[0]} goes alone, not with --{named[1].replace('_', '-')}")
    experiment = override(data_only(options.prepare or options.inspect), options.settings)
    idle = [key for key in parse_overrides(options.settings) if not key.startswith("data.")]
    if idle and options.prepare:
        raise PipelineError(f"{idle[0]} has no effect on --prepare; its settings begin with data.")
    from pipeline.contact_sheet import write_contact_sheet
    from pipeline.display import Display
    from pipeline.materials import find_data, prepare

    with Display(console()) as display:
        for line in without_effect(experiment, options.settings):
            display.note(line)
        manifest = prepare(experiment, find_data(experiment), display)
        if options.inspect:
            path = experiment.tracking.runs / "inspect" / f"{options.inspect}.png"
            write_contact_sheet(experiment, manifest, path)
            display.stage("inspect", str(path.absolute()))
        else:
            display.stage("files", f"{manifest.bytes / 1e6:,.0f} MB in {manifest.folder}")


def smoke(experiment: Experiment) -> Experiment:
    """The experiment's smoke form: its own network and recipe, two steps on made-up images.

    What does not fit into two steps is left out. It runs in this process and keeps its runs and
    registered models in a store of their own.
    """
    recipe = experiment.train
    held_out = 8 if recipe.validation else 0
    settings = {
        "seeds": 1,
        "init_from": "none",
        "train.teacher": "none",
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.accumulation": min(recipe.accumulation, 2),
        "train.validation": held_out,
        "train.warmup_epochs": 0,
        "train.growth_epochs": "[0,1]" if recipe.first_image_size else "[0,0]",
        "train.sync_batchnorm": "false",
        "train.compile": "none",
        "data.synthetic": f"[{16 + held_out},16]",
        "scaling.launcher": "local",
    }
    runs = experiment.tracking.runs / "smoke"
    settings["tracking.runs"] = runs
    settings["tracking.uri"] = f"sqlite:///{runs.absolute() / 'mlflow.db'}"
    return override(experiment, [f"{key}={value}" for key, value in settings.items()])


def _run(experiment: Experiment, options: argparse.Namespace) -> None:
    from pipeline.display import Display
    from pipeline.report import next_commands, seeds_summary, summary
    from pipeline.seeds import run_seeds
    from pipeline.stages import run

    display = Display(console())
    for line in _notes(experiment, options):
        display.note(line)
    if experiment.seeds > 1:
        results = run_seeds(experiment, resume=options.resume, display=display)
        table, uri, model = seeds_summary(results), results.tracking_uri, results.model
    else:
        result = run(experiment, resume=options.resume, display=display)
        table, uri = summary(result), result.tracking_uri
        model = result.model.uri if result.model is not None else None
    display.console.print(table)
    for label, command in next_commands(experiment.tracking, uri, model):
        # Whole and literal, so that it can be copied from a narrow terminal too.
        display.console.print(f"{label:<8}{command}", markup=False, soft_wrap=True)
