"""ONNX graphs of networks: made by torch.onnx, tidied, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.calls import ModelError
from models.exporting.program import export_program, first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto
    from onnxruntime import InferenceSession

Floats = npt.NDArray[np.float32]

#: The newest operator set that the oldest ONNX Runtime that we allow (1.23) runs.
OPSET = 23
IMAGES, PIXELS, LOGITS = "images", "pixels", "logits"
_LARGEST_FILE = 2**31 - 1  # bytes, of one protocol buffer


class InputNormalization(Protocol):
    """How pixels become inputs: pixel / 255, less the mean, divided by `std`, by channel."""

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...


def onnx_graph(network: nn.Module, image_shape: tuple[int, int, int]) -> ModelProto:
    """Translate a network of plain torch layers, in eval mode on the CPU.

    Its input is `images`, float32 (N, C, H, W), its output `logits`, (N, classes), with any N. A
    batch norm right behind a convolution is folded into it. Nothing in the graph says where or of
    which source it was made. Raises ModelError for what cannot be translated.
    """
    program = export_program(network, image_shape)
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[IMAGES],
                output_names=[LOGITS],
                custom_translation_table={torch.ops.aten.copysign.Tensor: _copysign},
                verbose=False,
            )
    except Exception as error:  # torch's exporter passes on whatever its translations raise
        error = _origin(error)
        raise ModelError(f"torch.onnx cannot translate the network: {first_line(error)}") from error
    assert translated is not None  # without `dynamo` torch would return nothing
    model: ModelProto = translated.model_proto
    _tidy(model)
    return model


def read_pixels(
    model: ModelProto, image_shape: tuple[int, int, int], normalization: InputNormalization
) -> None:
    """Put the normalization in front of a graph, in place.

    Its input is then `pixels`, uint8 (N, H, W, C), as image libraries give them.
    """
    from onnx import TensorProto, helper, numpy_helper

    channels, height, width = image_shape
    graph = model.graph
    constants = {
        "pixel_maximum": np.float32(255),
        "pixel_mean": np.array(normalization.mean, np.float32).reshape(-1, 1, 1),
        "pixel_std": np.array(normalization.std, np.float32).reshape(-1, 1, 1),
    }
    for name, values in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    steps = [
        helper.make_node("Transpose", [PIXELS], ["pixels_by_channel"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["pixels_by_channel"], ["pixel_values"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixel_values", "pixel_maximum"], ["pixel_shares"]),
        helper.make_node("Sub", ["pixel_shares", "pixel_mean"], ["pixels_centered"]),
        helper.make_node("Div", ["pixels_centered", "pixel_std"], [IMAGES]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    shape: list[str | int | None] = ["batch", height, width, channels]
    graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))


def onnx_bytes(model: ModelProto, metadata: Mapping[str, str]) -> bytes:
    """Return the file of a graph that passes ONNX's checker, with texts as its metadata.

    Raises ModelError beyond the 2 GB that one file can hold.
    """
    import onnx

    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > _LARGEST_FILE:
        raise ModelError(f"the network takes {model.ByteSize():,} bytes; an ONNX file holds 2 GB")
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def onnx_session(content: bytes | str, threads: int | None = None) -> InferenceSession:
    """Open an ONNX file, given by its content or its path, on the CPU.

    `threads` is by default as many as torch uses. Raises ModelError if it cannot be run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are of its own graph rewriting
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # each of its errors has a type of its own, below Exception
        raise ModelError(f"ONNX Runtime cannot run the file: {first_line(error)}") from error


def _copysign(magnitude: Any, sign: Any) -> Any:
    """Say copysign, which ternary activations use and ONNX has not, but for a sign of -0."""
    from onnxscript import opset18

    size = opset18.Abs(magnitude)
    is_negative = opset18.Less(sign, opset18.Sub(sign, sign))
    return opset18.Where(is_negative, opset18.Neg(size), size)


def _origin(error: Exception) -> Exception:
    """Return the error that an error began with; torch's own text is of how to report it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _tidy(model: ModelProto) -> None:
    graph = model.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        _use_global_pool(node, constants)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.producer_name, model.producer_version = "ternforge", ""


def _use_global_pool(node: NodeProto, constants: Mapping[str, TensorProto]) -> None:
    """Say GlobalAveragePool for a mean over height and width, which ONNX Runtime has in int8."""
    import onnx

    if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
        return
    axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if sorted(axes) in ([-2, -1], [2, 3]) and attributes.get("keepdims", 1):
        node.op_type = "GlobalAveragePool"
        del node.input[1:], node.attribute[:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what the exporter tells of its own steps, by prints, logs and warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
