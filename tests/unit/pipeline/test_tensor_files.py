from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.tensor_files import described, read_header, read_tensors, serialized

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def many_tensors():
    """Of each dtype a matrix, a scalar, an empty tensor and one laid out column by column."""
    torch.manual_seed(0)
    tensors = {}
    for dtype in DTYPES:
        matrix = (torch.randn(3, 5) * 3).to(dtype)
        tensors[f"{dtype}.matrix"] = matrix
        tensors[f"{dtype}.scalar"] = matrix[1, 1]
        tensors[f"{dtype}.empty"] = matrix[:0]
        tensors[f"{dtype}.columns"] = matrix.t()
    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    return {**tensors, "channels last": images, 'na\u00efve "name"': torch.ones(1)}


def test_the_library_reads_every_tensor_that_is_written(tmp_path):
    tensors = many_tensors()
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"".join(bytes(part) for part in serialized(tensors)))
    for found in (load_file(file), read_tensors(file)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def test_a_header_says_what_the_library_has_written(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in many_tensors().items()}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors"
    )
    assert read_header(tmp_path / "x.safetensors") == described(tensors)


def test_the_same_tensors_give_the_same_bytes():
    first, second = many_tensors(), dict(reversed(many_tensors().items()))
    assert b"".join(map(bytes, serialized(first))) == b"".join(map(bytes, serialized(second)))
