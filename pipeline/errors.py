"""What ends a run with one line for the user."""

from __future__ import annotations


class PipelineError(Exception):
    """A failure that the user can mend: one line that says what, where, and what would be right.

    Attributes:
        exit_code: of the process: 2 for bad input, 1 for a run that failed.
        run: name of the run that can be continued; None where there is none.
    """

    exit_code = 2
    run: str | None = None


class Interrupted(KeyboardInterrupt):
    """The user or the system ended the run; ``run`` names the folder that can be resumed."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.run = run
