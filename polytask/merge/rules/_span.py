"""Rules whose result is a combination of the tensors, with factors that follow from their inner products alone.

Such a rule reads everything twice and streams both times: the first pass adds up the products of each tensor, the second one
forms the combination. Shapes: N models, L lines (the rows or columns that have factors of their own; none for whole tensors).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.merge.rule import Block, Rule, total

Axis = Literal["whole", "last", "first"]


class Spanned(Rule):
    """What such rules share: they say `combine`, and `vectors` where these are not the differences to the base."""

    surveys: ClassVar[int] = 1

    def vectors(self, block: Block) -> list[Tensor]:
        """What the products are taken of."""
        return block.deltas

    def along(self) -> Axis:
        """What is one vector: the whole tensor, or each of its lines along the last or the first dimension."""
        return "whole"

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        """The factors [..., N] of the vectors from their inner products [..., N, N], in fp64."""
        raise NotImplementedError

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return ("row", 0) if self.along() == "last" else ("element", 1)

    def survey(self, number: int, block: Block) -> Tensor | list[list[float]]:
        gram = products(self.vectors(block), self.along())
        # small tensors that are kept between blocks that are not would leave holes, and memory grow with the tensors
        return gram if gram.dim() > 2 else gram.tolist()

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> dict[str, Tensor]:
        grams: dict[str, Any] = {}
        for name, gram in found:
            if name not in grams:
                grams[name] = gram
            elif isinstance(gram, Tensor):
                grams[name] = grams[name] + gram
            else:
                grams[name] = [
                    [a + b for a, b in zip(*rows, strict=True)] for rows in zip(grams[name], gram, strict=True)
                ]
        return {name: torch.as_tensor(gram, dtype=torch.float64) for name, gram in grams.items()}

    def merge(self, block: Block) -> Tensor:
        axis = self.along()
        gram = products(self.vectors(block), axis) if axis == "last" else block.facts[block.name]
        factors = self.combine(gram, block)
        if factors.dim() == 1:
            return self.added(block, factors.tolist())
        lines = factors.float().unbind(-1)
        if block.shape:
            lines = tuple(f.unsqueeze(-1 if axis == "last" else 0) for f in lines)
        out = block.zero + torch.zeros_like(block.tensors[0])
        for vector, factor in zip(self.vectors(block), lines, strict=True):
            out.addcmul_(vector, factor.expand_as(vector))
        return out

    def added(self, block: Block, factors: Sequence[float]) -> Tensor:
        """``b + sum_i f_i (x_i - b)``."""
        there = [i for i, f in enumerate(factors) if f]
        if len(there) == 1 and factors[there[0]] == 1.0:
            return block.tensors[there[0]]  # bit for bit
        if block.base is None:
            return total(block.tensors, factors)
        if (
            max(map(abs, factors)) > 8.0
        ):  # a short difference weighs much: the sum of whole tensors would lose its digits
            return total(block.deltas, factors).add_(block.base)
        return total([block.base, *block.tensors], [1.0 - sum(factors), *factors])

    def factors(self, block: Block) -> Sequence[float] | None:
        if self.along() != "whole":
            return None
        found: list[float] = self.combine(block.facts[block.name], block).tolist()
        return found


def products(vectors: Sequence[Tensor], axis: Axis) -> Tensor:
    """The inner products in fp64: [N, N], or [L..., N, N] of the lines along the last or the first dimension."""
    if axis == "whole" or not vectors[0].dim():
        flat = torch.stack([v.reshape(-1).double() for v in vectors])
        return flat @ flat.T
    stacked = torch.stack([v.double() for v in vectors], -1)  # [..., N]
    if axis == "first":
        return torch.einsum("a...n,a...m->...nm", stacked, stacked)
    return torch.einsum("...an,...am->...nm", stacked, stacked)


def lengths(gram: Tensor) -> Tensor:
    """The norms of the vectors, [..., N]."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def cosines(gram: Tensor) -> Tensor:
    """The cosines of all pairs, 0 where a vector is zero, [..., N, N]."""
    size = lengths(gram)
    size = torch.where(size > 0, size, torch.ones_like(size))
    return (gram / size.unsqueeze(-1) / size.unsqueeze(-2)).clamp(-1.0, 1.0)


def arc(gram: Tensor, t: float, close: float) -> Tensor:
    """The factors [..., 2] of two vectors at ``t`` of the great circle between them, linear where ``|sin| < close``."""
    angle = cosines(gram)[..., 0, 1].arccos()
    sine = angle.sin()
    linear = sine.abs() < close
    safe = torch.where(linear, torch.ones_like(sine), sine)
    first, second = (angle * (1.0 - t)).sin() / safe, (angle * t).sin() / safe
    first = torch.where(linear, torch.full_like(first, 1.0 - t), first)
    second = torch.where(linear, torch.full_like(second, t), second)
    return torch.stack([first, second], -1)
