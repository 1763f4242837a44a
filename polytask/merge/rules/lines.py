"""LiNeS: what was learned counts more in later layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, rules

from ._nested import Nested


@rules.register("lines")
@dataclass(frozen=True)
class Lines(Nested):
    """Scales the change that another rule makes with the depth: ``b + (alpha + beta l / (L - 1)) (merged - b)`` in layer l of L.
    Tensors outside the layers (embeddings, the last norm, heads) have the factor alpha.

    Args:
        inner: the rule, by name or with settings: ``{"name": "ties", "density": 0.2}``.
        alpha: of the first layer; when None, what keeps the sum of the changes' sizes: ``|sum_i tau_i|_1 / (N |tau_merged|_1)``
            over all tensors, which is 1 / N for the sum of the changes, and 1 for a single model.
        beta: how much more the last layer has; 1 - alpha when None, so that the last one has the factor 1.

    Reference: Wang et al., LiNeS, arXiv 2410.17146. A tensor's layer is that of its stack, not the first number in its name.

    Raises:
        ConfigError: a setting is out of range.
    """

    inner: Any = "task_arithmetic"
    alpha: float | None = None
    beta: float | None = None

    paper: ClassVar[str] = "arXiv 2410.17146"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "beta"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"lines: {key} must be a number or None, got {value!r}")

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        grain, surveys = self.rule.plan()
        return grain, surveys + (self.alpha is None)

    def survey(self, number: int, block: Block) -> Any:
        if number < self.rule.plan()[1]:
            return self.rule.survey(number, block)
        deltas = block.deltas
        together = sum(deltas[1:], deltas[0])
        change = self.rule.merge(block) - block.zero
        return float(together.double().abs().sum()), float(change.double().abs().sum())

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        if number < self.rule.plan()[1]:
            return self.rule.settle(number, found, facts)
        sizes = [size for _, size in found]
        whole, merged = (sum(size[i] for size in sizes) for i in (0, 1))
        return facts, (whole / merged if merged else None)

    def merge(self, block: Block) -> Tensor:
        factor, inside = self._factor(block)
        merged = self.rule.merge(inside)
        if factor == 1.0:
            return merged
        return (merged - block.zero).mul_(factor).add_(block.zero)

    def factors(self, block: Block) -> list[float] | None:
        factor, inside = self._factor(block)
        found = self.rule.factors(inside)
        return None if found is None else [factor * f for f in found]

    def _factor(self, block: Block) -> tuple[float, Block]:
        """The factor of a tensor's change, and the block as the inner rule sees it."""
        alpha = self.alpha
        if alpha is None:
            facts, ratio = block.facts
            block = replace(block, facts=facts)
            alpha = 1.0 if ratio is None else ratio / len(block.models)
        if block.layer is None:
            return alpha, block
        layer, layers = block.layer
        beta = 1.0 - alpha if self.beta is None else self.beta
        return alpha + beta * (layer / (layers - 1) if layers > 1 else 1.0), block
