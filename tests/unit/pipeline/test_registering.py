"""Registering with a store that changes things, and by a process that is killed in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import models
from pipeline.config import PipelineError
from pipeline.stores import TrackingStore
from pipeline.tracking import Tracker
from tests.unit.pipeline.made_versions import watched
from tests.unit.pipeline.stored import one_line, rows
from tests.unit.pipeline.test_registry import register_network, trained_network

NOTHING_LEFT = (
    "SELECT name FROM registered_models",
    "SELECT version FROM model_versions WHERE current_stage != 'Deleted_Internal'",
    "SELECT model_id FROM logged_models WHERE lifecycle_stage = 'active'",
)


def test_what_the_store_does_not_keep_as_it_was_sent_is_not_registered(
    store: TrackingStore, runs: Path
) -> None:
    def spoil(call: str) -> None:
        if call == "create_model_version":
            (file,) = (runs / "artifacts" / "models").glob("*/artifacts/packed.safetensors")
            file.write_bytes(file.read_bytes()[:-1])

    run_id = Tracker.start(store, "net", "run", {}, {}).run_id
    spoiling = watched(store, spoil)
    with pytest.raises(PipelineError, match="version 1 of net was not stored as it was") as error:
        register_network(spoiling, run_id, trained_network(seed=3), name="net")
    one_line(error)
    assert [rows(runs, query) for query in NOTHING_LEFT] == [[], [], []]


def test_a_packed_network_has_to_give_the_folded_ones_logits_to_the_bit(
    store: TrackingStore, runs: Path
) -> None:
    run_id = Tracker.start(store, "net", "run", {}, {}).run_id
    trained = trained_network(seed=3)
    folded = models.fold(trained)
    with torch.no_grad():
        next(p for name, p in folded.named_parameters() if name.endswith("bias")).add_(1e-6)
    with pytest.raises(PipelineError, match="the packed net gives other logits than the") as error:
        register_network(store, run_id, trained, folded, name="net")
    one_line(error)
    assert [rows(runs, query) for query in NOTHING_LEFT] == [[], [], []]


class KilledError(BaseException):
    """In place of a kill: from then on nothing reaches the store, not even to clean up."""


def killed_after(store: TrackingStore, survived: int) -> TrackingStore:
    calls: list[str] = []

    def before(call: str) -> None:
        if len(calls) == survived:
            raise KilledError
        calls.append(call)

    return watched(store, before)


@pytest.mark.slow
def test_wherever_a_registration_is_killed_the_next_one_ends_with_one_version_and_the_alias(
    store: TrackingStore, runs: Path
) -> None:
    """Model, files, READY, name, version, card, output, alias: a kill before each of them."""
    trained = trained_network(seed=3)
    for survived in range(8):
        name = f"net{survived}"
        run_id = Tracker.start(store, name, "run", {}, {}).run_id
        with pytest.raises(KilledError):
            register_network(killed_after(store, survived), run_id, trained, name=name)
        assert register_network(store, run_id, trained, name=name).version == 1
        versions = store.client.search_model_versions(f"name = '{name}'")
        assert [version.version for version in versions] == [1]
        assert versions[0].description
        assert store.client.get_registered_model(name).aliases == {"candidate": 1}
        models_left = store.client.search_logged_models(
            [store.client.get_run(run_id).info.experiment_id]
        )
        assert len(models_left) == 1
        outputs = store.client.get_run(run_id).outputs
        assert outputs is not None
        assert len(outputs.model_outputs) == 1
