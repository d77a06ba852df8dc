"""Packed networks: the same logits to the bit, and files of the very size that a profile states."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import (
    ModelError,
    add_blurpool,
    apply_method,
    create_model,
    fold,
    pack,
    profile,
    read_packed,
    repack,
    unpack,
)
from models.layers import compress
from models.masks import WeightMask
from models.packing.remaining import fits_float16, remaining_tensors, set_norm
from models.storage import FORMATS, FloatFormat
from models.surgery import blueprint

METHODS: list[Any] = [
    *("float", "ternary", "ternary(rule=ttq)", "ternary-x4", "binary", "binary-bwn"),
    *("sparse", "sparse-psc2", "sparse+ternary", "sparse+binary"),
    *("step", "step-original", "step(families=binary01)", "step+ternary"),
]
#: What differs from those above in its values, but not in how it is packed.
METHODS += [
    pytest.param(method, marks=pytest.mark.slow)
    for method in (
        *("ternary(rule=twn)", "ternary-x2", "binary(ternary_weights=all)"),
        *("step(families=ternary)", "step(mix=none)+ternary", "sparse-psc1+ternary-x4"),
    )
]
BACKBONES = ["lenet5", pytest.param("mobilenetv2(width=0.25)", marks=pytest.mark.slow)]

#: The smallest images that LeNet5 takes with more than one pixel in its last map.
PIXELS = 16


def trained(backbone: str, method: str, **options: bool) -> nn.Module:
    """A network whose norms have seen images, and are no identity."""
    network = create_model(backbone, method, num_classes=10, image_size=PIXELS, **options)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1, 0.3, generator)
            nn.init.normal_(module.bias, 0, 0.3, generator)
    with torch.no_grad():
        network.train()(images(8))
    return network


def images(count: int) -> Tensor:
    return torch.randn(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(count))


def same_logits(network: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(network(images(4)), other(images(4)))


def of_the_same_size(
    path: Path, network: nn.Module, weights: str | None = None, rest: FloatFormat = "float32"
) -> bool:
    """Pack a network, and return whether the file has the size that its profile states."""
    packed = pack(network, path, weights=weights, rest=rest)
    stated = profile(network, PIXELS, rest=rest).stored_bytes_in(weights)
    return packed.tensor_bytes == stated and packed.file_bytes == path.stat().st_size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_packed_network_is_the_folded_one_to_the_bit_and_as_large_as_stated_in_every_format(
    tmp_path: Path, backbone: str, method: str
) -> None:
    network = trained(backbone, method)
    folded = fold(network).eval()
    stated = profile(network, PIXELS)
    for format in (None, *stated.by_format):
        path = tmp_path / f"{format}.safetensors"
        packed = pack(network, path, weights=format)
        assert packed.tensor_bytes == stated.stored_bytes_in(format), format
        assert packed.file_bytes == path.stat().st_size
        unpacked = unpack(path)
        assert same_logits(unpacked, folded), format
        assert not unpacked.training
        # Frozen filters may keep the larger groups that folding has laid them out in.
        expected = {name: type(module) for name, module in folded.named_modules()}
        assert {name: type(module) for name, module in unpacked.named_modules()} == expected


def test_the_same_network_makes_the_same_bytes(tmp_path: Path) -> None:
    network = trained("lenet5", "sparse+ternary")
    first, second = (
        pack(network, tmp_path / name, metadata={"b": 1, "a": [2]}).path.read_bytes()
        for name in ("a.safetensors", "b.safetensors")
    )
    assert first == second


def test_a_network_with_its_channels_innermost_goes_round(tmp_path: Path) -> None:
    for method in ("sparse+ternary", "step+ternary", "binary-bwn"):
        network = trained("lenet5", method)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        unpacked = unpack(pack(network, tmp_path / "network.safetensors").path)
        folded = fold(network).eval()
        for tensor in (*folded.parameters(), *folded.buffers()):
            tensor.data = tensor.data.contiguous()
        assert same_logits(unpacked, folded), method


@pytest.mark.parametrize("rest", ["float32", "float16"])
@pytest.mark.parametrize("method", ["float", "ternary(first_last=float)", "sparse", "step"])
def test_half_floats_halve_what_has_no_code(tmp_path: Path, method: str, rest: FloatFormat) -> None:
    network = trained("lenet5", method)
    path = tmp_path / "network.safetensors"
    assert of_the_same_size(path, network, rest=rest)
    if rest == "float16":
        whole = pack(network, tmp_path / "whole.safetensors")
        codes = profile(network, PIXELS).layers
        exact = sum(r.storage.stored_bytes() for r in codes if r.storage and r.storage.levels)
        assert path.stat().st_size < whole.file_bytes
        assert read_packed(path).tensor_bytes - exact <= (whole.tensor_bytes - exact) / 2 + 40
        with torch.no_grad():
            found, expected = unpack(path)(images(4)), fold(network).eval()(images(4))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ([1.0, -0.333, 65504.0], True),
        ([1.0, 1e5], False),
        ([1e-6, 1.0], True),  # moves by less than a part in 65,536 of the largest
        ([1e-6, 3e-6], False),
        ([0.0, 0.0], True),
        ([], True),
    ],
)
def test_a_tensor_is_halved_only_where_it_stays_what_it_is(values: list[float], fits: bool) -> None:
    assert fits_float16(torch.tensor(values)) == fits


@dataclass(frozen=True)
class SignQuantizer:
    """A method that nobody has told the packer about: signs with one scale per tensor."""

    scheme: str = "signs"
    levels: int = 2
    keeps_zeros: bool = False

    def scales(self, weight: Tensor) -> int:
        return 1

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        return weight.detach().abs().mean() * torch.where(weight > 0, 1.0, -1.0)


@dataclass(frozen=True)
class DishonestQuantizer(SignQuantizer):
    """It says that it has two levels, and has as many as there are weights."""

    def __call__(self, weight: Tensor, mask: WeightMask | None = None) -> Tensor:
        return weight


def quantized(quantizer: SignQuantizer) -> nn.Module:
    return nn.Sequential(compress(nn.Conv2d(3, 4, 3), weight_quantizer=quantizer), nn.PReLU())


def test_a_new_quantizer_packs_without_a_line_for_it(tmp_path: Path) -> None:
    network, other = quantized(SignQuantizer()), quantized(SignQuantizer())
    packed = pack(network, tmp_path / "network.safetensors")
    assert packed.blueprint is None
    assert packed.tensor_bytes == profile(network, 8).stored_bytes == 14 + 4 + 4 * 4 + 4
    assert packed.layers[0].codebook == "magnitudes"
    assert same_logits(unpack(packed.path, other), fold(network))
    assert not same_logits(other, network)  # the caller's stays what it was


def test_a_quantizer_that_states_too_little_is_named(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    with pytest.raises(ModelError, match=r"^0 cannot be packed: the weight has other values than"):
        pack(quantized(DishonestQuantizer()), path)
    assert list(tmp_path.iterdir()) == []


def test_zero_filters_and_missing_levels_are_no_exception(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    for method in ("ternary", "ternary-x4", "ternary(rule=ttq)", "binary-bwn", "sparse+ternary"):
        network = trained("lenet5", method)
        with torch.no_grad():
            network.get_submodule("conv1").get_parameter("weight")[1:3] = 0
            network.get_submodule("conv2").get_parameter("weight").zero_()
            network.get_submodule("fc1").get_parameter("weight").fill_(0.5)
        assert of_the_same_size(path, network), method
        assert same_logits(unpack(path), fold(network).eval()), method


def test_learned_scales_may_have_any_sign(tmp_path: Path) -> None:
    network = trained("lenet5(width=1)", "ternary(rule=ttq)")
    with torch.no_grad():
        network.get_submodule("conv1.weight_quantizer").get_parameter("positive").neg_()
        network.get_submodule("conv2.weight_quantizer").get_parameter("negative").zero_()
    packed = pack(network, tmp_path / "network.safetensors")
    assert {layer.codebook for layer in packed.layers} == {"values"}
    assert same_logits(unpack(packed.path), fold(network).eval())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_norm_is_its_scale_and_shift_to_the_bit(
    affine: bool, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(67, affine=affine).eval()
    assert norm.running_var is not None and norm.running_mean is not None
    powers = 10.0 ** torch.linspace(-44, 6, 67)  # subnormal variances too
    norm.running_var.copy_(powers * torch.rand(67, generator=generator))
    norm.running_mean.normal_(0, 100, generator=generator)
    if affine:
        nn.init.normal_(norm.weight, 0, 3, generator)
        nn.init.normal_(norm.bias, 0, 30, generator)
    rebuilt = nn.BatchNorm2d(67, affine=affine).eval()
    set_norm(rebuilt, **remaining_tensors(norm))
    maps = 10 * torch.randn(3, 67, 9, 5, generator=generator)
    maps = maps.contiguous(memory_format=memory_format)
    assert torch.equal(rebuilt(maps), norm(maps))


def test_what_is_shared_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    def make() -> nn.Sequential:
        first, second, third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        second.weight, third.bias = first.weight, first.bias
        return nn.Sequential(first, second, second, third, nn.BatchNorm2d(3))

    for method in ("float", "ternary"):
        network, other = apply_method(make(), method), apply_method(make(), method)
        packed = pack(network, tmp_path / "network.safetensors")
        assert packed.tensor_bytes == profile(network, PIXELS).stored_bytes
        assert [layer.name for layer in packed.layers] == ["0", "3"]
        assert same_logits(unpack(packed.path, other), fold(network).eval())


class SharesItsWeight(nn.Module):
    """A quantized layer whose latent weight something else reads as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)
        self.names = nn.Embedding(5, 4)
        apply_method(self, "ternary")
        self.names.weight = self.head.weight


