"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with kernels that all layers share.

Shapes: d width of the stream, w of the bottleneck, n kernels of n x n, k rank of what they are multiplied with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError, listing
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms
from polytask.core.site import Site

from .bottleneck import ACTIVATIONS


@forms.register("compacter")
@dataclass(frozen=True)
class Compacter(Form):
    """A bottleneck adapter after layers, ``c = f(h H_down + b_down) H_up + b_up``, of very few numbers.

    ``H = sum_i kron(S_i, u_i v_i)``, where the n kernels S are shared by both matrices of all layers.

    Args:
        style: ``"compacter"`` after attention and feed-forward, ``"compacter++"`` after the feed-forward only.
        n: how many kernels, and their size; the widths are multiples of it.
        rank: k.
        reduction: d / w, up to a multiple of n.
        activation: ``relu``, ``gelu``, ``silu``, ``tanh`` or ``sigmoid``.

    Reference: Karimi Mahabadi et al., Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647. There
    everything starts small, which is only nearly the base; here the last factor starts at zero and the kernels with
    deviation 1 / sqrt n. Norms are not trained beside it: join it with ``norm`` for that (see ``union``).

    Raises:
        ConfigError: a setting is out of range.
    """

    style: Literal["compacter", "compacter++"] = "compacter"
    n: int = 4
    rank: int = 1
    reduction: int = 32
    activation: str = "gelu"

    default_sites: ClassVar[str] = "attn_out | down"
    mergeable: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str] = "POLYTASK_COMPACTER"
    paper: ClassVar[str] = "arXiv 2106.04647"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("style", self.style, ("compacter", "compacter++")),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in allowed:
                raise ConfigError(f"Compacter: {name} must be one of {listing(allowed)}, got {value!r}")
        for name in ("n", "rank", "reduction"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Compacter: {name} must be at least 1, got {getattr(self, name)!r}")

    def inner(self, d: int) -> int:
        """w at a stream of width d."""
        return self.n * max(1, d // self.reduction // self.n)

    def patch(self, site: Site) -> Patch:
        return CompacterPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and self.style == "compacter++" and site.role == "attn_out":
            return f"'compacter++' stands after feed-forwards only, and {site.name!r} is of an attention"
        if not reason and site.d_out % self.n:
            return f"site {site.name!r} has {site.d_out} outputs, which is no multiple of n = {self.n}"
        return reason

    def shared(self, sites: Sequence[Site]) -> Part:
        return Kernels(self)


class Kernels(Part):
    """S [n, n, n]: n kernels."""

    def __init__(self, form: Compacter) -> None:
        super().__init__(form)
        self.S = nn.Parameter(torch.empty(form.n, form.n, form.n))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.S.normal_(std=self.form.n**-0.5, generator=generator)


def kronecker(x: Tensor, S: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """``x sum_i kron(S_i, u_i v_i)`` without the product: x [..., n a], S [i, p, q], u [i, a, k], v [i, k, b]."""
    n, a, k = u.shape
    t = x.reshape(*x.shape[:-1], n, a) @ u.transpose(0, 1).reshape(a, n * k)  # [..., p, i k]
    z = torch.einsum("...pik,ipq->...qik", t.reshape(*t.shape[:-1], n, k), S)
    return (z.flatten(-2) @ v.flatten(0, 1)).flatten(-2)  # [..., q b]


class CompacterPatch(Patch):
    """For both matrices u [n, from / n, k] and v [n, k, to / n], and a bias."""

    form: Compacter

    def __init__(self, form: Compacter, site: Site) -> None:
        super().__init__(form, site)
        n, k, d, w = form.n, form.rank, site.d_out, form.inner(site.d_out)
        self.down_u, self.down_v = nn.Parameter(torch.empty(n, d // n, k)), nn.Parameter(torch.empty(n, k, w // n))
        self.up_u, self.up_v = nn.Parameter(torch.empty(n, w // n, k)), nn.Parameter(torch.empty(n, k, d // n))
        self.down_bias, self.up_bias = nn.Parameter(torch.empty(w)), nn.Parameter(torch.empty(d))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, own in self.named_parameters():
                own.zero_()
                if name in ("down_u", "down_v", "up_u"):  # Glorot-uniform with gain sqrt 2
                    bound = (2 * 6 / (own.shape[1] + own.shape[2])) ** 0.5
                    own.uniform_(-bound, bound, generator=generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        S = self.shared.S.to(y.dtype)
        own = {name: p.to(y.dtype) for name, p in self.named_parameters()}
        h = kronecker(y, S, own["down_u"], own["down_v"]) + own["down_bias"]
        return kronecker(ACTIVATIONS[self.form.activation](h), S, own["up_u"], own["up_v"]) + own["up_bias"]
