"""SCE: select where models differ, calculate a weight for each, erase what is in the minority."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.merge.rule import Block, Rule, rules
from polytask.merge.select import largest, masked, share

from .elect import elect, one_of, within


@rules.register("sce")
@dataclass(frozen=True)
class Sce(Rule):
    """Keeps the places of each tensor where the differences vary most over the models, weighs each model by the mean square of
    its kept entries, and adds the weighted mean of the entries that have the sign of their sum.

    Args:
        select_topk: the share of the places with any variance that is kept, at least one; 1 keeps every place.
        compat: ``mergekit`` rounds counts down, also to nothing, weighs all models alike where their squares are small, and takes
            sums of weights below 1e-6 for 1e-6.

    Reference: Wan et al., FuseChat, arXiv 2408.07990.

    Raises:
        ConfigError: a share outside 0 to 1.
    """

    select_topk: float = 1.0
    compat: str = ""

    weighted: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2408.07990"

    def __post_init__(self) -> None:
        within(self.name, "select_topk", self.select_topk)
        one_of(self.name, "compat", self.compat, ("", "mergekit"))

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return ("tensor", 0) if self.select_topk < 1 else ("element", 1)

    def survey(self, number: int, block: Block) -> list[float]:
        return _squares(block.deltas)

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> dict[str, list[float]]:
        sums: dict[str, list[float]] = {}
        for name, squares in found:
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(squares)), squares, strict=True)]
        return sums

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        deltas, floor = block.deltas, bool(self.compat)
        if self.select_topk < 1:
            spread = _variance(deltas)
            mask = largest(spread, share(self.select_topk, int(spread.count_nonzero()), floor=floor))
            for delta in deltas:
                masked(delta, mask)
            sums = _squares(deltas)
        else:
            sums = block.facts[block.name]
        squares = [square / max(1, block.count) for square in sums]
        whole = sum(squares)
        if whole < (1e-6 if floor else 1e-300):
            squares, whole = [1.0] * len(deltas), float(len(deltas))
        weights = [square / whole for square in squares]
        if not floor:
            return elect(deltas, weights, normalize=True).add_(block.base)
        return _floored(deltas, weights).add_(block.base)


def _squares(deltas: list[Tensor]) -> list[float]:
    """The sum of each model's squares, in fp64."""
    return [float(delta.double().square().sum()) for delta in deltas]


def _variance(deltas: list[Tensor]) -> Tensor:
    """Over the models, for each place."""
    mean = torch.stack(deltas).mean(0) if len(deltas) < 2 else sum(deltas[1:], deltas[0]) / len(deltas)
    out = torch.zeros_like(mean)
    for delta in deltas:
        gap = delta - mean
        out.addcmul_(gap, gap)
    return out.div_(len(deltas))


def _floored(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of what agrees, with sums of weights of at least 1e-6."""
    positive = sum(deltas[1:], deltas[0]) >= 0
    out, divisor = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        out.add_(delta * agrees, alpha=weight)
        divisor.add_(agrees, alpha=weight)
    return out.div_(divisor.clamp_min_(1e-6))
