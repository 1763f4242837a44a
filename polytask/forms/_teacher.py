"""How far what an adapter says of some rows is from what another one says, its teacher.

Shapes: B rows, S sequences, T positions, V words, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.errors import AdapterError
from polytask.core.head import Head, LinearHead
from polytask.core.rows import Row

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
        return _scores(head, wanted, head._logits(here), seen.rows) + mean
    with torch.no_grad(), model.using(teacher, tasks=seen.task):
        there, wanted = _words(seen, batch)
    with model.using(seen.name, tasks=seen.task):
        here, said = _words(seen, batch)
    sums = _divergence(wanted, said) + (here - there).float().square().mean(-1)  # [S, T]
    labels = batch["labels"][:, -sums.shape[1] :]
    each = (sums * (labels != -100)).sum(1)
    return torch.stack([part.sum() for part in each.split([row.count for row in seen.rows])])


def _divergence(wanted: Tensor, said: Tensor) -> Tensor:
    """KL over the last dimension."""
    return F.kl_div(
        said.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def _scores(head: LinearHead, wanted: Tensor, said: Tensor, rows: Sequence[Row]) -> Tensor:
    """How far two scores of the same rows are apart, [B]."""
    if head.task == "classify":
        return _divergence(wanted, said)
    if head.task == "multilabel":  # each label is a choice between yes and no
        return _divergence(F.pad(wanted[..., None], (0, 1)), F.pad(said[..., None], (0, 1))).mean(1)
    if head.task == "regress":
        return (wanted - said).squeeze(1).square()
    counts = [row.count for row in rows]
    pairs = zip(wanted.squeeze(1).split(counts), said.squeeze(1).split(counts), strict=True)
    return torch.stack([_divergence(a, b) for a, b in pairs])


def _words(seen: Seen, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last layer's vectors [S, T, d] and scores [S, T, V] at the positions that predict the last T labels."""
    caught: list[tuple[Tensor, Tensor]] = []
    layer = seen.model.module.get_output_embeddings()  # type: ignore[operator]
    handle = layer.register_forward_hook(lambda module, args, out: caught.append((args[0], out)))
    try:
        seen.head.run(seen.model, batch)
    finally:
        handle.remove()
    hidden, logits = caught[-1]
    return (hidden, logits) if seen.model.kind == "seq2seq" else (hidden[:, :-1], logits[:, :-1])
