"""The tracker on the default SQLite store, read back with sqlite3 and not through MLflow."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pipeline.config import PipelineError
from pipeline.tracking import Tracker, TrackingStore, open_tracking
from tests.unit.pipeline.stored import one_line, rows, run_python


def start(store: TrackingStore, **params: object) -> Tracker:
    return Tracker.start(store, "digits_lenet5", "first", params, {"data.fingerprint": "abc"})


def test_settings_metrics_and_tags_are_in_the_database(runs: Path, store: TrackingStore) -> None:
    tracker = start(store, **{"train.epochs": 3, "method": "ternary(expansion=4)"})
    tracker.log_epoch(0, {"train/loss": 0.5, "test/top1": 97.25})
    tracker.finish()
    assert set(rows(runs, "SELECT key, value FROM params")) == {
        ("train.epochs", "3"),
        ("method", "ternary(expansion=4)"),
    }
    assert set(rows(runs, "SELECT key, value, step FROM metrics")) == {
        ("train/loss", 0.5, 0),
        ("test/top1", 97.25, 0),
        ("epoch", 0.0, 0),
    }
    tags = dict(rows(runs, "SELECT key, value FROM tags"))
    assert tags["data.fingerprint"] == "abc"
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    assert rows(runs, "SELECT name, status FROM runs") == [("first", "FINISHED")]


def test_pictures_and_files_lie_under_the_runs_folder(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.log_figure("curves", figure)
    tracker.log_text("experiment.yaml", "name: digits\n")
    tracker.log_dict("profile.json", {"macs": 12})
    tracker.finish()
    artifacts = runs / "artifacts" / tracker.run_id / "artifacts"
    assert (artifacts / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (artifacts / "experiment.yaml").read_text() == "name: digits\n"
    assert json.loads((artifacts / "profile.json").read_text()) == {"macs": 12}


def test_an_epoch_is_logged_once_also_after_a_resume(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {"loss": 3.0})
    tracker.log_epoch(1, {"loss": 2.0})
    tracker.log_epoch(1, {"loss": 9.0})
    tracker.finish("KILLED")
    resumed = Tracker.resume(open_tracking(None, runs), tracker.run_id)
    assert rows(runs, "SELECT status FROM runs") == [("RUNNING",)]
    resumed.log_epoch(1, {"loss": 9.0})
    resumed.log_epoch(2, {"loss": 1.0})
    resumed.finish()
    history = rows(runs, "SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step")
    assert history == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_a_setting_too_long_for_mlflow_is_kept_whole(runs: Path, store: TrackingStore) -> None:
    tracker = start(store, note="x" * 7000, **{f"key{index}": index for index in range(250)})
    assert rows(runs, "SELECT count(*) FROM params") == [(251,)]
    whole = runs / "artifacts" / tracker.run_id / "artifacts" / "long_params.json"
    assert json.loads(whole.read_text()) == {"note": "x" * 7000}


def test_any_metric_name_number_and_count_is_taken(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {f"top1/class {index}": index / 10 for index in range(1000)})
    tracker.log_epoch(1, {"top1/cat's eye": 1.0, "loss": float("nan"), "best": float("inf")})
    tracker.finish()
    assert rows(runs, "SELECT count(*) FROM metrics WHERE step = 0") == [(1001,)]
    assert ("top1/cat_s eye",) in rows(runs, "SELECT key FROM metrics WHERE step = 1")
    assert rows(runs, "SELECT is_nan FROM metrics WHERE key = 'loss'") == [(1,)]


def test_what_the_store_refuses_is_named_at_the_end_and_blocks_nothing(
    runs: Path, store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {"name too long for MLflow" * 20: 1.0})
    tracker.log_epoch(1, {"loss": 1.0})
    with pytest.raises(PipelineError, match=r"not complete in .*: it lacks epoch 0$") as error:
        tracker.finish()
    one_line(error)
    assert len(caplog.records) == 1
    assert rows(runs, "SELECT status FROM runs") == [("FINISHED",)]
    assert rows(runs, "SELECT count(*) FROM metrics") == [(2,)]


def test_what_a_failed_run_lacks_does_not_hide_its_failure(
    store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(store)
    tracker.log_epoch(0, {"name too long for MLflow" * 20: 1.0})
    tracker.finish("FAILED")
    assert "lacks" in caplog.messages[-1]


def test_a_run_that_is_not_there_is_named(store: TrackingStore) -> None:
    with pytest.raises(PipelineError, match="cannot continue run 0123, which is not in") as error:
        Tracker.resume(store, "0123")
    one_line(error)


def test_a_deleted_experiment_is_reported(store: TrackingStore) -> None:
    start(store).finish()
    experiment = store.client.get_experiment_by_name("digits_lenet5")
    assert experiment is not None
    store.client.delete_experiment(experiment.experiment_id)
    with pytest.raises(PipelineError, match="deleted") as error:
        start(store)
    one_line(error)


def test_a_copied_folder_of_runs_is_refused_before_it_writes_into_the_old_one(
    runs: Path, store: TrackingStore, tmp_path: Path
) -> None:
    tracker = start(store)
    tracker.finish()
    before = set(runs.rglob("*"))
    copy = shutil.copytree(runs, tmp_path / "copy")
    old, new = ((folder / "artifacts").as_uri() for folder in (runs, copy))
    copied = open_tracking(None, copy)
    with pytest.raises(PipelineError, match=rf"in {old}, not in {new}: .* moved") as error:
        start(copied)
    one_line(error)
    with pytest.raises(PipelineError, match=rf"in {old}, not in {new}: .* moved"):
        Tracker.resume(copied, tracker.run_id)
    assert set(runs.rglob("*")) == before
    assert rows(copy, "SELECT status FROM runs") == [("FINISHED",)]


def test_a_part_of_a_run_lies_below_it_and_the_whole_has_a_result(
    runs: Path, store: TrackingStore
) -> None:
    with start(store) as whole:
        part = Tracker.start(store, "digits_lenet5", "part", {}, {}, parent=whole.run_id)
        part.finish()
        whole.log_result({"top1_mean": 99.0})
    parents = rows(runs, "SELECT run_uuid, value FROM tags WHERE key = 'mlflow.parentRunId'")
    assert parents == [(part.run_id, whole.run_id)]
    with Tracker.resume(store, whole.run_id) as resumed:  # killed before it noted that it ended
        resumed.log_result({"top1_mean": 99.0})
    results = rows(runs, "SELECT run_uuid, key, value FROM metrics")
    assert results == [(whole.run_id, "top1_mean", 99.0)]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (PipelineError, "FAILED")]
)
def test_a_run_is_closed_in_the_state_in_which_its_block_ends(
    runs: Path, store: TrackingStore, error: type[BaseException], status: str
) -> None:
    with start(store):
        pass
    with pytest.raises(error), start(store):
        raise error("stopped")
    assert set(rows(runs, "SELECT status FROM runs")) == {("FINISHED",), (status,)}


WHOLE_RUN = """
import sys
from pathlib import Path
from pipeline.tracking import Tracker, open_tracking
tracker = Tracker.start(open_tracking(None, Path(sys.argv[1])), "quiet", "run", {"a": 1}, {})
tracker.log_epoch(0, {"loss": 1.0})
tracker.finish()
"""


def test_two_drivers_that_start_at_once_share_one_new_silent_database(tmp_path: Path) -> None:
    drivers = [run_python(WHOLE_RUN, str(tmp_path)) for _ in range(2)]
    assert [driver.communicate(timeout=60) for driver in drivers] == [("", "")] * 2
    assert rows(tmp_path, "SELECT status FROM runs") == [("FINISHED",)] * 2
    assert rows(tmp_path, "SELECT count(*) FROM experiments WHERE name = 'quiet'") == [(1,)]


CUT_OFF = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking import Tracker, open_tracking

tracker = Tracker.start(open_tracking(None, Path(sys.argv[1])), "cut off", "run", {}, {})
send, written = tracker.store.client.log_batch, []

def send_and_die(*arguments, **options):
    send(*arguments, **options)
    written.append(arguments)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

tracker.store.client.log_batch = send_and_die
for epoch in range(1, 5):
    tracker.log_epoch(epoch, {"loss": 1 / epoch, "time": 1.7e9 + epoch})
tracker.finish()
"""


