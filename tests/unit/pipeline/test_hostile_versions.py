"""Versions that somebody has changed to do harm: whatever is done with them, nothing of it runs."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import models
from models import ModelError
from pipeline.config import Experiment, PipelineError, Tracking
from pipeline.registry.overview import compare, list_models
from pipeline.registry.promotion import consider, promote
from pipeline.registry.versions import fetch_packed, find_version, parse_reference
from pipeline.stores import TrackingStore, open_tracking
from pipeline.tracking import Tracker
from pipeline.weight_sources import resolve
from tests.unit.pipeline.stored import one_line
from tests.unit.pipeline.test_registry import NAME, register_network, trained_network


class Touch:
    """Pickled, it makes an empty file of whoever reads it back."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


@dataclass(frozen=True)
class Victim:
    """A good version in a registry, the second of its name, and what its files were."""

    store: TrackingStore
    runs: Path
    run_id: str
    artifact: Path
    files: dict[str, bytes]

    def restore(self) -> None:
        for path in self.artifact.rglob("*"):
            if path.is_file() and path.relative_to(self.artifact).as_posix() not in self.files:
                path.unlink()
        for name, content in self.files.items():
            (self.artifact / name).write_bytes(content)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store = open_tracking(None, runs)
    run_ids = [Tracker.start(store, NAME, name, {}, {}).run_id for name in "ab"]
    for run_id in run_ids:
        register_network(store, run_id, trained_network(seed=1))
    consider(store, NAME, 1)
    source = store.client.get_model_version(NAME, "2").source
    artifact = Path(str(source).removeprefix("file://"))
    files = {
        path.relative_to(artifact).as_posix(): path.read_bytes()
        for path in artifact.rglob("*")
        if path.is_file()
    }
    return Victim(store, runs, run_ids[1], artifact, files)


@pytest.fixture
def victim(registered: Victim) -> Iterator[Victim]:
    yield registered
    registered.restore()


