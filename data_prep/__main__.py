"""Prepare one data set by itself: ``python -m data_prep imagenet raw=/data/imagenet side=400``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from data_prep import DATASETS, DataError, get_dataset, prepare
from data_prep.datasets import Storage

#: Seconds between two lines of progress.
_REPORT_INTERVAL = 5.0


def _path(text: str) -> Path:
    if not text:
        raise ValueError
    return Path(text)


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def _side(text: str) -> int | None:
    return None if text == "none" else int(text)


@dataclass(frozen=True)
class _Setting:
    """A setting ``name=value``: how its text is read, and what it means."""

    read: Callable[[str], Any]
    help: str


_SETTINGS = {
    "root": _Setting(_path, "folder of raw data sets; default TERNFORGE_DATA, else data"),
    "raw": _Setting(_path, "the data set's own raw folder, zip or tar, instead of <root>/<name>"),
    "prepared": _Setting(_path, "folder of prepared data sets; default prepared"),
    "side": _Setting(_side, "longest side of a stored image in pixels, or none"),
    "format": _Setting(str, "jpg, raw or mixed"),
    "quality": _Setting(int, "of the JPEG encoder, 10 to 100"),
    "passthrough": _Setting(_flag, "keep the bytes of a JPEG that fits, true or false"),
    "max_per_class": _Setting(int, "take only the first so many images of each class"),
    "check_raw": _Setting(_flag, "compare raw files with published checksums, true or false"),
    "bad_share": _Setting(float, "share of images that may be bad, 0 to 1; default 0.001"),
    "processes": _Setting(int, "that decode and encode; default one for each core"),
}


def main(arguments: list[str] | None = None) -> int:
    """Prepare what the command line asks for, and say what is there; 2 is the code of an error."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings, as name=value or data.name=value:\n"
        + "\n".join(f"  {name + '=':15}{setting.help}" for name, setting in _SETTINGS.items()),
    )
    parser.add_argument("dataset", nargs="?", help=", ".join(DATASETS))
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--list", action="store_true", help="list the data sets and end")
    parsed = parser.parse_args(arguments)
    if parsed.list:
        print(_listing())
        return 0
    if parsed.dataset is None:
        parser.error("say which data set, or --list")
    try:
        with _signals_end_once():
            _prepare(parsed.dataset, parsed.settings)
    except DataError as error:
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted: nothing was prepared; a download goes on from where it stopped",
            file=sys.stderr,
        )
        return 130
    return 0


@contextmanager
def _signals_end_once() -> Iterator[None]:
    """Clean up on SIGTERM as after Ctrl-C, and let no second signal disturb that."""
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) != signal.SIG_IGN  # as a shell sets it in the background
    ]
    is_ending = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal is_ending
        if not is_ending:
            is_ending = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_ending else handler)


def _printable(text: str) -> str:
    """The text on one line that any terminal shows; names of files may hold whatever bytes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _listing() -> str:
    rows = []
    for row in DATASETS.values():
        images = " + ".join(f"{count:,}" for count in row.counts.values()) or "any number of"
        rows.append(f"{row.name}: {row.title}, {images} images\n    {row.raw}")
    return "\n".join(rows)


def _prepare(name: str, texts: list[str]) -> None:
    options = {"prepared": Path("prepared")} | _parsed(texts)
    row = get_dataset(name)
    changes = {
        field.name: options.pop(field.name) for field in fields(Storage) if field.name in options
    }
    if changes:
        options["storage"] = replace(row.storage or Storage(), **changes)
    manifest = prepare(row, **options, progress=_Report())
    how = "already prepared" if manifest.reused else "written and verified"
    counts = " + ".join(f"{count:,} {split}" for split, count in manifest.counts.items())
    size = manifest.bytes / 1e6
    lines = [f"{manifest.dataset}: {counts} images, {size:,.0f} MB, {how}: {manifest.folder}"]
    lines += [f"note: {note}" for note in manifest.notes]
    if manifest.quarantine:
        first = manifest.quarantine[0]
        lines.append(
            f"note: {len(manifest.quarantine):,} bad images were left out, listed in "
            f"{manifest.folder / 'manifest.json'}; the first: {first.name}: {first.reason}"
        )
    print(*map(_printable, lines), sep="\n")


def _parsed(texts: list[str]) -> dict[str, Any]:
    options = {}
    for text in texts:
        name, equals, value = text.removeprefix("data.").partition("=")
        if not equals or name not in _SETTINGS:
            raise DataError(
                f"unknown setting {text!r}: write name=value or data.name=value; names are "
                f"{', '.join(_SETTINGS)}"
            )
        try:
            options[name] = _SETTINGS[name].read(value)
        except ValueError:
            raise DataError(f"{text!r}: data.{name} is {_SETTINGS[name].help}") from None
    return options


class _Report:
    """Progress as plain lines, one every few seconds, with the time that is left."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._told = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._told = stage, now, now
            if stage.startswith("wait"):
                print(stage, flush=True)
        if now - self._told < _REPORT_INTERVAL or done == 0:
            return
        self._told = now
        rate = done / (now - self._started)
        print(
            f"{stage}: {done:,} of {total:,}, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
