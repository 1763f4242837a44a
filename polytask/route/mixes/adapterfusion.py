"""AdapterFusion: attention over what the adapters contribute, learned on the target task while they stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError, MixError
from polytask.core.form import Call, Part, Patch, Weights
from polytask.core.gate import Gate, Hosts, Router, learning, routers
from polytask.core.site import Site
from polytask.route.layers import vectors

VALUES = ("dynamic", "static")


@routers.register("adapterfusion")
@dataclass(frozen=True)
class AdapterFusion(Router):
    """``out = y + sum_n a_n W_v z_n`` with ``a = softmax_n(q . k_n / T)``, ``q = W_q y + b_q``, ``k_n = W_k z_n + b_k``.

    z_n is what adapter n contributes; the sum over one site, and no ``1 / sqrt(d)``. Each site of the adapters has its own
    attention: the paper's are bottleneck adapters after the feed-forward (``{"name": "bottleneck", "style": "pfeiffer"}``).

    Args:
        values: ``dynamic`` has W_v, the identity at the start but for 1e-6 beside the diagonal; ``static`` has none.
        temperature: T, or where it starts.
        cooling: by how much T falls with each step of the optimiser, down to 1.
        dropout: of the scores while it learns (of the scores themselves, not of the attention).
        deviation: of the normal distribution that W_q and W_k start from; their biases are zero.
        pull: of the regulariser ``pull sum (W_v - I)^2`` over all sites.

    Reference: Pfeiffer et al., AdapterFusion, arXiv 2005.00247. Ours reads q from the layer's output, as its bottleneck
    adapters do, not from the norm after it. Its code lowers T with every forward, also of evaluation, and adds the
    regulariser's gradient to the next step; ours by the step, and to the loss.

    Raises:
        ConfigError: a setting is out of range.
        MixError: a site does not give vectors of a known width.
    """

    values: str = "dynamic"
    temperature: float = 1.0
    cooling: float = 0.0
    dropout: float = 0.1
    deviation: float = 0.02
    pull: float = 0.01

    reads: ClassVar[Any] = "contributions"
    trains: ClassVar[Any] = "gates"
    paper: ClassVar[str] = "arXiv 2005.00247"
    exceptions: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("one", "identical", "images"), "W_v changes what an adapter contributes; without it (static) the check holds"
    )

    def __post_init__(self) -> None:
        if self.values not in VALUES:
            raise ConfigError(f"{self.name}: values must be one of {', '.join(VALUES)}, got {self.values!r}")
        for name in ("cooling", "deviation", "pull"):
            self.at_least(name, 0.0)
        if not self.temperature > 0.0:
            raise ConfigError(f"{self.name}: temperature must be above 0, got {self.temperature!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"{self.name}: dropout must be in [0, 1), got {self.dropout!r}")

    def refuses(self, site: Site, patches: Mapping[str, Patch]) -> str:
        if not vectors(site):
            return f"the router {self.name!r} attends to vectors of a known width, which sites of kind {site.kind!r} do not give"
        return super().refuses(site, patches)

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return FusionGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part | None:
        return Cooling(self) if self.cooling else None

    def penalty(self, gates: Sequence[Gate], shared: Any) -> Tensor | None:
        own = [gate.Wv for gate in gates if isinstance(gate, FusionGate) and gate.Wv is not None]
        if not own or not self.pull:
            return None
        return self.pull * torch.stack([(W - torch.eye(len(W), device=W.device)).square().sum() for W in own]).sum()

    def stepped(self, gates: Sequence[Gate], shared: Any) -> None:
        if isinstance(shared, Cooling):
            with torch.no_grad():
                shared.T.copy_(torch.where(shared.T > 1.0, (shared.T - self.cooling).clamp(min=1.0), shared.T))


class Cooling(Part):
    """T [1]; it falls, and is not trained."""

    frozen = frozenset({"T"})

    def __init__(self, router: AdapterFusion) -> None:
        super().__init__(router)
        self.T = nn.Parameter(torch.full((1,), router.temperature), requires_grad=False)


class FusionGate(Gate):
    """W_q, W_k, W_v [d, d] and b_q, b_k [d]."""

    def __init__(self, router: AdapterFusion, site: Site, names: Sequence[str]) -> None:
        super().__init__(router, site, names)
        d = site.d_out
        self.Wq, self.Wk = nn.Parameter(torch.zeros(d, d)), nn.Parameter(torch.zeros(d, d))
        self.bq, self.bk = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.Wv = nn.Parameter(torch.eye(d)) if router.values == "dynamic" else None

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        for W in (self.Wq, self.Wk):
            W.normal_(std=self.router.deviation, generator=generator)
        for b in (self.bq, self.bk):
            b.zero_()
        if self.Wv is not None:
            self.Wv.fill_(1e-6).fill_diagonal_(1.0)

    def combine(self, here: Hosts, x: Tensor, y: Tensor, out: Tensor, call: Call) -> Tensor:
        parts = [here.patches[name].contribute(x, y, call).expand_as(y) for name in self.names]
        z = torch.stack(parts, -2).to(self.Wq.dtype)  # [..., N, d]
        a = self.attention(y, z)
        self.note(Weights(self.names, a), call)
        made = (a.unsqueeze(-2) @ z).squeeze(-2)  # W_v is linear, so the mixture is transformed once
        return out + (made if self.Wv is None else F.linear(made, self.Wv)).to(out.dtype)

    def attention(self, y: Tensor, z: Tensor) -> Tensor:
        """The weights [..., N] of the contributions z [..., N, d] where the base gives y [..., d]."""
        q = F.linear(y.to(self.Wq.dtype), self.Wq, self.bq)
        # q . (W_k z + b_k) without a product with W_k for each adapter
        scores = (z @ (q @ self.Wk).unsqueeze(-1)).squeeze(-1) + (q @ self.bk).unsqueeze(-1)
        scores = F.dropout(scores, self.router.dropout, training=learning(self))
        T = self.router.temperature if self.shared is None else self.shared.T
        weights: Tensor = (scores / T).softmax(-1)
        return weights

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        raise MixError(f"the router {self.router.name!r} weighs what the adapters contribute; ask `combine`")
