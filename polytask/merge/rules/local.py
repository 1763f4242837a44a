"""Rules of whole differences, entry by entry: the largest (MagMax, EMR) and those that several tasks use (consensus)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, Rule, rules, total


@rules.register("magmax")
@dataclass(frozen=True)
class MagMax(Rule):
    """At each place the difference of largest size: ``b + scale * t_j``, ``j = argmax_i |t_i|``; of equal sizes the last one's.

    Args:
        scale: what it is multiplied by.

    Reference: Marczak et al., MagMax, arXiv 2407.06322, whose scripts take a scale of 0.5 for eight tasks.
    """

    scale: float = 1.0

    weighted: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2407.06322"

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        deltas = block.deltas
        out = deltas[0]
        for delta in deltas[1:]:
            out = torch.where(delta.abs() >= out.abs(), delta, out + delta * 0)  # what is no number stays to be noticed
        return out.mul_(self.scale).add_(block.base)


def tall_mask(delta: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """Where a task's difference stands out of the merged one: ``|t_i| > threshold * |t - t_i|``."""
    return delta.abs() > (merged - delta).abs_().mul_(threshold)


@rules.register("consensus")
@dataclass(frozen=True)
class Consensus(Rule):
    """Keeps of the summed difference the places that several tasks use: ``b + scale * t * [sum_i m_i >= agree]``,
    ``t = sum_i w_i t_i``, ``m_i = |w_i t_i| > threshold * |t - w_i t_i|``.

    Args:
        agree: in how many tasks' masks a place must be; 0 keeps all, 1 drops those of none, 2 also those of one task alone.
        threshold: how much a task must stand out, also for each model its own; higher is stricter. 0.2 to 0.6 are usual.
        scale: what the difference is multiplied by.

    Reference: Wang et al., Localizing task information (TALL masks), arXiv 2405.07813. The masks themselves, which bring each
    task's own model back, are written by `polytask.merge.unified.split`.

    Raises:
        ConfigError: a negative count or threshold.
    """

    agree: int = 2
    threshold: float = 0.6
    scale: float = 1.0

    each: ClassVar[tuple[str, ...]] = ("threshold",)
    paper: ClassVar[str] = "arXiv 2405.07813"
    exceptions: ClassVar[dict[str, str]] = {"alone": "no second task agrees with one alone"}

    def __post_init__(self) -> None:
        for name, value in (("agree", self.agree), ("threshold", self.threshold)):
            if value < 0:
                raise ConfigError(f"{name} of {self.name} must not be negative, got {value!r}")

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        deltas = [delta.mul_(weight) for delta, weight in zip(block.deltas, block.weights, strict=True)]
        merged = total(deltas, [1.0] * len(deltas))
        votes = torch.zeros_like(merged)
        for delta, threshold in zip(deltas, block.settings["threshold"], strict=True):
            votes += tall_mask(delta, merged, threshold)
        return merged.mul_(votes >= self.agree).mul_(self.scale).add_(block.base)


def emr_unified(deltas: Sequence[Tensor]) -> Tensor:
    """At each place the sign of the sum, and the largest size among the differences that have it."""
    positive = sum(deltas[1:], deltas[0]) > 0
    sign = positive.float().mul_(2).sub_(1)
    out = torch.zeros_like(sign)
    for delta in deltas:
        out = torch.maximum(out, delta * sign)
    return out.mul_(sign)


@rules.register("emr")
@dataclass(frozen=True)
class Emr(Rule):
    """Elects the sign of the sum at each place and takes the largest size that has it: ``b + scale * s * max_i (s t_i)^+``,
    ``s = sign(sum_i t_i)``. The differences that every task's mask and rescaler are applied to.

    Args:
        scale: what the difference is multiplied by.

    Reference: Huang et al., EMR-merging, arXiv 2405.17461. Masks and rescalers, which bring each task's own model back, are
    written by `polytask.merge.unified.split`.
    """

    scale: float = 1.0

    weighted: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2405.17461"

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        return emr_unified(block.deltas).mul_(self.scale).add_(block.base)
