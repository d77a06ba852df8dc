from __future__ import annotations

import numpy as np
import pytest

from pipeline.config import PipelineError
from pipeline.experiments import load_experiment
from pipeline.seeds import _candidate, _spreads
from pipeline.stages import run


def record(seed: int, **figures: float | None) -> dict:
    nothing = dict.fromkeys(("top1", "best_top1", "validation_top1", "top5", "loss"))
    return {"seed": seed, **nothing, **figures}


def test_mean_and_deviation_are_those_of_a_sample():
    values = [91.2, 91.65, 90.9, 91.4]
    runs = [record(seed, top1=value, loss=value / 7) for seed, value in enumerate(values)]
    spreads = _spreads(runs)
    assert list(spreads) == ["top1", "loss"], "what a run lacks has no mean"
    for name, scale in (("top1", 1), ("loss", 7)):
        assert spreads[name].mean == pytest.approx(np.mean(values) / scale)
        assert spreads[name].deviation == pytest.approx(np.std(values, ddof=1) / scale)


def test_test_images_do_not_choose_the_candidate_but_held_out_ones_do():
    runs = [record(3, top1=90.0), record(4, top1=99.0)]
    assert _candidate(runs)[0]["seed"] == 3
    held_out = [
        record(3, top1=99.0, validation_top1=90.0),
        record(4, top1=90.0, validation_top1=91),
    ]
    assert _candidate(held_out)[0]["seed"] == 4


def test_one_run_of_several_seeds_is_refused_and_told_what_to_do():
    with pytest.raises(PipelineError, match=r"seeds=3 are several runs: call pipeline\.run_seeds"):
        run(load_experiment("digits_lenet5", ["seeds=3"]))
