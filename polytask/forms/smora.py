"""SMoRA: a LoRA in which every rank is an expert and a router picks some of them for each token.

Shapes: T tokens, i = d_in, o = d_out, r rank, G gates (r, or r / block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@forms.register("smora")
@dataclass(frozen=True)
class SMoRA(Form):
    """Each token uses k of r ranks: ``c(x) = (alpha / k) B (g(x) * (A x))``, where g is zero but for the k best.

    The gates are ``sigmoid(R x) + beta``, and those that are chosen are scaled to sum k, so that k = r with equal gates
    is LoRA. Each forward that trains moves ``beta`` by ``balance`` towards ranks that were chosen less often than the
    others; there is no extra loss. Starts at zero, by B.

    Args:
        rank: r, the number of experts.
        k: how many ranks a token uses, at least two gates: a single one would always be scaled to one, and the router
            would learn nothing.
        alpha: the scale's numerator.
        block: neighbouring ranks that share one gate; more than one gives a mixture of LoRAs of that rank.
        balance: the step of beta at each optimiser step; 0 leaves it at zero.
        dropout: probability of zeroing each input feature, while the model is in training mode.

    Reference: Zhao et al., Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning,
    arXiv 2501.15103. As in the authors' code beta enters both the choice and the gate; ours moves it once per step.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 64
    k: int = 8
    alpha: float = 16.0
    block: int = 1
    balance: float = 1e-5
    dropout: float = 0.0

    mergeable: ClassVar[bool] = False
    routes: ClassVar[bool] = True
    peft_type: ClassVar[str] = "POLYTASK_SMORA"
    paper: ClassVar[str] = "arXiv 2501.15103"

    def __post_init__(self) -> None:
        if not (isinstance(self.block, int) and self.block >= 1 and self.rank % self.block == self.k % self.block == 0):
            raise ConfigError(
                f"SMoRA: block must divide rank and k, got block={self.block!r}, rank={self.rank!r}, k={self.k!r}"
            )
        if not 2 * self.block <= self.k <= self.rank:
            raise ConfigError(
                f"SMoRA: k must be from two gates ({2 * self.block}) to the rank ({self.rank}), got {self.k!r}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"SMoRA: dropout must be in [0, 1), got {self.dropout!r}")

    def patch(self, site: Site) -> Patch:
        return SMoRAPatch(self, site)


class SMoRAPatch(Patch):
    """A [r, i], B [o, r], the router R [G, i] and beta [G], which is never trained by a gradient."""

    keys = {"A": "smora_A", "B": "smora_B", "R": "smora_router", "beta": "smora_beta"}
    frozen = frozenset({"beta"})
    form: SMoRA

    def __init__(self, form: SMoRA, site: Site) -> None:
        super().__init__(form, site)
        gates = form.rank // form.block
        self.A = nn.Parameter(torch.empty(form.rank, site.d_in))
        self.B = nn.Parameter(torch.empty(site.d_out, form.rank))
        self.R = nn.Parameter(torch.empty(gates, site.d_in))
        self.beta = nn.Parameter(torch.empty(gates), requires_grad=False)
        self.__dict__["_step"] = None  # the optimiser step in which beta moved last

    def start(self, generator: torch.Generator) -> None:
        bound = self.site.d_in**-0.5
        with torch.no_grad():
            self.A.uniform_(-bound, bound, generator=generator)
            self.R.uniform_(-bound, bound, generator=generator)
            self.B.zero_()
            self.beta.zero_()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        form = self.form
        if form.dropout and self.dropping:
            x = F.dropout(x, form.dropout, training=True)
        h = F.linear(x, self.A.to(x.dtype))  # [..., r]
        g = self.gates(x, call).to(h.dtype)
        if form.block > 1:
            g = g.repeat_interleave(form.block, -1)
        return F.linear(h * g, (self.B * (form.alpha / form.k)).to(h.dtype))

    def gates(self, x: Tensor, call: Call = NO_CALL) -> Tensor:
        """g [..., G]: k / block of them are not zero, and those sum to k / block."""
        count = self.form.k // self.form.block
        raw = torch.sigmoid(F.linear(x, self.R.to(x.dtype)).float()) + self.beta
        top, index = raw.topk(count, -1) if count < raw.shape[-1] else (raw, None)
        # beta may push gates below zero: then the sum is no measure
        top = top * (count / top.sum(-1, keepdim=True).clamp_min(1e-6))
        if self.form.balance and self.dropping and torch.is_grad_enabled() and index is not None:
            self._balance(index, call)
        return top if index is None else torch.zeros_like(raw).scatter(-1, index, top)

    @torch.no_grad()
    def _balance(self, index: Tensor, call: Call) -> None:
        """Once per optimiser step: a forward that is computed again for its backward must not count twice."""
        if call.step is not None and call.step == self._step:
            return
        self.__dict__["_step"] = call.step
        counts = torch.bincount(index.reshape(-1), minlength=len(self.beta)).float()
        self.beta.add_(self.form.balance * torch.sign(counts.mean() - counts))
