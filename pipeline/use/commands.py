"""What the options that use a model do: results on standard output, progress beside it."""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, Field, PositiveInt
from rich.cells import cell_len
from rich.console import Console

from data_prep.raw.names import printable
from pipeline.config import PipelineError
from pipeline.describe import console
from pipeline.display import Display
from pipeline.settings import parse_overrides
from pipeline.use.model import BATCH_SIZE, UsableModel, open_model, open_registry
from pipeline.use.options import ActionSettings, Request

if TYPE_CHECKING:
    from pipeline.use.prediction import Prediction

#: Without --top, so many classes of each image are named.
_TOP = 5

#: Longer names do not move the columns of a prediction.
_WIDEST_FILE, _WIDEST_CLASS = 60, 24


def carry_out(request: Request) -> None:
    """Do what is asked for.

    Raises:
        PipelineError: one line, when it cannot be done.
    """
    action = {
        "evaluate": _evaluate,
        "predict": _predict,
        "export": _export,
        "benchmark": _benchmark,
        "models": _list_models,
        "compare": _compare,
        "promote": _promote,
    }[request.action]
    try:
        action(request)
    except BrokenPipeError:
        raise
    except OSError as error:  # a place that the user has named, or a disk that is full
        place = printable(str(error.filename or "the results"))
        raise PipelineError(f"cannot use {place}: {error.strerror or error}") from error


def _progress() -> Display:
    """Progress and notes go to standard error, so that results can be piped."""
    screen = Console(stderr=True, highlight=False, soft_wrap=True)
    return Display(screen)


def _print_json(value: object) -> None:
    print(json.dumps(value, allow_nan=False), flush=True)


def _batch_size(request: Request) -> int:
    """Images that the network sees together: as the user has set it, or few."""
    return parse_overrides(request.settings).get("train.batch_size", BATCH_SIZE)


def _evaluate(request: Request) -> None:
    from pipeline.use.evaluation import evaluate_model
    from pipeline.use.tables import evaluation_tables

    options = request.options
    with _progress() as display:
        model = open_model(options.evaluate, request.settings)
        found = evaluate_model(model, display, options.dataset, _batch_size(request))
    if options.json:
        _print_json(found.to_dict())
        return
    for table in evaluation_tables(found):
        console().print(table)


def _predict(request: Request) -> None:
    from pipeline.use.prediction import Refused, find_images, predict

    options = request.options
    model = open_model(options.predict, request.settings)
    found = find_images(request.words)
    with _progress() as display:
        for refused in found.refused:
            display.note(f"skipped {refused}")
        if found.others:
            are = "is" if found.others == 1 else "are"
            display.note(f"{found.others:,} of the files {are} no image, by name or by content")
        if not found.files:
            raise PipelineError(f"no images in {', '.join(map(printable, request.words))}")
        columns = _Columns(found.files, model)
        # On a terminal the lines themselves show how far it is; a bar would be in their way.
        is_shown = not console().is_terminal
        predicted = 0
        batch_size = _batch_size(request)
        answers = predict(model, found.files, top=options.top or _TOP, batch_size=batch_size)
        for done, answer in enumerate(answers):
            if is_shown:
                display.progress("predict", done, len(found.files), f"{len(found.files):,} images")
            if isinstance(answer, Refused):
                display.note(f"skipped {answer}")
                continue
            if options.json:
                _print_json(answer.to_dict())
            else:
                columns.write(answer)
            predicted += 1
    if not predicted:
        raise PipelineError(f"none of the {len(found.files):,} files could be used")


class _Columns:
    """Predictions as lines of columns, below their titles, one after the other."""

    def __init__(self, files: Sequence[Path], model: UsableModel) -> None:
        longest = max(cell_len(printable(str(file))) for file in files)
        self._file_width = min(max(longest, len("image")), _WIDEST_FILE)
        names = map(printable, model.preprocessing.class_names)
        self._class_width = min(max(len("class"), *map(cell_len, names)), _WIDEST_CLASS)
        self._has_titles = False

    def write(self, prediction: Prediction) -> None:
        if not self._has_titles:
            self._write_line("image", "class", "probability", "others")
            self._has_titles = True
        (best, share), *others = prediction.ranked
        rest = ", ".join(f"{printable(name)} {other:.1%}" for name, other in others)
        file = printable(str(prediction.file))
        self._write_line(file, printable(best), f"{share:.1%}", rest)

    def _write_line(self, file: str, best: str, share: str, others: str) -> None:
        columns = (_filled(file, self._file_width), _filled(best, self._class_width))
        print("  ".join([*columns, f"{share:>11}", others]).rstrip(), flush=True)


def _filled(text: str, width: int) -> str:
    """A text with spaces up to a width on the screen, where some letters take two columns."""
    return text + " " * (width - cell_len(text))


def _export(request: Request) -> None:
    from pipeline.use.exporting import ExportSettings, export_model

    options, path = request.options, Path(request.words[0])
    settings = ExportSettings.read(request.own, options.to)
    with _progress() as display:
        model = open_model(options.export, request.settings)
        exported = export_model(model, options.to, path, display, settings)
    for name, text in exported.lines():
        print(f"{name:<9}{text}")


def _listed(text: str) -> list[str]:
    """``1,8,32`` as its parts."""
    return text.split(",")


class BenchmarkSettings(ActionSettings):
    """What to measure, and for how long."""

    batches: Annotated[tuple[PositiveInt, ...], BeforeValidator(_listed)] | None = None
    seconds: Annotated[float, Field(gt=0, le=3600)] = 1.0


def _benchmark(request: Request) -> None:
    from pipeline.use.benchmark import BATCHES, benchmark
    from pipeline.use.speed import benchmark_table

    options = request.options
    wanted = BenchmarkSettings.parse("benchmark", request.own)
    batches = wanted.batches or BATCHES
    with _progress() as display:
        model = open_model(options.benchmark, request.settings)
        found = benchmark(model, display, batches=batches, seconds=wanted.seconds)
    if options.json:
        _print_json(found.to_dict())
        return
    console().print(benchmark_table(found))
    console().print(found.conclusion(), markup=False)


def _list_models(request: Request) -> None:
    from pipeline.registry.overview import list_models

    pattern = request.options.models
    console().print(list_models(open_registry(request.settings), pattern))


def _compare(request: Request) -> None:
    from pipeline.registry.overview import compare

    first, second = request.options.compare
    console().print(compare(open_registry(request.settings), first, second))


def _promote(request: Request) -> None:
    from pipeline.registry.promotion import promote

    options = request.options
    store = open_registry(request.settings)
    print(promote(store, options.promote, options.force, getpass.getuser()))
