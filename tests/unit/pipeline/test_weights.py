"""Weights from elsewhere: found, checked, loaded; what cannot be used is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
from pipeline.checkpoints.state import Progress, Snapshot, TrainingState
from pipeline.checkpoints.storage import LocalStorage
from pipeline.checkpoints.store import CheckpointStore
from pipeline.config import Experiment, PipelineError, Recipe, Tracking
from pipeline.weight_sources import kept, record, resolve
from pipeline.weights import Weights, load_into
from tests.unit.pipeline.stored import one_line


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(
        name="cifar10_resnet20",
        dataset="cifar10",
        backbone="resnet20",
        tracking=Tracking(runs=tmp_path / "runs"),
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which torch keeps downloads, empty, and a network that is not there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def resnet20(method: str = "float", *, seed: int = 0, num_classes: int = 10) -> nn.Module:
    return models.create_model(
        "resnet20", method, num_classes=num_classes, image_size=32, seed=seed
    )


def saved(folder: Path, tensors: dict[str, Tensor]) -> str:
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return str(path)


def same(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


@torch.no_grad()
def with_statistics(model: nn.Module) -> nn.Module:
    """The network with batch-norm statistics and biases that are not those it was made with."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(0, 0.1, generator=generator)
            module.get_buffer("running_var").uniform_(0.5, 2, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
    return model.eval()


def put_in_hub(hub: Path, entry: torchvision.models.WeightsEnum, content: Any) -> Path:
    hub.mkdir(parents=True, exist_ok=True)
    file = hub / entry.url.rpartition("/")[2]
    torch.save(content, file)
    return file


SLOW = pytest.mark.slow
TWINS = [
    ("resnet18", "resnet18"),
    ("mobilenetv2(form=imagenet)", "mobilenet_v2"),
    ("squeezenet(form=imagenet)", "squeezenet1_1"),
    ("shufflenetv2(form=imagenet, width=0.5)", "shufflenet_v2_x0_5"),
    pytest.param("resnet34", "resnet34", marks=SLOW),
    pytest.param("resnet50", "resnet50", marks=SLOW),
    pytest.param("resnet101", "resnet101", marks=SLOW),
    pytest.param("vgg16(form=imagenet)", "vgg16_bn", marks=SLOW),
    pytest.param("efficientnetb0(form=imagenet)", "efficientnet_b0", marks=SLOW),
    pytest.param("squeezenet(form=imagenet, version=1.0)", "squeezenet1_0", marks=SLOW),
    pytest.param("shufflenetv2(form=imagenet)", "shufflenet_v2_x1_0", marks=SLOW),
]


@pytest.mark.parametrize(("ours", "theirs"), TWINS)
def test_with_torchvisions_weights_our_network_gives_torchvisions_logits(
    ours: str, theirs: str, experiment: Experiment, hub: Path
) -> None:
    entry = torchvision.models.get_model_weights(theirs).DEFAULT
    twin = with_statistics(torchvision.models.get_model(theirs, weights=None))
    put_in_hub(hub, entry, twin.state_dict())
    weights = resolve(str(entry), experiment)
    network = models.create_model(ours, num_classes=1000, image_size=96, seed=3)
    count = len(twin.state_dict())
    assert load_into(network, weights) == f"init_from {entry}: {count} of {count} tensors"
    assert weights.torchvision == str(entry)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), twin(images), rtol=0, atol=1e-5)


def test_default_is_the_newest_weights_and_says_which(experiment: Experiment, hub: Path) -> None:
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    put_in_hub(hub, entry, {"weight": torch.ones(2)})
    weights = resolve("SqueezeNet1_1_Weights.DEFAULT", experiment)
    assert weights.origin == ("SqueezeNet1_1_Weights.DEFAULT (SqueezeNet1_1_Weights.IMAGENET1K_V1)")
    assert weights.torchvision == "SqueezeNet1_1_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("ResNet18_Weights.IMAGENET1K_V9", "did you mean ResNet18_Weights.IMAGENET1K_V1"),
        ("resnet18_weights.imagenet1k_v1", "none of torchvision's weights"),
        ("ResNet18_QuantizedWeights.DEFAULT", "did you mean ResNet18_Weights.DEFAULT"),
        ("resnet50", "did you mean ResNet50_Weights.IMAGENET1K_V2?"),
        ("FCN_ResNet50_Weights.DEFAULT", "none of torchvision's weights for classification"),
        ("weights/none.pt", "there is no file or run folder weights/none.pt"),
        ("none.safetensors", "there is no file or run folder none.safetensors"),
        ("runs:/0123/model", "there is no file or run folder"),
        ("", "run folder"),
    ],
)
def test_an_unknown_source_is_one_line_with_the_nearest(
    source: str, hint: str, experiment: Experiment, hub: Path
) -> None:
    with pytest.raises(PipelineError) as error:
        resolve(source, experiment)
    assert hint in one_line(error)


