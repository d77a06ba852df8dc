"""Prepare one data set by itself: ``python -m data_prep digits``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep import DATASETS, DataError, ffcv_available, prepare


def main() -> int:
    """Parse the command line, prepare, and say what is there; 2 is the exit code of an error."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    parser.add_argument("dataset", help=", ".join(DATASETS))
    parser.add_argument("--root", type=Path, help="raw data; default TERNFORGE_DATA, else data")
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="where to write")
    parser.add_argument("--backend", default="ffcv" if ffcv_available() else "torch")
    arguments = parser.parse_args()
    try:
        manifest = prepare(
            arguments.dataset,
            root=arguments.root,
            prepared=arguments.prepared,
            backend=arguments.backend,
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    how = "already prepared" if manifest.reused else "written and verified"
    counts = ", ".join(f"{count} {split}" for split, count in manifest.counts.items())
    print(f"{manifest.dataset}: {counts} images, {how}: {manifest.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
