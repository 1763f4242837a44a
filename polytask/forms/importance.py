"""How much the task would have each part of a base move: scores from gradients, for forms that choose where to act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Batches = Sequence[Callable[[], Tensor]]


def gradients(parameters: Sequence[nn.Parameter], batches: Batches) -> Iterator[list[Tensor]]:
    """The gradient of each batch's loss by each parameter; zeros where it does not depend on it."""
    for batch in batches:
        with torch.enable_grad():
            found = torch.autograd.grad(batch(), list(parameters), allow_unused=True)
        yield [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def fisher(parameters: Sequence[nn.Parameter], batches: Batches) -> list[Tensor]:
    """The diagonal of the empirical Fisher information: the mean square of each batch's gradient.

    With one example per batch it is ``E[(d log p(y|x) / d theta)^2]``.
    """
    sums = [torch.zeros_like(p) for p in parameters]
    for found in gradients(parameters, batches):
        for total, gradient in zip(sums, found, strict=True):
            total.addcmul_(gradient, gradient, value=1.0 / len(batches))
    return sums


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """The positions of the ``count`` largest scores over all (flattened) tensors, ascending in each; exactly as many."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    chosen = flat.topk(min(count, len(flat))).indices.sort().values
    done, start = [], 0
    for score in scores:
        inside = chosen[(chosen >= start) & (chosen < start + score.numel())]
        done.append(inside - start)
        start += score.numel()
    return done
