"""How fast photographs are prepared: this project's writer against FFCV's own.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/data_writing.py [FOLDER] [--repeat 10]

FOLDER holds photographs as ``train/<class>/`` and ``val/<class>/``; without it some are made up.
The stock writer is ``ffcv.writer.DatasetWriter`` over torchvision's ImageFolder, with the same
longest side and JPEG quality. Ours is the whole of ``data_prep.prepare``: it also checks every
image, reads the file back, compares samples of every page with their sources, and hashes it. They
take turns; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import data_prep
from tests.pictures import write_class_folders

SIDE, QUALITY = 400, 90
CORES = os.cpu_count() or 1
IMAGENET = sum(data_prep.DATASETS["imagenet"].counts.values())

STOCK = """
import sys
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder
folder, target, processes, side, quality = sys.argv[1:]
image = RGBImageField(write_mode="jpg", max_resolution=int(side), jpeg_quality=int(quality))
fields = {"image": image, "label": IntField()}
for split in ("train", "val"):
    writer = DatasetWriter(f"{target}/{split}.beton", fields, num_workers=int(processes))
    writer.from_indexed_dataset(ImageFolder(f"{folder}/{split}"), chunksize=20)
"""

OURS = """
import sys
from pathlib import Path
import data_prep
from data_prep.datasets import Storage
folder, target, processes, side, quality, passthrough = sys.argv[1:]
storage = Storage(int(side), "jpg", int(quality), passthrough == "True")
if __name__ == "__main__":
    data_prep.prepare(
        "folder",
        raw=Path(folder),
        prepared=Path(target),
        storage=storage,
        processes=int(processes),
    )
"""


def seconds_of(program: str, *arguments: object) -> float:
    """Of a process of its own, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "writer.py"
        script.write_text(program)
        words = [str(word) for word in (arguments[0], folder, *arguments[1:])]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(script), *words],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ".", "OPENCV_FOR_THREADS_NUM": "1"},
        )
        if done.returncode:
            sys.exit(done.stderr)
        return time.perf_counter() - started


def repeated(folder: Path, target: Path, times: int) -> Path:
    """The same class folders with every image there so many times, as links."""
    for path in folder.rglob("*"):
        if path.is_file():
            for number in range(times):
                link = target / path.relative_to(folder).with_stem(f"{path.stem}_{number}")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path.resolve())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, help="JSON file to add to, docs/loading.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or write_class_folders(Path(scratch) / "raw", 600, 60, scale=8)
        raw = repeated(folder, Path(scratch) / "repeated", arguments.repeat)
        images = sum(path.is_file() for path in raw.rglob("*"))
        contestants: dict[tuple[int, str], Callable[[], float]] = {}
        for processes in sorted({CORES, 1}):
            work = (raw, processes, SIDE, QUALITY)
            contestants[processes, "this writer"] = partial(seconds_of, OURS, *work, False)
            passing = partial(seconds_of, OURS, *work, True)
            contestants[processes, "this writer, passing JPEGs"] = passing
            contestants[processes, "stock FFCV"] = partial(seconds_of, STOCK, *work)
        times: dict[tuple[int, str], list[float]] = {key: [] for key in contestants}
        for _ in range(arguments.rounds):
            for key, run in contestants.items():
                times[key].append(run())
    record: dict[str, dict[str, float]] = {}
    for (processes, name), values in times.items():
        at = f"{processes} process{'es' if processes > 1 else ''}"
        title = f"writing {images:,} JPEGs, longest side {SIDE}, {at}"
        record.setdefault(title, {})[name] = images / statistics.median(values)
    for title, speeds in record.items():
        print(title)
        for name, speed in speeds.items():
            ratio = speed / speeds["stock FFCV"]
            print(f"  {name:<30}{speed:>7,.0f} img/s   {ratio:5.2f}x stock FFCV")
    one, all_cores = (speeds["this writer"] for speeds in record.values())
    print(f"{CORES} processes are {all_cores / one / CORES:.0%} of linear scaling")
    print(f"ImageNet's {IMAGENET:,} images: {IMAGENET / one / 3600:.1f} core-hours")
    if arguments.record:
        known = json.loads(arguments.record.read_text()) if arguments.record.exists() else {}
        known = {title: speeds for title, speeds in known.items() if "writing" not in title}
        arguments.record.write_text(json.dumps(known | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
