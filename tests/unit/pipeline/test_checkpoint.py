from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoints.state import Progress, Snapshot
from pipeline.checkpoints.store import CheckpointError, Position
from tests.unit.pipeline.small_training import (
    ROW,
    ROWS,
    make_step,
    names,
    save,
    saved,
    small_training,
    store_in,
)

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "lamb")


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        *((optimizer, "float32") for optimizer in OPTIMIZERS),
        ("sgd", "float16"),
        *(pytest.param(name, "float16", marks=pytest.mark.slow) for name in OPTIMIZERS[1:]),
    ],
)
def test_a_restored_training_goes_on_bit_for_bit(tmp_path, optimizer, precision):
    state, store = small_training(optimizer, precision), store_in(tmp_path)
    for number in range(3):
        make_step(state, number)
    progress = Progress(1, 13, [{"train_loss": 0.5}], done=3)
    store.save(Snapshot.of(state, progress, ROWS))
    for number in range(3, 6):
        make_step(state, number)

    again = small_training(optimizer, precision)
    found, rank_state = store.load(Position(1, 3), again, ROW)
    assert found == progress
    assert all(torch.equal(rank_state[name], rows) for name, rows in ROWS.items())
    for number in range(3, 6):
        make_step(again, number)
    assert state.average is not None and again.average is not None
    for whole, resumed in ((state.model, again.model), (state.average, again.average)):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
    moments = zip(state.optimizer.state.values(), again.optimizer.state.values(), strict=True)
    for expected, restored in moments:
        assert expected.keys() == restored.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, restored[key]), key
            assert tensor.stride() == restored[key].stride(), f"{key} is laid out another way"
    assert state.scaler.state_dict() == again.scaler.state_dict()
    if precision == "float16":
        assert state.scaler.get_scale() > 65536, "the scale has grown, so there was state to lose"


def test_a_restored_training_holds_no_file_of_its_checkpoint(tmp_path):
    """Its place on the disk would be free only when the training ends."""
    state, store = small_training("adamw"), store_in(tmp_path)
    make_step(state, 0)
    save(store, state, 1, done=3)
    again = small_training("adamw")
    store.load(Position(1, 3), again, ROW)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_settings_of_the_optimizer_come_from_the_experiment_and_not_from_a_checkpoint(tmp_path):
    state = small_training(lr=0.1)
    make_step(state, 0)
    store = store_in(tmp_path)
    save(store, state, 1)
    again = small_training(lr=0.7)
    store.load(Position(1), again, ROW)
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.7, 0.7]
    assert b"lr" not in (tmp_path / "epoch-0001" / "state.json").read_bytes()


def test_a_snapshot_holds_still_while_the_training_goes_on():
    state = small_training()
    make_step(state, 0)
    snapshot = Snapshot.of(state, Progress(1, 1, [{}]))
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    make_step(state, 1)
    for name, tensor in snapshot.tensors["model"].items():
        assert torch.equal(tensor, before[name]), name


def test_the_memory_of_a_snapshot_is_used_again_where_it_fits():
    state = small_training()
    make_step(state, 0)
    first = Snapshot.of(state, Progress(1, 1, [{}]), ROWS)
    make_step(state, 1)
    second = Snapshot.of(state, Progress(1, 2, [{}]), {"statistics": torch.ones(3, 5)}, reuse=first)
    for part in ("model", "average", "optimizer"):
        for name, tensor in second.tensors[part].items():
            assert tensor.data_ptr() == first.tensors[part][name].data_ptr(), name
    weight = state.model.get_parameter("0.weight")
    assert torch.equal(second.tensors["model"]["0.weight"], weight)
    assert torch.equal(second.tensors["ranks"]["statistics"], torch.ones(3, 5))


def test_positions_are_named_so_that_they_sort_and_can_be_read_back():
    positions = [Position(0, 7), Position(1), Position(1, 50), Position(1, 123_456), Position(2)]
    assert sorted({*positions}) == positions
    assert [position.name for position in positions] == [
        *("epoch-0000-step-000007", "epoch-0001", "epoch-0001-step-000050"),
        *("epoch-0001-step-123456", "epoch-0002"),
    ]
    assert [Position.parse(position.name) for position in positions] == positions


@pytest.mark.parametrize(
    "name",
    [
        *("epoch-1", "epoch-00001", "epoch-0001-step-000000", "epoch-0001-step-1", "epoch-backup"),
        *("epoch-\u0661\u0661\u0661\u0661", "epoch-0001\n", "../epoch-0001", "epoch-0001.bak", ""),
    ],
)
def test_other_names_are_no_positions(name):
    assert Position.parse(name) is None


