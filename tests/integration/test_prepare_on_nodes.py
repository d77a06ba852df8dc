"""Preparation on each machine of a cluster: two real Ray nodes, on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import write_class_folders
from tests.ray_cluster import answer_of

#: Ray itself and its processes are in a program of their own, which prints what came out.
PROGRAM = """
import json, sys
from pipeline import inputs, launch
from pipeline.experiments import load_experiment
from tests.ray_cluster import ray_cluster
experiment = load_experiment("folder_resnet20", ["data.location=node", *sys.argv[1:]])
told = set()
with ray_cluster({"num_cpus": 1}, {"num_cpus": 1}):
    try:
        dataset = inputs.dataset_of(experiment)
        manifest = launch.prepare_on_nodes(experiment, dataset, lambda *words: told.add(words[0]))
        answer = {"folder": str(manifest.folder), "counts": manifest.counts, "told": sorted(told)}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error)}
print(json.dumps(answer))
"""


@pytest.mark.slow
def test_each_machine_prepares_and_all_have_the_same_images(tmp_path):
    raw = write_class_folders(tmp_path / "raw")
    answer = answer_of(PROGRAM, f"data.raw={raw}", f"data.prepared={tmp_path / 'prepared'}")
    assert answer["counts"] == {"train": 48, "test": 12}
    assert Path(answer["folder"]).is_dir()
    # On one disk one of the two works, and the other one waits for it or finds it done.
    of_the_other = {
        "wait for the process that prepares folder, 0 of 2 machines ready",
        "check, 0 of 2 machines ready",
        "check, 1 of 2 machines ready",
    }
    assert of_the_other & set(answer["told"])


@pytest.mark.slow
def test_a_machine_that_cannot_prepare_is_one_line(tmp_path):
    raw = write_class_folders(tmp_path / "raw")
    for path in (raw / "train" / "cat").iterdir():
        path.write_bytes(b"")
    answer = answer_of(PROGRAM, f"data.raw={raw}", f"data.prepared={tmp_path / 'prepared'}")
    assert answer["error"] == "DataError"
    assert "data.bad_share=0.001" in answer["text"] and "the file is empty" in answer["text"]
    assert not list((tmp_path / "prepared").glob("folder*"))
