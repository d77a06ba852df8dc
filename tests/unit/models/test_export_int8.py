from __future__ import annotations

from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from models import ModelError, apply_method, fold
from models.activations import ActivationQuantizer, QuantizedActivation
from models.exporting.int8 import quantize, weight_scales
from models.exporting.onnx_graph import onnx_bytes, onnx_graph

SHAPE = (8, 12, 12)


class Block(nn.Module):
    """A residual network in small: everything that a ResNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.relu2 = nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.relu1(self.norm1(self.stem(images))))
        maps = self.relu2(self.norm2(self.body(maps)) + maps)
        logits: Tensor = self.head(self.mean(maps).flatten(1))
        return logits


class Chain(nn.Sequential):
    """Layers in a row: with binary activations, the second one's inputs and outputs are signs."""

    def __init__(self) -> None:
        layers = {
            "stem": nn.Conv2d(8, 16, 3, bias=False),
            "norm1": nn.BatchNorm2d(16),
            "relu1": nn.ReLU(),
            "body": nn.Conv2d(16, 16, 3, bias=False),
            "norm2": nn.BatchNorm2d(16),
            "relu2": nn.ReLU(),
            "last": nn.Conv2d(16, 16, 3, bias=False),
            "norm3": nn.BatchNorm2d(16),
            "flat": nn.Flatten(),
            "head": nn.Linear(576, 5),
        }
        super().__init__(OrderedDict(layers))


def network(method: str) -> nn.Module:
    torch.manual_seed(3)
    model = Chain() if method.startswith("binary") else Block()
    for norm in model.children():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.running_var = torch.empty(16).uniform_(0.5, 2.0)
            # Of these a bias in int32 is rounded to nothing, though it decides where sums are zero.
            norm.bias.data[:8] = norm.weight[:8].detach() * torch.linspace(-3e-6, 3e-6, 8)
    apply_method(model, method, roles={"stem": "stem", "head": "head"})
    return fold(model).eval()


def batches() -> list[Tensor]:
    return list(torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0)).split(16))


@cache
def graphs(method: str) -> tuple[ModelProto, ModelProto]:
    """The float graph and the one in eight bits."""
    plain = onnx_graph(network(method), SHAPE)
    return plain, quantize(plain, (batch.numpy() for batch in batches()))


def values(model: ModelProto, names: list[str]) -> list[np.ndarray]:
    """The values of tensors inside a graph for the calibration images."""
    observed = ModelProto()
    observed.CopyFrom(model)
    for name in names:
        observed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        observed.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(names, {"images": torch.cat(batches()).numpy()})


