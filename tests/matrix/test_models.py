"""Every method on every family of networks, found through the registries.

A new method, or a new file of networks, is tested without a line here. The family's network with
the fewest parameters stands for it; the others, and the forms that the image size does not choose,
get one test each, marked slow.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from models import (
    ModelError,
    after_step,
    constant_buffers,
    create_model,
    fold,
    list_backbones,
    list_methods,
    pack,
    profile,
    quantized_layers,
    unpack,
)
from models.backbones import BACKBONES
from models.calls import parse_call

CLASSES = 10
COMPOSITIONS = ["sparse+ternary", "sparse+binary", "step+ternary"]
VARIANTS = ["ternary(expansion=4)", "ternary(rule=ttq)", *COMPOSITIONS]
METHODS = [*list_methods(), *VARIANTS]

#: Forms of networks beside those that small images choose.
FORMS = [
    "alexnet",
    "resnet18(form=imagenet)",
    "resnet50(form=imagenet)",
    "vgg11(form=imagenet)",
    "vgg16(batch_norm=false)",
    "mobilenet(form=imagenet)",
    "mobilenetv2(form=imagenet)",
    "mobilenetv2(form=cifar100)",
    "efficientnetb0(form=imagenet)",
    "efficientnetb0(original=true)",
    "squeezenet(form=imagenet)",
    "squeezenet(form=imagenet, version=1.0)",
    "shufflenet(form=imagenet, groups=8)",
    "shufflenetv2(form=imagenet)",
    "ghostnet(form=imagenet)",
    "lenet5(xnor=true)",
    "stepnet(original=true)",
    "threshnet79(stem=small)",
    "triplenetb(version=repository)",
]

#: Combinations that cannot be, and the reason that the user is told.
REFUSALS = {
    ("step+sparse", "vgg11"): "sparse finds no layer of CifarVGG to change",
    ("step(mode=original)", "alexnet"): "features",
    ("sparse+sparse", "resnet20"): "sparse is named twice",
    ("binary+ternary", "resnet20"): "both of kind quantizer",
    ("binary(order=CPBA)", "resnet20"): "order=CPBA needs a network whose blocks have an order",
    ("binary(ternary_weights=1001)", "lenet5"): "in quotes",
}

#: Too deep to learn a batch in a dozen steps when all is binary.
SLOW_LEARNER = "efficientnetb0"

#: In the gate all is tested on these networks, and what takes long, compiling and exporting, on
#: the first alone. The other families get one test there for each method, the rest marked slow.
VARIED = ("lenet5", "resnet20")
TRACED = VARIED[:1]


def image_size(backbone: str) -> int:
    return max(32, BACKBONES.get(parse_call(backbone).name).smallest_image)


def build(backbone: str, method: str, seed: int = 0) -> nn.Module:
    return create_model(
        backbone, method, num_classes=CLASSES, image_size=image_size(backbone), seed=seed
    )


def representatives() -> list[str]:
    """The network with the fewest parameters of each class in each file of networks."""
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in list_backbones():
        with torch.device("meta"):
            model = build(name, "float")
        family = (BACKBONES.get(name).build.__module__, type(model).__name__)
        size = sum(parameter.numel() for parameter in model.parameters())
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return sorted(name for _, name in smallest.values())


REPRESENTATIVES = representatives()


def pairs(
    networks: list[str],
    quick: Callable[[str, str], bool],
    fits: Callable[[str, str], bool] = lambda backbone, method: True,
) -> Any:
    """Parametrize a test by networks and methods that fit; those not quick are marked slow."""
    found = []
    for backbone in networks:
        for method in (method for method in METHODS if fits(backbone, method)):
            marks = () if quick(backbone, method) else pytest.mark.slow
            found.append(pytest.param((backbone, method), id=f"{backbone}-{method}", marks=marks))
    return pytest.mark.parametrize("pair", found)


OTHERS = [name for name in list_backbones() if name not in REPRESENTATIVES] + FORMS
every_family = pairs(REPRESENTATIVES, lambda backbone, method: backbone in VARIED)
every_learner = pairs(
    REPRESENTATIVES,
    lambda backbone, method: backbone in VARIED,
    lambda backbone, method: backbone != SLOW_LEARNER or "binary" not in method,
)
every_family_traced = pairs(REPRESENTATIVES, lambda backbone, method: backbone in TRACED)
every_network = pairs(
    REPRESENTATIVES + OTHERS,
    lambda backbone, method: backbone in REPRESENTATIVES and method not in VARIANTS,
)


def batch(size: int, pixels: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, pixels, pixels, generator=generator)


def images_for(pair: tuple[str, str], size: int) -> Tensor:
    return batch(size, image_size(pair[0]))


def channels_last(model: nn.Module) -> nn.Module:
    """Put the channels innermost, as in training."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give the norms the statistics of these images, and go to evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def check_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == parameter.dtype, name


