"""Registered models: what is in the artifact, and what a stranger's process makes of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from pipeline.config import Data, Experiment, PipelineError, Recipe, Tracking
from pipeline.registry.artifact import refuse_pickled_code
from pipeline.registry.predictions import Predictions
from pipeline.registry.registering import RegisteredModel, register
from pipeline.registry.registration import Registration
from pipeline.tracking import Tracker, TrackingStore, open_tracking
from pipeline.weight_sources import resolve
from pipeline.weights import load_into
from tests.unit.pipeline.stored import one_line, rows

NAME = "digits_lenet5_ternary"
MODEL_CARD = "# A ternary LeNet-5\n" + 600 * "0123456789"
EXPERIMENT = Experiment(
    name=NAME,
    dataset="digits",
    backbone="lenet5",
    method="ternary",
    train=Recipe(epochs=3, ema_decay=0.99),
    data=Data(raw=Path(__file__), prepared=Path(__file__).parents[3] / "prepared"),
    tracking=Tracking(runs=Path(__file__).parent, uri="http://user:secret@tracking.example"),
)
PREPROCESSING = {"mean": [0.5], "std": [0.25], "class_names": ["zero", "one"]}
PREDICTIONS = Predictions("ab" * 32, np.array([0, 9, 3], np.uint8), np.array([0, 9, 4], np.uint8))


@dataclass(frozen=True)
class Registered:
    """A ternary LeNet-5 in the registry of a store of its own."""

    store: TrackingStore
    run_id: str
    trained: torch.nn.Module
    model: RegisteredModel
    artifact: Path


def trained_network(seed: int) -> torch.nn.Module:
    """A ternary LeNet-5 whose batch-norm statistics are not those it was made with."""
    model = models.create_model(
        "lenet5", "ternary", num_classes=10, in_channels=1, image_size=32, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 1, 32, 32, generator=generator) * 2 + 1)
    return model.eval()


def register_network(
    store: TrackingStore,
    run_id: str,
    trained: torch.nn.Module,
    folded: torch.nn.Module | None = None,
    name: str = NAME,
    alias: str = "candidate",
) -> RegisteredModel:
    registration = Registration(
        name=name,
        run_id=run_id,
        experiment=EXPERIMENT,
        image_shape=(1, 32, 32),
        model_card=MODEL_CARD,
        preprocessing=PREPROCESSING,
        predictions=PREDICTIONS,
        metadata={"data": {"license": "CC BY 4.0"}},
        tags={"top1": "97.5"},
    )
    folded = models.fold(trained) if folded is None else folded
    return register(trained, folded, registration, store=store, alias=alias)


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    runs = tmp_path_factory.mktemp("my runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        store = open_tracking(None, runs)
        run_id = Tracker.start(store, NAME, "run", {}, {}).run_id
        trained = trained_network(seed=0)
        model = register_network(store, run_id, trained)
        (artifact,) = (runs / "artifacts" / "models").glob("*/artifacts")
        yield Registered(store, run_id, trained, model, artifact)
        assert list(Path.cwd().iterdir()) == [], "MLflow wrote to the working directory"


STRANGER = """
import importlib.util, sys
import mlflow.pytorch, numpy, torch
assert importlib.util.find_spec("pipeline") is None
assert importlib.util.find_spec("models") is None
model = mlflow.pytorch.load_model("models:/digits_lenet5_ternary@candidate")
with torch.inference_mode():
    for count in (1, 2, 7):
        images = torch.from_numpy(numpy.load("images.npy")[:count])
        numpy.save(f"logits{count}.npy", model(images).numpy())
