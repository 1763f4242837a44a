"""How far what an adapter says of some rows is from what another one says, its teacher.

Shapes: B rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polytask.core.agreement import divergence, row_sums, scores_apart, words
from polytask.core.errors import AdapterError
from polytask.core.head import Head, LinearHead

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.head import Seen


def check_teacher(name: str, teacher: Adapter, task: str, head: Head) -> None:
    """Raises `AdapterError` where a teacher has no head for the task that scores what the student's ``head`` does."""
    if not isinstance(head, LinearHead):
        if head.trunk != "likelihood":
            raise AdapterError(f"the task {task!r} has a head of kind {head.name!r}, which learns from no teacher")
        return
    own = teacher.heads.get(task)
    if not isinstance(own, LinearHead) or (own.task, own.labels) != (head.task, head.labels):
        said = (
            f"{own.settings()}" if own is not None else f"none (its heads are for: {', '.join(teacher.heads) or '-'})"
        )
        raise AdapterError(
            f"the teacher {name!r} cannot teach the task {task!r}: it needs a head of kind {head.task!r} for the labels "
            f"{head.labels}, and has {said}"
        )


def apart(seen: Seen, teacher: str) -> Tensor:
    """``KL(teacher || student) + mean (h_teacher - h_student)^2`` of each row, [B].

    Of the classes' scores and the pooled vectors; for texts summed over the scored tokens of the last layer. The vectors
    of a text's tokens are no part of what a head gets, so it runs the student again there.

    Args:
        seen: the rows, and what the student said.
        teacher: an attached adapter.
    """
    model, head, batch = seen.model, seen.head, seen.batch
    if isinstance(head, LinearHead):
        with torch.no_grad(), model.using(teacher, tasks=seen.task):
            there = head.run(model, batch)
            wanted = model.adapters[teacher].heads[seen.task]._logits(there)  # type: ignore[operator]
        here: Tensor = seen.out  # type: ignore[assignment]
        distance = (here - there).float().square().mean(1)  # type: ignore[operator]  # [S]
        mean = torch.stack([part.mean() for part in distance.split([row.count for row in seen.rows])])
        return scores_apart(head, wanted, head._logits(here), seen.rows) + mean
    with torch.no_grad(), model.using(teacher, tasks=seen.task):
        there, wanted = words(seen, batch)
    with model.using(seen.name, tasks=seen.task):
        here, said = words(seen, batch)
    return row_sums(divergence(wanted, said) + (here - there).float().square().mean(-1), batch, seen.rows)
