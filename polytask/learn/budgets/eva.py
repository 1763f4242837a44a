"""A budget that is spent at the start, by what the inputs of each layer explain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from polytask.forms.lora import LoRA

from ..budget import Budget, budgets, number


@budgets.register("eva")
@dataclass(frozen=True)
class Eva(Budget):
    """Ranks by the variance that the principal components of each layer's inputs explain, from which A also starts.

    The same as ``LoRA(init="eva:2")``, with the ranks in the adapter's card.

    Args:
        most: ranks that a site may have, over the average; 1 leaves them equal.

    Reference: Paischer et al., Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170; see
    `polytask.forms.starts.eva`.
    """

    most: float = 2.0

    paper: ClassVar[str] = "arXiv 2410.07170"

    def __post_init__(self) -> None:
        self.require(most=(number(self.most, 1), "a number of at least 1"))

    def form(self, form: LoRA) -> LoRA:
        return replace(self.takes(form), init=f"eva:{self.most}")
