"""Versions in a real registry without a training: files and tags as a registration leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.registry.predictions import Predictions
from pipeline.stores import TrackingStore

NAME = "digits_lenet5"
IMAGES = 200
LABELS = np.arange(IMAGES, dtype=np.uint8) % 10
DATA = "da" * 32


def answers(wrong: Sequence[int], data: str = DATA) -> Predictions:
    """Of a version that is wrong at these images."""
    predicted = LABELS.copy()
    predicted[list(wrong)] += 1
    return Predictions(data, predicted, LABELS)


def add_version(
    store: TrackingStore,
    folder: Path,
    predictions: Predictions | None,
    name: str = NAME,
    **tags: str,
) -> int:
    """Register a version and return its number.

    Args:
        folder: where its files go, new for each version.
        predictions: its answers; None for a version that has none.
    """
    folder.mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    if predictions is not None:
        predictions.save(folder / "evaluation.safetensors")
        tags = {"top1": f"{predictions.top1:.3f}"} | tags
    if name not in {model.name for model in store.client.search_registered_models()}:
        store.client.create_registered_model(name)
    version = store.client.create_model_version(name, folder.as_uri(), tags=tags)
    store.client.set_registered_model_alias(name, "candidate", version.version)
    return int(version.version)


def champion(store: TrackingStore, name: str = NAME) -> int | None:
    """The number of the version that the alias points to."""
    number = store.client.get_registered_model(name).aliases.get("champion")
    return None if number is None else int(number)


def watched(store: TrackingStore, before: Callable[[str], None]) -> TrackingStore:
    """The store, with a client that calls ``before`` ahead of each call that changes something."""
    client: Any = _Watched(store.client, before)
    return replace(store, client=client)


class _Watched:
    """A client of MLflow that does something before each call that changes the store."""

    def __init__(self, client: Any, before: Callable[[str], None]) -> None:
        self._client = client
        self._before = before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not name.startswith(("set_", "log_", "create_", "delete_", "update_", "finalize_")):
            return method

        def call(*arguments: Any, **words: Any) -> Any:
            self._before(name)
            return method(*arguments, **words)

        return call