def test_the_newest_is_found_and_only_so_many_are_kept(tmp_path):
    store = saved(tmp_path, epochs=4, keep=3)
    assert store.newest(pytest.fail) == Position(4)
    assert names(tmp_path) == ["epoch-0002", "epoch-0003", "epoch-0004"]


def test_the_best_checkpoint_is_kept_however_old_it_is(tmp_path):
    state, store = small_training(), store_in(tmp_path, keep=1)
    history = [{"validation_top1": accuracy} for accuracy in (50.0, 70.0, 60.0, 65.0)]
    for epoch in range(1, 5):
        save(store, state, epoch, history=history[:epoch])
    assert names(tmp_path) == ["epoch-0002", "epoch-0004"]


def test_what_an_older_checkpoint_takes_for_the_best_is_kept_with_it(tmp_path):
    """Epoch 5 is the best now; were it damaged, the training would go on from 4, which knows 2."""
    state, store = small_training(), store_in(tmp_path)
    history = [{"validation_top1": accuracy} for accuracy in (10.0, 30.0, 20.0, 25.0, 40.0)]
    for epoch in range(1, 6):
        save(store, state, epoch, history=history[:epoch])
    assert names(tmp_path) == ["epoch-0002", "epoch-0004", "epoch-0005"]


def test_within_an_epoch_the_newest_are_kept_beside_the_result_so_far(tmp_path):
    state, store = small_training(), store_in(tmp_path)
    history = [{"validation_top1": accuracy} for accuracy in (30.0, 20.0)]
    for epoch, done in ((0, 5), (1, 0), (1, 5), (2, 0), (2, 3), (2, 6)):
        save(store, state, epoch, done, history[:epoch])
    assert names(tmp_path) == ["epoch-0001", "epoch-0002-step-000003", "epoch-0002-step-000006"]
    assert store.newest(pytest.fail) == Position(2, 6)
    assert store.history(Position(2, 6)) == history


