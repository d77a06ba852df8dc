"""Programs of torch.export: a network without its Python code, and without anyone's."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from models.calls import ModelError


def export_program(network: nn.Module, image_shape: tuple[int, int, int]) -> ExportedProgram:
    """Trace a network on the CPU in eval mode, for batches (N, C, H, W) of any size N >= 1.

    Raises ModelError for what torch.export cannot trace.
    """
    # Of a batch of one image the program would take no other size.
    images = torch.zeros(2, *image_shape)
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=shapes)
    except Exception as error:  # each kind of network fails in a way of its own
        raise ModelError(f"torch.export cannot trace the network: {first_line(error)}") from error


def program_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Return the file of a program, made bare (see `bare`), with texts as extra files in it."""
    bare(program)
    archive = io.BytesIO()
    torch.export.save(program, archive, extra_files=dict(metadata))
    return archive.getvalue()


def bare(program: ExportedProgram) -> None:
    """Take out of a program what a reader would run or unpickle, and the paths of this machine.

    The example batch is the one member of a .pt2 that torch always writes as a pickle. Both torch
    and MLflow insist on reading it and on one entry per argument, so `((0,), {})` stays: a stream
    that names no type. Guards are Python that a reader executes; they would only refuse inputs that
    the graph refuses anyway. Each node of the graph keeps the stack trace of its making, with the
    source paths of this checkout; nothing reads that.
    """
    program.example_inputs = ((0,), {})
    program._guards_code.clear()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def strip_archive(archive: Path) -> None:
    """Make the program of a .pt2 archive bare (see `bare`), in place."""
    with no_buffer_warning():
        program = torch.export.load(archive)
    bare(program)
    torch.export.save(program, archive)


def no_buffer_warning() -> warnings.catch_warnings[None]:
    """Torch warns that weights it has just read share memory with a read-only buffer."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def first_line(error: Exception) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
