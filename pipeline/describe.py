"""What can be looked at without running: the catalog, an experiment, what a run would do."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.datasets import DATASETS, Dataset
from models.registry import declared
from pipeline.config import Experiment, PipelineError, flatten, nearest
from pipeline.experiments import catalog, chapters
from pipeline.recipes import RECIPES
from pipeline.sections import without_credentials

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from models import Profile

#: Of the layers of one scheme a dry run names so many.
_MOST_NAMES = 8


def console() -> Console:
    """Where text for people goes: standard output."""
    from rich.console import Console

    # Without a terminal there is no width to keep; lines stay whole for grep and log files.
    return Console(
        highlight=False,
        soft_wrap=not sys.stdout.isatty(),
        width=None if sys.stdout.isatty() else 160,
    )


def list_parts(pattern: str) -> None:
    """Print the experiments, networks, methods and recipes that match a pattern.

    Of a data set, a network or a method that has that very name, print what is known of it.

    Raises:
        PipelineError: where nothing matches.
    """
    parts = {"network": declared("backbone"), "method": declared("method")}
    if pattern in DATASETS:
        _explain_dataset(DATASETS[pattern])
        return
    if any(pattern == part.name for declarations in parts.values() for part in declarations):
        _explain(pattern)
        return
    tables = [*_experiments(pattern), _datasets(pattern)]
    for kind, declarations in parts.items():
        tables.append(_table((kind, "what it is")))
        for part in declarations:
            if fnmatch.fnmatch(part.name, pattern):
                note = f" ({part.note})" if part.note else ""
                tables[-1].add_row(part.name, part.summary + note)
    tables.append(_table(("recipe", "what it is")))
    for name, named in RECIPES.items():
        if fnmatch.fnmatch(name, pattern):
            tables[-1].add_row(name, named.what)
    if not any(table.row_count for table in tables):
        raise PipelineError(
            f"no experiment, data set, network, method or recipe matches {pattern!r}"
            f"{nearest(pattern, [*catalog(), *DATASETS, *RECIPES])}"
        )
    screen = console()
    for table in tables:
        if table.row_count:
            screen.print(table)
    screen.print("--list NAME explains a data set, network or method", markup=False)


def _table(titles: Sequence[str], right: Sequence[str] = ()) -> Table:
    """A table with columns of these titles, the first one in bold, some aligned to the right."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, title_justify="left", title_style="bold")
    for title in titles:
        bold = "bold" if title == titles[0] else None
        table.add_column(title, justify="right" if title in right else "left", style=bold)
    return table


def _experiments(pattern: str) -> list[Table]:
    """A table for each chapter of the catalog, with columns of the same width."""
    titles = ("experiment", "what it is", "top-1", "top-5")
    found = {
        title: [entry for entry in entries if fnmatch.fnmatch(entry.name, pattern)]
        for title, entries in chapters().items()
    }
    width = max((len(entry.name) for entries in found.values() for entry in entries), default=0)
    tables = []
    for title, entries in found.items():
        table = _table(titles, right=titles[2:])
        table.title = title
        table.columns[0].min_width = width
        for entry in entries:
            assert entry.reference is not None
            accuracies = (entry.reference.top1, entry.reference.top5)
            published = ["-" if value is None else f"{value:.2f}" for value in accuracies]
            table.add_row(entry.name, entry.reference.text, *published)
        tables.append(table)
    return tables


def _datasets(pattern: str) -> Table:
    titles = ("data set", "what it is", "classes", "size", "train + test images")
    table = _table(titles, right=titles[2:])
    for row in DATASETS.values():
        if fnmatch.fnmatch(row.name, pattern):
            classes = "yours" if row.classes is None else f"{row.classes:,}"
            counts = " + ".join(f"{count:,}" for count in row.counts.values())
            table.add_row(row.name, row.title, classes, str(row.image_size), counts or "yours")
    return table


