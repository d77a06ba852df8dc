from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from pipeline.averaging import MovingAverage, Statistics
from pipeline.context import TrainContext


def moved(model: nn.Module, number: int) -> None:
    """Other weights and statistics, as after a step."""
    generator = torch.Generator().manual_seed(number)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.add_(torch.randn(tensor.shape, generator=generator))


def test_the_average_is_its_recursion_written_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, decay=0.5)
    names = ["0.weight", "1.weight", "1.running_mean", "1.running_var"]
    expected = {name: model.state_dict()[name].clone() for name in names}
    for step in range(20):
        moved(model, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name]
    for name in names:
        assert torch.allclose(average.model.state_dict()[name], expected[name], atol=1e-5), name


def test_the_average_learns_nothing_and_leaves_the_network_alone():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    average = MovingAverage(model, decay=0.9)
    moved(average.model, 1)
    assert torch.equal(model.weight, before)
    assert not any(p.requires_grad for p in average.model.parameters())


def test_frozen_patterns_are_not_averaged():
    model = models.create_model(
        "stepnet", "step", num_classes=10, in_channels=3, image_size=32, seed=0
    )
    average = MovingAverage(model, decay=0.9)
    constants = models.constant_buffers(model)
    assert constants
    for name in constants:
        average.model.get_buffer(name).fill_(7)
    average.update(0)
    for name in constants:
        assert (average.model.get_buffer(name) == 7).all(), name


class TwoRanks(TrainContext):
    """Rank 0 of two, of which the other has zeros."""

    world_size = 2

    def __init__(self) -> None:
        super().__init__(lambda event: None)
        self.messages = 0

    def sum_over_ranks(self, tensor: torch.Tensor) -> None:
        self.messages += 1


def test_statistics_are_averaged_in_one_message():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    moved(model, 0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    context = TwoRanks()
    Statistics([model]).average(context)
    assert context.messages == 1
    for name, buffer in model.named_buffers():
        expected = before[name] / 2 if buffer.is_floating_point() else before[name]
        assert torch.equal(buffer, expected), name


def test_statistics_are_put_back_where_they_were():
    norms = [nn.BatchNorm2d(4) for _ in range(2)]
    networks = [nn.Sequential(nn.Conv2d(3, 4, 1), norm) for norm in norms]
    for number, network in enumerate(networks):
        moved(network, number)
    statistics = Statistics(networks)
    before = [buffer.clone() for network in networks for buffer in network.buffers()]
    row = statistics.row()
    for norm in norms:
        norm.reset_running_stats()
    statistics.set(row)
    after = [buffer for network in networks for buffer in network.buffers()]
    assert len(row) == 16
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was, now) or not now.is_floating_point()


def test_statistics_of_another_network_are_refused():
    with pytest.raises(ValueError, match="8 batch norm statistics for a network with 6"):
        Statistics([nn.BatchNorm2d(3)]).set(Statistics([nn.BatchNorm2d(4)]).row())


def test_a_network_without_batch_norm_has_none():
    assert len(Statistics([nn.Linear(3, 3)]).row()) == 0
