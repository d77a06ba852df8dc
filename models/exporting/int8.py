"""Eight-bit ONNX graphs in which weights of one magnitude per filter are exact.

Static quantization in the QDQ form: weights int8 with a scale per filter, activations uint8 with a
scale and a zero point per tensor, biases int32. ONNX Runtime computes such a graph in integers, on
the CPU with the dot products of VNNI where there are any.

A filter with the magnitudes {0, a}, as ternary and binary ones have also after batch norm has
scaled them, gets the scale a / 64 and the codes -64, 0 and 64: a division by a power of two, so
that codes times scale are the float weights to the bit. (Codes of 64 also keep the sum of two
products within 16 bits, for CPUs without VNNI, where such sums saturate.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from models.calls import ModelError
from models.exporting.onnx_graph import IMAGES, Floats, onnx_session, quiet

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

#: Operators that ONNX Runtime has in integers; between them a tensor stays in eight bits.
_OPERATORS = {
    *("Conv", "Gemm", "MatMul", "Add", "Concat", "Split", "Reshape", "Transpose", "Pad"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Mul"),
}
_ROUNDING = "Ceil"  # the operator by which a quantized activation is recognized

#: A filter with at most so many magnitudes is searched for the scale that fits them best.
_FEW = 8
_CODES = np.arange(64, 128)  # candidates for the code of a filter's largest magnitude
_LARGEST_CODE = 127
#: Where only the sign matters, the codes cover this share of the range: any sum but zero is beyond
#: half a code, in filters with small weights too, so that none is rounded to zero.
_SIGN_RANGE = 2.0**-30


def quantize(model: ModelProto, calibration: Iterable[Floats]) -> ModelProto:
    """Return the eight-bit form of a graph with the input `images`.

    The range of an activation is that of its values for the calibration images, of which each
    batch is float32 (N, C, H, W). One that takes only the values -1, 0 and 1 there is exact.

    In a network with binary activations one sign turned by rounding turns many others. So only the
    layers between such activations, of whose outputs the signs alone are used, are in eight bits;
    they give the signs that exact sums have. What goes to a pool, batch norm or sum stays float.

    Weights with one magnitude per filter are exact. With a few (residual expansion, trained scales)
    the codes are the nearest under the best of 64 scales: off by at most a 128th of the largest
    magnitude, mostly by much less. Others have 127 steps up to the largest magnitude of the filter.
    A filter whose bias is more than 2^24 times its weights, so that these say nothing, is not
    exact. Raises ModelError without calibration images.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QDQQuantizer,
        QuantType,
        TensorsData,
    )

    nodes = [node for node in model.graph.node if node.op_type in _OPERATORS]
    tensors = _activations(model, nodes)
    ranges, overrides = _calibrated(model, tensors, calibration)
    signs = _inputs_of_signs(model)
    if _has_quantized_activations(model):
        kept = overrides.keys() | signs
        nodes = [
            node for node in nodes if node.input[0] in overrides and kept.issuperset(node.output)
        ]
    if not nodes:
        raise ModelError("no layer of the network can be computed in eight bits")
    for name, axis in _weights(model, nodes).items():
        scales = weight_scales(np.moveaxis(_constant(model, name), axis, 0))
        overrides[name] = [
            {"quant_type": QuantType.QInt8, "axis": axis, "scale": scale, "zero_point": np.int8(0)}
            for scale in scales
        ]
    with quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
            nodes_to_quantize=[node.name for node in nodes],
            nodes_to_exclude=[],
            op_types_to_quantize=sorted(_OPERATORS),
            extra_options={"TensorQuantOverrides": overrides},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantized: ModelProto = quantizer.model.model
    _round_biases_up(quantized, model, signs)
    del quantized.graph.value_info[:], quantized.metadata_props[:]
    quantized.producer_name, quantized.producer_version = model.producer_name, ""
    return quantized


def weight_scales(weight: Floats) -> Floats:
    """Return the scale of each filter, (O,), for a weight (O, ...) in codes from -127 to 127."""
    magnitudes = np.abs(weight.reshape(len(weight), -1))
    largest = magnitudes.max(axis=1)
    scales = largest / np.float32(_LARGEST_CODE)
    is_one = ((magnitudes == largest[:, None]) | (magnitudes == 0)).all(axis=1)
    scales[is_one] = largest[is_one] / np.float32(_CODES[0])
    for row in np.flatnonzero(~is_one):
        values, counts = np.unique(magnitudes[row], return_counts=True)
        if len(values) <= _FEW + 1:  # zero is one of the values
            scales[row] = _best_scale(values, counts)
    # A filter of zeros needs a scale for its bias alone.
    nonzero = scales[scales > 0]
    scales[scales == 0] = nonzero.min() if nonzero.size else np.float32(2.0**-20)
    return scales


def _best_scale(values: Floats, counts: np.ndarray[Any, Any]) -> np.float32:
    """Return the scale with the smallest sum of squared errors over values, `counts` of each."""
    candidates = values.max() / _CODES.astype(np.float32)
    errors = np.rint(values / candidates[:, None]) * candidates[:, None] - values
    best: np.float32 = candidates[(errors**2 @ counts).argmin()]
    return best


def _has_quantized_activations(model: ModelProto) -> bool:
    return any(node.op_type == _ROUNDING for node in model.graph.node)


