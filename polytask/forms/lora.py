"""LoRA: a low-rank change of a weight.

Shapes: B rows, T tokens, i = d_in, o = d_out, r rank, N adapters, R the ranks of several adapters side by side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Bank, Call, Form, Patch, Weights, forms, per_row
from polytask.core.site import Site


@forms.register("lora")
@dataclass(frozen=True)
class LoRA(Form):
    """A weight's change as a product of two thin matrices: ``c(x) = s B (A x)``.

    ``s = alpha / rank`` ("classic"), or ``alpha / sqrt(rank)`` ("rank-stabilised", arXiv 2312.03732), which keeps the size
    of the update when the rank grows. Acts on linear layers (also stored transposed), convolutions (A has the layer's
    kernel and stride, B is 1x1), embeddings (A is looked up, not multiplied) and fused experts (factors per expert).

    Args:
        rank: r, the inner size of both factors.
        alpha: the scale's numerator; twice the rank when None.
        dropout: probability of zeroing each input feature, while the model is in training mode. None at embeddings, as in
            PEFT, and none where the change is made to the weight.
        scaling: ``"classic"`` or ``"rank-stabilised"``.
        init: ``"zero-B"`` (A Kaiming-uniform, B zero: starts as the base), ``"gaussian"`` (A normal with deviation
            1/rank, B zero) or ``"random"`` (both Kaiming-uniform: does not start as the base; for tests).

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. Where the paper starts A
    from a normal distribution, its code and PEFT use Kaiming-uniform; so does ``"zero-B"``.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    scaling: Literal["classic", "rank-stabilised"] = "classic"
    init: Literal["zero-B", "gaussian", "random"] = "zero-B"

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts")
    peft_type: ClassVar[str] = "LORA"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2106.09685"
    tensor_names: ClassVar[dict[str, str]] = {
        "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"LoRA: rank must be a whole number of at least 1, got {self.rank!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA: dropout must be in [0, 1), got {self.dropout!r}")
        for name, value, allowed in (
            ("scaling", self.scaling, ("classic", "rank-stabilised")),
            ("init", self.init, ("zero-B", "gaussian", "random")),
        ):
            if value not in allowed:
                raise ConfigError(f"LoRA: {name} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def scale(self) -> float:
        """s, the number that the product is multiplied by."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "classic" else math.sqrt(self.rank))

    def patch(self, site: Site) -> Patch:
        return LoRAPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if reason or not site.shape:
            return reason
        if site.kind == "linear" and len(site.shape) != 2:
            return f"site {site.name!r} has a weight of shape {site.shape}; LoRA needs two dimensions there"
        return ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        own: dict[str, LoRA] = {path: p.form for path, p in patches.items() if isinstance(p.form, LoRA)}
        if len({f.scaling for f in own.values()} | {self.scaling}) > 1:
            raise AdapterError("PEFT's format has one scaling for all sites, and this adapter mixes classic and rank-stabilised")
        alphas = {path: 2.0 * f.rank if f.alpha is None else f.alpha for path, f in own.items()}
        return {
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "rank-stabilised",
            "rank_pattern": {path: f.rank for path, f in own.items() if f.rank != self.rank},
            "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
            "fan_in_fan_out": any(p.site.transposed for p in patches.values()),
            "init_lora_weights": True,
            "bias": "none",
            "use_dora": False,
            "lora_bias": False,
            "layers_to_transform": None,
            "layers_pattern": None,
            "target_parameters": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> LoRA:
        """The form at one site of a PEFT adapter. Raises `AdapterError` for what plain LoRA cannot express."""
        for key, why in (("use_dora", "DoRA"), ("lora_bias", "a bias in B"), ("target_parameters", "raw parameters")):
            if config.get(key):
                raise AdapterError(f"this PEFT adapter uses {why} ({key}), which the form 'lora' does not have")
        if config.get("bias", "none") != "none":
            raise AdapterError(
                f"this PEFT adapter also trained biases (bias={config['bias']!r}), which the form 'lora' does not have; "
                "merge it with PEFT's merge_and_unload, or train it again with bias='none'"
            )
        rank = _pattern(config.get("rank_pattern") or {}, path, config.get("r", 8))
        return cls(
            rank=int(rank),
            alpha=_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            scaling="rank-stabilised" if config.get("use_rslora") else "classic",
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensors, for files that do not describe it."""
        A, B = tensors["A"], tensors["B"]
        if A.dim() > 2:
            return Site(path, "conv", "other", (B.shape[0], *A.shape[1:]))
        if config.get("_embedding"):
            return Site(path, "embedding", "other", (A.shape[1], B.shape[0]))
        if config.get("fan_in_fan_out"):
            return Site(path, "linear", "other", (A.shape[1], B.shape[0]), transposed=True)
        return Site(path, "linear", "other", (B.shape[0], A.shape[1]))


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression on the end of the module's path; the first that matches holds."""
    for pattern, value in patterns.items():
        if path and re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


class LoRABank(Bank):
    """Several LoRAs at once: factors side by side for the whole batch or per token, gathered per row for `PerRow`."""

    def __init__(self, patches: Mapping[str, Patch]) -> None:
        super().__init__(patches)
        self._kept: tuple[Weights, tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    def apply(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        if not self._fast or (weights.fixed is not None and len(self.patches) == 1):
            return super().apply(x, y, out, weights, call)
        if weights.index is not None and weights.values.dim() == 2:  # type: ignore[union-attr]
            return self._rows(x, out, weights)
        A, B, owner = self._side_by_side(x.dtype)
        h = F.linear(x, A)  # [..., R]
        if weights.fixed is not None:
            scale = torch.tensor([_weight_of(weights, name) for name in self.patches], dtype=h.dtype, device=h.device)
        else:
            dense = weights.dense()
            columns = [weights.names.index(name) for name in self.patches]
            scale = dense[..., columns].to(h.dtype)  # [N], [B, N] or [B, T, N]
            if scale.dim() == 2:
                scale = scale.reshape(scale.shape[0], *[1] * (h.dim() - 2), scale.shape[1])
        return out + F.linear(h * scale[..., owner], B).to(out.dtype)

    def average(self, x: Tensor, y: Tensor, out: Tensor, weights: Weights, call: Call = NO_CALL) -> Tensor:
        if not self._fast or len({p.form.rank for p in self.patches.values()}) > 1:
            raise AdapterError("averaging LoRA factors needs linear sites and equal ranks; combine outputs instead")
        dense = weights.dense().to(x.device, x.dtype)
        dense = dense[..., [weights.names.index(name) for name in self.patches]]
        A = torch.stack([p.A for p in self.patches.values()]).to(x.dtype)  # [N, r, i]
        B = torch.stack([p.B * p.form.scale for p in self.patches.values()]).to(x.dtype)  # [N, o, r]
        if dense.dim() == 1:
            return out + F.linear(F.linear(x, torch.einsum("n,nri->ri", dense, A)), torch.einsum("n,nor->or", dense, B))
        if dense.dim() == 2:
            x3, _, per = per_row(x, out, dense.shape[0], next(iter(self.patches.values())).site.name)
            rows = x3.reshape(dense.shape[0], -1, x3.shape[-1])  # [B, per*T, i]
            h = rows @ torch.einsum("bn,nri->bir", dense, A)
            return out + (h @ torch.einsum("bn,nor->bro", dense, B)).reshape(*x3.shape[:-1], -1)
        h = torch.einsum("btn,nri,bti->btr", dense, A, x)
        return out + torch.einsum("btn,nor,btr->bto", dense, B, h)

    def forget(self) -> None:
        self._kept = None

    @property
    def _fast(self) -> bool:
        patches = self.patches.values()
        return all(p.site.kind == "linear" and not (p.form.dropout and p.dropping) for p in patches)

    def _side_by_side(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """All A as [R, i], all s*B as [o, R], and which adapter each of the R ranks belongs to."""
        patches = list(self.patches.values())
        A = torch.cat([p.A for p in patches]).to(dtype)
        B = torch.cat([p.B * p.form.scale for p in patches], 1).to(dtype)
        ranks = torch.tensor([p.form.rank for p in patches], device=A.device)
        return A, B, torch.repeat_interleave(torch.arange(len(patches), device=A.device), ranks)

    def _rows(self, x: Tensor, out: Tensor, weights: Weights) -> Tensor:
        """Each row its own factors: two batched products over [B, T, i] x [B, i, R] x [B, R, o]."""
        rows = weights.values.shape[0]  # type: ignore[union-attr]
        x, out, _ = per_row(x, out, rows, next(iter(self.patches.values())).site.name)
        A, B = self._gathered(weights, x.dtype)
        h = torch.bmm(x.reshape(rows, -1, x.shape[-1]), A)  # [B, T, R]
        flat = out.reshape(rows, -1, out.shape[-1])
        if torch.is_grad_enabled() or flat.data_ptr() != out.data_ptr():
            return torch.baddbmm(flat, h, B).view(out.shape)
        return flat.baddbmm_(h, B).view(out.shape)

    def _gathered(self, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A of each row as [B, i, R] and w*s*B as [B, R, o], kept while neither the mix nor the adapters change."""
        grad = torch.is_grad_enabled() and any(p.A.requires_grad for p in self.patches.values())
        versions = () if grad else tuple(t._version for p in self.patches.values() for t in (p.A, p.B))
        if not grad and self._kept is not None and self._kept[0] is weights and self._kept[1] == versions:
            kept = self._kept[2]
            if kept[0].dtype == dtype:
                return kept
        most = max(p.form.rank for p in self.patches.values())
        A = torch.stack([_pad(p.A, most, 0) for p in self.patches.values()])  # [N, r, i]
        B = torch.stack([_pad(p.B * p.form.scale, most, 1) for p in self.patches.values()])  # [N, o, r]
        names = list(self.patches)
        place = torch.tensor([names.index(n) if n in self.patches else -1 for n in weights.names], device=A.device)
        index = place[weights.index]  # type: ignore[index]  # [B, k]
        values = torch.where(index >= 0, weights.values, 0.0)  # type: ignore[arg-type]  # another bank's adapters
        index = index.clamp(min=0)
        rows, k = index.shape
        left = A[index].reshape(rows, k * most, -1)  # [B, R, i]
        right = (B[index] * values[..., None, None].to(B.dtype)).movedim(3, 2).reshape(rows, k * most, -1)  # [B, R, o]
        pair = (left.to(dtype).transpose(1, 2), right.to(dtype))
        if not grad:
            self._kept = (weights, versions, pair)
        return pair


def _weight_of(weights: Weights, name: str) -> float:
    return weights.values[weights.names.index(name)] if name in weights.names else 0.0  # type: ignore[return-value]


def _pad(tensor: Tensor, size: int, dim: int) -> Tensor:
    short = size - tensor.shape[dim]
    if not short:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = short
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


class LoRAPatch(Patch):
    """A [r, i] and B [o, r] at one site; for convolutions A [r, c, *kernel], B [o, r, 1, ...]; per expert for experts."""

    bank = LoRABank
    form: LoRA

    def __init__(self, form: LoRA, site: Site) -> None:
        super().__init__(form, site)
        r, shape = form.rank, site.shape
        if site.kind == "conv":
            a, b = (r, *shape[1:]), (shape[0], r, *[1] * (len(shape) - 2))
        elif site.kind == "experts":  # [E, o, i]
            a, b = (shape[0], r, shape[2]), (shape[0], shape[1], r)
        else:
            a, b = (r, site.d_in), (site.d_out, r)
        self.A = nn.Parameter(torch.empty(a))
        self.B = nn.Parameter(torch.empty(b))
        if site.kind == "embedding":
            self.keys = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        else:
            self.keys = {"A": "lora_A.weight", "B": "lora_B.weight"}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            if self.site.kind == "embedding":
                # as PEFT: the zero factor is A, which is looked up, and B is normal
                self.A.zero_()
                self.B.normal_(generator=generator)
                if self.form.init == "random":
                    self.A.normal_(generator=generator)
                return
            fan_in = self.A[0].numel() if self.site.kind != "experts" else self.A.shape[2]
            if self.form.init == "gaussian":
                self.A.normal_(std=1.0 / self.form.rank, generator=generator)
            else:
                self.A.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)  # kaiming_uniform(a=sqrt(5))
            self.B.zero_()
            if self.form.init == "random":
                self.B.uniform_(-(self.form.rank**-0.5), self.form.rank**-0.5, generator=generator)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.site.kind == "embedding":
            h = F.embedding(x, self.A.T.to(y.dtype))  # [..., r]
            return F.linear(h, self.B.to(y.dtype)) * (self.form.scale * self._embedding_scale())
        x = self._drop(x)
        if self.site.kind == "conv":
            return self._convolve(x)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.form.scale

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if self.site.kind != "linear" or torch.is_autocast_enabled(x.device.type):
            return super().add(x, y, out, weight, call)
        x = self._drop(x)
        A, B = self.A, self.B
        if A.dtype != x.dtype:
            A, B = A.to(x.dtype), B.to(x.dtype)
        h = F.linear(x, A)
        flat = out.reshape(-1, out.shape[-1])
        # one kernel multiplies, scales and adds; in place where nothing else can hold the base's fresh output
        if not torch.is_grad_enabled() and flat.is_contiguous() and flat.data_ptr() == out.data_ptr():
            flat.addmm_(h.reshape(-1, h.shape[-1]), B.t(), alpha=weight * self.form.scale)
            return out
        return torch.addmm(flat, h.reshape(-1, h.shape[-1]), B.t(), alpha=weight * self.form.scale).view(out.shape)

    def delta(self) -> Tensor:
        s = self.form.scale
        if self.site.kind == "embedding":
            return (self.B @ self.A).T * s
        if self.site.kind == "experts":
            return torch.bmm(self.B, self.A) * s
        if self.site.kind == "conv":
            return (torch.tensordot(self.B.flatten(1), self.A.flatten(1), 1) * s).reshape(self.site.shape)
        product = (self.B @ self.A) * s
        return product.T if self.site.transposed else product

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.form.dropout, training=True) if self.form.dropout and self.dropping else x

    def _embedding_scale(self) -> float:
        """Gemma multiplies the looked-up vectors; the change of the weight is multiplied the same."""
        scale = getattr(self.base, "embed_scale", None)
        return 1.0 if scale is None else float(scale)

    def _convolve(self, x: Tensor) -> Tensor:
        base = self.base
        if not isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise AdapterError(f"the LoRA at {self.site.name!r} must be attached to a convolution before it is used")
        convolve: Sequence[Any] = (F.conv1d, F.conv2d, F.conv3d)
        dims = len(base.kernel_size)
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        A, B, groups = self.A.to(x.dtype), self.B.to(x.dtype), base.groups
        if groups == 1:
            h = convolve[dims - 1](x, A, None, base.stride, padding, base.dilation)
            return convolve[dims - 1](h, B) * self.form.scale
        # A sees the inputs of one group; the product is taken first, which is exact for any number of groups
        return convolve[dims - 1](x, self.delta().to(x.dtype), None, base.stride, padding, base.dilation, groups)
