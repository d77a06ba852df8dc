"""Ternforge: train, search, compare and ship efficient image classifiers.

python run.py --experiment digits_lenet5_ternary
"""

from __future__ import annotations

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