def _weights(model: ModelProto, nodes: list[NodeProto]) -> dict[str, int]:
    """Map the name of each weight to the axis of its filters."""
    constants = {tensor.name for tensor in model.graph.initializer}
    weights = {}
    for node in nodes:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            weights[node.input[1]] = 0 if node.op_type == "Conv" or transposed else 1
    return weights


def _constant(model: ModelProto, name: str) -> Floats:
    from onnx import numpy_helper

    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(tensor)


def _activations(model: ModelProto, nodes: list[NodeProto]) -> list[str]:
    """List the float tensors between nodes, in their order."""
    from onnx import TensorProto, shape_inference

    inferred = shape_inference.infer_shapes(model).graph
    floats = {
        value.name
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [name for node in nodes for name in (*node.input, *node.output)]
    return [name for name in dict.fromkeys(names) if name in floats]


def _calibrated(
    model: ModelProto, tensors: list[str], calibration: Iterable[Floats]
) -> tuple[dict[str, tuple[Floats, Floats]], dict[str, list[dict[str, Any]]]]:
    """Return the range of each activation, and what is exact instead."""
    from onnxruntime.quantization import QuantType

    session = onnx_session(_observed(model, tensors).SerializeToString())
    batches = [session.run(None, {IMAGES: images}) for images in calibration]
    if not batches:
        raise ModelError("int8 needs calibration images, and there are none")
    statistics = [np.concatenate(values) for values in zip(*batches, strict=True)]
    only_signs = _inputs_of_signs(model)
    ranges, exact = {}, {}
    for index, name in enumerate(tensors):
        lowest, highest, fractions = statistics[3 * index : 3 * index + 3]
        low, high = lowest.min(), highest.max()
        if not np.isfinite([low, high]).all():
            raise ModelError(f"the calibration images give values that are not finite ({name})")
        if name in only_signs:
            high = max(-low, high) * np.float32(_SIGN_RANGE)
            low = -high
        elif fractions.max() == 0 and max(-low, high) <= 1:
            exact[name] = [
                {
                    "quant_type": QuantType.QUInt8,
                    "scale": np.array(1 / _CODES[0], np.float32),
                    "zero_point": np.array(128, np.uint8),
                }
            ]
        ranges[name] = (np.asarray(low), np.asarray(high))
    return ranges, exact


def _observed(model: ModelProto, tensors: list[str]) -> ModelProto:
    """Return a graph that gives, for each tensor and image, minimum, maximum and largest fraction.

    The last is zero for an image where the tensor holds whole numbers only.
    """
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    observed = ModelProto()
    observed.CopyFrom(model)
    graph = observed.graph
    del graph.output[:]
    for name, value in {"by_image": [0, -1], "over_image": [1]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for name in tensors:
        flat, rounded, rest, fraction = (
            f"{name}/{part}" for part in ("flat", "round", "rest", "fraction")
        )
        outputs = [f"{name}/{statistic}" for statistic in ("lowest", "highest", "largest_fraction")]
        graph.node.extend(
            [
                helper.make_node("Reshape", [name, "by_image"], [flat]),
                helper.make_node("Round", [flat], [rounded]),
                helper.make_node("Sub", [flat, rounded], [rest]),
                helper.make_node("Abs", [rest], [fraction]),
                helper.make_node("ReduceMin", [flat, "over_image"], outputs[:1], keepdims=0),
                helper.make_node("ReduceMax", [flat, "over_image"], outputs[1:2], keepdims=0),
                helper.make_node("ReduceMax", [fraction, "over_image"], outputs[2:], keepdims=0),
            ]
        )
        graph.output.extend(
            helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch"])
            for output in outputs
        )
    return observed


def _round_biases_up(quantized: ModelProto, model: ModelProto, signs: set[str]) -> None:
    """Round up, not to the nearest, the biases of layers whose outputs are in `signs`.

    A whole number plus the bias is positive exactly where that number plus the bias rounded up is.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    made_by = {node.output[0]: node for node in quantized.graph.node}
    bias_of = {node.name: node.input[2] for node in model.graph.node if len(node.input) == 3}
    for node in quantized.graph.node:
        if node.op_type not in ("Conv", "Gemm") or signs.isdisjoint(node.output):
            continue
        if len(node.input) < 3 or node.input[2] not in made_by:
            continue  # no bias, or the layer is in float
        codes, scale = (constants[name] for name in made_by[node.input[2]].input[:2])
        bias = _constant(model, bias_of[node.name])
        exact = bias.astype(np.float64) / numpy_helper.to_array(scale)
        limits = np.iinfo(np.int32)
        rounded = np.ceil(exact).clip(limits.min, limits.max).astype(np.int32)
        codes.CopyFrom(numpy_helper.from_array(rounded, codes.name))


def _inputs_of_signs(model: ModelProto) -> set[str]:
    """Name the tensors of which nothing but the sign is used: all that read them round up.

    b(x) of models.binary_quantizers is +1 where ceil(x) > 0 and -1 elsewhere.
    """
    rounded = {node.input[0] for node in model.graph.node if node.op_type == _ROUNDING}
    others = {name for node in model.graph.node if node.op_type != _ROUNDING for name in node.input}
    return rounded - others
