from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline import runfolder
from pipeline.config import Experiment, PipelineError
from pipeline.errors import Interrupted
from pipeline.failures import TrainingError
from pipeline.runlist import UnclearRunError
from pipeline.settings import override

FINGERPRINT = "0123456789abcdef" * 4
MADE_OF = {
    "data": {"fingerprint": FINGERPRINT, "mean": [0.5], "std": [0.2]},
    "sources": {"init_from": None, "train.teacher": {"source": "big", "digest": "ab" * 32}},
}


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
    assert done.name in str(caught.value)


def test_a_run_that_another_process_ends_meanwhile_is_not_trained_again(experiment):
    run = runfolder.create(experiment, "identity")
    assert run._lock is not None
    as_before = runfolder.read(experiment, run.name)
    run.update(status="finished")
    run.release()
    read = runfolder._read

    def read_before_it_ended(folder):
        runfolder._read = read
        return as_before

    runfolder._read = read_before_it_ended
    with pytest.raises(PipelineError, match=f"run {run.name} is finished"):
        runfolder.find(experiment, "identity", None)
    assert run.holder() is None


def test_a_run_whose_checkpoints_lie_elsewhere_does_not_begin_anew_without_them(
    experiment, tmp_path
):
    kept, other = tmp_path / "kept", tmp_path / "other"
    here = override(experiment, [f"checkpoint.folder={kept}"])
    run = runfolder.create(here, "identity")
    run.release()
    checkpoints = kept / experiment.name / run.name
    (checkpoints / "epoch-0001").mkdir(parents=True)
    moved = override(experiment, [f"checkpoint.folder={other}"])
    for changed in (experiment, moved):
        with pytest.raises(PipelineError, match=f"keeps its checkpoints in {kept}, and there are"):
            runfolder.find(changed, "identity", None)
    shutil.copytree(kept, other)
    for settings in (moved, moved, here):
        runfolder.find(settings, "identity", None).release()
    shutil.rmtree(other)
    assert runfolder.find(here, "identity", None).path == run.path


def test_several_candidates_are_listed_and_one_can_be_named(experiment):
    names = []
    for _ in range(2):
        run = runfolder.create(experiment, "identity")
        run.release()
        names.append(run.name)
    with pytest.raises(PipelineError, match="2 runs can be continued, name one") as caught:
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
        pytest.raises(Interrupted) as stopped,
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


def stopped(experiment, *checkpoints, **record):
    """A run that has these checkpoints, and that no process works on."""
    run = runfolder.create(experiment, "identity", MADE_OF)
    for name in checkpoints:
        (run.path / "checkpoints" / name).mkdir(parents=True)
    run.update(**record)
    run.release()
    return run


def shown(experiment, resume=True):
    """The states and differences that are shown where it is not clear what to resume."""
    with pytest.raises(UnclearRunError) as unclear:
        runfolder.begun_with(experiment, resume)
    return {run.name: (run.state, list(run.differences)) for run in unclear.value.runs}


def test_what_there_is_to_resume_is_shown_with_its_state_and_differences(experiment):
    long = override(experiment, ["train.epochs=20"])
    late = stopped(long, "epoch-0003", "epoch-0002", "epoch-0003-step-001200")
    done = stopped(experiment, status="finished", result={"top1": 99.214})
    early = stopped(override(experiment, ["seed=3", "train.lr=0.2"]))
    broken = stopped(experiment)
    (broken.path / "run.json").write_text("{")
    whole = stopped(override(experiment, ["seeds=5"]), runs={"0": "a", "1": "b"})
    held = runfolder.create(override(experiment, ["train.flip=true"]), "identity")
    assert shown(experiment) == {
        late.name: ("stopped at step 1,200 of epoch 4 of 20", ["train.epochs=20 (now 10)"]),
        done.name: ("finished, top-1 99.21 %", []),
        early.name: (
            "stopped before its first checkpoint",
            ["seed=3 (now 0)", "train.lr=0.2 (now 0.1)"],
        ),
        broken.name: ("cannot be read: damaged or of another version", []),
        whole.name: ("stopped in run 2 of 5", ["seeds=5 (now 1)"]),
        held.name: (f"running, process {os.getpid()}", ["train.flip=true (now false)"]),
    }
    assert shown(experiment, "nowhere").keys() == shown(experiment).keys()