@every_family
def test_every_parameter_takes_part_in_the_output(pair: tuple[str, str]) -> None:
    # In evaluation mode: batch statistics would cancel the biases in front of a norm.
    model = settle(build(*pair), images_for(pair, 8))
    logits = model(images_for(pair, 4))
    assert logits.shape == (4, CLASSES)
    (logits * torch.linspace(-1, 1, CLASSES)).sum().backward()
    check_gradients(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() > 0, name


@every_learner
def test_training_lowers_the_loss_on_its_batch(pair: tuple[str, str]) -> None:
    # Signs that flip make the loss of a binary network rise at times: some step has to lower it.
    model = build(*pair)
    images, labels = images_for(pair, 8), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    first = None
    for _ in range(12):
        torch.manual_seed(0)  # the same dropout in each step
        loss = nn.functional.cross_entropy(model(images), labels)
        if first is None:
            first = loss.item()
        elif loss.item() < first:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss stayed above {first:.3f}")


@every_family
def test_a_state_dict_goes_round(pair: tuple[str, str]) -> None:
    model, other = build(*pair, seed=0), build(*pair, seed=1)
    settle(model, images_for(pair, 4))
    other.load_state_dict(model.state_dict(), strict=True)
    images = images_for(pair, 2)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), model(images))


@every_family
def test_a_float_checkpoint_loads_into_every_layer_that_is_still_there(
    pair: tuple[str, str],
) -> None:
    model, plain = build(*pair, seed=1), build(pair[0], "float")
    swapped = "step" in pair[1]
    result = model.load_state_dict(plain.state_dict(), strict=not swapped)
    lost = {name.rpartition(".")[0] for name in result.unexpected_keys}
    assert bool(lost) == swapped
    for name in result.missing_keys:
        assert any(name.startswith(f"{layer}.") for layer in lost), name
    masked = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if getattr(layer, "mask", None) is not None
    }
    loaded = model.state_dict()
    for name, value in plain.state_dict().items():
        if name in loaded and name not in masked:
            assert torch.equal(loaded[name], value), name


@every_family
def test_pickle_deepcopy_and_fold_keep_the_outputs(pair: tuple[str, str]) -> None:
    model = settle(build(*pair).double(), images_for(pair, 4).double())
    folded = fold(model)
    assert quantized_layers(folded) == []
    images = images_for(pair, 3).double()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)
        assert torch.equal(copy.deepcopy(model)(images), expected)
        if "step" not in pair[1]:  # whose banks and mixes fold into one convolution
            assert torch.equal(folded(images), expected)
        tolerance = 1e-9 * expected.abs().max().item()
        torch.testing.assert_close(folded(images), expected, rtol=1e-9, atol=tolerance)


