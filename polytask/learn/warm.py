"""A head's start: what a linear probe on the frozen base finds, so that adapters learn from a sensible reading.

Learning with a random head first distorts the features it reads (Kumar et al., arXiv 2202.10054); the probe costs one forward
over the training examples. The probe is regularised more than one that is used by itself, to leave something to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polytask.core.head import LinearHead
from polytask.core.model import Model
from polytask.core.predict import embed
from polytask.core.rows import Row

STRENGTH = 0.1  # the inverse of the L2 penalty, on standardised features


def warm(model: Model, head: LinearHead, rows: Sequence[Row], batch_size: int = 64) -> None:
    """Sets a head's values by a regression on the features that the model gives now.

    Softmax regression for classes, a logistic one per output for labels and choices, ridge for numbers; biases are not
    penalised. Outputs that the rows do not tell apart (a class or label that never or always occurs) start at zero.

    Args:
        model: the base, with whatever acts on it.
        head: of the rows' task.
        rows: training rows with their targets.
        batch_size: sequences per forward.
    """
    x = embed(model, head, rows, batch_size=batch_size).cpu().double()
    spread, mean = torch.std_mean(x, 0, correction=0)
    spread = spread + 1e-6
    loss: Callable[[Tensor], Tensor]
    if head.task == "classify":
        kept, classes = torch.tensor([row.target for row in rows]).unique(return_inverse=True)
        if len(kept) < 2:
            return

        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, classes, reduction="sum")

    elif head.task == "regress":
        kept = torch.tensor([0])
        numbers = torch.tensor([[row.target] for row in rows], dtype=torch.float64)

        def loss(logits: Tensor) -> Tensor:
            return (logits - numbers).square().sum() / 2

    else:
        if head.task == "multilabel":
            marks = torch.tensor([row.target for row in rows], dtype=torch.float64)
        else:
            marks = torch.cat([torch.arange(row.count) == row.target for row in rows])[:, None].double()
        kept = (marks != marks[0]).any(0).nonzero().squeeze(-1)
        marks = marks[:, kept]

        def loss(logits: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(logits, marks, reduction="sum")

    weight, bias = x.new_zeros(head.linear.weight.shape), x.new_zeros(head.linear.out_features)
    weight[kept], bias[kept] = _regression((x - mean) / spread, len(kept), loss)
    scaled = weight / spread
    with torch.no_grad():
        head.linear.weight.copy_(scaled)
        head.linear.bias.copy_(bias - scaled @ mean)


def _regression(z: Tensor, outputs: int, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The weight [outputs, features] and bias [outputs] with the least loss plus penalty; both are convex."""
    weight = z.new_zeros(outputs, z.shape[1], requires_grad=True)
    bias = z.new_zeros(outputs, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        total = loss(F.linear(z, weight, bias)) + weight.square().sum() / (2 * STRENGTH)
        total.backward()
        return total

    with torch.enable_grad():
        search.step(closure)
    return weight.detach(), bias.detach()
