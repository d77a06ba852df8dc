"""The files of a registered model: no code in them, nothing of the machine that made them."""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from pipeline.config import Checkpointing, Data, Experiment, PipelineError, Scaling, Tracking

TRAINING, WEIGHTS, EXPERIMENT = "training", "weights.safetensors", "experiment.yaml"
PICKLE_START = b"\x80"  # of every pickle since protocol 2; torch writes no older ones

# What a pickle needs to get hold of an object or to call one; without these it is plain data.
CODE_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
CODE_OPCODES |= {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"}


def save_companions(
    folder: Path, model_card: str, trained: torch.nn.Module, experiment: Experiment
) -> None:
    """Write the card and what `fetch_training` gives back, without where the training ran."""
    (folder / "model_card.md").write_text(model_card)
    (folder / TRAINING).mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    # Not by save_file, which would let only this user read them.
    (folder / TRAINING / WEIGHTS).write_bytes(save(tensors))
    elsewhere = {"root": None, "raw": None, "prepared": Data().prepared}
    portable = {
        "data": experiment.data.model_copy(update=elsewhere),
        "scaling": Scaling(),
        "checkpoint": Checkpointing(),
        "tracking": Tracking(),
    }
    (folder / TRAINING / EXPERIMENT).write_text(experiment.model_copy(update=portable).to_yaml())


def strip_archive(archive: Path) -> None:
    """Take out of a .pt2 archive its pickle of tensors and the paths of this machine.

    The example batch is the one member that torch always writes as a pickle. Both torch and
    MLflow insist on reading it and on one entry per argument, so `((0,), {})` stays: a stream
    that names no type. Each node of the graph keeps the stack trace of its making, with the
    source paths of this checkout; nothing reads that.
    """
    with no_buffer_warning():
        program = torch.export.load(archive)
    program.example_inputs = ((0,), {})
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    torch.export.save(program, archive)


def no_buffer_warning() -> warnings.catch_warnings[None]:
    """Torch warns that weights it has just read share memory with a read-only buffer."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def refuse_pickled_code(folder: Path) -> None:
    """Raise PipelineError if a file below `folder` is a pickle that could run code."""
    for name, content in _members(folder):
        if not content.startswith(PICKLE_START):
            continue
        if _opcodes(content) & CODE_OPCODES:
            raise PipelineError(f"the exported model holds pickled code in {name}")


def _opcodes(content: bytes) -> set[str]:
    """What an unpickler would carry out: up to the end, or to the first byte it cannot read.

    Numbers may begin like a pickle; of most the protocol, the second byte, is one that no
    unpickler takes.
    """
    found: set[str] = set()
    if content[1:2] > bytes([pickle.HIGHEST_PROTOCOL]):
        return found
    with contextlib.suppress(ValueError):
        for opcode, _, _ in pickletools.genops(content):
            found.add(opcode.name)
    return found


def _members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below `folder`, and every member of the archives among them, to any depth."""
    waiting = [(str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file()]
    while waiting:
        name, content = waiting.pop()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                waiting += [
                    (f"{name}/{inner}", archive.read(inner)) for inner in archive.namelist()
                ]
        else:
            yield name, content
