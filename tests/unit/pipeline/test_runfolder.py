from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import runfolder
from pipeline.config import Experiment, PipelineError
from pipeline.failures import TrainingError
from pipeline.settings import override


@pytest.fixture
def experiment(tmp_path):
    base = Experiment(name="digits_lenet5", dataset="digits", backbone="lenet5")
    return override(base, [f"tracking.runs={tmp_path}"])


def test_two_runs_of_one_experiment_never_share_a_folder(experiment):
    runs = [runfolder.create(experiment, "identity") for _ in range(3)]
    assert len({run.path for run in runs}) == 3


def test_the_one_unfinished_run_is_found_and_keeps_its_record(experiment):
    first = runfolder.create(experiment, "identity")
    first.update(mlflow_run="abc")
    first.release()
    found = runfolder.find(experiment, "identity", None)
    assert found.path == first.path
    assert found.record["mlflow_run"] == "abc"


def test_a_finished_run_and_one_of_other_settings_are_not_continued(experiment):
    done = runfolder.create(experiment, "identity")
    done.update(status="finished")
    done.release()
    runfolder.create(experiment, "another").release()
    with pytest.raises(PipelineError, match="no unfinished run") as caught:
        runfolder.find(experiment, "identity", None)
    assert f"{done.name} (finished)" in str(caught.value)


def test_several_candidates_are_listed_and_one_can_be_named(experiment):
    names = []
    for _ in range(2):
        run = runfolder.create(experiment, "identity")
        run.release()
        names.append(run.name)
    with pytest.raises(PipelineError, match="several runs") as caught:
        runfolder.find(experiment, "identity", None)
    assert all(name in str(caught.value) for name in names)
    assert runfolder.find(experiment, "identity", names[0]).name == names[0]


def test_a_named_run_of_changed_settings_is_refused_with_the_difference(experiment):
    run = runfolder.create(experiment, "identity")
    run.release()
    changed = override(experiment, ["train.epochs=77"])
    with pytest.raises(PipelineError, match=r"train\.epochs=10 \(now 77\)"):
        runfolder.find(changed, "changed", run.name)


def test_an_unknown_run_names_those_that_exist(experiment):
    with pytest.raises(PipelineError, match="there are no runs"):
        runfolder.find(experiment, "identity", "nowhere")


def test_a_run_in_use_is_refused_and_free_again_when_its_process_is_killed(experiment):
    program = (
        "import sys, time; from pathlib import Path; from pipeline import runfolder;"
        "run = runfolder.RunFolder(Path(sys.argv[1]), {}); run.hold();"
        "print('held', flush=True); time.sleep(60)"
    )
    run = runfolder.create(experiment, "identity")
    run.release()
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(PipelineError, match=f"by process {holder.pid}"):
        runfolder.find(experiment, "identity", None)
    holder.kill()
    holder.wait()
    assert runfolder.find(experiment, "identity", None).path == run.path


def test_runs_that_is_a_file_is_one_line(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = override(experiment, [f"tracking.runs={tmp_path / 'file'}"])
    with pytest.raises(PipelineError, match="cannot write the run folder"):
        runfolder.create(blocked, "identity")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"identity": "identity"}'])
def test_a_record_that_cannot_be_used_is_named_and_blocks_no_other_run(experiment, content):
    good = runfolder.create(experiment, "identity")
    bad = runfolder.create(experiment, "identity")
    good.release()
    bad.release()
    (bad.path / "run.json").write_text(content)
    assert runfolder.find(experiment, "identity", None).path == good.path
    with pytest.raises(PipelineError, match="damaged or of another version"):
        runfolder.find(experiment, "identity", bad.name)


def test_a_run_may_be_named_by_its_path_but_not_by_nothing(experiment):
    run = runfolder.create(experiment, "identity")
    run.release()
    assert runfolder.find(experiment, "identity", f"runs/{run.name}/").path == run.path
    with pytest.raises(PipelineError, match="names no run"):
        runfolder.find(experiment, "identity", "")


def test_what_stops_a_run_names_the_folder_to_continue_and_lets_go_of_it(experiment):
    with (
        pytest.raises(runfolder.Interrupted) as stopped,
        runfolder.opened(experiment, "identity", False),
    ):
        raise KeyboardInterrupt
    name = stopped.value.run
    with pytest.raises(PipelineError) as failed, runfolder.opened(experiment, "identity", name):
        raise PipelineError("the disk is full")
    assert (failed.value.run, failed.value.exit_code) == (name, 1)
    with runfolder.opened(experiment, "identity", True) as again:
        assert again.name == name


def test_a_failure_that_would_only_be_repeated_names_no_folder(experiment):
    with pytest.raises(TrainingError) as failed, runfolder.opened(experiment, "identity", False):
        raise TrainingError("the loss was not finite")
    assert failed.value.run is None


def test_what_follows_the_hash_of_an_identity_is_in_the_name_of_the_folder(experiment):
    assert runfolder.create(experiment, "0123456789ab-seeds3").name.endswith("-012345-seeds3")


def test_a_record_is_read_by_name_also_of_a_run_that_is_not_there(experiment):
    run = runfolder.create(experiment, "identity")
    assert runfolder.read(experiment, run.name).record == run.record
    assert not runfolder.read(experiment, "nowhere").finished
