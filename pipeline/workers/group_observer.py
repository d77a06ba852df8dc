"""What happens to a group of workers, as Ray's controller sees it, told to the driver.

The controller is a process of its own, which polls the workers and replaces a group that fails.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from pipeline.config import PipelineError
from pipeline.context import Wish
from pipeline.failures import Kind, describe_failure, first_line, kind_of
from pipeline.workers.board import SAVES, Event, Worker

#: Seconds until Ray has found out that a worker, or its machine, is gone. Before that it would
#: only try to place the next group there.
_CERTAINTY_SECONDS = 25.0

#: Seconds in which workers stop before their number changes; otherwise some steps are repeated.
_SAVE_SECONDS = 20.0

#: Seconds before a machine is taken away in which its state is saved once more.
_LAST_CALL_SECONDS = 15.0


def group_observer(board: Any) -> Any:
    """Callback of Ray's controller that posts ``group``, ``failure`` and ``note`` events.

    Ray has these hooks for developers only, not for the public ``UserCallback``, which does not
    learn of a resize, of a preemption, or of who the workers are.

    Raises:
        PipelineError: when this version of Ray lacks them.
    """
    try:
        from ray.train.v2._internal.execution.callback import (
            ControllerCallback,
            WorkerGroupCallback,
        )
    except ImportError as error:
        raise PipelineError(
            f"this version of Ray cannot be observed ({error}); "
            "install the one that requirements.lock names"
        ) from None

    class RayGroupObserver(GroupObserver, ControllerCallback, WorkerGroupCallback):
        """With Ray's own hooks where the observer has none."""

    return RayGroupObserver(board)


class GroupObserver:
    """The hooks; their arguments are Ray's.

    Args:
        board: actor that carries events to the driver.
    """

    def __init__(self, board: Any) -> None:
        self._board = board
        self._workers: dict[int, Worker] = {}
        self._actors: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._leaving: Any = None
        self._asked_last = False
        self._is_training = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._errors, self._leaving = {}, None
        for worker in worker_group.get_workers():
            rank, process = worker.distributed_context.world_rank, worker.metadata
            self._workers[rank] = Worker(rank, process.pid, process.node_id, process.node_ip)
            self._actors[rank] = worker.actor
        self._is_training = True
        self._post({"kind": "group", "workers": list(self._workers.values())})

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._workers, self._actors, self._is_training = {}, {}, False
        self._post({"kind": "group", "workers": []})

    def after_worker_group_poll_status(self, status: Any) -> None:
        self._errors = {
            rank: worker.error
            for rank, worker in status.worker_statuses.items()
            if worker.error is not None
        }
        if self._errors and all(self._is_collateral(error) for error in self._errors.values()):
            self._errors |= self._deaths()
        info = status.get_preemption_info()
        if info is None:
            return
        if info != self._leaving:
            self._leaving, self._asked_last = info, False
            self._announce(info)
        left = _seconds_left(info)
        if left is not None and left < _LAST_CALL_SECONDS and not self._asked_last:
            self._asked_last = True
            self._board.wish.remote(int(Wish.CHECKPOINT), SAVES)

    def before_controller_execute_resize_decision(self, decision: Any) -> None:
        """Let a group that trains save its state before Ray ends it for one of another size."""
        import ray

        if not self._is_training:
            return
        before, after = len(self._workers), decision.num_workers
        text = f"there is room for {after} workers instead of {before}; they go on where these stop"
        self._post_note(text)
        stopped = self._board.wait_for.remote("stopped", _SAVE_SECONDS)
        number = ray.get(self._board.wish.remote(int(Wish.STOP), ("stopped",)))
        if not ray.get(stopped):
            ray.get(self._board.forget.remote(number))

    def after_controller_state_update(self, previous: Any, current: Any) -> None:
        from ray.train.v2._internal.execution.controller.state import (
            ReschedulingState,
            RestartingState,
        )

        if current is previous:
            time.sleep(0.2)  # in which Ray would look for room without a pause
        elif isinstance(current, RestartingState):
            self._is_training = False
            self._tell_failure(current.training_failed_error)
            self._count_machines()
        elif isinstance(current, ReschedulingState):
            self._tell_failed_start(current.training_failed_error)
            self._count_machines()

    def _is_collateral(self, error: BaseException) -> bool:
        return kind_of(error) is Kind.CONNECTION

    def _deaths(self) -> dict[int, BaseException]:
        """Errors of the workers that are gone, though Ray had not noticed when it looked."""
        import ray

        deaths: dict[int, BaseException] = {}
        deadline = time.monotonic() + _CERTAINTY_SECONDS
        unknown = [rank for rank in self._actors if rank not in self._errors]
        while unknown and time.monotonic() < deadline:
            rank = unknown.pop(0)
            try:
                patience = max(0.0, deadline - time.monotonic())
                ray.get(self._actors[rank].get_metadata.remote(), timeout=patience)
            except ray.exceptions.ActorUnavailableError:
                unknown.append(rank)
                time.sleep(0.2)
            except ray.exceptions.RayError as error:
                deaths[rank] = error
        return deaths

    def _announce(self, info: Any) -> None:
        """Ask for a checkpoint as long as the machine is there."""
        import ray

        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        names = ", ".join(addresses.get(node, node) for node in info.preempted_node_ids)
        left = _seconds_left(info)
        when = f" in {max(0.0, left):.0f} s" if left is not None else ""
        text = f"the machine {names} will be taken away{when}; saving the state of the training"
        self._post_note(text)
        self._board.wish.remote(int(Wish.CHECKPOINT), SAVES)

    def _tell_failure(self, error: Any) -> None:
        if self._errors:
            self._post(describe_failure(self._errors, self._workers))
            return
        info = getattr(error, "preemption_info", None)
        ranks = info.preempted_ranks if info is not None else []
        who = ", ".join(str(self._workers[rank]) for rank in ranks if rank in self._workers)
        text = f"a machine was taken away, and with it {who}" if who else first_line(error)
        self._post_failure(text, error, preempted=info is not None)

    def _tell_failed_start(self, error: Any) -> None:
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        failure = getattr(error, "controller_failure", error)
        # The cluster may get room again, for which the driver sees the training wait.
        if not isinstance(failure, WorkerGroupStartupTimeoutError):
            text = f"Ray could not start the workers: {first_line(failure)}"
            self._post_failure(text, failure, preempted=False)

    def _post_failure(self, text: str, error: BaseException, preempted: bool) -> None:
        trace = f"{type(error).__name__}: {error}"
        event = {"kind": "failure", "text": text, "trace": trace, "pids": []}
        self._post(event | {"preempted": preempted})

    def _count_machines(self) -> None:
        """Ray counts them every 20 s, and would start the next group on one that is lost."""
        import ray

        name = "AutoscalingCoordinator"
        # It only saves time: an error here would end the training, where Ray just takes longer.
        with contextlib.suppress(ValueError, AttributeError, ray.exceptions.RayError):
            coordinator = ray.get_actor(name, namespace=name)
            ray.get(coordinator._tick.remote(), timeout=_SAVE_SECONDS)

    def _post_note(self, text: str) -> None:
        self._post({"kind": "note", "time": time.time(), "text": text})

    def _post(self, event: Event) -> None:
        self._board.post.remote(event)


def _seconds_left(info: Any) -> float | None:
    """Until a machine is taken away, by Ray's word of it; None where nobody knows."""
    return None if info.deadline_ms is None else info.deadline_ms / 1000 - time.time()