def test_a_changed_experiment_is_refused_by_its_settings_before_data_and_weights_are_there(
    experiment,
):
    run = stopped(experiment)
    changed = override(experiment, ["seeds=3", "method=ternary"])
    with pytest.raises(PipelineError, match=r"differs in method=float \(now ternary\), seeds=1"):
        runfolder.begun_with(changed, run.name)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (
            ["data.side=96", "data.threads=4"],
            {"data": {"fingerprint": "f" * 64, "mean": [0.5], "std": [0.2]}},
            r"differs in data\.side=none \(now 96\)$",
        ),
        (
            [],
            {"data": {"fingerprint": "f" * 64, "mean": [0.5], "std": [0.2]}},
            r"differs in its images: other raw files .*\(fingerprint 01234567, now ffffffff\)$",
        ),
        (
            [],
            {"data": {"fingerprint": FINGERPRINT, "mean": [0.6], "std": [0.2]}},
            "its images: another mean or deviation",
        ),
        (
            ["init_from=mine.pt"],
            {"sources": {"init_from": {"digest": "cd" * 32}, "train.teacher": None}},
            r"the tensors of init_from \(SHA-256 of none, now cdcdcdcd\), "
            r"the tensors of train\.teacher \(SHA-256 abababab, now none\)$",
        ),
    ],
)
def test_data_and_weights_that_have_changed_are_named(experiment, settings, changes, message):
    run = stopped(experiment)
    changed = override(experiment, settings)
    with pytest.raises(PipelineError, match=message):
        runfolder.find(changed, "another", run.name, MADE_OF | changes)


def test_a_run_goes_on_with_the_weights_that_it_began_with(experiment):
    assert runfolder.begun_with(experiment, False) == {}
    run = stopped(experiment)
    for resume in (True, run.name):
        assert runfolder.begun_with(experiment, resume) == MADE_OF["sources"]
    stopped(experiment, sources={"init_from": {"digest": "ef" * 32}})
    assert runfolder.begun_with(experiment, True) == {}, "which of them is meant, the data say"


def test_a_process_on_another_machine_that_did_not_say_that_it_ended_is_named(experiment):
    run = stopped(experiment)
    (run.path / "lock").write_text("process 12 on another-machine")
    said: list[str] = []
    with runfolder.opened(experiment, "identity", True, warn=said.append) as found:
        assert found.path == run.path
    assert len(said) == 1
    assert "process 12 on another-machine has not said that it ended" in said[0]
    with runfolder.opened(experiment, "identity", True, warn=said.append):
        pass
    assert len(said) == 1, "a run that ends as it should says so"


def test_listing_a_run_does_not_keep_another_process_from_it(experiment):
    run = stopped(experiment)
    with (run.path / "lock").open() as listing:
        fcntl.flock(listing, fcntl.LOCK_SH)
        threading.Timer(0.15, listing.close).start()
        assert runfolder.find(experiment, "identity", run.name).path == run.path


def test_the_record_holds_no_password_and_is_the_users_own(experiment):
    secret = [
        "tracking.uri=http://ann:hunter2@host:5000",
        "checkpoint.folder=s3://key:hunter2@bucket/x",
    ]
    settings = override(experiment, secret)
    run = stopped(settings)
    text = (run.path / "run.json").read_text()
    assert "hunter2" not in text
    assert json.loads(text)["experiment"]["tracking"]["uri"] == "http://host:5000"
    for name in ("run.json", "lock"):
        assert stat.S_IMODE((run.path / name).stat().st_mode) == 0o600
    assert runfolder.find(settings, "identity", None).path == run.path


def test_a_run_whose_record_cannot_be_written_leaves_no_folder(experiment):
    """On a file system without space, which the limit on the size of files stands for."""
    program = (
        "import json, resource, signal, sys; from pipeline import runfolder;"
        "from pipeline.settings import build_experiment;"
        "experiment = build_experiment(json.loads(sys.argv[1]));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2);"
        "runfolder.create(experiment, 'identity')"
    )
    for room, what in ((0, "lock"), (100, "write")):
        arguments = (experiment.model_dump_json(), str(room))
        run = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        last = run.stderr.splitlines()[-1]
        assert last.startswith(f"pipeline.errors.PipelineError: cannot {what} "), run.stderr
        assert list((experiment.tracking.runs / experiment.name).iterdir()) == []


def test_a_record_that_cannot_be_written_stays_as_it_was(experiment):
    run = runfolder.create(experiment, "identity")
    before = (run.path / "run.json").read_text()
    (run.path / ".run.json.partial").mkdir()
    with pytest.raises(PipelineError, match=r"cannot write .*run\.json: Is a directory"):
        run.update(status="finished")
    assert not run.finished
    assert (run.path / "run.json").read_text() == before