def test_a_writer_killed_between_two_epochs_is_followed_by_one_that_writes_the_others(
    runs: Path, store: TrackingStore
) -> None:
    killed = run_python(CUT_OFF, str(runs))
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    ((run_id,),) = rows(runs, "SELECT run_uuid FROM runs")
    assert len(rows(runs, "SELECT * FROM metrics")) == 4
    tracker = Tracker.resume(store, run_id)
    for epoch in range(1, 5):
        tracker.log_epoch(epoch, {"loss": 1 / epoch, "time": 1.7e9 + epoch})
    tracker.finish()
    assert set(rows(runs, "SELECT key, step, value, timestamp FROM metrics")) == {
        (key, epoch, value, 1_700_000_000_000 + 1000 * epoch)
        for epoch in range(1, 5)
        for key, value in (("loss", 1 / epoch), ("epoch", epoch))
    }
    assert rows(runs, "SELECT count(*) FROM metrics") == [(8,)]


def test_rows_that_are_sent_again_are_stored_once(runs: Path, store: TrackingStore) -> None:
    tracker = start(store)
    metrics = {"loss": 0.5, "nothing": float("nan"), "time": 1.7e9}
    tracker.log_epoch(1, metrics)
    tracker.finish("KILLED")
    before = rows(runs, "SELECT * FROM metrics ORDER BY key")
    unaware = Tracker(store, tracker.run_id, 0, set(), print)  # of what is already there
    unaware.log_epoch(1, metrics)
    unaware.finish()
    assert rows(runs, "SELECT * FROM metrics ORDER BY key") == before


def test_a_run_that_nobody_noted_is_deleted_when_its_folder_begins_again(
    runs: Path, store: TrackingStore
) -> None:
    tags = {"run_folder": "/runs/one"}
    killed = Tracker.start(store, "digits_lenet5", "one", {}, tags)
    other = Tracker.start(store, "digits_lenet5", "one", {}, {"run_folder": "/runs/other"})
    again = Tracker.start(store, "digits_lenet5", "one", {}, tags)
    stages = rows(runs, "SELECT run_uuid, lifecycle_stage FROM runs")
    for tracker, stage in ((killed, "deleted"), (other, "active"), (again, "active")):
        assert (tracker.run_id, stage) in stages
        tracker.finish("KILLED")


def test_a_closed_run_leaves_no_thread(store: TrackingStore) -> None:
    before = set(threading.enumerate())
    with start(store) as tracker:
        tracker.log_epoch(1, {"loss": 1.0})
        (sender,) = set(threading.enumerate()) - before
    sender.join(timeout=5)
    assert not sender.is_alive()
