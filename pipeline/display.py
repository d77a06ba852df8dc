"""What the user sees of a run: one line a stage, and one bar or a calm line with ETA."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

#: Without a terminal, a line at most so often (in seconds), and so many for a whole stage.
LINE_INTERVAL = 5.0
LINES = 12

#: A longer stage has more of them: nobody shall wonder for longer than that whether it lives.
LONGEST_SILENCE = 1800.0


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3:07 min`` or ``2:05 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds) // 60
    if minutes < 100:
        return f"{minutes}:{round(seconds) % 60:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


class Display:
    """Progress of a run on the console; usable as a context manager that removes its bar.

    Args:
        console: where to write; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._started = self._last_line = time.monotonic()
        self._first_done = 0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close_bar()

    def stage(self, name: str, text: str) -> None:
        """One line: what stage of the run, and what of it."""
        self.close_bar()
        line = Text(f"{name:<9}", style="bold")
        line.append(text, style="not bold")
        self.console.print(line)

    def note(self, text: str) -> None:
        """A line that is set apart: something the user did not ask for has happened."""
        self.console.print(Text(f"{'note':<9}{text}", style="yellow"))

    def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of a stage, or print a line where there is no terminal.

        Args:
            stage: name of the stage; a new name starts a new bar.
            done: units done so far, of ``total``.
            text: figures to show beside the bar.
        """
        now = time.monotonic()
        if stage != self._stage:
            self.close_bar()
            self._stage, self._started, self._last_line = stage, now, now
            self._first_done = done
        left, interval = "", LINE_INTERVAL
        if done > self._first_done:
            rate = (now - self._started) / (done - self._first_done)
            left = f"ETA {duration(rate * (total - done))}"
            if self._last_line > self._started:  # the first one comes soon, whatever the rest takes
                interval = max(LINE_INTERVAL, min(rate * total / LINES, LONGEST_SILENCE))
        if self.console.is_terminal:
            self._move_bar(stage, done, total, f"{left:<14}{text}")
        elif now - self._last_line >= interval and done < total:
            self._last_line = now
            self.console.print(f"{stage:<9}{done / total:4.0%}  {left:<14}{text}".rstrip())

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task, self._stage = None, None, ""

    def _move_bar(self, stage: str, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("[bold]{task.description:<8}"),
                BarColumn(bar_width=12),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(stage, total=total, text=text)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, text=text)


class TrainingDisplay:
    """Turns the events of a training into the display's bar and lines.

    Args:
        hardware: that the user has been told of.
    """

    def __init__(self, display: Display, epochs: int, hardware: str = "") -> None:
        self.display = display
        self.epochs = epochs
        self._hardware = hardware
        self._accuracy = ""
        self._done = 0

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler is not None:
            handler(event)

    def _on_phase(self, event: dict[str, Any]) -> None:
        self.display.stage("train", event["text"])

    def _on_note(self, event: dict[str, Any]) -> None:
        self.display.note(event["text"])

    def _on_workers(self, event: dict[str, Any]) -> None:
        if event["hardware"] != self._hardware:
            self._hardware = event["hardware"]
            self.display.stage("train", f"on {self._hardware}")

    def _on_resumed(self, event: dict[str, Any]) -> None:
        self._done = 0
        self.display.stage("train", f"continuing after {self._place(event)}")

    def _on_restart(self, event: dict[str, Any]) -> None:
        self.display.close_bar()
        trace = f"; the full trace is in {event['trace']}" if event["trace"] else ""
        self.display.note(f"{event['text']}; restarting from the last checkpoint{trace}")

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self.display.stage("train", f"saved after {self._place(event)}")

    def _place(self, event: dict[str, Any]) -> str:
        """How far a training is, in words."""
        if not event["done"]:
            return f"epoch {event['epoch']} of {self.epochs}"
        return f"step {event['done']:,} of epoch {event['epoch'] + 1} of {self.epochs}"

    def _on_step(self, event: dict[str, Any]) -> None:
        done = event["epoch"] * event["steps"] + event["done"]
        self._show(event["epoch"], done, self.epochs * event["steps"], event)

    def _on_epoch(self, event: dict[str, Any]) -> None:
        metrics = event["metrics"]
        # A recipe that holds images out is judged by them, epoch by epoch.
        watched = "validation" if "validation_top1" in metrics else "test"
        self._accuracy = f"  {watched} {metrics[f'{watched}_top1']:.2f}%"
        self._show(event["epoch"] - 1, event["step"], event["steps"], metrics)

    def _show(self, epoch: int, done: int, total: int, figures: dict[str, Any]) -> None:
        if done < self._done:  # an epoch is told when it is safe, and the next one may be under way
            return
        self._done = done
        text = (
            f"epoch {epoch + 1}/{self.epochs}  loss {figures['train_loss']:.3f}  "
            f"train {figures['train_top1']:.1f}%{self._accuracy}"
            f"  {figures['images_per_second']:,.0f} img/s"
        )
        self.display.progress("train", done, total, text)
