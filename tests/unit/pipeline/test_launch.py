from __future__ import annotations

import pickle

import pytest

from pipeline.config import PipelineError
from pipeline.experiments import load_experiment
from pipeline.launch import check_scaling, for_workers, planned_workers


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


def test_workers_do_not_get_the_password_of_the_tracking_server_and_train_the_same():
    words = ["tracking.uri=http://user:verysecret@tracker:5000"]
    experiment = load_experiment("digits_lenet5", words)
    sent = for_workers(experiment)
    assert b"verysecret" in pickle.dumps(experiment)
    assert b"verysecret" not in pickle.dumps(sent)
    assert sent.identity("data") == experiment.identity("data")