def with_program(content: bytes, name: str, change: bytes | dict[str, object]) -> bytes:
    """A .pt2 archive with one member replaced, or with entries of its JSON replaced."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(changed, "w") as target:
        for member in archive.namelist():
            inner = archive.read(member)
            if member.endswith(name):
                inner = change if isinstance(change, bytes) else replaced(inner, change)
            target.writestr(member, inner)
    return changed.getvalue()


def replaced(content: bytes, change: dict[str, object]) -> bytes:
    """JSON text in which every value under these keys, at any depth, is another one."""

    def walk(value: object) -> object:
        if isinstance(value, dict):
            return {key: change.get(key, walk(inner)) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(walk(json.loads(content))).encode()


def touching(harm: Path) -> str:
    """An expression of Python that makes the file."""
    return f"__import__('pathlib').Path({str(harm)!r}).touch()"


def pickled(harm: Path) -> bytes:
    """What torch.save writes of an object that does harm when it is read."""
    content = io.BytesIO()
    torch.save(Touch(harm), content)
    return content.getvalue()


def programs(good: bytes, harm: Path) -> dict[str, bytes]:
    """Archives of torch.export that torch 2.11 reads, and that run code by that."""
    return {
        "a symbolic size": with_program(good, "models/model.json", {"expr_str": touching(harm)}),
        "a guard": with_program(
            good, "models/model.json", {"guards_code": [f"{touching(harm)} or True"]}
        ),
        "a pickled example": with_program(good, "sample_inputs/model.pt", pickled(harm)),
    }


KINDS = ["a symbolic size", "a guard", "a pickled example"]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_itself_runs_what_such_a_program_holds(
    kind: str, registered: Victim, tmp_path: Path
) -> None:
    """Otherwise what follows would prove nothing."""
    harm, file = tmp_path / "harm", tmp_path / "model.pt2"
    file.write_bytes(programs(registered.files["data/model.pt2"], harm)[kind])
    with contextlib.suppress(Exception):
        torch.export.load(file).module()(torch.zeros(2, 1, 32, 32))
    assert harm.exists()


def use(victim: Victim, tmp_path: Path) -> list[str]:
    """Do with version 2 whatever the pipeline does with a version; returns what it refused."""
    store, refused = victim.store, []
    reference = parse_reference(f"{NAME}@2")
    beginner = Experiment(
        name="next", dataset="digits", backbone="lenet5", tracking=Tracking(runs=victim.runs)
    )

    def unpack() -> None:
        models.unpack(fetch_packed(find_version(reference, store), store, tmp_path))

    uses = (
        unpack,
        lambda: resolve(f"models:/{NAME}/2", beginner),
        lambda: list_models(store),
        lambda: compare(store, f"{NAME}@1", f"{NAME}@2"),
        lambda: promote(store, f"{NAME}@2", False, "ada"),
    )
    for attempt in uses:
        try:
            attempt()
        except (PipelineError, ModelError) as error:
            assert "\n" not in str(error)
            refused.append(str(error))
    again = register_network(store, victim.run_id, trained_network(seed=1))
    assert again.version != 2, "the version is not taken up by the run that it is of"
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_hostile_program_runs(kind: str, victim: Victim, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    good = victim.files["data/model.pt2"]
    (victim.artifact / "data" / "model.pt2").write_bytes(programs(good, harm)[kind])
    use(victim, tmp_path)
    assert not harm.exists()


def test_nothing_of_hostile_files_beside_it_runs(
    victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm, modules = tmp_path / "harm", tmp_path / "modules"
    modules.mkdir()
    (modules / "harmful.py").write_text(touching(harm))
    monkeypatch.syspath_prepend(str(modules))
    payload = pickle.dumps(Touch(harm))
    for name in ("packed.safetensors", "evaluation.safetensors", "training/weights.safetensors"):
        (victim.artifact / name).write_bytes(payload)
    yaml = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{harm}]]"
    for name in ("experiment.yaml", "training/experiment.yaml"):
        (victim.artifact / name).write_text(yaml)
    (victim.artifact / "data" / "model.pth").write_bytes(pickled(harm))
    (victim.artifact / "data" / "pickle_module_info.txt").write_text("pickle")
    description = (victim.artifact / "MLmodel").read_text()
    hostile = description.replace("loader_module: mlflow.pytorch", "loader_module: harmful")
    assert hostile != description
    (victim.artifact / "MLmodel").write_text(hostile.replace("code: null", f"code: {modules}"))
    path = list(sys.path)
    refused = use(victim, tmp_path)
    assert len(refused) == 4, refused
    assert not harm.exists()
    assert sys.path == path
    assert "harmful" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        *("models:/../../secrets@champion", "../secrets@1", "models:/net@../../etc", "net@a/b"),
        *("models:/net/..", "net@", "@1", "models:net", "models:/net", "a:b", "net/1", ""),
    ],
)
def test_a_reference_that_leads_elsewhere_is_refused(text: str) -> None:
    with pytest.raises(PipelineError, match="names no version; write models:/NAME@ALIAS") as error:
        parse_reference(text)
    one_line(error)


def test_a_link_to_a_file_elsewhere_is_not_followed(victim: Victim, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("user:password")
    (victim.artifact / "packed.safetensors").unlink()
    (victim.artifact / "packed.safetensors").symlink_to(secret)
    version = find_version(parse_reference(f"{NAME}@2"), victim.store)
    with pytest.raises(PipelineError, match="outside the artifact directory") as error:
        fetch_packed(version, victim.store, tmp_path)
    one_line(error)
    (victim.artifact / "packed.safetensors").unlink()


def test_a_few_lines_of_yaml_that_stand_for_a_billion_words_take_no_memory(
    victim: Victim,
) -> None:
    lines = ["train:", "  epochs: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 9):
        lines.append(f"  lr{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    lines += ["dataset: *a8", f"name: {NAME}", "backbone: lenet5"]
    (victim.artifact / "experiment.yaml").write_text("\n".join(lines))
    with pytest.raises(PipelineError, match=r"experiment\.yaml: dataset=") as error:
        compare(victim.store, f"{NAME}@1", f"{NAME}@2")
    one_line(error)
