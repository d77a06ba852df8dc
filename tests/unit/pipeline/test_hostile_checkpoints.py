"""Checkpoints that somebody has made up: they are refused, and nothing in them is executed."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.store import CheckpointError, Position
from tests.unit.pipeline.small_training import (
    ROW,
    ROWS,
    forge,
    make_step,
    save,
    saved,
    small_training,
    store_in,
)

STATE = {
    "nested": b'{"history":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "a list": b"[]",
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "large": b" " * (1 << 24) + b"{}",
}
CHANGES: dict[str, dict[str, object]] = {
    "negative": {"step": -1},
    "a float for an integer": {"epoch": 2.0},
    "text for a number": {"step": "20"},
    "not finite": {"history": [{}, {"train_loss": float("inf")}]},
    "no number": {"history": [{}, {"train_loss": None}]},
    "fewer rows than epochs": {"history": [{}]},
    "fewer steps than epochs": {"step": 1},
    "settings of the optimizer": {"param_groups": [{"lr": 1e30}]},
    "an integer of many digits": {"step": 10**4000},
    "a scale below zero": {"scaler": {"scale": -1.0}},
    "a counter of many digits": {"counters": {"0.step": 10**4000}},
    "true": {"done": True},
}


@pytest.mark.parametrize("case", [*STATE, *CHANGES])
def test_a_record_that_is_not_what_it_should_be_is_refused(tmp_path, case):
    store = saved(tmp_path)
    folder = tmp_path / "epoch-0002"
    record = json.loads((folder / "state.json").read_text())
    content = STATE.get(case) or json.dumps(record | CHANGES.get(case, {})).encode()
    forge(folder, "state.json", b"" if case == "empty" else content)
    lines: list[str] = []
    assert store.newest(lines.append) == Position(1)
    assert len(lines) == 1
    assert "state.json" in lines[0]
    assert len(lines[0]) < 250
    assert "\n" not in lines[0]


@pytest.mark.parametrize(
    "name", ["../epoch-0001/state.json", "/etc/hostname", "state.json/../x", "hook.py", "", "\0"]
)
def test_a_manifest_that_names_other_files_is_refused(tmp_path, name):
    store = saved(tmp_path)
    forge(tmp_path / "epoch-0002", "state.json", b"{}", name)
    lines: list[str] = []
    assert store.newest(lines.append) == Position(1)
    assert f"its manifest names {name!r}" in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", '{"files": {"state.json": [1, "x"]}}', '{"files": {}}', "null"),
        '{"files": {"state.json": {"size": -1, "sha256": "' + "0" * 64 + '"}}}',
        '{"files": {"state.json": {"size": 1e30, "sha256": "' + "0" * 64 + '"}}}',
        '{"files": {"state.json": {"size": 99999999999999, "sha256": "' + "0" * 64 + '"}}}',
        '{"files":' * 10_000,
        "[" * 1_000_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    store = saved(tmp_path)
    (tmp_path / "epoch-0002" / "manifest.json").write_text(content)
    lines: list[str] = []
    assert store.newest(lines.append) == Position(1)
    assert len(lines) == 1


class Bomb:
    """What a pickle of it does when it is loaded: it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("not a number", "'3.weight' is not finite"),
        ("another shape", "has F32 3x145 as '3.weight', not F32 3x144"),
        ("another dtype", "has F64 3x144 as '3.weight', not F32 3x144"),
        ("one missing", "has no tensor as '3.weight', not F32 3x144"),
        ("one more", "has F32 1 as 'more', not no tensor"),
        ("a pickle", "is no safetensors file"),
        ("a header of 2**62 bytes", "is no safetensors file"),
        ("a tensor of 2**60 bytes", "is no safetensors file"),
        ("a nested header", "is no safetensors file"),
    ],
)
def test_a_network_that_is_not_this_one_is_refused_before_anything_is_changed(
    tmp_path, case, problem
):
    store = saved(tmp_path)
    file = tmp_path / "epoch-0002" / "model.safetensors"
    tensors, mark = load_file(file), tmp_path / "executed"
    match case:
        case "not a number":
            tensors["3.weight"][1, 2] = float("nan")
        case "another shape":
            tensors["3.weight"] = torch.zeros(3, 145)
        case "another dtype":
            tensors["3.weight"] = tensors["3.weight"].double()
        case "one missing":
            del tensors["3.weight"]
        case "one more":
            tensors["more"] = torch.zeros(1)
    save_file(tensors, file)
    content = file.read_bytes()
    header = {"w": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}
    match case:
        case "a pickle":
            content = pickle.dumps(Bomb(mark))
        case "a header of 2**62 bytes":
            content = (2**62).to_bytes(8, "little") + b"{}"
        case "a tensor of 2**60 bytes":
            text = json.dumps(header).encode()
            content = len(text).to_bytes(8, "little") + text
        case "a nested header":
            content = (200_000).to_bytes(8, "little") + b'{"a":' * 40_000
    forge(tmp_path / "epoch-0002", "model.safetensors", content)
    state, untouched = small_training(), small_training()
    with pytest.raises(CheckpointError) as raised:
        store.load(Position(2), state, ROW)
    assert problem in str(raised.value)
    assert "epoch-0002 cannot be used: model.safetensors" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not mark.exists()
    for name, tensor in untouched.model.state_dict().items():
        assert torch.equal(tensor, state.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("of another parameter", "has F32 3 as '9.momentum_buffer', not no tensor"),
        ("of another optimizer", "has F32 3 as '3.exp_avg', not no tensor"),
        ("without one of two", "has no tensor as '0.exp_avg', not F32 4x2x3x3"),
        ("another shape", "has F32 7 as '3.momentum_buffer', not F32 4"),
        ("counters of another optimizer", "what its optimizer counts"),
    ],
)
def test_a_state_that_the_optimizer_does_not_keep_is_refused(tmp_path, case, problem):
    optimizer = "adam" if case == "without one of two" else "sgd"
    state, store = small_training(optimizer), store_in(tmp_path)
    make_step(state, 0)
    save(store, state, 1)
    folder = tmp_path / "epoch-0001"
    file = folder / "optimizer.safetensors"
    tensors = load_file(file)
    match case:
        case "of another parameter":
            tensors["9.momentum_buffer"] = torch.zeros(3)
        case "of another optimizer":
            tensors["3.exp_avg"] = torch.zeros(3)
        case "without one of two":
            del tensors["0.exp_avg"]
        case "another shape":
            tensors["3.momentum_buffer"] = torch.zeros(7)
        case "counters of another optimizer":
            record = json.loads((folder / "state.json").read_text())
            record["counters"] = {"0.lr": 1000.0}
            forge(folder, "state.json", json.dumps(record).encode())
    save_file(tensors, file)
    forge(folder, file.name, file.read_bytes())
    with pytest.raises(CheckpointError) as raised:
        store.load(Position(1), small_training(optimizer), ROW)
    assert problem in str(raised.value)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"statistics": torch.zeros(2, 5)}, "has no tensor as 'counted', not F64 2x4"),
        ({**ROWS, "more": torch.zeros(2)}, "has F32 2 as 'more', not no tensor"),
        ({**ROWS, "statistics": torch.zeros(2, 6)}, "not F32 2x5"),
        ({**ROWS, "statistics": torch.zeros(3, 5)}, "not of any number of ranks"),
        ({name: rows[:0] for name, rows in ROWS.items()}, "not of any number of ranks"),
        ({"statistics": torch.tensor(1.0)}, "not of any number of ranks"),
    ],
)
def test_what_ranks_never_had_of_their_own_is_refused(tmp_path, rows, problem):
    store = store_in(tmp_path)
    store.save(Snapshot.of(small_training(), Progress(0, 3, [], 3), rows))
    with pytest.raises(CheckpointError, match=problem):
        store.load(Position(0, 3), small_training(), ROW)


