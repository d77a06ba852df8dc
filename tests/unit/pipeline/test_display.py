from __future__ import annotations

import io

from rich.console import Console

from pipeline.display import LINES, LONGEST_SILENCE, Display, TrainingDisplay, duration


def test_durations_read_well():
    assert duration(0.4) == "0 s"
    assert duration(99) == "99 s"
    assert duration(187) == "3:07 min"
    assert duration(2 * 3600 + 5 * 60) == "2:05 h"


def epoch_event(epoch: int) -> dict:
    metrics = {
        "train_loss": 0.5,
        "train_top1": 90.0,
        "test_top1": 95.0,
        "images_per_second": 1000.0,
    }
    return {"kind": "epoch", "epoch": epoch, "step": 10 * epoch, "steps": 1000, "metrics": metrics}


def test_without_a_terminal_a_long_stage_takes_a_dozen_lines_with_eta(monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr("pipeline.display.time.monotonic", lambda: next(clock))
    output = io.StringIO()
    display = TrainingDisplay(Display(Console(file=output, width=120)), epochs=100)
    for epoch in range(1, 101):
        display(epoch_event(epoch))
    lines = output.getvalue().splitlines()
    assert 8 <= len(lines) <= LINES, "one soon, then one in seventeen of two hundred seconds"
    shown = "train      4%  ETA 3:12 min  epoch 4/100  loss 0.500  train 90.0%  test 95.00%"
    assert lines[0] == f"{shown}  1,000 img/s", "ninety-six epochs of two seconds are left"


def test_on_a_terminal_one_bar_is_redrawn_in_place():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with Display(console) as display:
        training = TrainingDisplay(display, epochs=100)
        for epoch in range(1, 101):
            training(epoch_event(epoch))
    shown = output.getvalue()
    assert "epoch 100/100" in shown
    assert shown.count("\n") < 20, "the bar stays on its line"


def test_a_restart_is_said():
    output = io.StringIO()
    training = TrainingDisplay(Display(Console(file=output, width=200)), epochs=3)
    trace = "runs/failure-1.txt"
    training({"kind": "restart", "text": "worker 1 was killed or crashed", "trace": trace})
    training({"kind": "restart", "text": "worker 0 was killed or crashed", "trace": None})
    training({"kind": "resumed", "epoch": 1, "done": 0, "history": []})
    shown = output.getvalue()
    restarting = "was killed or crashed; restarting from the last checkpoint"
    assert f"worker 1 {restarting}; the full trace is in runs/failure-1.txt\n" in shown
    assert f"worker 0 {restarting}\n" in shown
    assert "continuing after epoch 1 of 3" in shown


def test_a_recipe_that_holds_images_out_shows_its_accuracy_on_them():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    event = epoch_event(1)
    event["metrics"] = {**event["metrics"], "validation_top1": 93.25}
    del event["metrics"]["test_top1"]
    with Display(console) as display:
        TrainingDisplay(display, epochs=100)(event)
    assert "validation 93.25%" in output.getvalue()


def test_workers_are_said_when_they_are_others_than_planned():
    output = io.StringIO()
    training = TrainingDisplay(Display(Console(file=output, width=200)), 3, "2 to 4 x H100, nccl")
    for hardware in ("2 x H100, nccl", "2 x H100, nccl", "3 x H100, nccl"):
        training({"kind": "workers", "workers": 2, "machines": 1, "hardware": hardware})
    assert output.getvalue().split("\n") == [
        "train    on 2 x H100, nccl",
        "train    on 3 x H100, nccl",
        "",
    ]


def test_an_event_that_is_not_for_people_shows_nothing():
    output = io.StringIO()
    TrainingDisplay(Display(Console(file=output)), epochs=3)({"kind": "evaluation"})
    assert output.getvalue() == ""


def test_a_stage_of_days_is_never_silent_for_longer_than_half_an_hour(monkeypatch):
    clock = iter(range(0, 10**9, 600))  # ten minutes between two looks
    monkeypatch.setattr("pipeline.display.time.monotonic", lambda: next(clock))
    output = io.StringIO()
    display = Display(Console(file=output, width=120))
    for done in range(1, 601):
        display.progress("train", done, 600)
    lines = len(output.getvalue().splitlines())
    assert 600 * 600 / LONGEST_SILENCE * 0.7 <= lines <= 600 * 600 / LONGEST_SILENCE * 1.1


def test_a_place_within_an_epoch_is_said():
    output = io.StringIO()
    training = TrainingDisplay(Display(Console(file=output, width=200)), epochs=4)
    training({"kind": "resumed", "epoch": 1, "done": 1023, "history": []})
    training({"kind": "stopped", "epoch": 2, "done": 0})
    text = output.getvalue()
    assert "continuing after step 1,023 of epoch 2 of 4" in text
    assert "saved after epoch 2 of 4" in text


def test_an_epoch_that_is_told_late_does_not_move_the_bar_back():
    shown: list[tuple[int, str]] = []

    class Noting(Display):
        def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
            shown.append((done, text))

    training = TrainingDisplay(Noting(), epochs=2)
    figures = {"train_loss": 1.0, "train_top1": 50.0, "images_per_second": 10.0}
    training({"kind": "step", "epoch": 1, "done": 3, "steps": 10, **figures})
    metrics = {**figures, "test_top1": 61.25}
    training({"kind": "epoch", "epoch": 1, "step": 10, "steps": 20, "metrics": metrics})
    training({"kind": "step", "epoch": 1, "done": 4, "steps": 10, **figures})
    assert [done for done, _ in shown] == [13, 14]
    assert "61.25" in shown[1][1]
