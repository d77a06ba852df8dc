"""The files of a registered model: no code in them, nothing of the machine that made them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from pipeline.config import Checkpointing, Data, Experiment, PipelineError, Scaling, Tracking
from pipeline.registry.versions import EXPERIMENT, TRAINING, WEIGHTS

#: Files of a version for people and programs elsewhere, beside those that MLflow writes.
CARD, PREPROCESSING, PROGRAM = "model_card.md", "preprocessing.json", "data/model.pt2"

PICKLE_START = b"\x80"  # of every pickle since protocol 2; torch writes no older ones

# What a pickle needs to get hold of an object or to call one; without these it is plain data.
CODE_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"}
CODE_OPCODES |= {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4"}

#: Keys in MLmodel of which two writings of one model have other values, a line each.
_OF_THE_MOMENT = (b"utc_time_created", b"model_id", b"model_uuid", b"artifact_path", b"run_id")


def portable_yaml(experiment: Experiment) -> str:
    """The experiment as YAML, without where its training ran."""
    elsewhere = {"root": None, "raw": None, "prepared": Data().prepared}
    portable = {
        "data": experiment.data.model_copy(update=elsewhere),
        "scaling": Scaling(),
        "checkpoint": Checkpointing(),
        "tracking": Tracking(),
    }
    return experiment.model_copy(update=portable).to_yaml()


def save_training(folder: Path, trained: torch.nn.Module, experiment_yaml: str) -> None:
    """Write what another training can begin with."""
    (folder / TRAINING).mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    # Not by save_file, which would let only this user read them.
    (folder / TRAINING / WEIGHTS).write_bytes(save(tensors))
    (folder / TRAINING / EXPERIMENT).write_text(experiment_yaml)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path there.

    Of ``MLmodel``, without what two writings of one model differ in: its time and its id.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.relative_to(folder) == Path("MLmodel"):
                content = _lasting(content)
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def _lasting(description: bytes) -> bytes:
    """The lines of an MLmodel file that say what the model is."""
    lines = description.splitlines()
    return b"\n".join(line for line in lines if line.split(b":")[0] not in _OF_THE_MOMENT)


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