def test_within_an_epoch_the_state_of_the_ranks_has_to_be_there(tmp_path):
    store = store_in(tmp_path)
    store.save(Snapshot.of(small_training(), Progress(0, 3, [], 3)))
    with pytest.raises(CheckpointError, match=r"ranks\.safetensors is missing"):
        store.load(Position(0, 3), small_training(), ROW)


def test_an_average_that_the_manifest_does_not_name_is_not_taken_for_the_network(tmp_path):
    state, store = small_training(), store_in(tmp_path)
    state.average = None
    make_step_without_average(state)
    save(store, state, 1)
    planted = {name: torch.zeros(t.shape) for name, t in state.model.state_dict().items()}
    save_file(planted, tmp_path / "epoch-0001" / "average.safetensors")
    assert store.network_file(1).name == "model.safetensors"


def make_step_without_average(state: TrainingState) -> None:
    state.model(torch.randn(8, 2, 8, 8)).square().mean().backward()
    state.optimizer.step()


@pytest.mark.parametrize(
    "scaler",
    [
        *({}, {"scale": 2.0}, {"scale": 0.0, "_growth_tracker": 0}),
        {"scale": 2.0, "_growth_tracker": 10**15},
    ],
)
def test_a_state_that_no_loss_scaler_has_is_refused(tmp_path, scaler):
    state, store = small_training(precision="float16"), store_in(tmp_path)
    make_step(state, 0)
    save(store, state, 1)
    record = json.loads((tmp_path / "epoch-0001" / "state.json").read_text())
    settings = record["scaler"] if "_growth_tracker" in scaler else {}
    record["scaler"] = {**settings, **scaler}
    forge(tmp_path / "epoch-0001", "state.json", json.dumps(record).encode())
    with pytest.raises(CheckpointError, match="loss scaler"):
        store.load(Position(1), small_training(precision="float16"), ROW)


def test_a_model_of_another_shape_is_refused(tmp_path):
    store = saved(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"average\.safetensors has F32 4 as '0\.bias', not F32 5"
    ):
        store.load_model(2, nn.Sequential(nn.Conv2d(1, 5, 3)))


def test_a_link_in_place_of_a_checkpoint_is_not_followed(tmp_path):
    store = saved(tmp_path / "mine")
    elsewhere = (tmp_path / "mine" / "epoch-0002").rename(tmp_path / "elsewhere")
    (tmp_path / "mine" / "epoch-0002").symlink_to(elsewhere)
    lines: list[str] = []
    assert store.newest(lines.append) == Position(1)
    assert lines == ["checkpoint epoch-0002 is skipped: it is no folder"]
    save(store, small_training(), 2)
    assert store.newest(pytest.fail) == Position(2)
    assert (elsewhere / "state.json").exists(), "what it led to is left alone"


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    saved(tmp_path)
    for path in (tmp_path / "epoch-0002").iterdir():
        content = path.read_bytes()
        assert not content.startswith(b"PK"), f"{path.name} is an archive"
        with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
            list(pickletools.genops(content))