def _explain_dataset(row: Dataset) -> None:
    """Print what is known of a data set, and what has to lie where."""
    storage = "pixel by pixel"
    if row.storage is not None:
        side = f"at most {row.storage.side} pixels" if row.storage.side else "their own size"
        storage = f"{row.storage.format}, {side}"
        if row.storage.format != "raw":
            storage += f", quality {row.storage.quality}"
    size = sum(download.bytes for download in row.downloads) / 1e6
    lines = {
        "classes": "those of the folder" if row.classes is None else f"{row.classes:,}",
        "images": " + ".join(f"{count:,} {split}" for split, count in row.counts.items()),
        "seen at": f"{row.image_size}x{row.image_size} pixels, {row.channels} channels",
        "kept as": storage,
        "raw files": row.raw,
        "looked for": f"data.raw, else <data.root>/{row.name}",
        "download": f"{size:,.0f} MB" if size else ("yes" if row.downloads else "none"),
        "license": row.license,
        "source": row.source,
    }
    screen = console()
    screen.print(f"data set {row.name}: {row.title}\n", markup=False)
    for name, text in lines.items():
        if text:
            screen.print(f"{name:<12}{text}", markup=False)


def _explain(name: str) -> None:
    """Print the text of a network or method, its options and its short forms."""
    import models

    part = models.explain(name)
    screen = console()
    note = f" ({part.note})" if part.note else ""
    screen.print(f"{part.kind} {name}{note}\n\n{part.text}\n", markup=False)
    if part.short_forms:
        screen.print(f"short forms: {', '.join(part.short_forms)}", markup=False)
    table = _table(("option", "default", "values"))
    for option in part.options:
        table.add_row(option.name, option.default, option.values)
    if part.options:
        screen.print(table)


def describe(experiment: Experiment, notes: Sequence[str]) -> None:
    """Print notes, then the settings of an experiment, its layers and what they cost."""
    import models

    screen = console()
    about = models.backbone_note(experiment.backbone)
    if about:
        notes = [*notes, f"{experiment.backbone}: {about}"]
    for note in notes:
        screen.print(note, markup=False)
    for key, value in flatten(experiment.model_dump(mode="json")).items():
        screen.print(f"{key:<28}{'none' if value is None else value}", markup=False)
    _print_layers(screen, experiment)


def _print_layers(screen: Console, experiment: Experiment) -> None:
    profile, image_size = _profile(experiment)
    sizes = ("parameters", "bits", "MACs", "stored bytes")
    titles = ("layer", "kind", "output", "parameters", "bits", "scheme", "MACs", "stored bytes")
    table = _table(titles, right=sizes)
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
    screen.print(table)
    for line in _costs(profile, image_size):
        screen.print(line)


def _costs(profile: Profile, image_size: int) -> list[str]:
    """What the layers add up to for images of a size, where it is more than a column's sum."""
    learned = f"{profile.learned:,} learned"
    if profile.frozen:
        learned += f", {profile.frozen:,} frozen"
    if profile.masked:
        learned += f"; {profile.masked:,} pre-defined zeros are not among them"
    by_bits = ", ".join(f"{count:,} at {bits:g} bits" for bits, count in profile.by_bits.items())
    stored = (
        f"{profile.stored_bytes:,} bytes against {profile.float32_bytes:,} of this network in "
        f"float32: {profile.ratio:.1f}x smaller"
    )
    operations = f"MACs       {profile.macs:,} at {image_size}x{image_size}"
    if profile.nominal_macs != profile.macs:
        operations += f", {profile.nominal_macs:,} with those by padding alone and by the zeros "
        operations += "around patterns in a larger kernel"
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


def _profile(experiment: Experiment) -> tuple[Profile, int]:
    """The network in evaluation and use, and the height and width of its images there."""
    import models
    from pipeline.inputs import dataset_of, evaluation_size
    from pipeline.loop import build_model

    dataset = dataset_of(experiment)
    size = evaluation_size(experiment.train, dataset)
    return models.profile(build_model(experiment, dataset), size), size


