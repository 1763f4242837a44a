"""How far two forwards of the same rows are apart, in what they say of the answer.

Shapes: B rows, S sequences, T positions, V words, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .head import LinearHead
from .rows import Row

if TYPE_CHECKING:
    from .head import Seen


def divergence(wanted: Tensor, said: Tensor) -> Tensor:
    """KL(wanted || said) of two tensors of scores, over the last dimension."""
    return F.kl_div(
        said.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def scores_apart(head: LinearHead, wanted: Tensor, said: Tensor, rows: Sequence[Row]) -> Tensor:
    """How far two scores of the same rows are apart, [B]: KL, or the squared difference of numbers."""
    if head.task == "classify":
        return divergence(wanted, said)
    if head.task == "multilabel":  # each label is a choice between yes and no
        return divergence(F.pad(wanted[..., None], (0, 1)), F.pad(said[..., None], (0, 1))).mean(1)
    if head.task == "regress":
        return (wanted - said).squeeze(1).square()
    counts = [row.count for row in rows]
    pairs = zip(wanted.squeeze(1).split(counts), said.squeeze(1).split(counts), strict=True)
    return torch.stack([divergence(a, b) for a, b in pairs])


def words(seen: Seen, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last layer's vectors [S, T, d] and scores [S, T, V] at the positions that predict the last T labels.

    Args:
        seen: whose model and head run, under the mix that acts now.
        batch: the tensors of its rows.
    """
    caught: list[tuple[Tensor, Tensor]] = []
    layer = seen.model.module.get_output_embeddings()  # type: ignore[operator]
    handle = layer.register_forward_hook(lambda module, args, out: caught.append((args[0], out)))
    try:
        seen.head.run(seen.model, batch)
    finally:
        handle.remove()
    hidden, logits = caught[-1]
    return (hidden, logits) if seen.model.kind == "seq2seq" else (hidden[:, :-1], logits[:, :-1])


def row_sums(each: Tensor, batch: dict[str, Tensor], rows: Sequence[Row]) -> Tensor:
    """Sums [B] over the scored tokens of values [S, T] at the positions of `words`."""
    scored = batch["labels"][:, -each.shape[1] :] != -100
    return torch.stack([part.sum() for part in (each * scored).sum(1).split([row.count for row in rows])])