"""


def test_a_process_without_this_project_gets_the_trained_logits_for_batches_of_1_2_and_7(
    registered: Registered, tmp_path: Path
) -> None:
    images = torch.randn(7, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "images.npy", images.numpy())
    stranger = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": registered.store.uri},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert stranger.returncode == 0, stranger.stderr
    with torch.inference_mode():
        expected = registered.trained(images).numpy()
    for count in (1, 2, 7):
        logits = np.load(tmp_path / f"logits{count}.npy")
        np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=1e-5)


class NoGlobals(pickle.Unpickler):
    """Reads plain containers and numbers only; a stream that names a type or function fails."""

    def find_class(self, module: str, name: str) -> object:
        raise AssertionError(f"the pickle names {module}.{name}")


def leaves(content: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """A file, or the members at any depth if it is an archive."""
    if content[:2] != b"PK":
        yield name, content
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.namelist():
            yield from leaves(archive.read(member), f"{name}/{member}")


def test_nothing_in_the_artifact_is_a_pickle_that_names_a_type(registered: Registered) -> None:
    files = {
        name: content
        for path in registered.artifact.rglob("*")
        if path.is_file()
        for name, content in leaves(path.read_bytes(), path.name)
    }
    (data,) = [name for name in files if name.endswith((".pkl", ".pth", ".pickle"))]
    assert "/sample_inputs/" in data
    assert NoGlobals(io.BytesIO(files[data])).load() == ((0,), {})
    configs = [content for name, content in files.items() if name.endswith("_config.json")]
    assert configs
    assert not any(b'"use_pickle": true' in content.lower() for content in configs)


def test_nothing_in_the_artifact_names_a_folder_of_this_machine(registered: Registered) -> None:
    runs = registered.artifact.parents[3]
    folders = {str(Path(__file__).parents[3]), sys.prefix, str(runs), runs.as_uri(), "secret"}
    for path in registered.artifact.rglob("*"):
        if path.is_file():
            for name, content in leaves(path.read_bytes(), path.name):
                assert [folder for folder in folders if folder.encode() in content] == [], name


def test_pickled_code_is_found_in_an_archive_within_an_archive(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return print, ("executed",)

    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("weights", pickle.dumps({"weight": Payload()}))
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("data/inner", inner.getvalue())
    with pytest.raises(PipelineError, match=r"code in .*model\.pt2/data/inner/weights"):
        refuse_pickled_code(tmp_path)
    (tmp_path / "model.pt2").unlink()
    (tmp_path / "plain").write_bytes(pickle.dumps({"weight": [1.0, 2.0]}))
    refuse_pickled_code(tmp_path)


def test_pickled_code_is_found_before_bytes_that_no_pickle_has(tmp_path: Path) -> None:
    harmful = pickle.dumps(print)
    (tmp_path / "weights").write_bytes(harmful.removesuffix(pickle.STOP) + b"\xff garbage")
    with pytest.raises(PipelineError, match=r"code in .*weights"):
        refuse_pickled_code(tmp_path)


def test_numbers_that_begin_like_a_pickle_of_an_unknown_protocol_are_let_through(
    tmp_path: Path,
) -> None:
    (tmp_path / "weights").write_bytes(pickle.PROTO + bytes([6]) + pickle.REDUCE + b"\xff")
    refuse_pickled_code(tmp_path)


def test_whoever_may_read_one_file_of_a_version_may_read_all(registered: Registered) -> None:
    files = [path for path in registered.artifact.rglob("*") if path.is_file()]
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1


def test_card_preprocessing_signature_and_tags_come_with_the_model(registered: Registered) -> None:
    from mlflow.models import Model

    assert (registered.artifact / "model_card.md").read_text() == MODEL_CARD
    stored = json.loads((registered.artifact / "preprocessing.json").read_text())
    assert stored == PREPROCESSING
    loaded = Model.load(str(registered.artifact))
    assert loaded.metadata == PREPROCESSING
    assert loaded.run_id == registered.run_id
    assert loaded.signature is not None
    assert [spec.shape for spec in loaded.signature.inputs] == [(-1, 1, 32, 32)]
    assert [spec.shape for spec in loaded.signature.outputs] == [(-1, 10)]
    version = registered.store.client.get_model_version_by_alias(NAME, "candidate")
    packed = registered.artifact / "packed.safetensors"
    profile = models.profile(registered.trained, 32)
    sizes = {
        "stored_bytes": str(profile.stored_bytes),
        "packed_bytes": str(packed.stat().st_size),
    }
    assert version.tags == {"top1": "97.5", **sizes}
    assert version.run_id == registered.run_id
    assert version.description == MODEL_CARD[:5000]


def test_the_packed_network_gives_the_folded_ones_logits_to_the_bit_and_says_what_it_is(
    registered: Registered,
) -> None:
    path = registered.artifact / "packed.safetensors"
    images = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected = models.fold(registered.trained)(images)
        assert torch.equal(models.unpack(path)(images), expected)
    metadata = models.read_packed(path).metadata
    assert metadata["preprocessing"] == PREPROCESSING
    assert metadata["data"] == {"license": "CC BY 4.0"}
    assert (metadata["experiment"], metadata["source_run"]) == (NAME, registered.run_id)
    assert metadata["experiment_yaml"] == (registered.artifact / "experiment.yaml").read_text()
    answers = Predictions.load(registered.artifact / "evaluation.safetensors")
    assert answers.predicted.tolist() == [0, 9, 3]


def test_the_model_also_answers_through_the_interface_of_the_scoring_server(
    registered: Registered,
) -> None:
    import mlflow.pyfunc

    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(6))
    logits = mlflow.pyfunc.load_model(str(registered.artifact)).predict(images.numpy())
    with torch.inference_mode():
        np.testing.assert_allclose(logits, registered.trained(images).numpy(), rtol=0, atol=1e-5)


def test_the_result_says_where_the_model_is_and_how_large(registered: Registered) -> None:
    sizes = [
        (registered.artifact / file).stat().st_size
        for file in ("data/model.pt2", "packed.safetensors")
    ]
    assert registered.model == RegisteredModel(NAME, 1, f"models:/{NAME}@candidate", *sizes)


def beginner(runs: Path) -> Experiment:
    """An experiment whose registry is that of the folder of runs."""
    return Experiment(
        name="next", dataset="digits", backbone="lenet5", tracking=Tracking(runs=runs)
    )


@pytest.mark.parametrize("source", [f"models:/{NAME}@candidate", f"models:/{NAME}/1"])
def test_another_training_can_begin_with_the_latent_weights_of_a_version(
    source: str, registered: Registered
) -> None:
    weights = resolve(source, beginner(registered.artifact.parents[3]))
    network = trained_network(seed=8)
    report = load_into(network, weights)
    count = len(network.state_dict())
    origin = source if source.endswith("/1") else f"{source} (version 1)"
    assert report == f"init_from {origin}: {count} of {count} tensors"
    latent = registered.trained.state_dict()
    assert all(torch.equal(latent[name], tensor) for name, tensor in network.state_dict().items())
    assert latent["conv1.weight"].unique().numel() > 3  # a ternary weight has three values
    assert weights.experiment is not None
    assert weights.experiment.train == EXPERIMENT.train


@pytest.fixture
def older(registered: Registered, tmp_path: Path) -> Iterator[str]:
    """The number of a version without what another training begins with."""
    (tmp_path / "MLmodel").write_bytes((registered.artifact / "MLmodel").read_bytes())
    client = registered.store.client
    version = client.create_model_version(NAME, tmp_path.as_uri(), registered.run_id)
    client.set_registered_model_alias(NAME, "older", version.version)
    yield str(version.version)
    client.delete_model_version(NAME, version.version)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("models:/digits_lenet5_tenary@candidate", f"did you mean {NAME}?"),
        (f"models:/{NAME}@candidat", "has no alias candidat; did you mean candidate?"),
        (f"models:/{NAME}/17", "has no version 17; it has 1, "),
        (f"models:/{NAME}/latest", "write models:/NAME@ALIAS or models:/NAME/3"),
        (f"models:{NAME}", "write models:/NAME@ALIAS or models:/NAME/3"),
        (f"models:/{NAME}@older", f"of {NAME} was registered without the weights"),
    ],
)
def test_what_the_registry_does_not_have_is_one_line_with_the_nearest(
    source: str, message: str, registered: Registered, older: str
) -> None:
    with pytest.raises(PipelineError) as error:
        resolve(source, beginner(registered.artifact.parents[3]))
    assert message in one_line(error)


def test_an_empty_registry_says_that_it_is_empty(runs: Path) -> None:
    with pytest.raises(PipelineError, match="has no registered model net; it has none") as error:
        resolve("models:/net@champion", beginner(runs))
    one_line(error)


def test_weights_that_were_damaged_in_the_store_are_one_line(registered: Registered) -> None:
    path = registered.artifact / "training" / "weights.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(PipelineError, match=r"weights\.safetensors is damaged") as error:
            resolve(f"models:/{NAME}@candidate", beginner(registered.artifact.parents[3]))
        one_line(error)
    finally:
        path.write_bytes(content)


class Classifier(nn.Module):
    """A linear net with small logits, to which a subclass may do something bad in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32 * 32, 10)
        with torch.no_grad():
            self.linear.weight.mul_(0.1)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(images.flatten(1))
        return logits


