"""Running a base and a head over many examples, with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .head import Head, TextHead, collate, split
from .memory import memory_advice
from .model import Model
from .rows import Row


def batches(lengths: Sequence[int], counts: Sequence[int], size: int) -> list[list[int]]:
    """Positions in batches of at most ``size`` sequences, similar lengths together, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    made: list[list[int]] = []
    filled = size
    for i in order:
        if filled + counts[i] > size:
            made.append([])
            filled = 0
        made[-1].append(i)
        filled += counts[i]
    return made


@torch.no_grad()
def predict(
    model: Model, head: Head, rows: Sequence[Row], *, batch_size: int = 32, write: bool | None = None
) -> list[Any]:
    """One prediction per row, in the order of the rows, under the mix that acts now.

    Args:
        model: the base.
        head: of the rows' task.
        rows: made with ``scoring=True``.
        batch_size: sequences per forward.
        write: let a `TextHead` write answers instead of scoring the given ones; by default where its task is ``generate``.

    Raises:
        MemoryLimitError: a batch does not fit into memory.
    """
    writes = isinstance(head, TextHead) and (head.task == "generate" if write is None else write)
    found: list[Any] = [None] * len(rows)
    for batch in batches([r.length for r in rows], [r.count for r in rows], batch_size):
        chosen = [rows[i] for i in batch]
        with memory_advice(model.device, sum(row.count for row in chosen)):
            if writes and isinstance(head, TextHead):
                answers: list[Any] = list(head.write(model, chosen))
            else:
                answers = head.predict(head.run(model, collate(model, head, chosen)), chosen)
        for i, answer in zip(batch, answers, strict=True):
            found[i] = answer
    return found


@torch.no_grad()
def embed(model: Model, head: Head, rows: Sequence[Row], *, batch_size: int = 64) -> torch.Tensor:
    """The pooled vectors of the rows' sequences, [S, d] in fp32 on the CPU, under the mix that acts now.

    Raises `MemoryLimitError` when a batch does not fit into memory.
    """
    found = [torch.empty(0)] * len(rows)
    for batch in batches([r.length for r in rows], [r.count for r in rows], batch_size):
        chosen = [rows[i] for i in batch]
        with memory_advice(model.device, sum(row.count for row in chosen)):
            out = model.features(collate(model, head, chosen)).float().cpu()
        for i, part in zip(batch, split(out, [r.count for r in chosen]), strict=True):
            assert isinstance(part, torch.Tensor)
            found[i] = part
    return torch.cat(found)