def test_damaged_ones_that_were_skipped_go_with_the_next_save(tmp_path):
    """Were they counted among the newest, the one just saved would be removed in their place."""
    store = saved(tmp_path, epochs=3, keep=3)
    for name in ("epoch-0002", "epoch-0003"):
        flip_a_bit(tmp_path / name / "model.safetensors")
    assert store.newest(lambda line: None) == Position(1)
    store = store_in(tmp_path, keep=2)
    save(store, small_training(), 1, done=4)
    assert names(tmp_path) == ["epoch-0001", "epoch-0001-step-000004"]


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path):
    (tmp_path / ".partial-epoch-0001-0123").mkdir()
    (tmp_path / ".partial-epoch-0001-0123" / "model.safetensors").write_bytes(b"half")
    save(store_in(tmp_path), small_training(), 1)
    assert names(tmp_path) == ["epoch-0001"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    store = saved(tmp_path)
    (tmp_path / "epoch-backup").mkdir()
    save(store, small_training(), 3)
    assert store.newest(pytest.fail) == Position(3)
    assert "epoch-backup" in names(tmp_path)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert store_in(tmp_path / "none").newest(pytest.fail) is None


def test_the_moving_average_is_the_network_that_is_kept(tmp_path):
    state, store = small_training(), store_in(tmp_path)
    make_step(state, 0)
    save(store, state, 1)
    kept = small_training().model
    store.load_model(1, kept)
    assert state.average is not None
    assert torch.equal(kept.get_parameter("3.weight"), state.average.get_parameter("3.weight"))
    assert not torch.equal(kept.get_parameter("3.weight"), state.model.get_parameter("3.weight"))
    from_file = load_file(store.network_file(1))
    assert torch.equal(from_file["3.weight"], kept.get_parameter("3.weight"))


def flip_a_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def made_a_link(path: Path) -> None:
    """To the very file, so that its checksum is right."""
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILES = ("model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json")
DAMAGES: dict[Callable[[Path], None], str] = {
    flip_a_bit: "does not match its checksum",
    cut_short: "bytes of",
    Path.unlink: "is missing",
    made_a_pipe: "no plain file",
    made_a_link: "no plain file",
    made_a_folder: "no plain file",
}


@pytest.mark.timeout(20)  # reading from a pipe would wait for ever
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_wins(tmp_path, damage):
    for file in (*FILES, "manifest.json"):
        folder = tmp_path / file
        store = saved(folder)
        damage(folder / "epoch-0002" / file)
        lines: list[str] = []
        assert store.newest(lines.append) == Position(1)
        assert len(lines) == 1
        assert lines[0].startswith("checkpoint epoch-0002 is skipped: ")
        assert file == "manifest.json" or (file in lines[0] and DAMAGES[damage] in lines[0])
        with pytest.raises(CheckpointError, match="epoch-0002 cannot be used"):
            store.load_model(2, small_training().model)


def test_no_single_flipped_bit_goes_unnoticed(tmp_path):
    store = saved(tmp_path)
    chance = random.Random(0)
    for path in sorted((tmp_path / "epoch-0002").iterdir()):
        whole = path.read_bytes()
        count = 100 if path.name == "manifest.json" else 8
        for place in chance.sample(range(len(whole)), count):
            content = bytearray(whole)
            content[place] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            lines: list[str] = []
            assert store.newest(lines.append) == Position(1), f"byte {place} of {path.name}"
            assert len(lines) == 1
        path.write_bytes(whole)
    assert store.newest(pytest.fail) == Position(2)


def test_a_checkpoint_of_another_experiment_is_never_continued(tmp_path):
    saved(tmp_path)
    lines: list[str] = []
    assert store_in(tmp_path, identity="other").newest(lines.append) is None
    assert len(lines) == 2
    assert all("another experiment" in line for line in lines)


def test_a_checkpoint_under_another_name_is_skipped(tmp_path):
    store = saved(tmp_path)
    (tmp_path / "epoch-0002").rename(tmp_path / "epoch-0009")
    lines: list[str] = []
    assert store.newest(lines.append) == Position(1)
    assert "it was saved after 2 epochs and 0 steps" in lines[0]


@pytest.mark.parametrize("part", ["model", "average", "optimizer"])
def test_a_state_that_is_not_finite_never_replaces_a_good_one(tmp_path, part):
    store, state = saved(tmp_path, epochs=1), small_training()
    make_step(state, 0)
    assert state.average is not None
    network = state.average if part == "average" else state.model
    tensor = network.get_parameter("3.bias")
    if part == "optimizer":
        tensor = state.optimizer.state[tensor]["momentum_buffer"]
    tensor.data[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite after 20 steps \(epoch 2\)"):
        save(store, state, 2)
    assert names(tmp_path) == ["epoch-0001"]


def test_metrics_that_are_not_finite_are_refused_in_a_line(tmp_path):
    store = saved(tmp_path, epochs=1)
    with pytest.raises(CheckpointError) as raised:
        save(store, small_training(), 2, history=[{}, {"train_loss": float("nan")}])
    assert str(raised.value) == (
        f"checkpoint epoch-0002 cannot be saved in {tmp_path}: history.1.train_loss: Input should "
        "be a finite number; the last whole one is epoch-0001"
    )
    assert names(tmp_path) == ["epoch-0001"]


def test_a_checkpoint_has_the_rights_that_the_user_gives_files(tmp_path):
    before = os.umask(0o027)
    try:
        save(store_in(tmp_path), small_training(), 1)
    finally:
        os.umask(before)
    folder = tmp_path / "epoch-0001"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


WRITER = textwrap.dedent(
    """
    import itertools, pathlib, sys
    import torch
    from torch import nn
    from pipeline.checkpoints.store import CheckpointStore
    from pipeline.checkpoints.writer import CheckpointWriter
    from pipeline.config import Recipe
    from pipeline.optim import build_optimizer
    from pipeline.checkpoints.storage import LocalStorage
    from pipeline.checkpoints.state import Progress, TrainingState
    model = nn.Linear(600, 600)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainingState(model, build_optimizer(model, Recipe()), scaler)
    writer = CheckpointWriter(CheckpointStore(LocalStorage(pathlib.Path(sys.argv[1])), "identity"))
    for epoch in itertools.count(1):
        writer.start(state, Progress(epoch, epoch, [{}] * epoch), {})
        for progress in writer.collect():
            print(progress.epoch, flush=True)
    """
)


@pytest.mark.parametrize("time", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_a_writer_killed_at_any_time_leaves_only_whole_checkpoints(tmp_path, time):
    """What it has said is safe is there, and what it was writing is there or is not."""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    for _ in range(random.Random().randrange(3, 12)):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.communicate()[0].split() if line]
    store = store_in(tmp_path)
    newest = store.newest(pytest.fail)
    assert newest is not None
    assert newest.epoch >= max(said, default=1)
    assert len(store.history(newest)) == newest.epoch
    save(store_in(tmp_path, keep=1), small_training(), newest.epoch + 1)
    assert names(tmp_path) == [Position(newest.epoch + 1).name], "nothing half written is left"
