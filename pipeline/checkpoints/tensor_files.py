"""Tensors in files of the format safetensors, which holds names, shapes and numbers, and no code.

The format: https://github.com/huggingface/safetensors#format. It is written here and not by the
library so that a checkpoint can be written part by part, hashed on the way, while the training goes
on. It is read by the library.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoints.storage import DamagedError, one_line

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


#: Of a tensor: its dtype as the format names it, and its shape.
Description = tuple[str, tuple[int, ...]]


def serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a file with these tensors, in parts: a header, then the numbers of each.

    Args:
        tensors: on the CPU, of any layout; they must not change before the last part is taken.
    """
    # The widest numbers first, so that all of them lie at multiples of their width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        numbers = tensors[name].detach().contiguous().flatten()
        yield numbers.view(torch.uint8).numpy().data


def described(tensors: Mapping[str, Tensor]) -> dict[str, Description]:
    """What the header of a file with these tensors says."""
    return {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def read_header(path: Path) -> dict[str, Description]:
    """What a file says that it holds, read before there is any memory for it.

    Raises:
        DamagedError: it is damaged, or of another format.
    """
    with _opened(path) as file:
        names = file.keys()
        slices = {name: file.get_slice(name) for name in names}
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        DamagedError: it is damaged, of another format, or a number in it is not finite.
    """
    with _opened(path) as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DamagedError(f"{path.name}: {name[:80]!r} is not finite")
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedError(f"{path.name} is no safetensors file: {one_line(error)}") from None
