"""Heads of adapters that are merged: kept where all have the same, or averaged where they started from the same values."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError, listing
from polytask.core.head import Head


def mean_heads(adapters: Sequence[Adapter]) -> dict[str, Head]:
    """The plain mean of each task's heads; what is no floating-point number is the first one's.

    Args:
        adapters: snapshots of one run or of several, with the same tasks.

    Raises:
        MergeError: they have different tasks, or heads of a task that did not start from the same values.
    """
    first = adapters[0]
    for adapter in adapters[1:]:
        if set(adapter.heads) != set(first.heads):
            raise MergeError(
                f"{first.name!r} has heads for {listing(first.heads) or 'no task'}, and {adapter.name!r} for "
                f"{listing(adapter.heads) or 'no task'}; average adapters of the same tasks"
            )
    return {task: _mean(task, adapters) for task in first.heads}


def starts_of(adapters: Sequence[Adapter]) -> dict[str, str]:
    """From which values each task's head started, as the cards say it, where all that say it agree."""
    found: dict[str, set[str]] = {}
    for adapter in adapters:
        for task, start in _starts(adapter).items():
            found.setdefault(task, set()).add(start)
    return {task: next(iter(starts)) for task, starts in found.items() if len(starts) == 1}


def _starts(adapter: Adapter) -> Mapping[str, str]:
    starts: Mapping[str, str] = adapter.card.training.get("head_starts") or {}
    return starts


def _mean(task: str, adapters: Sequence[Adapter]) -> Head:
    heads = [adapter.heads[task] for adapter in adapters]
    for adapter, head in zip(adapters, heads, strict=True):
        if head.settings() != heads[0].settings():
            raise MergeError(
                f"{adapters[0].name!r} and {adapter.name!r} have heads for {task!r} that read it differently: "
                f"{heads[0].settings()} and {head.settings()}; average adapters of the same task"
            )
    states = [head.state_dict() for head in heads]
    made = copy.deepcopy(heads[0])
    if all(torch.equal(value, states[0][name]) for state in states for name, value in state.items()):
        return made
    _same_start(task, adapters)
    made.load_state_dict({name: _middle([state[name] for state in states]) for name in states[0]})
    return made


def _same_start(task: str, adapters: Sequence[Adapter]) -> None:
    """Raises `MergeError` where the heads did not start from the same values, or nobody knows."""
    starts = [_starts(adapter).get(task) for adapter in adapters]
    silent = [adapter.name for adapter, start in zip(adapters, starts, strict=True) if start is None]
    if silent:
        raise MergeError(
            f"the card of {listing(silent)} does not say from which values the head for {task!r} started, and heads are averaged "
            "only where they started from the same; learn it with polytask"
        )
    other = next((a.name for a, start in zip(adapters, starts, strict=True) if start != starts[0]), None)
    if other is not None:
        raise MergeError(
            f"the heads of {adapters[0].name!r} and {other!r} for {task!r} started from different values, so their mean reads "
            "neither; learn both from one start (start=, --start), or with the same seed, data and head_start"
        )


def _middle(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    return torch.stack([t.double() for t in tensors]).mean(0).to(first) if first.is_floating_point() else first


def heads_of(adapters: Sequence[Adapter]) -> dict[str, Head]:
    """All heads by task. Raises `MergeError` for two different ones of a task."""
    heads: dict[str, Head] = {}
    for adapter in adapters:
        for task, head in adapter.heads.items():
            other = heads.setdefault(task, head)
            own, theirs = head.state_dict(), other.state_dict()
            if own.keys() != theirs.keys() or any(not torch.equal(v, theirs[k]) for k, v in own.items()):
                raise MergeError(
                    f"two of the adapters have different heads for the task {task!r}, and heads are not averaged; take one "
                    f"away before (adapter.heads.pop({task!r})), or give it another name"
                )
    return heads