@every_family_traced
def test_compiles_without_a_graph_break_forward_and_backward(pair: tuple[str, str]) -> None:
    torch.compiler.reset()
    # In float64, so that no rounding moves a weight or an activation across a threshold.
    eager, other = (channels_last(build(*pair).double()) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    images, labels = images_for(pair, 4).double(), torch.arange(4)
    torch.manual_seed(0)
    output = compiled(images)
    torch.manual_seed(0)
    expected = eager(images)
    torch.testing.assert_close(output, expected)
    nn.functional.cross_entropy(output, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@every_family
def test_bfloat16_autocast_trains_without_nan(pair: tuple[str, str]) -> None:
    model = build(*pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images_for(pair, 4)), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    check_gradients(model)


@pairs(list(VARIED), lambda backbone, method: True)
def test_a_training_step_never_waits_for_the_device(pair: tuple[str, str]) -> None:
    # Operators whose result, or its shape, the host has to know before it can go on.
    names = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal")
    waiting = {f"aten::{name}" for name in (*names, "is_nonzero")}
    model = build(*pair)
    images, labels = images_for(pair, 4), torch.arange(4)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as recorded:
        nn.functional.cross_entropy(model(images), labels).backward()
        after_step(model)()
    called = {event.key for event in recorded.key_averages()}
    assert "aten::convolution_backward" in called
    assert not called & waiting


@every_family
def test_channels_last_gives_the_same_logits(pair: tuple[str, str]) -> None:
    model = settle(build(*pair), images_for(pair, 4)).double()
    images = images_for(pair, 3).double()
    with torch.no_grad():
        expected = model(images)
        result = channels_last(model)(images.contiguous(memory_format=torch.channels_last))
        fold(model)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@every_family_traced
def test_the_folded_network_exports_and_takes_any_batch(pair: tuple[str, str]) -> None:
    model = fold(settle(build(*pair).double(), images_for(pair, 4).double()))
    dynamic = ({0: torch.export.Dim("batch_size")},)
    program = torch.export.export(model, (images_for(pair, 2).double(),), dynamic_shapes=dynamic)
    exported = program.module()
    with torch.no_grad():
        for size in (1, 2, 7):
            images = images_for(pair, size).double()
            expected = model(images)
            tolerance = 1e-9 * expected.abs().max().item()
            torch.testing.assert_close(exported(images), expected, rtol=1e-9, atol=tolerance)


@every_family
def test_the_profile_accounts_for_every_parameter(pair: tuple[str, str]) -> None:
    model = build(*pair)
    result = profile(model, image_size(pair[0]))
    assert result.learned + result.masked == sum(p.numel() for p in model.parameters())
    assert result.parameters == result.learned + result.frozen
    assert (result.frozen > 0) == ("step" in pair[1])
    assert (result.masked > 0) == ("sparse" in pair[1])
    assert (result.stored_bytes < result.float32_bytes) == (pair[1] != "float")


@pairs(
    REPRESENTATIVES,
    lambda backbone, method: backbone == VARIED[1] and method in COMPOSITIONS,
)
def test_a_packed_network_has_the_logits_of_the_folded_one_and_the_size_of_its_profile(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    model = settle(build(*pair), images_for(pair, 4))
    packed = pack(model, tmp_path / "network.safetensors")
    assert packed.tensor_bytes == profile(model, image_size(pair[0])).stored_bytes
    images = images_for(pair, 2)
    with torch.no_grad():
        assert torch.equal(unpack(packed.path)(images), fold(model)(images))


@every_network
def test_every_network_trains_and_folds(pair: tuple[str, str]) -> None:
    model = build(*pair)
    loss = nn.functional.cross_entropy(model(images_for(pair, 4)), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    check_gradients(model)
    settle(model.double(), images_for(pair, 4).double())
    images = images_for(pair, 2).double()
    with torch.no_grad():
        expected = model(images)
        tolerance = 1e-6 * expected.abs().max().item()
        torch.testing.assert_close(fold(model)(images), expected, rtol=1e-6, atol=tolerance)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("backbone", "method"),
    [("resnet20", method) for method in METHODS] + [("efficientnetb0(original=true)", "float")],
)
def test_ddp_finds_no_unused_parameter_and_leaves_constants_alone(
    backbone: str, method: str
) -> None:
    model = build(backbone, method)
    constants = {name: value.clone() for name, value in model.named_buffers()}
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):  # the second forward pass fails if the first left a gradient out
        replica(images_for((backbone, method), 4)).square().sum().backward()
    for name in constant_buffers(model):
        assert name in replica.parameters_to_ignore
        assert torch.equal(dict(model.named_buffers())[name], constants[name])


@pytest.mark.parametrize(("method", "backbone"), REFUSALS)
def test_what_cannot_be_combined_is_refused_in_one_line(method: str, backbone: str) -> None:
    with pytest.raises(ModelError, match=REFUSALS[method, backbone]) as caught:
        build(backbone, method)
    assert "\n" not in str(caught.value)
