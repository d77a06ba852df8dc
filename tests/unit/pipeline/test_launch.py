from __future__ import annotations

import pytest

from pipeline.config import PipelineError
from pipeline.experiments import load_experiment
from pipeline.launch import check_scaling, planned_workers


def test_the_address_of_a_ray_client_is_refused_with_the_right_kind(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(PipelineError, match="RAY_ADDRESS=ray://head:10001 is for Ray clients"):
        check_scaling(load_experiment("digits_lenet5", []))


def test_training_in_this_process_asks_for_no_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    words = ["scaling.launcher=local", "scaling.workers=8", "train.batch_size=2"]
    experiment = load_experiment("digits_lenet5", words)
    check_scaling(experiment)
    assert planned_workers(experiment).most == 1
