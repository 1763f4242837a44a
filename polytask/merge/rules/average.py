"""Weighted sums: of the models, and of their differences to a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from polytask.core.errors import MergeError
from polytask.merge.rule import Block, Rule, rules, total


@rules.register("linear")
@dataclass(frozen=True)
class Linear(Rule):
    """The weighted mean of the models: ``sum_i w_i x_i / sum_i w_i``. With equal weights, the average of checkpoints.

    Args:
        normalize: divide by the sum of the weights.

    Reference: Wortsman et al., Model soups, arXiv 2203.05482. Sums are in fp32 and rounded once.

    Raises:
        MergeError: the weights add up to nothing.
    """

    normalize: bool = True

    needs_base: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv 2203.05482"

    def merge(self, block: Block) -> Tensor:
        there = [i for i, w in enumerate(block.weights) if w]
        if len(there) == 1 and self.normalize:
            return block.tensors[there[0]]  # bit for bit
        return total(block.tensors, self.factors(block))

    def factors(self, block: Block) -> Sequence[float]:
        return normalized(block) if self.normalize else block.weights


@rules.register("average")
@dataclass(frozen=True)
class Average(Rule):
    """The plain mean ``sum_i x_i / N`` of snapshots of one run or of several, and for adapters the mean of their heads too. What
    is no floating-point number is taken from the first.

    Runs of equal length may be averaged in turn: the mean of their means is the mean over all snapshots.

    Reference: Schmidt et al., Free lunch: robust cross-lingual transfer via model checkpoint averaging, arXiv 2305.16834. Heads
    that started from different values are refused, as the paper's code aligns them before. The mean of adapters is that of
    what they change, and not of their factors; sums are in fp32.

    Raises:
        MergeError: adapters have different tasks, or heads that did not start from the same values.
    """

    needs_base: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    heads: ClassVar[Literal["same", "mean"]] = "mean"
    paper: ClassVar[str] = "arXiv 2305.16834"

    def merge(self, block: Block) -> Tensor:
        first = block.tensors[0]
        return first if len(block.tensors) == 1 else total(block.tensors, self.factors(block))

    def factors(self, block: Block) -> Sequence[float]:
        return [1.0 / len(block.weights)] * len(block.weights)


@rules.register("task_arithmetic")
@dataclass(frozen=True)
class TaskArithmetic(Rule):
    """The base plus the weighted sum of the differences: ``b + lambda sum_i w_i (x_i - b)``. A weight may be negative.

    Args:
        scale: lambda (``lambda`` in a mergekit file).
        normalize: divide by the sum of the weights.

    Reference: Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089.

    Raises:
        MergeError: the weights are to be normalised and add up to nothing.
    """

    scale: float = 1.0
    normalize: bool = False

    paper: ClassVar[str] = "arXiv 2212.04089"

    def merge(self, block: Block) -> Tensor:
        factors = self.factors(block)
        there = [i for i, w in enumerate(factors) if w]
        if len(there) == 1 and factors[there[0]] == 1.0:
            return block.tensors[there[0]]  # b + (x - b) is not x in floating point
        # b + sum w (x - b) = (1 - sum w) b + sum w x: no differences are formed
        return total([block.zero, *block.tensors], [1.0 - sum(factors), *factors])

    def factors(self, block: Block) -> list[float]:
        weights = normalized(block) if self.normalize else block.weights
        return [self.scale * w for w in weights]


def normalized(block: Block) -> list[float]:
    """The weights over their sum. Raises `MergeError` where that is zero."""
    whole = sum(block.weights)
    if abs(whole) < 1e-12:
        raise MergeError(
            f"the weights {tuple(block.weights)} at {block.name} add up to nothing, so they cannot be normalised; say "
            "normalize=False, or change them"
        )
    return [w / whole for w in block.weights]
