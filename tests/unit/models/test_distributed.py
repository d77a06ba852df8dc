"""Constants under DistributedDataParallel, in two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from models import constant_buffers, create_model

METHODS = {"sparse": "mask.period", "step": "bank.weight"}
MARK = 7.0


def train_two_steps(rank: int, folder: str) -> None:
    """One of two processes; the second one marks its constants and begins elsewhere."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for method in METHODS:
        model = create_model(
            "resnet20", method, num_classes=10, image_size=32, seed=rank, blurpool=True
        )
        if rank == 1:
            for name in constant_buffers(model):
                model.get_buffer(name).fill_(MARK)
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        for _ in range(2):
            loss = nn.functional.cross_entropy(replica(images), torch.arange(2))
            loss.backward()
        torch.save(
            {
                "constants": {name: model.get_buffer(name) for name in constant_buffers(model)},
                "weights": dict(model.named_parameters()),
                "gradients": {name: p.grad for name, p in model.named_parameters()},
            },
            f"{folder}/{method}-{rank}.pt",
        )
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(
        train_two_steps, args=(str(folder),), nprocs=2, start_method="spawn"
    )
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_constants_are_neither_broadcast_nor_reduced_while_all_else_is(
    method: str, folder: Path
) -> None:
    first, second = (torch.load(folder / f"{method}-{rank}.pt") for rank in (0, 1))
    assert any(name.endswith(METHODS[method]) for name in first["constants"])
    assert any(name.endswith("blur.filter") for name in first["constants"])
    for name, constant in second["constants"].items():
        assert (constant == MARK).all(), name
        assert not (first["constants"][name] == MARK).any(), name
    for kind in ("weights", "gradients"):
        for name, value in second[kind].items():
            assert torch.equal(value, first[kind][name]), name
