"""Training runs from raw images to a registered model, in the order in which it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.experiments import load_experiment
    from pipeline.seeds import SeedsResult, run_seeds
    from pipeline.stages import Result, run

__all__ = ["Result", "SeedsResult", "load_experiment", "run", "run_seeds"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `--help` and `--list` answer without loading torch.
    if name == "load_experiment":
        from pipeline.experiments import load_experiment

        return load_experiment
    if name in ("run", "Result"):
        from pipeline import stages

        return getattr(stages, name)
    if name in ("run_seeds", "SeedsResult"):
        from pipeline import seeds

        return getattr(seeds, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
