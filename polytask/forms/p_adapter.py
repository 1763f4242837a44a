"""p-adapter: an attention map read as a graph, re-weighted by how much its nodes differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

CROSS = re.compile(r"(cross|encoder_attn|EncDec|crossattention)", re.IGNORECASE)


@forms.register("p-adapter")
@dataclass(frozen=True)
class PAdapter(Form):
    """p-Laplacian message passing over the attention map: ``c = W_o (GELU(W_g y) * F')``, F' from values F along the map.

    ``F'_i = a_i (sum_j M_ij F_j + (2 mu / p) F_i)`` with ``M_ij = P_ij (sqrt(P_ij) |F_i - F_j|)^(p - 2)`` and
    ``a_i = 1 / (sum_j M_ij + 2 mu / p)``, for each head; P are the base's attention probabilities. At p = 2 and mu = 0 it
    is P F. Both p and mu are learned.

    Args:
        reduction: F has ``head size / reduction`` features, at least one.
        p: where p starts.
        mu: mu0 of ``mu = mu0 (2 + tanh t)``, with t learned from 0.
        floor: the least difference that counts, so that a node does not drown the others when p < 2.

    Reference: Wu et al., p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models, arXiv 2312.10613. Here
    it acts inside the attention, before the output projection, on self-attention only, and W_o starts at zero, so that a
    new one is the base. The floor is ours; without it a node's own entry is 1e6 times the others at p = 1.25.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: cross-attention, or one that transformers' table of attention functions does not serve.
    """

    reduction: int = 8
    p: float = 1.25
    mu: float = 0.1
    floor: float = 1e-2

    kinds: ClassVar[tuple[str, ...]] = ("attention",)
    default_sites: ClassVar[str] = "kind:attention"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_P_ADAPTER"
    paper: ClassVar[str] = "arXiv 2312.10613"

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ConfigError(f"PAdapter: reduction must be at least 1, got {self.reduction}")
        if not (self.p >= 1 and self.mu >= 0 and self.floor > 0):
            raise ConfigError(
                f"PAdapter: p must be at least 1, mu not negative and floor positive, got {self.p}, {self.mu}, {self.floor}"
            )

    def patch(self, site: Site) -> Patch:
        return PAdapterPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason:
            return reason
        if not site.shape:
            return f"the attention {site.name!r} does not use transformers' attention functions, whose map it reads"
        return (
            f"{site.name!r} is cross-attention; its queries are no nodes of the graph"
            if CROSS.search(site.path)
            else ""
        )


class PAdapterPatch(Patch):
    """W_i [f, D] for all heads, W_g [H f, H D], W_o [H D, H f], p and t."""

    form: PAdapter

    def __init__(self, form: PAdapter, site: Site) -> None:
        super().__init__(form, site)
        H, _, D = site.shape
        f = max(1, D // form.reduction)
        self.W_i = nn.Parameter(torch.empty(f, D))
        self.W_g = nn.Parameter(torch.empty(H * f, H * D))
        self.W_o = nn.Parameter(torch.empty(H * D, H * f))
        self.p = nn.Parameter(torch.empty(()))
        self.t = nn.Parameter(torch.empty(()))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for weight in (self.W_i, self.W_g):
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
            self.W_o.zero_()
            self.p.fill_(self.form.p)
            self.t.zero_()

    def messages(self, P: Tensor, nodes: Tensor) -> Tensor:
        """F' [B, H, T, f] from the map P [B, H, T, S] and the nodes [B, H, S, f], whose last T are the queries."""
        queries = nodes[:, :, nodes.shape[2] - P.shape[2] :]
        squares = queries.square().sum(-1)[..., None] + nodes.square().sum(-1)[..., None, :]
        apart = (squares - 2 * queries @ nodes.transpose(-1, -2)).clamp(min=0)  # |F_i - F_j|^2
        size = (P * apart).clamp(min=self.form.floor**2)
        M = P * size ** ((self.p - 2) / 2)
        rest = 2 * self.form.mu * (2 + torch.tanh(self.t)) / self.p
        return (M @ nodes + rest * queries) / (M.sum(-1, keepdim=True) + rest + 1e-12)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        heads = call.heads
        if heads is None:
            raise AdapterError(f"the p-adapter at {self.site.name!r} must be used inside an attention of the model")
        P = torch.nan_to_num(heads.seen().softmax(-1))  # [B, H, T, S] in fp32; 0 for tokens that look at nothing
        nodes = F.linear(heads.value.float(), self.W_i).repeat_interleave(P.shape[1] // heads.value.shape[1], 1)
        mixed = self.messages(P, nodes).transpose(1, 2).flatten(2)  # [B, T, H f]
        gate = F.gelu(F.linear(y.float(), self.W_g))
        return F.linear(gate * mixed, self.W_o).to(y.dtype)

    def misfit(self, site: Site) -> str:
        return "" if self.site.shape == site.shape else f"its heads are {self.site.shape}, and the model's {site.shape}"
