"""DoRA: LoRA with a trained magnitude for each output.

Shapes: T tokens, i = d_in (at a convolution: channels times kernel), o = d_out, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Bank, Call, Patch, forms
from polytask.core.site import Site

from .lora import PLAIN_STARTS, LoRA, LoRAPatch


@forms.register("dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """A weight's direction changes as in LoRA, and its length per output is trained: ``W' = (m / n) (W + s B A)``.

    ``n`` holds the norms of the rows of ``W + s B A`` and takes no gradient, so ``c(x, y) = (m/n - 1) (y - b) + (m/n) s
    B A x``; the bias ``b`` is never scaled. It acts on linear layers (also stored transposed) and convolutions, and
    ``m`` starts as ``n``, so that it starts as the base.

    Args:
        rank, alpha, dropout, scaling: as for `LoRA`.
        init: ``"zero-B"``, ``"gaussian"`` or ``"random"``, as for `LoRA`.

    Reference: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353. Ours drops inputs of the
    low-rank branch only, so ``y`` is used again, where the authors' code computes the base a second time on the dropped
    input; a row of zeros in W, where they divide by zero, keeps ``m / n = 1`` while B is zero there; and n comes from
    thin products, without the dense sum.

    Raises:
        ConfigError: a setting is out of range.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    paper: ClassVar[str] = "arXiv 2402.09353"
    tensor_names: ClassVar[dict[str, str]] = {**LoRA.tensor_names, "lora_magnitude_vector": "m"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in PLAIN_STARTS:
            raise ConfigError(f"DoRA: init must be one of {', '.join(PLAIN_STARTS)}, got {self.init!r}")

    def patch(self, site: Site) -> Patch:
        return DoRAPatch(self, site)

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {**super().to_peft(patches), "use_dora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> LoRA:
        return super().from_peft({**config, "use_dora": False}, path)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        if config.get("_embedding"):
            raise AdapterError(
                f"this PEFT adapter has DoRA at the embedding {path!r}, and the form 'dora' acts at linear layers and "
                "convolutions; merge it with PEFT's merge_and_unload, or train it again without that target"
            )
        return super().infer_site(path, tensors, config)


class DoRAPatch(LoRAPatch):
    """A and B as in LoRA, and m [o] ([1, o, 1, ...] at a convolution)."""

    bank = Bank

    def __init__(self, form: DoRA, site: Site) -> None:
        super().__init__(form, site)
        shape = (1, site.shape[0], *[1] * (len(site.shape) - 2)) if site.kind == "conv" else (site.d_out,)
        self.m = nn.Parameter(torch.empty(shape))
        self.keys = {**self.keys, "m": "lora_magnitude_vector"}
        self.__dict__["_squares"] = None  # ||W||^2 of each row, and what it was computed from

    def start(self, generator: torch.Generator) -> None:
        super().start(generator)
        with torch.no_grad():
            self.m.copy_(self._norm().view_as(self.m))

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        ratio = self._ratio()  # in m's own type: near 1 a narrow one would lose what m has learned
        more, ratio = (ratio - 1).to(y.dtype), ratio.to(y.dtype)
        bias = None if self.base is None else self.base._parameters.get("bias")
        plain = y if bias is None else y - self._along(bias).to(y.dtype)
        return self._along(more) * plain + self._along(ratio) * super().contribute(x, y, call)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        fused = (
            out is y and weight == 1.0 and self.site.kind == "linear" and not torch.is_autocast_enabled(y.device.type)
        )
        if not (fused and x.dtype == y.dtype == self.m.dtype == self.A.dtype):
            return out + (self.contribute(x, y, call) * weight).to(out.dtype)
        # alone: y + c = g (y - b + s h B^T) + b, where g = m / n
        h = nn.functional.linear(self._drop(x), self.A)  # [..., r]
        bias = None if self.base is None else self.base._parameters.get("bias")
        flat, h = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        return _Scaled.apply(flat, h, self.B, self.form.scale, self.m, self._norm(), bias).view(y.shape)

    def delta(self) -> Tensor:
        weight = self._weight().detach().to(self.m.dtype)
        ratio = self._ratio()
        ratio = ratio if self.site.transposed else ratio.view(-1, *[1] * (weight.dim() - 1))
        return ratio * super().delta() + (ratio - 1) * weight

    def _ratio(self) -> Tensor:
        """m / n as [o]; 1 where n is zero."""
        return _over(self.m.view(-1), self._norm())

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """n [o]: ||W + sBA||^2 = ||W||^2 + 2 <W, sBA> + ||sBA||^2 in each row, where W A^T and A A^T are thin."""
        weight, s = self._weight(), self.form.scale
        A, B = self.A.flatten(1).float(), self.B.flatten(1).float()  # [r, i], [o, r]
        A = A.clone()  # where a file put it in memory must not be seen in the last bit of A A^T
        flat = weight.t() if self.site.transposed else weight.flatten(1)  # [o, i]
        cross = (A.to(flat.dtype) @ flat.t()).t().float()  # [o, r]
        squares = self._squared(weight) + (B * (2 * s * cross + s * s * (B @ (A @ A.t())))).sum(1)
        return squares.clamp_min_(0).sqrt_()

    def _squared(self, weight: Tensor) -> Tensor:
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device)
        if self._squares is None or self._squares[0] != key:
            wide = weight.detach().float()
            dims = 0 if self.site.transposed else tuple(range(1, weight.dim()))
            self.__dict__["_squares"] = (key, wide.square().sum(dims))
        return self._squares[1]

    def _weight(self) -> Tensor:
        """The base's own weight, without what is attached to it."""
        name = self.site.param or "weight"
        weight = None if self.base is None else self.base._parameters.get(name, getattr(self.base, name, None))
        if weight is None:
            raise AdapterError(f"the DoRA at {self.site.name!r} must be attached to a model before it is used")
        if not weight.is_floating_point():
            raise AdapterError(
                f"the DoRA at {self.site.name!r} needs the norms of the weight, which is quantised ({weight.dtype}) "
                "there; load the base unquantised, or use the form 'lora'"
            )
        return weight

    def _along(self, vector: Tensor) -> Tensor:
        """A value per output, shaped to multiply the output."""
        return vector.view(-1, *[1] * (len(self.site.shape) - 2)) if self.site.kind == "conv" else vector


def _over(m: Tensor, n: Tensor) -> Tensor:
    """m / n; 1 where n is zero."""
    return torch.where(n > 0, m / n.clamp_min(torch.finfo(n.dtype).tiny), 1.0)


class _Scaled(torch.autograd.Function):
    """``g (y - b + s h B^T) + b``, g = m / n, with as few passes over y [T, o] as there can be; h is [T, r], B [o, r], m, n and
    b [o]. n takes no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, s: float, m: Tensor, n: Tensor, b: Tensor | None) -> Tensor:
        g = _over(m, n)
        own = B * (g * s)[:, None]
        ctx.s = s
        ctx.save_for_backward(y, h, B, own, g, n, b)
        out = y * g if b is None else torch.addcmul((1 - g) * b, y, g)
        return out.addmm_(h, own.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, h, B, own, g, n, b = ctx.saved_tensors
        need, s = ctx.needs_input_grad, ctx.s
        thin = (h.t() @ grad).t()  # [o, r]; this way round is several times faster
        total = grad.sum(0) if b is not None and (need[4] or need[6]) else None
        along = None
        if need[4]:
            along = torch.add((grad * y).sum(0), (thin * B).sum(1), alpha=s)
            along = along if total is None else along - b * total
            along = torch.where(n > 0, along / n.clamp_min(torch.finfo(n.dtype).tiny), 0.0)
        return (
            grad * g if need[0] else None,
            (own.t() @ grad.t()).t() if need[1] else None,
            thin * (g * s)[:, None] if need[2] else None,
            None,
            along,
            None,
            total * (1 - g) if need[6] and total is not None else None,
        )