def test_a_weight_that_is_used_with_other_values_elsewhere_is_refused(tmp_path: Path) -> None:
    reason = "names shares its weight with head.weight, but uses another value"
    with pytest.raises(ModelError, match=reason):
        pack(SharesItsWeight(), tmp_path / "network.safetensors")


def test_a_bank_that_is_no_longer_its_own_is_refused(tmp_path: Path) -> None:
    network = trained("lenet5", "step")
    network.get_submodule("conv1.bank").get_buffer("weight")[0] = 0
    with pytest.raises(ModelError, match=r"^conv1.bank cannot be packed: its patterns are not"):
        pack(network, tmp_path / "network.safetensors")


def test_repacking_changes_the_formats_and_not_the_logits(tmp_path: Path) -> None:
    for method in ("sparse+binary", "step-original"):
        network = trained("lenet5", method)
        source = pack(network, tmp_path / "source.safetensors", metadata={"note": "kept"}).path
        for format in (None, "seed", "patterns", "2-bit", "float32", "1-bit"):
            path = tmp_path / "repacked.safetensors"
            packed = repack(source, path, weights=format)
            direct = pack(network, tmp_path / "direct.safetensors", weights=format)
            assert packed.tensor_bytes == direct.tensor_bytes
            assert packed.metadata == {"note": "kept"}
            assert same_logits(unpack(path), fold(network).eval()), (method, format)
            source = path if format == "float32" else source
    halved = repack(source, tmp_path / "halved.safetensors", rest="float16")
    assert halved.tensor_bytes == profile(network, PIXELS, rest="float16").stored_bytes


