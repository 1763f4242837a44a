"""Another rule, on differences that masks hold back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, rules

from ._nested import Nested


@rules.register("masked")
@dataclass(frozen=True)
class Masked(Nested):
    """Merges differences that are multiplied by masks, entry by entry: the inner rule sees ``b + m_i (x_i - b)``. A mask is read
    beside each model; a tensor without one is as it is, and where a mask is 1 the entry is that of the model bit for bit.

    Args:
        inner: the rule, by name or with settings: ``{"name": "ties", "density": 0.2}``.

    Reference: Tang et al., Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion,
    arXiv 2312.06173, whose masks `polytask.merge.fits.concrete` finds; any other masks do as well.

    Raises:
        ConfigError: the inner rule reads something beside the models itself.
    """

    inner: Any = "task_arithmetic"

    companion: ClassVar[Literal["", "rows", "whole"]] = "rows"
    paper: ClassVar[str] = "arXiv 2312.06173"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule.companion:
            raise ConfigError(
                f"masked: inner must be a rule that reads models alone, and {self.rule.name} reads something beside them"
            )

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return self.rule.plan()

    def survey(self, number: int, block: Block) -> Any:
        return self.rule.survey(number, hold_back(block))

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        return self.rule.settle(number, found, facts)

    def merge(self, block: Block) -> Tensor:
        return self.rule.merge(hold_back(block))


def hold_back(block: Block) -> Block:
    """The block with each model's difference multiplied by its mask."""
    base = block.zero
    tensors = tuple(
        # b + (x - b) is not x in floating point
        tensor if mask is None else torch.where(mask == 1, tensor, base + mask * (tensor - base))
        for tensor, mask in zip(block.tensors, block.companions or [None] * len(block.tensors), strict=True)
    )
    return replace(block, tensors=tensors)
