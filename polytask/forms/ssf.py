"""SSF: every layer's output is scaled and shifted, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from .full import _Plain
from .norm import along


@forms.register("ssf")
@dataclass(frozen=True)
class SSF(Form):
    """Scales and shifts the features that layers and norms return: ``c = (g - 1) * y + h``.

    Starts with g = 1 and h = 0. A module without a bias gets no shift, so that the change can always be merged.

    Reference: Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning,
    arXiv 2210.08823. There g and h start close to 1 and 0, so that a new one is not quite the base.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm")
    default_sites: ClassVar[str] = "linear | kind:norm"
    peft_type: ClassVar[str] = "POLYTASK_SSF"
    paper: ClassVar[str] = "arXiv 2210.08823"

    def patch(self, site: Site) -> Patch:
        return SSFPatch(self, site)


class SSFPatch(Patch):
    """g and h [o]."""

    def __init__(self, form: SSF, site: Site) -> None:
        super().__init__(form, site)
        self.width = site.d_out if site.kind == "linear" else site.shape[0]
        self.g = nn.Parameter(torch.ones(self.width))
        if site.bias:
            self.h = nn.Parameter(torch.zeros(self.width))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, own in self.named_parameters():
                own.fill_(1.0 if name == "g" else 0.0)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        factor = along((self.g - 1.0).to(y.dtype), y, self)
        h = self._parameters.get("h")
        return y * factor if h is None else torch.addcmul(along(h.to(y.dtype), y, self), y, factor)

    def deltas(self) -> dict[str, Tensor]:
        if self.base is None:
            raise AdapterError(f"the SSF at {self.site.name!r} must be attached to a model before it is used")
        name = self.site.param or "weight"
        weight, bias = (self.base._parameters.get(n) for n in (name, "bias"))
        if weight is None:
            raise AdapterError(f"{name} of {self.site.path!r} is computed or missing, so SSF cannot change it")
        factor = self.g - 1.0
        if self.site.kind == "norm":
            changes = {name: factor * (weight.detach() + self._offset())}
        elif self.site.transposed:
            changes = {name: factor * weight.detach()}
        else:
            changes = {name: factor.view(-1, *[1] * (weight.dim() - 1)) * weight.detach()}
        h = self._parameters.get("h")
        if h is not None and bias is not None:
            changes["bias"] = factor * bias.detach() + h
        return changes

    def delta(self) -> Tensor:
        return self.deltas()[self.site.param or "weight"]

    @torch.no_grad()
    def _offset(self) -> float:
        """What a norm adds to its weight before it multiplies: 1 in Gemma's, whose weight is stored without it."""
        base: Any = self.base
        if isinstance(base, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
            return 0.0
        plain = _Plain(base)
        stored = {n: p for n, p in base._parameters.items() if p is not None}
        weight = stored["weight"]
        x = torch.linspace(1.0, 2.0, self.width, dtype=weight.dtype, device=weight.device)[None]
        outs = []
        for value in (0.0, 1.0):
            own = {f"inner.{n}": torch.full_like(p, value if n == "weight" else 0.0) for n, p in stored.items()}
            outs.append(torch.func.functional_call(plain, own, (x,)))
        return float((outs[0] / (outs[1] - outs[0])).float().mean().round())