def test_banks_in_codes_need_no_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained("lenet5", "step")
    folded = fold(network).eval()
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("seed", "patterns", "2-bit")}
    for format, path in paths.items():
        pack(network, path, weights=format)
    monkeypatch.setattr("models.patterns.KeyedPatterns.version", "keyed-2")
    for format in ("patterns", "2-bit"):
        assert same_logits(unpack(paths[format]), folded)
    message = "conv1.bank was trained on patterns of version keyed-1, but here .* version keyed-2$"
    with pytest.raises(ModelError, match=message) as caught:
        unpack(paths["seed"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="version keyed-1, but here"):
        repack(paths["seed"], tmp_path / "codes.safetensors", weights="2-bit")


@pytest.mark.parametrize("method", ["step", "step-original"])
def test_another_bank_is_refused(tmp_path: Path, method: str) -> None:
    other = "step(seed=7)" if method == "step" else "step(mode=original, seed=7)"
    packed = pack(trained("lenet5", method), tmp_path / "network.safetensors")
    with pytest.raises(ModelError, match="was trained on patterns of seed 42, but here"):
        unpack(packed.path, trained("lenet5", other))


def test_the_blueprint_goes_with_the_network_and_ends_with_its_truth() -> None:
    arguments = {
        "backbone": "lenet5(width=2)",
        "method": "ternary-x2",
        **{"num_classes": 7, "in_channels": 1, "image_size": 28, "seed": 3, "blurpool": False},
    }
    network = create_model(
        "lenet5(width=2)", "ternary-x2", num_classes=7, in_channels=1, image_size=28, seed=3
    )
    assert blueprint(network) == arguments
    assert blueprint(copy.deepcopy(network)) == arguments
    assert blueprint(pickle.loads(pickle.dumps(network))) == arguments
    assert "blueprint" not in "".join(network.state_dict())
    assert blueprint(fold(network)) is None
    plain = create_model("lenet5", num_classes=7, image_size=28)
    assert blueprint(apply_method(plain, "ternary")) is None
    blurred = create_model("resnet20", num_classes=7, image_size=32)
    add_blurpool(blurred)
    assert blueprint(blurred) is None


def test_a_network_changed_by_hand_is_packed_without_its_blueprint(tmp_path: Path) -> None:
    network = trained("lenet5", "ternary")
    network.add_module("fc2", nn.Linear(512, 5))
    path = tmp_path / "network.safetensors"
    assert pack(network, path).blueprint is None
    with pytest.raises(ModelError, match="it has no blueprint, because create_model did not make"):
        unpack(path)


def test_blurred_networks_are_blurred_again(tmp_path: Path) -> None:
    network = trained("resnet20", "ternary", blurpool=True)
    packed = pack(network, tmp_path / "network.safetensors")
    assert packed.blueprint is not None and packed.blueprint["blurpool"] is True
    assert same_logits(unpack(packed.path), fold(network).eval())


def test_what_cannot_be_packed_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    def packed(network: nn.Module, **options: Any) -> str:
        with pytest.raises(ModelError) as caught:
            pack(network, tmp_path / "network.safetensors", **options)
        assert list(tmp_path.iterdir()) == []
        message = str(caught.value)
        assert "\n" not in message
        return message

    broken = trained("lenet5", "ternary")
    broken.get_submodule("fc2").get_parameter("weight").data[0, 0] = torch.nan
    assert packed(broken) == "fc2.weight cannot be packed: it has values that are not finite"
    endless = trained("lenet5", "float")
    endless.get_submodule("bn1").get_buffer("running_mean")[0] = torch.inf
    assert "bn1.shift cannot be packed: it has values that are not finite" in packed(endless)
    double = trained("lenet5", "binary").double()
    assert packed(double) == (
        "conv1.weight cannot be packed: it is float64; networks are packed in float32"
    )
    with torch.device("meta"):
        empty = create_model("lenet5", num_classes=10, image_size=PIXELS)
    assert packed(empty) == "conv1.weight has no values (it is on the meta device)"
    network = trained("lenet5", "ternary")
    assert "unknown format '2bit' (did you mean '2-bit'?)" in packed(network, weights="2bit")
    assert "stored in float32 or float16, not in 'half'" in packed(network, rest="half")
    with pytest.raises(ModelError, match="the metadata cannot be written as JSON"):
        pack(network, tmp_path / "network.safetensors", metadata={"a": {1, 2}})
    with pytest.raises(ModelError, match="cannot be written: No such file or directory"):
        pack(network, tmp_path / "folder" / "network.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_another_make_is_refused(tmp_path: Path) -> None:
    path = pack(trained("lenet5", "ternary"), tmp_path / "network.safetensors").path
    for backbone, method, reason in [
        (
            "lenet5(width=2)",
            "ternary",
            r"the file has no conv1.weight of the shape \(64, 3, 5, 5\)",
        ),
        ("lenet5(bias=false)", "ternary", "the network has no conv1.bias"),
        ("lenet5", "sparse+ternary", "conv2 has another mask in the file than in the network"),
    ]:
        with pytest.raises(ModelError, match=f"cannot be unpacked: {reason}"):
            unpack(path, trained(backbone, method))


GOALS = [("resnet50", "ternary", 1000, 224, 5.4), ("vgg16", "step", 10, 32, 3.5)]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "method", "classes", "size", "megabytes"), GOALS)
def test_large_networks_are_small_files(
    tmp_path: Path, backbone: str, method: str, classes: int, size: int, megabytes: float
) -> None:
    network = create_model(backbone, method, num_classes=classes, image_size=size)
    packed = pack(network, tmp_path / "network.safetensors")
    assert packed.tensor_bytes == profile(network, size).stored_bytes
    assert packed.file_bytes <= megabytes * 1e6