def _changed_layers(profile: Profile) -> list[str]:
    """A line for each scheme in which a method stores weights, and the layers that have it."""
    schemes: dict[str, list[str]] = {}
    for layer in profile.layers:
        if layer.scheme != "float32":
            schemes.setdefault(layer.scheme, []).append(layer.name)
    lines = []
    for scheme, names in schemes.items():
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        lines.append(f"{len(names)} {scheme}: {', '.join(names[:_MOST_NAMES])}{more}")
    return lines or ["all float32"]


def dry_run(experiment: Experiment, notes: Sequence[str]) -> None:
    """Print notes, then what a run would do. Writes nothing."""
    from pipeline.materials import check

    dataset = check(experiment)
    import models

    lines = [("note", note) for note in notes]
    lines += _planned_weights(experiment)
    lines.append(("prepare", _planned_data(experiment, dataset)))
    lines += _planned_training(experiment, dataset)
    lines += [("layers", line) for line in _changed_layers(_profile(experiment)[0])]
    about = models.backbone_note(experiment.backbone)
    if about:
        lines.append(("note", f"{experiment.backbone}: {about}"))
    lines += _planned_places(experiment)
    screen = console()
    for name, text in [*lines, ("", "nothing was written")]:
        screen.print(f"{name:<9}{text}", markup=False)


def _planned_weights(experiment: Experiment) -> list[tuple[str, str]]:
    """Where the weights come from that the experiment names."""
    sources = {"from": experiment.init_from, "of the teacher": experiment.train.teacher}
    if not any(sources.values()):
        return []
    from pipeline.weight_sources import whereabouts

    return [
        ("weights", f"{use} {source}, {whereabouts(source, experiment)}")
        for use, source in sources.items()
        if source is not None
    ]


def _planned_data(experiment: Experiment, dataset: Dataset) -> str:
    import data_prep
    from pipeline.inputs import source_options

    try:
        plan = data_prep.plan(dataset, **source_options(experiment))
    except data_prep.DataError as error:
        raise PipelineError(str(error)) from None
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in plan.files.items())
    how = "ready in" if plan.ready else f"would be made from {plan.source} in"
    return f"{files} {how} {plan.folder}"


def _planned_training(experiment: Experiment, dataset: Dataset) -> list[tuple[str, str]]:
    """How many runs of how many steps, where, and at which rate."""
    from pipeline import launch
    from pipeline.inputs import training_images
    from pipeline.materials import rate_note

    lines = []
    epochs, batch, seeds = experiment.train.epochs, experiment.train.batch_size, experiment.seeds
    steps = (training_images(experiment, dataset) or 0) // batch
    total = f"{seeds * epochs * steps:,} in all"
    if seeds > 1:
        last = experiment.seed + seeds - 1
        lines.append(("seeds", f"{seeds} runs, seeds {experiment.seed} to {last}"))
        total += f" {seeds} runs"
    where = launch.planned_workers(experiment).description
    lines.append(
        ("train", f"{epochs} epochs of {steps:,} steps of {batch} images, {total}, on {where}")
    )
    rate = rate_note(experiment.train)
    if rate is not None:
        lines.append(("train", rate))
    return lines


def _planned_places(experiment: Experiment) -> list[tuple[str, str]]:
    """Where a run would be kept."""
    runs = experiment.tracking.runs.absolute()
    folders = "a new folder" if experiment.seeds == 1 else "a folder for each, and one for all,"
    settings = experiment.checkpoint
    kept = without_credentials(settings.folder) if settings.folder else "the run folder"
    within = ""
    if settings.steps is not None:
        within = f" and every {settings.steps:,} steps"
    elif settings.minutes is not None:
        within = f" and every {settings.minutes:g} minutes"
    lines = [
        ("run", f"{folders} in {runs / experiment.name}"),
        ("keep", f"a checkpoint after each epoch{within}, in {kept}"),
    ]
    if experiment.tracking.enabled:
        uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        address = without_credentials(uri) if uri else runs / "mlflow.db"
        lines.append(("track", f"MLflow, {address}"))
        if experiment.tracking.register_model:
            lines.append(("register", f"models:/{experiment.name}"))
    return lines
