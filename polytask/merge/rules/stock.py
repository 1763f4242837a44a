"""Model Stock: how far to go from the base to the mean, from the angle between the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, rules

from ._span import Axis, Spanned, cosines


@rules.register("model_stock")
@dataclass(frozen=True)
class ModelStock(Spanned):
    """Between the base and the mean of N models: ``t mean_i x_i + (1 - t) b`` with ``t = N c / (1 + (N - 1) c)``.
    c is the cosine of the angle between two models' differences to the base.

    Args:
        mean: of the N(N-1)/2 pairs' ``cosines``, or of their ``angles``, whose cosine is taken afterwards.
        filter_wise: each line along the last dimension has a t of its own.
        clip: keep t between 0 and 1; models that point away from each other give a negative one.

    Reference: Jang et al., Model Stock, arXiv 2403.19522 (N = 2), mergekit's ``model_stock`` for more, with ``cosines``. A model
    that equals the base has the cosine 0. Where the directions cancel, and the formula divides by zero, the base is taken.

    Raises:
        ConfigError: an unknown mean.
    """

    mean: Literal["cosines", "angles"] = "cosines"
    filter_wise: bool = False
    clip: bool = False

    weighted: ClassVar[bool] = False
    least: ClassVar[int] = 2
    paper: ClassVar[str] = "arXiv 2403.19522"

    def __post_init__(self) -> None:
        if self.mean not in ("cosines", "angles"):
            raise ConfigError(f"model_stock: mean must be one of cosines, angles, got {self.mean!r}")

    def along(self) -> Axis:
        return "last" if self.filter_wise else "whole"

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        count = gram.shape[-1]
        first, second = torch.triu_indices(count, count, 1).unbind(0)
        pairs = cosines(gram)[..., first, second]
        cos = pairs.arccos().mean(-1).cos() if self.mean == "angles" else pairs.mean(-1)
        below = 1.0 + (count - 1) * cos
        cancels = below.abs() < 1e-9
        t = torch.where(
            cancels, torch.zeros_like(cos), count * cos / torch.where(cancels, torch.ones_like(below), below)
        )
        if self.clip:
            t = t.clamp(0.0, 1.0)
        return (t / count).unsqueeze(-1).repeat_interleave(count, -1)