@st.composite
def small_networks(draw: st.DrawFn) -> nn.Module:
    """Two convolutions of any widths under any method, with random weights."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=2))
    kernel = draw(st.sampled_from([1, 3, 5]))
    bias = draw(st.booleans())
    network = nn.Sequential(
        nn.Conv2d(3, widths[0], 3, padding=1, bias=bias),
        nn.BatchNorm2d(widths[0], affine=draw(st.booleans())),
        nn.ReLU(),
        nn.Conv2d(widths[0], widths[1], kernel, padding=kernel // 2, bias=bias),
    )
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0, 10.0 ** draw(st.integers(-3, 3)), generator)
    methods = ["ternary", "ternary-x2", "ternary-x4", "ternary(rule=twn)", "ternary(rule=ttq)"]
    methods += ["binary(activations=float, scale=xnor, first=binary, last=binary)", "float"]
    methods += ["step", "sparse-psd2p8", "sparse-psc1+ternary"] if kernel > 1 else []
    return apply_method(network, draw(st.sampled_from(methods)))


@settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(small_networks(), st.sampled_from([None, *FORMATS]))
def test_any_small_network_goes_round(
    tmp_path: Path, network: nn.Module, format: str | None
) -> None:
    packed = pack(network, tmp_path / "network.safetensors", weights=format)
    assert packed.tensor_bytes == profile(network, PIXELS).stored_bytes_in(format)
    assert same_logits(unpack(packed.path, network), fold(network).eval())
