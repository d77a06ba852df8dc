from __future__ import annotations

import math

import pytest
import torch

from pipeline import meter as meters
from pipeline.context import TrainContext, Wish
from pipeline.meter import Checks, Meter


@pytest.fixture
def context():
    return TrainContext(lambda event: None, torch.device("cpu"))


def batches(count):
    torch.manual_seed(0)
    return [(torch.rand(()), torch.randint(0, 9, ()), 5 + i) for i in range(count)]


def test_means_are_over_images_and_not_over_steps(context):
    meter = Meter(context)
    meter.add(0, torch.tensor(1.0), torch.tensor(2), images=10)
    meter.add(1, torch.tensor(4.0), torch.tensor(5), images=5)
    assert meter.means() == {"train_loss": 2.0, "train_top1": 100 * 7 / 15}


def test_a_meter_goes_on_from_what_it_had_counted_to_the_same_bits(context):
    whole, first = Meter(context), Meter(context)
    steps = batches(20)
    for number, (loss, hits, images) in enumerate(steps):
        whole.add(number, loss, hits, images)
    for number, (loss, hits, images) in enumerate(steps[:7]):
        first.add(number, loss, hits, images)
    counted = first.row()
    second = Meter(context, counted)
    for number, (loss, hits, images) in enumerate(steps[7:], start=7):
        second.add(number, loss, hits, images)
    assert second.means() == whole.means()
    assert second.images == whole.images == sum(images for _, _, images in steps)
    assert second.seconds > counted[-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_bad_step_is_named(context, bad):
    meter, checks = Meter(context), Checks(context)
    for step, loss in enumerate((1.0, 2.0, bad, 1.0, bad), start=70):
        meter.add(step, torch.tensor(loss), torch.tensor(0), 1)
    assert checks.agree(Wish.NOTHING, meter.first_bad).bad_step == 72
    assert checks.agree(Wish.NOTHING).bad_step is None


@pytest.mark.parametrize("wish", list(Wish))
def test_a_wish_is_heard(context, wish):
    assert Checks(context).agree(wish).wish is wish


def steps_between_checks(checks, seconds, clock, steps):
    """At which of the steps, of so many seconds each, all ranks check."""
    checked = []
    checks.begin_epoch()
    for step in range(1, steps + 1):
        clock[0] += seconds
        if checks.is_due():
            checks.agree(Wish.NOTHING)
            checked.append(step)
    return checked


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.01, [1, 51, 101]), (1.0, [1, 6, 11, 16]), (30.0, [1, 2, 3])],
)
def test_checks_are_fifty_steps_or_five_seconds_apart(context, monkeypatch, seconds, expected):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    checks = Checks(context)
    assert steps_between_checks(checks, seconds, clock, expected[-1]) == expected
    assert checks.usual == pytest.approx(seconds)


def test_a_slow_first_step_does_not_count_for_the_others(context, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    checks = Checks(context)
    checks.begin_epoch()
    clock[0] += 20  # decoders are compiled
    assert checks.is_due()
    checks.agree(Wish.NOTHING)
    clock[0] += 0.1
    assert checks.is_due()
    checks.agree(Wish.NOTHING)
    assert checks.usual == pytest.approx(0.1)
    assert not checks.is_due()
