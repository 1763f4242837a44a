"""MoLoRA: experts and a softmax router at each site, which learn together; each token gets all of them, or the best few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.form import Call
from polytask.core.gate import Gate, TokenGate, TokenRouter, routers
from polytask.core.site import Site


@routers.register("molora")
@dataclass(frozen=True)
class MoLoRA(TokenRouter):
    """Scores ``W x`` at each site, W [N, i] without a bias; the softmax weighs the experts' outputs.

    Args:
        top_k: how many experts act for a token, their weights summing to one; all where 0.
        temperature: the scores are divided by it.
        deviation: of the normal distribution that W starts from.

    Reference: Zadouri et al., Pushing Mixture of Experts to the Limit, arXiv 2309.05444, where all experts act. Its option of the
    best few leaves their weights below one; ours are the softmax over the chosen.
    """

    deviation: float = 0.02

    trains: ClassVar[Any] = "gates and adapters"
    paper: ClassVar[str] = "arXiv 2309.05444"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("deviation", 0.0)

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return LinearGate(self, site, names)


class LinearGate(TokenGate):
    """W [N, i]."""

    def __init__(self, router: Any, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        self.W = nn.Parameter(torch.zeros(len(names), site.d_in))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.W.normal_(std=self.router.deviation, generator=generator)

    def scores(self, x: Tensor, call: Call) -> Tensor:
        return F.linear(x.to(self.W.dtype), self.W)
