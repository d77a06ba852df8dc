"""What a training has to be given back to go on, copied out of it and in again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: What a loss scaler changes by itself; the rest are settings.
_MOVING = ("scale", "_growth_tracker")


class MisfitError(Exception):
    """Tensors or numbers that are not those of this training; the message is one line."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: complete epochs.
        step: optimizer steps in all.
        history: metrics of each complete epoch.
        done: steps of the epoch in progress; 0 at its beginning.
    """

    epoch: int
    step: int
    history: list[dict[str, float]]
    done: int = 0


@dataclass
class TrainingState:
    """What is trained, and all that has to be restored to go on.

    Attributes:
        scaler: of the loss; its state is empty unless the precision is float16.
        average: network with the moving average of the weights; None without one.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None = None


@dataclass(frozen=True)
class Snapshot:
    """A training at one moment, copied to the CPU: what goes on changes nothing here.

    Attributes:
        tensors: by part (``model``, ``average``, ``optimizer``, ``ranks``) and name.
        counters: numbers that the optimizer keeps in its parameter groups, ``<index>.<key>``.
        scaler: state of the loss scaler.
    """

    progress: Progress
    tensors: dict[str, dict[str, Tensor]]
    counters: dict[str, int | float]
    scaler: dict[str, int | float]

    @classmethod
    def of(
        cls,
        state: TrainingState,
        progress: Progress,
        rank_state: Mapping[str, Tensor] | None = None,
        reuse: Snapshot | None = None,
    ) -> Snapshot:
        """Copy the state.

        Args:
            rank_state: what differs from rank to rank within an epoch, (world size, ...) each.
            reuse: an earlier one that nobody needs any more; its memory is written over, which is
                faster than memory that the system has to find first.
        """
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": state.model.state_dict(),
            "optimizer": dict(_optimizer_tensors(state.optimizer)),
        }
        if state.average is not None:
            parts["average"] = state.average.state_dict()
        if rank_state:
            parts["ranks"] = rank_state
        memory = reuse.tensors if reuse is not None else {}
        tensors = {part: _copied(found, memory.get(part, {})) for part, found in parts.items()}
        devices = {tensor.device for found in parts.values() for tensor in found.values()}
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return cls(progress, tensors, _counters(state.optimizer), state.scaler.state_dict())


def _copied(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the same layout, in memory that is there already where it fits."""
    copies = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        copy = memory.get(name)
        if copy is None or (copy.shape, copy.stride(), copy.dtype) != (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        ):
            copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor, non_blocking=True)
    return copies


def expected_tensors(state: TrainingState) -> dict[str, dict[str, Tensor]]:
    """By part and name, a tensor of the shape and dtype that belongs there, on any device."""
    optimizer: dict[str, Tensor] = {}
    example = _after_a_step(state.optimizer)
    pairs = zip(_parameters(state.optimizer), _parameters(example), strict=True)
    for index, (parameter, small) in enumerate(pairs):
        for key, value in example.state[small].items():
            shape = parameter.shape if value.shape == small.shape else value.shape
            optimizer[f"{index}.{key}"] = torch.empty(shape, dtype=value.dtype, device="meta")
    expected = {"model": state.model.state_dict(), "optimizer": optimizer}
    if state.average is not None:
        expected["average"] = state.average.state_dict()
    return expected


def restore(
    state: TrainingState,
    tensors: Mapping[str, Mapping[str, Tensor]],
    counters: Mapping[str, int | float],
    scaler: Mapping[str, int | float],
) -> None:
    """Give a training the state back. The settings of optimizer and scaler stay as they are.

    Args:
        tensors: by part, of the names, shapes and dtypes that ``expected_tensors`` has.

    Raises:
        MisfitError: what was given is not of this training, which is then not to be used.
    """
    example = _after_a_step(state.optimizer)
    if counters.keys() != _counters(state.optimizer, example).keys():
        raise MisfitError("what its optimizer counts is not what the one here counts")
    own = state.scaler.state_dict()
    if scaler.keys() != own.keys() or not _is_possible(scaler):
        raise MisfitError("the state of its loss scaler is none of the one here")
    load_network(state.model, tensors["model"])
    if state.average is not None:
        load_network(state.average, tensors["average"])
    _restore_optimizer(state.optimizer, example, tensors["optimizer"])
    for name, value in counters.items():
        index, _, key = name.partition(".")
        state.optimizer.param_groups[int(index)][key] = value
    if own:
        state.scaler.load_state_dict(own | {key: scaler[key] for key in _MOVING})


def _is_possible(scaler: Mapping[str, int | float]) -> bool:
    """Whether a loss scaler can have this state, which is empty where it does nothing."""
    if not scaler:
        return True
    scale, tracker = (scaler[key] for key in _MOVING)
    return 0 < scale < torch.finfo(torch.float32).max and 0 <= tracker <= scaler["growth_interval"]


def load_network(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load all tensors of a network.

    Raises:
        MisfitError: a layer refuses them.
    """
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:  # a headline, then a line for each
        raise MisfitError(str(error).splitlines()[-1].strip()) from None


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer keeps of each parameter, as ``<index of the parameter>.<key>``."""
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{index}.{key}", value


def _after_a_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer of the same kind and settings that has made a step on one element each.

    It shows which tensors and counters such an optimizer keeps, of which dtype and where.
    """
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        small = [
            torch.zeros([1] * parameter.ndim, dtype=parameter.dtype, device=parameter.device)
            for parameter in group["params"]
        ]
        for element in small:
            element.requires_grad_().grad = torch.zeros_like(element)
        groups.append({**group, "params": small})
    kind: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = type(optimizer)
    example = kind(groups)
    example.step()
    return example


def _counters(
    optimizer: torch.optim.Optimizer, example: torch.optim.Optimizer | None = None
) -> dict[str, int | float]:
    """Numbers of the parameter groups that are no settings, as ``<index of the group>.<key>``.

    Args:
        example: of the same settings, whose numbers are wanted.
    """
    return {
        f"{index}.{key}": value
        for index, group in enumerate((example or optimizer).param_groups)
        for key, value in group.items()
        if key not in optimizer.defaults and isinstance(value, int | float)
    }


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    example: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    """Moments get the memory format of their parameter, without which each step is slower."""
    pairs = zip(_parameters(optimizer), _parameters(example), strict=True)
    optimizer.state.clear()
    for index, (parameter, small) in enumerate(pairs):
        for key, shown in example.state[small].items():
            value = tensors.get(f"{index}.{key}")
            if value is None:
                continue
            if value.shape == parameter.shape:
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            # A copy: as it is read it is a part of the file, which would stay on the disk.
            optimizer.state[parameter][key] = value.to(shown.device, copy=True)