class WrongForOneCount(Classifier):
    """Gives other logits for `wrong` images, but not for the two counts in `right`."""

    def __init__(self, right: tuple[int, int]) -> None:
        super().__init__()
        self.right = right

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = self.right
        count = images.shape[0]
        return super().forward(images) * (1 + (count - first) * (count - second))


class SlightlyOff(Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + 1e-4


class NotExportable(Classifier):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits if logits.sum() > 0 else -logits


class Mask(torch.Tensor):
    pass


class WithPickledWeight(Classifier):
    """Torch writes a buffer of a tensor subclass as a pickle that names its class."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(10).as_subclass(Mask))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + self.get_buffer("mask")


OTHER_LOGITS = "gives other logits than the trained network: .* for {} images"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WrongForOneCount(right=(1, 2)), OTHER_LOGITS.format(7)),
        (WrongForOneCount(right=(7, 1)), OTHER_LOGITS.format(2)),
        (WrongForOneCount(right=(7, 2)), OTHER_LOGITS.format(1)),
        (SlightlyOff(), OTHER_LOGITS.format(7)),
        (NotExportable(), "cannot export"),
        (WithPickledWeight(), "holds pickled code"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("name", [NAME, "new_name"])
def test_what_is_not_accepted_leaves_no_trace_in_the_registry(
    name: str, model: Classifier, message: str, registered: Registered
) -> None:
    reference = Classifier()
    reference.load_state_dict(model.state_dict(), strict=False)
    before = in_registry(registered)
    with pytest.raises(PipelineError, match=message) as error:
        register_network(registered.store, registered.run_id, reference, model, name)
    assert "\n" not in str(error.value)
    assert in_registry(registered) == before


def in_registry(registered: Registered) -> list[list[tuple[object, ...]]]:
    """Names, versions, aliases and logged models that are not deleted, without MLflow's help."""
    queries = (
        "SELECT name FROM registered_models",
        "SELECT name, version FROM model_versions WHERE current_stage != 'Deleted_Internal'",
        "SELECT name, alias, version FROM registered_model_aliases",
        "SELECT model_id FROM logged_models WHERE lifecycle_stage = 'active'",
    )
    return [rows(registered.artifact.parents[3], query) for query in queries]


def test_a_failure_of_the_store_after_the_version_was_created_leaves_no_trace(
    registered: Registered,
) -> None:
    before = in_registry(registered)
    model = trained_network(seed=2)
    with pytest.raises(PipelineError, match=r"cannot register new_name .*alias"):
        register_network(
            registered.store, registered.run_id, model, name="new_name", alias="not/an alias"
        )
    assert in_registry(registered) == before


def test_a_run_has_one_version_however_often_it_is_registered_and_no_alias_goes_back(
    store: TrackingStore, runs: Path
) -> None:
    first, second = (Tracker.start(store, "net", name, {}, {}).run_id for name in "ab")
    model = trained_network(seed=2)

    def registered_as(run_id: str) -> RegisteredModel:
        return register_network(store, run_id, model, name="net")

    assert [registered_as(run_id).version for run_id in (first, second)] == [1, 2]
    left = store.client.create_logged_model("1", "net", first)  # by a process that was killed
    again = registered_as(first)
    assert again.version == 1
    assert again.size_bytes > 0
    assert rows(runs, "SELECT version FROM model_versions ORDER BY version") == [(1,), (2,)]
    assert rows(runs, "SELECT alias, version FROM registered_model_aliases") == [("candidate", 2)]
    assert rows(runs, "SELECT count(*) FROM inputs WHERE source_type = 'RUN_OUTPUT'") == [(2,)]
    stages = dict(rows(runs, "SELECT model_id, lifecycle_stage FROM logged_models"))
    assert [key for key, stage in stages.items() if stage == "deleted"] == [left.model_id]


def test_registering_for_a_run_that_is_not_there_is_one_line(registered: Registered) -> None:
    with pytest.raises(PipelineError, match=f"cannot register {NAME} .*0123") as error:
        register_network(registered.store, "0123", registered.trained)
    assert "\n" not in str(error.value)
