"""Means of the models weighed by statistics of their data, which stand beside them: by entry (Fisher), by input (RegMean).

Shapes: a weight W_i [o, d] of a linear layer and the Gram matrix G_i [d, d] of its inputs, in model i of N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError
from polytask.merge.rule import Block, Rule, rules, total

from .average import normalized


@rules.register("fisher")
@dataclass(frozen=True)
class Fisher(Rule):
    """The mean in which each entry counts as much as its model's answers depend on it: ``sum_i w_i F_i x_i / sum_i w_i F_i``.
    Where no model has statistics, that is the weighted mean.

    Args:
        floor: the least that an entry's statistic counts, so what no model depends on has the weighted mean too.

    Reference: Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832. There the floor may be of
    one model alone; here it is of all, and a model without statistics of a tensor has the floor there.

    Raises:
        ConfigError: the floor is negative.
        MergeError: a weight is negative, or they add up to nothing.
    """

    floor: float = 1e-6

    needs_base: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2111.09832"
    companion: ClassVar[Literal["", "rows", "whole"]] = "rows"

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise ConfigError(f"fisher: floor must be at least 0, got {self.floor!r}")

    def merge(self, block: Block) -> Tensor:
        mean, there = _mean(self.name, block)
        if len(there) == 1 or all(statistic is None for statistic in block.companions):
            return mean
        whole, parts = torch.zeros_like(mean), torch.zeros_like(mean)
        for i in there:
            statistic = block.companions[i]
            size = torch.full_like(mean, self.floor) if statistic is None else statistic.clamp(min=self.floor)
            size = size * block.weights[i]
            whole += size
            parts.addcmul_(size, block.tensors[i] - mean)  # of the differences: where all are equal nothing is rounded
        return mean + torch.where(whole > 0, parts / whole, 0.0)


@rules.register("regmean")
@dataclass(frozen=True)
class RegMean(Rule):
    """The weight of a linear layer that gives nearest to what every model's own gives, in the squares summed over its inputs:
    ``W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1``. Tensors that have no Gram matrix beside each model have the weighted mean.

    Solved in fp64 for the difference to the mean M, ``M + (sum_i w_i (W_i - M) G_i) (sum_i w_i G_i)^-1``, so in directions that
    no input has M stays.

    Args:
        reduce: what entries of G_i off its diagonal are multiplied by: 1 is the plain regression, 0 weighs each column alone.
        ridge: the share of the summed diagonal that is added to it, so that it can be solved.
        turned: whether the weight is stored [d, o], as GPT-2's ``Conv1D`` does; settings may differ between tensors.

    Reference: Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849. Its code inverts
    without a ridge, and off-diagonals are reduced only where that is asked for.

    Raises:
        ConfigError: a setting is out of range.
        MergeError: a weight is negative, they add up to nothing, a Gram matrix does not fit its tensor, or the sum of them has
            no inverse.
    """

    reduce: float = 0.95
    ridge: float = 1e-6
    turned: bool = False

    needs_base: ClassVar[bool] = False
    grain: ClassVar[Literal["element", "row", "tensor"]] = (
        "tensor"  # rows in blocks would factor the same sum each time
    )
    paper: ClassVar[str] = "arXiv 2212.09849"
    companion: ClassVar[Literal["", "rows", "whole"]] = "whole"

    def __post_init__(self) -> None:
        if not 0 <= self.reduce <= 1:
            raise ConfigError(f"regmean: reduce must be between 0 and 1, got {self.reduce!r}")
        if not self.ridge >= 0:
            raise ConfigError(f"regmean: ridge must be at least 0, got {self.ridge!r}")

    def merge(self, block: Block) -> Tensor:
        mean, there = _mean(self.name, block)
        grams = [block.companions[i] for i in there] if block.companions else []
        known = [gram for gram in grams if gram is not None]
        if len(there) == 1 or not known or len(known) < len(grams):
            return mean
        whole = torch.zeros_like(known[0], dtype=torch.float64)
        parts = torch.zeros_like(mean.mT if self.turned else mean, dtype=torch.float64)
        for i, gram in zip(there, known, strict=True):
            away = block.tensors[i].double() - mean.double()
            away = away.mT if self.turned else away  # [o, d]
            if away.dim() != 2 or gram.shape != (away.shape[1], away.shape[1]):
                raise MergeError(
                    f"regmean: beside {block.name}, of shape {tuple(block.shape)}, stands a Gram matrix of shape "
                    f"{tuple(gram.shape)}; it must be square, with a row for each input (turned={self.turned})"
                )
            weighed = block.weights[i] * self._reduced(gram.double())
            whole += weighed
            parts += away @ weighed
        step = self._solved(whole, parts, block.name)
        return (mean.double() + (step.mT if self.turned else step)).float()

    def _reduced(self, gram: Tensor) -> Tensor:
        return gram * self.reduce + torch.diag(gram.diagonal()) * (1.0 - self.reduce)

    def _solved(self, whole: Tensor, parts: Tensor, name: str) -> Tensor:
        """``parts whole^-1``, [o, d]; zero at inputs that are always zero."""
        size = whole.diagonal()
        whole = whole + torch.diag(self.ridge * size + (size == 0))
        step, failed = torch.linalg.solve_ex(whole, parts.mT)  # it is symmetric
        if failed:
            raise MergeError(
                f"regmean: the Gram matrices at {name} add up to one without an inverse; raise ridge, or lower reduce"
            )
        solved: Tensor = step.mT
        return solved


def _mean(rule: str, block: Block) -> tuple[Tensor, Sequence[int]]:
    """The weighted mean, and which models have a weight; where it is one, its tensor bit for bit."""
    if min(block.weights) < 0:
        raise MergeError(f"{rule}: weights must be at least 0, got {tuple(block.weights)} at {block.name}")
    there = [i for i, weight in enumerate(block.weights) if weight]
    return (block.tensors[there[0]] if len(there) == 1 else total(block.tensors, normalized(block))), there
