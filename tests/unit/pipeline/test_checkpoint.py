from __future__ import annotations

import copy
import json
import os
import pickletools
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import CheckpointError, CheckpointStore, Progress, TrainingState
from pipeline.config import Recipe
from pipeline.optim import build_optimizer


def small_training(optimizer_name: str = "sgd", precision: str = "float32") -> TrainingState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    optimizer = build_optimizer(model, Recipe(optimizer=optimizer_name))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", growth_interval=2)
    return TrainingState(model, optimizer, scaler, copy.deepcopy(model))


def step(state: TrainingState, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    loss = state.model(images).square().mean()
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    assert state.average is not None
    for mean, weight in zip(state.average.parameters(), state.model.parameters(), strict=True):
        mean.data.lerp_(weight.data, 0.5)


@pytest.mark.parametrize("optimizer_name", ["sgd", "adam", "adamw", "rmsprop", "lamb"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_restored_training_goes_on_bit_for_bit(tmp_path, optimizer_name, precision):
    state = small_training(optimizer_name, precision)
    store = CheckpointStore(tmp_path, "identity")
    for number in range(3):
        step(state, number)
    store.save(state, Progress(1, 3, [{"train_loss": 0.5}]))
    for number in range(3, 6):
        step(state, number)

    again = small_training(optimizer_name, precision)
    progress = store.load(1, again)
    assert progress == Progress(1, 3, [{"train_loss": 0.5}])
    for number in range(3, 6):
        step(again, number)
    assert state.average is not None and again.average is not None
    for whole, resumed in ((state.model, again.model), (state.average, again.average)):
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert state.scaler.state_dict() == again.scaler.state_dict()
    if precision == "float16":
        assert state.scaler.get_scale() > 65536, "the scale has grown, so there was state to lose"


def test_the_best_checkpoint_is_kept_however_old_it_is(tmp_path):
    state = small_training()
    store = CheckpointStore(tmp_path, "identity", keep=1)
    history = [{"validation_top1": accuracy} for accuracy in (50.0, 70.0, 60.0, 65.0)]
    for epoch in range(1, 5):
        store.save(state, Progress(epoch, epoch, history[:epoch]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0002", "epoch-0004"]


def test_what_an_older_checkpoint_takes_for_the_best_is_kept_with_it(tmp_path):
    """Epoch 5 is the best now; were it damaged, the training would go on from 4, which knows 2."""
    state = small_training()
    store = CheckpointStore(tmp_path, "identity", keep=2)
    history = [{"validation_top1": accuracy} for accuracy in (10.0, 30.0, 20.0, 25.0, 40.0)]
    for epoch in range(1, 6):
        store.save(state, Progress(epoch, epoch, history[:epoch]))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch-0002", "epoch-0004", "epoch-0005"]


def test_the_moving_average_is_the_network_that_is_kept(tmp_path):
    state = small_training()
    step(state, 0)
    store = CheckpointStore(tmp_path, "identity")
    store.save(state, Progress(1, 1, [{}]))
    kept = small_training().model
    store.load_model(1, kept)
    assert state.average is not None
    assert torch.equal(kept.get_parameter("3.weight"), state.average.get_parameter("3.weight"))
    assert not torch.equal(kept.get_parameter("3.weight"), state.model.get_parameter("3.weight"))


def saved(folder: Path, epochs: int = 2, keep: int = 2) -> CheckpointStore:
    state = small_training()
    store = CheckpointStore(folder, "identity", keep=keep)
    for epoch in range(1, epochs + 1):
        step(state, epoch)
        store.save(state, Progress(epoch, epoch, [{}] * epoch))
    return store


def test_the_newest_is_found_and_only_so_many_are_kept(tmp_path):
    store = saved(tmp_path, epochs=11, keep=3)
    assert store.newest(pytest.fail) == 11
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["epoch-0009", "epoch-0010", "epoch-0011"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    store = saved(tmp_path)
    (tmp_path / "epoch-backup").mkdir()
    assert store.newest(pytest.fail) == 2


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path / "none", "identity").newest(pytest.fail) is None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes of"),
        (flip_a_bit, "checksum"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_wins(tmp_path, damage, reason):
    store = saved(tmp_path)
    damage(tmp_path / "epoch-0002")
    lines: list[str] = []
    assert store.newest(lines.append) == 1
    assert len(lines) == 1
    assert "epoch-0002" in lines[0]
    assert reason in lines[0]


def test_a_checkpoint_of_another_experiment_is_never_continued(tmp_path):
    saved(tmp_path)
    lines: list[str] = []
    assert CheckpointStore(tmp_path, "other").newest(lines.append) is None
    assert all("another experiment" in line for line in lines)


def test_a_model_of_another_shape_is_refused(tmp_path):
    store = saved(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        store.load_model(2, nn.Sequential(nn.Conv2d(1, 5, 3)))


def test_a_damaged_model_is_not_loaded(tmp_path):
    store = saved(tmp_path)
    flip_a_bit(tmp_path / "epoch-0002")
    with pytest.raises(CheckpointError, match="checksum"):
        store.load_model(2, small_training().model)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    saved(tmp_path)
    for path in (tmp_path / "epoch-0002").iterdir():
        content = path.read_bytes()
        assert not content.startswith(b"PK"), f"{path.name} is an archive"
        with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
            list(pickletools.genops(content))


def test_a_writer_killed_at_any_time_leaves_only_whole_checkpoints(tmp_path):
    program = textwrap.dedent(
        """
        import itertools, pathlib, sys
        import torch
        from torch import nn
        from pipeline.checkpoint import CheckpointStore, Progress, TrainingState
        from pipeline.config import Recipe
        from pipeline.optim import build_optimizer
        model = nn.Linear(600, 600)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = TrainingState(model, build_optimizer(model, Recipe()), scaler)
        store = CheckpointStore(pathlib.Path(sys.argv[1]), "identity")
        for epoch in itertools.count(1):
            store.save(state, Progress(epoch, epoch, []))
            print(epoch, flush=True)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    for _ in range(5):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = CheckpointStore(tmp_path, "identity").newest(pytest.fail)
    assert newest is not None
    assert newest >= last
    state = json.loads((tmp_path / f"epoch-{newest:04d}" / "state.json").read_text())
    assert state["epoch"] == newest


def test_a_failure_in_the_middle_of_a_save_leaves_the_last_checkpoint_untouched(tmp_path):
    """The tensors are on disk when the metrics turn out not to be JSON."""
    store = saved(tmp_path, epochs=1)
    state = small_training()
    bad = Progress(2, 2, [{"train_loss": float("nan")}])
    with pytest.raises(ValueError, match="JSON"):
        store.save(state, bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0001"]
    assert store.newest(pytest.fail) == 1
