"""Versions in tables: all there are, and two of them side by side."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Experiment, PipelineError, flatten
from pipeline.registry.predictions import NotComparableError
from pipeline.registry.predictions import compare as compare_predictions
from pipeline.registry.promotion import SIGNIFICANCE, p_value
from pipeline.registry.versions import (
    Version,
    fetch_experiment,
    find_version,
    list_versions,
    parse_reference,
    read_predictions,
    short_commit,
)
from pipeline.runlist import setting_text
from pipeline.settings import load_yaml
from pipeline.stores import TrackingStore

if TYPE_CHECKING:
    from rich.table import Table

#: Settings that say where something ran, not what was trained.
_WHERE = ("tracking.", "scaling.", "checkpoint.", "data.processes", "data.threads", "data.cache")

_NOT_SAID = "-"


def list_models(store: TrackingStore, pattern: str = "*") -> Table:
    """The versions of all models whose names match a pattern, the newest first.

    Raises:
        PipelineError: there is none, or the store is away.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    versions = list_versions(store, pattern)
    if not versions:
        what = "" if pattern == "*" else f" whose name matches {pattern!r}"
        raise PipelineError(f"{store.uri} has no registered model{what}; train one first")
    # The name says data and method; with more columns a line would not fit on a screen.
    table = Table(
        *("model", "alias", "top-1 (95 %)", "bytes", "registered"),
        box=SIMPLE,
        title=f"{len(versions)} in {store.uri}",
        title_justify="left",
        collapse_padding=True,
    )
    for column in table.columns:
        column.no_wrap = True
        column.justify = "right" if column.header == "bytes" else "left"
    for version in versions:
        row = (
            _short_name(version),
            "\n".join(version.aliases),
            _accuracy(version),
            _number(version, "stored_bytes"),
            f"{version.created:%Y-%m-%d}",
        )
        table.add_row(*map(Text, row))
    return table


def compare(store: TrackingStore, a: str, b: str) -> Table:
    """Two versions side by side, and whether one is significantly better.

    Args:
        a, b: references, see ``parse_reference``.

    Raises:
        PipelineError: there is no such version, or the store is away.
    """
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    first, second = (find_version(parse_reference(text), store) for text in (a, b))
    table = Table("", _short_name(first), _short_name(second), box=SIMPLE)
    table.columns[0].style, table.columns[0].no_wrap = "bold", True
    rows: list[tuple[str, ...]] = [
        ("alias", *(", ".join(version.aliases) or _NOT_SAID for version in (first, second))),
        ("top-1 (95 %)", *map(_accuracy, (first, second))),
        *_paired(first, second, store),
    ]
    for title, key in (("stored bytes", "stored_bytes"), ("file bytes", "packed_bytes")):
        rows.append((title, *(_number(version, key) for version in (first, second))))
    for title, key in (("MACs", "macs"), ("parameters", "parameters")):
        rows.append((title, *(_number(version, key) for version in (first, second))))
    rows += [(f"{key} =", *values) for key, *values in _setting_differences(first, second, store)]
    rows.append(("data", *(_tag(each, "data.fingerprint")[:12] for each in (first, second))))
    rows.append(("code", *(short_commit(_tag(each, "git_commit")) for each in (first, second))))
    rows.append(("run", *(version.run_id or _NOT_SAID for version in (first, second))))
    rows.append(("registered", *(f"{each.created:%Y-%m-%d %H:%M}" for each in (first, second))))
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _paired(first: Version, second: Version, store: TrackingStore) -> list[tuple[str, ...]]:
    """What the answers to each single test image say of the two."""
    try:
        found = compare_predictions(read_predictions(first, store), read_predictions(second, store))
    except NotComparableError as error:
        return [("compared", f"not image by image: {error}", "")]
    verdicts = [
        f"{'significantly' if p < SIGNIFICANCE else 'not significantly'} better ({p_value(p)})"
        for p in (found.p_first, found.p_second)
    ]
    return [
        ("only this one right", f"{found.only_first:,} images", f"{found.only_second:,} images"),
        ("compared", *verdicts),
    ]


def _setting_differences(
    first: Version, second: Version, store: TrackingStore
) -> list[tuple[str, str, str]]:
    """Settings of the two trainings that differ, under dotted keys."""
    settings = [_settings(version, store) for version in (first, second)]
    if None in settings:
        return []
    one, other = (each or {} for each in settings)
    return [
        (key, setting_text(one.get(key)), setting_text(other.get(key)))
        for key in {**one, **other}
        if one.get(key) != other.get(key) and not key.startswith(_WHERE)
    ]


def _settings(version: Version, store: TrackingStore) -> dict[str, object] | None:
    """Of the experiment that trained a version; None where it has none that can be read."""
    with tempfile.TemporaryDirectory(prefix="ternforge-") as scratch:
        path = fetch_experiment(version, store, Path(scratch))
        if path is None:
            return None
        try:
            experiment: Experiment = load_yaml(path)
        except PipelineError as error:
            raise PipelineError(f"{version}: {error}".replace(f"{path}", path.name)) from None
    return flatten(experiment.model_dump(mode="json", exclude={"name", "reference"}))


def _short_name(version: Version) -> str:
    """As the user would write it."""
    return f"{version.name}@{version.number}"


def _tag(version: Version, key: str) -> str:
    return version.tags.get(key, _NOT_SAID)


def _number(version: Version, key: str) -> str:
    """A whole number in a tag, for people."""
    text = _tag(version, key)
    return f"{int(text):,}" if text.isdecimal() else text


def _accuracy(version: Version) -> str:
    """Top-1 accuracy and its interval, in percent; as far as the tags are what we write."""
    try:
        top1 = float(_tag(version, "top1"))
        low, high = map(float, version.tags.get("top1_interval", "").split())
    except ValueError:
        return _tag(version, "top1")
    return f"{top1:.2f} ({low:.2f}-{high:.2f})"