def weights(model: ModelProto) -> dict[str, np.ndarray]:
    """Weights of convolutions and linear layers, codes times scales where they are in int8."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {node.output[0]: node for node in model.graph.node}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        name = node.input[1]
        if name in constants:
            found[name] = constants[name]
            continue
        codes, scales, zeros = (constants[part] for part in made_by[name].input)
        assert codes.dtype == np.int8
        assert not zeros.any()
        shape = (-1, *[1] * (codes.ndim - 1))
        source = made_by[name].input[0].removesuffix("_quantized")
        found[source] = codes.astype(np.float32) * scales.reshape(shape)
    return found


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("ternary", 3),
        pytest.param("sparse+ternary", 3, marks=pytest.mark.slow),
        ("binary", 2),  # first and last layer are float
        # Beside the 1x1 convolutions that mix its patterns.
        pytest.param("step", 1, marks=pytest.mark.slow),
    ],
)
def test_weights_of_one_magnitude_per_filter_are_exact(method: str, layers: int) -> None:
    plain, quantized = (weights(graph) for graph in graphs(method))
    assert plain.keys() == quantized.keys()
    exact = 0
    for name, weight in plain.items():
        magnitudes = np.abs(weight.reshape(len(weight), -1))
        one = ((magnitudes == 0) | (magnitudes == magnitudes.max(axis=1)[:, None])).all(axis=1)
        np.testing.assert_array_equal(quantized[name][one], weight[one], strict=True)
        exact += one.all()
    assert exact == layers


def test_residual_network_is_computed_in_integers_alone(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(
        onnx_bytes(graphs("ternary")[1], {}), options, providers=["CPUExecutionProvider"]
    )
    operators = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool"} <= operators
    assert not operators & {"Conv", "FusedConv", "Gemm", "Add", "MaxPool", "GlobalAveragePool"}
    images = torch.cat(batches())
    with torch.inference_mode():
        logits = network("ternary")(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert (found - logits).abs().max() < 0.1 * logits.abs().max()


@pytest.mark.parametrize(
    "method", ["binary", pytest.param("binary(scale=xnor)", marks=pytest.mark.slow)]
)
def test_binary_activations_are_those_of_the_network(method: str) -> None:
    plain, quantized = graphs(method)
    signs = [node.output[0] for node in plain.graph.node if node.op_type == "Where"]
    assert len(signs) == 2
    for exact, found in zip(*(values(graph, signs) for graph in (plain, quantized)), strict=True):
        assert set(np.unique(exact)) == {-1, 1}
        np.testing.assert_array_equal(found, exact)
    # The layer between them is in eight bits, the others are not.
    reduced = [
        tensor.name
        for tensor in quantized.graph.initializer
        if tensor.data_type == TensorProto.INT8
    ]
    assert reduced == ["body.1.weight_zero_point", "body.1.weight_quantized"]


def test_network_without_a_layer_between_signs_is_refused() -> None:
    model = nn.Sequential(
        QuantizedActivation(ActivationQuantizer()), nn.Conv2d(8, 8, 3), nn.Flatten()
    )
    graph = onnx_graph(model.eval(), SHAPE)
    with pytest.raises(ModelError, match="no layer of the network can be computed in eight bits"):
        quantize(graph, (batch.numpy() for batch in batches()))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    magnitude=st.floats(2.0**-100, 2.0**100, width=32),
    signs=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=20).filter(any),
)
def test_any_single_magnitude_is_exact(magnitude: float, signs: list[int]) -> None:
    weight = np.float32(magnitude) * np.array([signs], np.float32)
    scale = weight_scales(weight)[0]
    codes = np.rint(weight / scale).astype(np.int8)
    assert set(codes.ravel()) <= {-64, 0, 64}
    np.testing.assert_array_equal(codes.astype(np.float32) * scale, weight, strict=True)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(
    magnitudes=st.lists(st.floats(2.0**-7, 1, width=32), min_size=2, max_size=8, unique=True),
    seed=st.integers(0, 1000),
)
def test_few_magnitudes_get_the_best_of_the_scales(magnitudes: list[float], seed: int) -> None:
    draws = np.random.default_rng(seed).choice(np.array(magnitudes, np.float32), (1, 50))
    weight = np.where(draws == draws[0, 0], -draws, draws)  # signs do not matter

    def error(scale: np.float32) -> float:
        return float(((np.rint(weight / scale) * scale - weight) ** 2).sum())

    largest = np.abs(weight).max()
    best = min(error(largest / np.float32(code)) for code in range(64, 128))
    assert error(weight_scales(weight)[0]) <= best * (1 + 1e-3) + 1e-12


@pytest.mark.slow
def test_filter_of_zeros_keeps_its_bias() -> None:
    layer = nn.Conv2d(8, 4, 3)
    layer.bias = nn.Parameter(torch.tensor([0.1, 0.5, -0.2, 0.0]))
    with torch.no_grad():
        layer.weight[1] = 0
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)).eval()
    images = batches()
    graph = quantize(onnx_graph(model, SHAPE), (batch.numpy() for batch in images))
    session = onnxruntime.InferenceSession(
        onnx_bytes(graph, {}), providers=["CPUExecutionProvider"]
    )
    found = torch.from_numpy(session.run(None, {"images": images[0].numpy()})[0])
    with torch.inference_mode():
        logits = model(images[0])
    assert (found - logits).abs().max() < 0.05 * logits.abs().max()


def test_calibration_without_images_or_with_broken_ones_is_refused() -> None:
    graph = onnx_graph(nn.Sequential(nn.Flatten(), nn.Linear(1152, 3)), SHAPE)
    with pytest.raises(ModelError, match="int8 needs calibration images"):
        quantize(graph, [])
    with pytest.raises(ModelError, match="not finite"):
        quantize(graph, [np.full((2, *SHAPE), np.nan, np.float32)])
