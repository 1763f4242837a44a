"""OFT: a linear layer's input is rotated, block by block.

Shapes: i = d_in, o = d_out, n blocks of size b, N rows of the flattened input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

SERIES = 16  # from this block size on a series may replace the inverse


@forms.register("oft")
@dataclass(frozen=True)
class OFT(Form):
    """Turns the input of a linear layer by a block-diagonal rotation: ``c(x) = W (R^T - I) x``.

    Each block is the Cayley transform ``R = (I - Q)(I + Q)^-1`` of a skew matrix Q that starts at zero, so the layer's
    Gram matrix ``W W^T`` stays what it was.

    Args:
        block_size: b; where it does not divide the layer's width, the nearest size that does.
        blocks: n instead of a block size, 0 to go by the size.
        share: one rotation for all blocks of a layer.
        cayley: ``"exact"``, or ``"neumann"``: ``I + 2Q + 2Q^2 + ... + Q^(terms - 1)``, which is orthogonal only while Q
            is small.
        terms: of the Neumann series.

    Reference: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280. The rotation
    acts on the input side as there; its constrained variant (COFT) is not offered. ``"neumann"`` is the default in
    PEFT; it approximates the transposed rotation, as there.

    Raises:
        ConfigError: a setting is out of range.
    """

    block_size: int = 32
    blocks: int = 0
    share: bool = False
    cayley: Literal["exact", "neumann"] = "exact"
    terms: int = 5

    acts: ClassVar[str] = "around"
    peft_type: ClassVar[str] = "OFT"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2306.07280"
    tensor_names: ClassVar[dict[str, str]] = {"oft_R.weight": "q"}

    def __post_init__(self) -> None:
        if self.blocks < 0 or (not self.blocks and self.block_size < 2):
            raise ConfigError(
                f"OFT: block_size must be at least 2 (or blocks at least 1), got {self.block_size!r}, {self.blocks!r}"
            )
        if self.cayley not in ("exact", "neumann"):
            raise ConfigError(f"OFT: cayley must be one of exact, neumann, got {self.cayley!r}")
        if self.terms < 4:
            raise ConfigError(f"OFT: terms must be at least 4, got {self.terms!r}")

    def patch(self, site: Site) -> Patch:
        return OFTPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        return reason or ("" if site.d_in > 1 else f"site {site.name!r} has one input feature, which cannot be turned")

    def unlike_peft(self, patch: Patch) -> str:
        return "a weight that is stored transposed" if patch.site.transposed else ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {
            "r": self.blocks,
            "oft_block_size": 0 if self.blocks else self.block_size,
            "block_share": self.share,
            "use_cayley_neumann": self.cayley == "neumann",
            "num_cayley_neumann_terms": self.terms,
            "module_dropout": 0.0,
            "coft": False,
            "eps": 6e-05,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_weights": True,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> OFT:
        """The form of a PEFT adapter. Raises `AdapterError` for the constrained variant and trained biases."""
        plain_peft(config, "oft", {"coft": "the constrained variant (COFT)"})
        blocks, neumann = int(config.get("r") or 0), bool(config.get("use_cayley_neumann", True))
        return cls(
            block_size=int(config.get("oft_block_size") or 32),
            blocks=blocks,
            share=bool(config.get("block_share")),
            cayley="neumann" if neumann else "exact",
            terms=max(4, int(config.get("num_cayley_neumann_terms") or 5)) if neumann else 5,
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensor. It does not tell d_out, nor d_in where the blocks share their rotation."""
        q = tensors["q"]
        count = int(config.get("r") or 0) or len(q)
        return Site(path, "linear", "other", (0, entries_size(q) * count))


def entries_size(q: Tensor) -> int:
    """b, where the rows of q have the ``b (b - 1) / 2`` upper entries of a matrix."""
    return round((1 + math.sqrt(1 + 8 * q.shape[-1])) / 2)


def plain_peft(config: Mapping[str, Any], name: str, refused: Mapping[str, str]) -> None:
    """Raises `AdapterError` where a PEFT configuration asks for what the form ``name`` does not have."""
    for key, what in refused.items():
        if config.get(key):
            raise AdapterError(f"this PEFT adapter uses {what} ({key}), which the form {name!r} does not have")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"this PEFT adapter also trained biases (bias={config['bias']!r}), which the form {name!r} does not have; "
            "merge it with PEFT's merge_and_unload, or train it again with bias='none'"
        )


def divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` that is nearest to ``wanted``, the smaller one of two; PEFT's rule."""
    if wanted >= width:
        return width
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - wanted), d))


def cayley(Q: Tensor) -> Tensor:
    """``R - I`` for the Cayley transforms of skew matrices Q [..., b, b]; exactly zero for zero."""
    change: Tensor = _Cayley.apply(Q)  # type: ignore[no-untyped-call]
    return change


class _Cayley(torch.autograd.Function):
    """Its derivative needs no second inverse: ``dR = -2 (I + Q)^-1 dQ (I + Q)^-1``."""

    @staticmethod
    def forward(Q: Tensor) -> Tensor:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        series = Q.is_cpu and Q.dim() == 3 and Q.shape[-1] >= SERIES and not torch.compiler.is_compiling()
        if series and Q.square().sum((1, 2)).max() < 0.09:  # then |Q|^16 < 1e-8, and products are faster than LAPACK
            power, inverse = Q @ Q, eye - Q
            for _ in range(2):  # (I + Q)^-1 = (I - Q)(I + Q^2)(I + Q^4)(I + Q^8) to rounding
                inverse, power = torch.baddbmm(inverse, inverse, power), power @ power
            return 2.0 * (torch.baddbmm(inverse, inverse, power) - eye)
        whole: Tensor = torch.linalg.inv_ex(eye + Q)[0]  # it exists: Q has imaginary eigenvalues only
        return 2.0 * (whole - eye)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (change,) = ctx.saved_tensors
        inverse: Tensor = (0.5 * change + torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)).mT
        return -2.0 * (inverse @ grad @ inverse)


def blockwise(x: Tensor, blocks: Tensor, plus: bool = False) -> Tensor:
    """x [..., i] times a block-diagonal matrix with ``blocks`` [n, b, b], or [1, b, b] where all are the same.

    With ``plus`` x is added to the product.
    """
    count, size, _ = blocks.shape
    if count * size != x.shape[-1]:
        rows = x.reshape(-1, size)
        return (torch.addmm(rows, rows, blocks[0]) if plus else rows @ blocks[0]).reshape(x.shape)
    rows = x.reshape(-1, count, size).transpose(0, 1)  # [n, N, b]
    out = torch.baddbmm(rows, rows, blocks) if plus else torch.bmm(rows, blocks)
    return out.transpose(0, 1).reshape(x.shape)


class TurnPatch(Patch):
    """What multiplies the input of a linear layer: subclasses say by what, with ``_make`` and ``turn``."""

    _kept: tuple[Any, Tensor] | None = None

    def _make(self) -> Tensor:
        """Whatever ``turn`` needs of the parameters, in fp32."""
        raise NotImplementedError

    def turn(self, x: Tensor, change: Tensor, back: bool = False) -> Tensor:
        """``x (R - I)`` for rows x [..., i], with R^T for R when ``back``; ``change`` comes from `_make`."""
        raise NotImplementedError

    def turned(self, x: Tensor, change: Tensor) -> Tensor:
        """``x R``."""
        return x + self.turn(x, change)

    def change(self, dtype: torch.dtype) -> Tensor:
        """What `_make` returns; kept while no parameter changes and no gradients are recorded."""
        own = list(self.parameters())
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in own)):
            return self._make().to(dtype)
        marks = [0 if p.is_inference() else p._version for p in own]
        key = (dtype, torch.is_inference_mode_enabled(), [p.data_ptr() for p in own], marks)
        if self._kept is None or self._kept[0] != key:
            self.__dict__["_kept"] = (key, self._make().to(dtype))
        return self._kept[1]  # type: ignore[index]

    def around(self, run: Callable[[Tensor], Tensor], x: Tensor, call: Call = NO_CALL) -> Tensor:
        return run(self.turned(x, self.change(x.dtype)))

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return F.linear(self.turn(x, self.change(x.dtype)), self.weight().to(x.dtype))

    def weight(self) -> Tensor:
        """The base's weight as [o, i], also where it is stored transposed or answered by what is attached."""
        if self.base is None:
            raise AdapterError(f"the {self.form.name} at {self.site.name!r} must be attached before it is used")
        stored = self.base._parameters.get(self.site.param or "weight")
        if stored is None:
            stored = getattr(self.base, self.site.param or "weight")
        return stored.T if self.site.transposed else stored

    def delta(self) -> Tensor:
        weight = self.weight().detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        delta = self.turn(weight, self.change(weight.dtype), back=True)  # y = W (R^T x), so W becomes W R^T
        return delta.T if self.site.transposed else delta

    def misfit(self, site: Site) -> str:
        """Only the input's width matters, and a file of PEFT's tells nothing else."""
        if site.kind != "linear":
            return super().misfit(site)
        mine = self.site.d_in
        return "" if mine == site.d_in else f"it was made for an input of {mine}, and the model's has {site.d_in}"


class OFTPatch(TurnPatch):
    """The upper entries q of Q, [n, b(b-1)/2] (one row where the blocks share it)."""

    keys = {"q": "oft_R.weight"}
    form: OFT

    def __init__(self, form: OFT, site: Site) -> None:
        super().__init__(form, site)
        width = site.d_in
        self.size = width // divisor(width, form.blocks) if form.blocks else divisor(width, form.block_size)
        count = 1 if form.share else width // self.size
        self.q = nn.Parameter(torch.zeros(count, self.size * (self.size - 1) // 2))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.q.zero_()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if self.form.share and "q" in tensors:  # a shared block tells nothing about the layer's width
            self.size = entries_size(tensors["q"])
            self.q = nn.Parameter(torch.zeros(1, self.size * (self.size - 1) // 2))
        super().load(tensors)

    def misfit(self, site: Site) -> str:
        if not self.form.share or site.kind != "linear":
            return super().misfit(site)
        return "" if site.d_in % self.size == 0 else f"blocks of {self.size} do not divide the {site.d_in} inputs"

    def _make(self) -> Tensor:
        q = self.q.to(torch.promote_types(self.q.dtype, torch.float32))
        row, column = torch.triu_indices(self.size, self.size, 1, device=q.device)
        upper = q.new_zeros(len(q), self.size**2).index_copy(1, row * self.size + column, q)
        upper = upper.view(-1, self.size, self.size)
        Q = upper - upper.mT
        if self.form.cayley == "exact":
            return cayley(Q)
        power, total = Q, 2.0 * Q  # I + 2Q + 2Q^2 + ... + 2Q^(t-2) + Q^(t-1), without I
        for term in range(2, self.form.terms):
            power = power @ Q
            total = total + (power if term == self.form.terms - 1 else 2.0 * power)
        return total

    def turn(self, x: Tensor, change: Tensor, back: bool = False) -> Tensor:
        return blockwise(x, change.mT if back else change)

    def turned(self, x: Tensor, change: Tensor) -> Tensor:
        return blockwise(x, change, plus=True)