def test_without_a_network_the_error_says_where_the_file_belongs(
    experiment: Experiment, hub: Path
) -> None:
    with pytest.raises(PipelineError, match="cannot download https://") as error:
        resolve("ResNet18_Weights.IMAGENET1K_V1", experiment)
    assert f"put that file at {hub / 'resnet18-f37072fd.pth'}" in one_line(error)
    assert list(hub.iterdir()) == []
    assert not (experiment.tracking.runs / "weights").exists()


class Payload:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("place", ["hub", "file"])
def test_a_pickle_with_code_is_refused_and_not_run(
    place: str, experiment: Experiment, hub: Path, tmp_path: Path
) -> None:
    content = {"weight": torch.ones(2), "other": Payload(tmp_path / "executed")}
    source = "ResNet18_Weights.IMAGENET1K_V1"
    file = put_in_hub(hub, torchvision.models.get_weight(source), content)
    with pytest.raises(PipelineError, match="reading it could run code") as error:
        resolve(str(file) if place == "file" else source, experiment)
    assert str(file) in one_line(error)
    assert not (tmp_path / "executed").exists()


def truncated(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def make_bad(kind: str, folder: Path) -> Path:
    path = folder / f"bad{'.safetensors' if kind.startswith('safetensors') else '.pt'}"
    tensors = {"weight": torch.ones(300), "bias": torch.ones(3)}
    match kind:
        case "safetensors cut off":
            save_file(tensors, path)
            truncated(path, 0.5)
        case "safetensors cut off in its header":
            save_file(tensors, path)
            truncated(path, 0.01)
        case "cut off":
            torch.save(tensors, path)
            truncated(path, 0.5)
        case "no bytes" | "safetensors without bytes":
            path.touch()
        case "text" | "safetensors of text":
            path.write_text("weights, I was told")
        case "a network":
            torch.save(nn.Linear(2, 2), path)
        case "a plain pickle":
            path.write_bytes(pickle.dumps(Payload(folder / "executed")))
        case "a list":
            torch.save([torch.ones(2)], path)
        case "no tensors":
            torch.save({}, path)
        case "a checkpoint without a state dict":
            torch.save({"epoch": 3, "weights": tensors}, path)
        case "numbers for names":
            torch.save({1: torch.ones(2)}, path)
        case "a sparse tensor":
            torch.save({"weight": torch.ones(2, 2).to_sparse()}, path)
        case "not a number":
            torch.save({"weight": torch.tensor([1.0, float("nan")])}, path)
        case "another kind of file":
            path = folder / "weights.onnx"
            path.touch()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("safetensors cut off", "damaged, or no safetensors file"),
        ("safetensors cut off in its header", "damaged, or no safetensors file"),
        ("safetensors without bytes", "damaged, or no safetensors file"),
        ("safetensors of text", "damaged, or no safetensors file"),
        ("cut off", "damaged"),
        ("no bytes", "damaged"),
        ("text", "damaged"),
        ("a network", "more than tensors"),
        ("a plain pickle", "more than tensors"),
        ("a list", "no state dict but a list"),
        ("no tensors", "holds no tensors"),
        ("a checkpoint without a state dict", "'epoch' is no plain tensor but int"),
        ("numbers for names", "1 is no plain tensor"),
        ("a sparse tensor", "'weight' is no plain tensor"),
        ("not a number", "not all values of weight are finite"),
        ("another kind of file", "none of .safetensors, .pt, .pth"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it_and_leaves_nothing(
    kind: str, message: str, experiment: Experiment, tmp_path: Path
) -> None:
    path = make_bad(kind, tmp_path)
    with pytest.raises(PipelineError) as error:
        resolve(str(path), experiment)
    assert message in one_line(error)
    assert str(path) in str(error.value)
    assert not (tmp_path / "executed").exists()
    assert not (experiment.tracking.runs / "weights").exists()


def test_every_form_of_file_gives_the_same_weights_and_the_same_digest(
    experiment: Experiment, tmp_path: Path
) -> None:
    tensors = resnet20().state_dict()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    contents = {
        "plain.pt": tensors,
        "plain.pth": dict(reversed(tensors.items())),
        "training.pt": {"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}},
        "model.pt": {"model": {f"_orig_mod.{name}": t for name, t in tensors.items()}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    sources = [saved(tmp_path, wrapped), *(str(tmp_path / name) for name in contents)]
    found = [resolve(source, experiment) for source in sources]
    assert len({(weights.file, weights.digest) for weights in found}) == 1
    folder = experiment.tracking.runs / "weights"
    assert list(folder.iterdir()) == [folder / f"{found[0].digest[:16]}.safetensors"]
    assert same(load_file(found[0].file), dict(tensors))
    plain_file = tmp_path / "plain.pt"
    assert found[0].file.stat().st_mode == plain_file.stat().st_mode, "others may read it too"
    assert [weights.source for weights in found] == sources


def test_tensors_that_share_memory_or_lie_otherwise_in_it_are_kept_as_they_are(
    experiment: Experiment, tmp_path: Path
) -> None:
    weight = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    torch.save({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "shared.pt")
    kept = resolve(str(tmp_path / "shared.pt"), experiment).read()
    assert same(kept, {"a": weight, "b": weight, "c": weight[1:]})


def test_weights_travel_to_another_process_and_are_checked_there(
    experiment: Experiment, tmp_path: Path
) -> None:
    source = saved(tmp_path, dict(resnet20().state_dict()))
    weights: Weights = pickle.loads(pickle.dumps(resolve(source, experiment)))
    content = bytearray(weights.file.read_bytes())
    content[-1] ^= 1
    weights.file.write_bytes(content)
    with pytest.raises(PipelineError, match="was changed after it was written") as error:
        load_into(resnet20(), weights)
    one_line(error)
    assert resolve(source, experiment) == weights  # which mends it
    load_into(resnet20(), weights)
    weights.file.unlink()
    with pytest.raises(PipelineError, match="a folder that all workers see") as error:
        load_into(resnet20(), weights)
    one_line(error)


def test_a_folder_that_cannot_be_written_is_one_line(
    experiment: Experiment, tmp_path: Path
) -> None:
    source = saved(tmp_path, {"weight": torch.ones(2)})
    (tmp_path / "runs").write_text("a file in its place")
    with pytest.raises(PipelineError, match=r"cannot keep weights in .*tracking\.runs") as error:
        resolve(source, experiment)
    one_line(error)


def changed(kind: str) -> dict[str, Tensor]:
    tensors = dict(resnet20().state_dict())
    match kind:
        case "lacks":
            del tensors["layer1.0.conv1.weight"], tensors["bn1.bias"]
        case "more":
            tensors["conv1.bias"] = torch.zeros(16)
        case "shape":
            tensors["layer2.0.conv2.weight"] = torch.zeros(32, 32, 1, 1)
        case "head":
            tensors["fc.weight"] = torch.zeros(100, 32)
        case "prefix":
            tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lacks", "they lack bn1.bias, layer1.0.conv1.weight"),
        ("more", "the network here has no conv1.bias"),
        ("shape", "layer2.0.conv2.weight is 32x32x1x1 there and 32x32x3x3 here"),
        ("head", "fc.weight is 100x32 there and 10x64 here"),
        ("prefix", "and 94 more; the network here has no backbone.bn1.bias"),
    ],
)
def test_weights_of_another_network_are_refused_with_the_tensors_that_do_not_fit(
    kind: str, message: str, experiment: Experiment, tmp_path: Path
) -> None:
    weights = resolve(saved(tmp_path, changed(kind)), experiment)
    with pytest.raises(PipelineError) as error:
        load_into(resnet20(), weights)
    assert message in one_line(error)
    assert weights.source in str(error.value)


def test_torchvisions_weights_do_not_fit_the_form_for_small_images(
    experiment: Experiment, hub: Path
) -> None:
    entry = torchvision.models.ResNet18_Weights.DEFAULT
    put_in_hub(hub, entry, {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    network = models.create_model("resnet18", num_classes=1000, image_size=32)
    with pytest.raises(PipelineError, match="64x3x7x7 there and 64x3x3x3 here") as error:
        load_into(network, resolve(str(entry), experiment))
    assert "form=imagenet" in one_line(error)


def test_a_head_for_other_classes_stays_as_it_is_and_all_else_is_loaded(
    experiment: Experiment, tmp_path: Path
) -> None:
    trained, network = resnet20(seed=1, num_classes=1000), resnet20(seed=2)
    weights = resolve(saved(tmp_path, dict(trained.state_dict())), experiment)
    head = network.get_parameter("fc.weight").detach().clone()
    assert load_into(network, weights) == (
        f"init_from {weights.source}: 114 of 116 tensors; fc.weight and fc.bias (1,000 classes "
        "there, 10 here) begin anew"
    )
    assert torch.equal(network.get_parameter("fc.weight"), head)
    before, after = trained.state_dict(), network.state_dict()
    shared = [name for name in after if not name.startswith("fc.")]
    assert all(torch.equal(before[name], after[name]) for name in shared)


def test_files_from_before_batch_norms_counted_load(experiment: Experiment, tmp_path: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in resnet20(seed=1).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    network = resnet20()
    report = load_into(network, resolve(saved(tmp_path, tensors), experiment))
    assert report.endswith("97 of 116 tensors; 19 batch norms count their batches anew")
    assert all(torch.equal(network.state_dict()[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("method", ["ternary", "ternary(expansion=2)", "binary-bwn", "sparse"])
def test_float_weights_are_the_latent_ones_of_a_method(
    method: str, experiment: Experiment, tmp_path: Path
) -> None:
    tensors = dict(resnet20(seed=1).state_dict())
    network = resnet20(method, seed=2)
    report = load_into(network, resolve(saved(tmp_path, tensors), experiment))
    assert report.endswith("116 of 116 tensors")
    masked = 0
    for name, tensor in network.state_dict().items():
        layer = network.get_submodule(name.rpartition(".")[0])
        mask = getattr(layer, "mask", None)
        if mask is not None and name.endswith(".weight"):
            full = mask.full()
            assert not tensor[full == 0].any()
            assert torch.equal(tensor[full == 1], tensors[name][full == 1])
            masked += 1
        else:
            assert torch.equal(tensor, tensors[name])
    assert masked == (18 if method == "sparse" else 0)


def test_scales_that_a_quantizer_learns_follow_from_float_weights(
    experiment: Experiment, tmp_path: Path
) -> None:
    tensors = dict(resnet20(seed=1).state_dict())
    network = resnet20("ternary(rule=ttq)", seed=2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = load_into(network, resolve(saved(tmp_path, tensors), experiment))
    scales = {name for name in before if name not in tensors}
    assert report.endswith(f"; {len(scales)} learned scales follow from these weights")
    assert all(not torch.equal(network.state_dict()[name], before[name]) for name in scales)
    expected = resnet20("ternary(rule=ttq)", seed=1).state_dict()
    assert same(dict(network.state_dict()), dict(expected))


def test_weights_that_were_trained_under_another_mask_are_refused_in_one_line(
    experiment: Experiment, tmp_path: Path
) -> None:
    trained = resnet20("sparse(kernel=1, pattern=random, seed=1)")
    weights = resolve(saved(tmp_path, dict(trained.state_dict())), experiment)
    with pytest.raises(PipelineError, match="trained under another mask") as error:
        load_into(resnet20("sparse(kernel=1, pattern=random, seed=2)"), weights)
    assert "Error(s)" not in one_line(error)
    load_into(resnet20("sparse(kernel=1, pattern=random, seed=1)"), weights)


def run_folder(
    folder: Path, recipe: Recipe, accuracies: list[float], *, average: nn.Module | None = None
) -> dict[int, dict[str, Tensor]]:
    """A run folder with a checkpoint of each epoch, as the loop leaves one; the weights of each."""
    trained = Experiment(
        name="cifar10_resnet20", dataset="cifar10", backbone="resnet20", train=recipe
    )
    folder.mkdir(parents=True)
    record: dict[str, Any] = {"identity": "0123", "status": "started", "mlflow_run": None}
    record["experiment"] = trained.model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps(record))
    store = CheckpointStore(LocalStorage(folder / "checkpoints"), "0123", keep=9)
    watched = "validation_top1" if recipe.validation else "top1"
    weights = {}
    for epoch in range(1, len(accuracies) + 1):
        network = resnet20(seed=epoch)
        weights[epoch] = dict(network.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        history = [{watched: accuracy} for accuracy in accuracies[:epoch]]
        state = TrainingState(network, optimizer, scaler, average)
        store.save(Snapshot.of(state, Progress(epoch, 10 * epoch, history)))
    return weights


def test_a_run_folder_gives_its_last_epoch_with_the_experiment_that_trained_it(
    experiment: Experiment, tmp_path: Path
) -> None:
    trained = run_folder(tmp_path / "run", Recipe(epochs=5), [50.0, 70.0, 60.0])
    weights = resolve(str(tmp_path / "run"), experiment)
    assert same(weights.read(), trained[3])
    assert weights.origin == f"{tmp_path / 'run'} (epoch 3 of 5)"
    assert weights.experiment is not None
    assert weights.experiment.train.epochs == 5


def test_a_run_folder_with_held_out_images_gives_its_best_epoch(
    experiment: Experiment, tmp_path: Path
) -> None:
    recipe = Recipe(epochs=3, validation=100)
    trained = run_folder(tmp_path / "run", recipe, [50.0, 70.0, 60.0])
    assert same(resolve(str(tmp_path / "run"), experiment).read(), trained[2])


def test_a_run_folder_gives_the_average_of_the_weights_where_one_was_kept(
    experiment: Experiment, tmp_path: Path
) -> None:
    average = resnet20(seed=9)
    run_folder(tmp_path / "run", Recipe(epochs=1, ema_decay=0.9), [50.0], average=average)
    kept = resolve(str(tmp_path / "run"), experiment).read()
    assert same(kept, dict(average.state_dict()))


def test_a_damaged_checkpoint_is_skipped_and_the_report_says_so(
    experiment: Experiment, tmp_path: Path
) -> None:
    trained = run_folder(tmp_path / "run", Recipe(epochs=2), [50.0, 60.0])
    checkpoints = tmp_path / "run" / "checkpoints"
    truncated(checkpoints / "epoch-0002" / "model.safetensors", 0.9)
    weights = resolve(str(tmp_path / "run"), experiment)
    assert same(weights.read(), trained[1])
    report = load_into(resnet20(), weights)
    assert "(epoch 1 of 2; checkpoint epoch-0002 is skipped: model.safetensors holds" in report
    truncated(checkpoints / "epoch-0001" / "model.safetensors", 0.9)
    with pytest.raises(
        PipelineError, match=r"no checkpoint that can be used; .*0002.*0001"
    ) as error:
        resolve(str(tmp_path / "run"), experiment)
    one_line(error)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "is no run folder: it has no run.json"),
        ("{", "damaged or of another version"),
        ("[]", "damaged or of another version"),
        ('{"identity": "0", "experiment": {"name": "x"}}', "setting 'dataset' is missing"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(
    record: str | None, message: str, experiment: Experiment, tmp_path: Path
) -> None:
    if record is not None:
        (tmp_path / "run.json").write_text(record)
    with pytest.raises(PipelineError) as error:
        resolve(str(tmp_path), experiment)
    assert message in one_line(error)


def test_weights_are_found_again_by_the_record_of_a_run_when_their_source_is_gone(
    experiment: Experiment, tmp_path: Path
) -> None:
    trained = run_folder(tmp_path / "run", Recipe(epochs=5), [50.0])
    weights = resolve(str(tmp_path / "run"), experiment)
    recorded = json.loads(json.dumps(record(weights)))
    shutil.rmtree(tmp_path / "run")
    again = kept(recorded, experiment)
    assert again == weights
    assert same(again.read(), trained[1])
    weights.file.write_bytes(weights.file.read_bytes()[:-1] + b"x")
    assert kept(recorded, experiment) is None, "it is damaged"
    weights.file.unlink()
    assert kept(recorded, experiment) is None
    assert record(None) is None


def test_a_record_leads_to_no_file_elsewhere(experiment: Experiment) -> None:
    hostile = {"source": "x.pt", "origin": "x.pt", "digest": "../../etc/passwd"}
    with pytest.raises(PipelineError, match=r"record of x\.pt is damaged"):
        kept(hostile | {"experiment": None, "torchvision": None}, experiment)
