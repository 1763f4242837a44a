"""One model's tensors as they are: for stacks that are put together from layers of several models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from polytask.merge.rule import Block, Rule, rules


@rules.register("passthrough")
@dataclass(frozen=True)
class Passthrough(Rule):
    """The one model's tensors, multiplied: ``scale * x``. With a scale of 1 they are kept bit for bit.

    Args:
        scale: the factor; with a list of filters, of some tensors only.

    Reference: mergekit's ``passthrough``.
    """

    scale: float = 1.0

    needs_base: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    most: ClassVar[int | None] = 1
    paper: ClassVar[str] = "mergekit"

    def merge(self, block: Block) -> Tensor:
        return block.tensors[0] if self.scale == 1 else block.tensors[0] * self.scale
