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
PIECE = 1 << 16  # entries at a time, so that their fp64 copies stay in the processor's cache


class Spanned(Rule):
    """What such rules share: they say `combine`, and `points` and `origin` where these are not the models and the base."""

    surveys: ClassVar[int] = 1

    def points(self, block: Block) -> list[Tensor]:
        """Where the vectors end."""
        return list(block.tensors)

    def origin(self, block: Block) -> Tensor | None:
        """Where they begin, if not at zero."""
        return block.base

    def vectors(self, block: Block) -> list[Tensor]:
        """What the products are taken of."""
        origin = self.origin(block)
        return self.points(block) if origin is None else [point - origin for point in self.points(block)]

    def along(self) -> Axis:
        """What is one vector: the whole tensor, or each of its lines along the last or the first dimension."""
        return "whole"

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        """The factors [..., N] of the vectors from their inner products [..., N, N], in fp64."""
        raise NotImplementedError

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return ("row", 0) if self.along() == "last" else ("element", 1)

    def survey(self, number: int, block: Block) -> Tensor | list[list[float]]:
        gram = products(self.points(block), self.along(), self.origin(block))
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
        gram = products(self.points(block), axis, self.origin(block)) if axis == "last" else block.facts[block.name]
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


def products(points: Sequence[Tensor], axis: Axis, origin: Tensor | None = None) -> Tensor:
    """The inner products of the vectors from ``origin``, in fp64: [N, N], or [L..., N, N] of the lines along the last or
    the first dimension."""
    if axis == "whole" or not points[0].dim():
        flat, first = [p.reshape(-1) for p in points], None if origin is None else origin.reshape(-1)
        gram = torch.zeros(len(flat), len(flat), dtype=torch.float64)
        held = torch.empty(
            len(flat), min(PIECE, len(flat[0])), dtype=torch.float64
        )  # once: new memory costs more than products
        for start in range(0, len(flat[0]), PIECE):
            wide = held[:, : len(flat[0]) - start]
            here = slice(start, start + PIECE)
            for row, point in zip(wide, flat, strict=True):
                row.copy_(point[here] if first is None else point[here] - first[here])
            gram.addmm_(wide, wide.T)
        return gram
    stacked = torch.stack([(p if origin is None else p - origin).double() for p in points], -1)  # [..., N]
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
