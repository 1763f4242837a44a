"""LoHa: a change of a weight as the elementwise product of two low-rank matrices.

Shapes: i = d_in (at a convolution: channels times kernel, or channels c and kernel k apart), o = d_out, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError
from polytask.core.form import Form, Patch, forms
from polytask.core.peft_files import check_peft, pattern, pattern_keys
from polytask.core.site import Site

from ._shapes import MatrixPatch


@forms.register("loha")
@dataclass(frozen=True)
class LoHa(Form):
    """A change of rank up to r*r from two products of rank r: ``dW = (alpha / r) (w1a w1b) * (w2a w2b)``.

    Starts at zero, by ``w2b``. The change is dense, so it is added to the weight where all rows of a batch have the
    same adapters.

    Args:
        rank: r of both products.
        alpha: the scale's numerator; the rank when None.
        effective: at convolutions with a kernel, a core [r, r, k] in each product instead of a flattened kernel
            (Proposition 3 of the paper; one- and two-dimensional convolutions).

    Reference: Hyeon-Woo et al., FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning,
    arXiv 2108.06098. Without the tanh and the added one of its personalised variant, as in PEFT.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    effective: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    acts: ClassVar[str] = "weight"
    peft_type: ClassVar[str] = "LOHA"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2108.06098"
    tensor_names: ClassVar[dict[str, str]] = {
        f"hada_{name}": name.replace("_", "") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    }

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"LoHa: rank must be a whole number of at least 1, got {self.rank!r}")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def patch(self, site: Site) -> Patch:
        return LoHaPatch(self, site)

    def unlike_peft(self, patch: Patch) -> str:
        if patch.form.effective != self.effective:
            return "settings that differ from site to site"
        return no_peft(patch.site)

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        own = {path: p.form for path, p in patches.items() if isinstance(p.form, type(self))}
        keys = pattern_keys(own)

        def alpha(form: LoHa) -> float:
            return form.rank if form.alpha is None else form.alpha

        return {
            "r": self.rank, "alpha": alpha(self), "use_effective_conv2d": self.effective, "rank_dropout": 0.0,
            "rank_pattern": {keys[path]: f.rank for path, f in own.items() if f.rank != self.rank},
            "alpha_pattern": {keys[path]: alpha(f) for path, f in own.items() if alpha(f) != alpha(self)},
            "module_dropout": 0.0, "init_weights": True, "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> LoHa:
        """PEFT's dropout of whole ranks or modules acts in training only and is left out."""
        if not path:
            own = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d")
            check_peft(config, cls.name, (*own, "rank_dropout", "module_dropout"), {})
        return cls(
            rank=int(pattern(config.get("rank_pattern") or {}, path, config.get("r", 8))),
            alpha=pattern(config.get("alpha_pattern") or {}, path, config.get("alpha", 8)),
            effective=bool(config.get("use_effective_conv2d")),
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        a, b = tensors["w1a"], tensors["w1b"]
        if "t1" in tensors:
            # PEFT stores the kernel of a one-dimensional convolution as [k, 1]
            kernel = tensors["t1"].shape[2:]
            return Site(path, "conv", "other", (a.shape[1], b.shape[1], *(kernel[:1] if kernel[1] == 1 else kernel)))
        return Site(path, "linear", "other", (a.shape[0], b.shape[1]))


def no_peft(site: Site) -> str:
    """Why PEFT's LoHa and LoKr do not act at a site, or the empty string."""
    if site.transposed:
        return "a weight stored as [d_in, d_out]"
    return "a convolution in three dimensions" if site.kind == "conv" and len(site.shape) > 4 else ""


def cored(form: Any, site: Site) -> bool:
    """Whether a convolution has a core of its own: only for kernels that are more than a point."""
    return form.effective and site.kind == "conv" and len(site.shape) <= 4 and math.prod(site.shape[2:]) > 1


class LoHaPatch(MatrixPatch):
    """w1a [o, r], w1b [r, i] and the same for w2; with cores w1a [r, o], w1b [r, c], t1 [r, r, k1, k2] and so for 2."""

    form: LoHa

    def __init__(self, form: LoHa, site: Site) -> None:
        super().__init__(form, site)
        r = form.rank
        o = site.d_out if site.kind == "linear" else site.shape[0]
        self.core = cored(form, site)
        for n in ("1", "2"):
            if self.core:
                kernel = (*site.shape[2:], 1)[:2]
                shapes = {f"w{n}a": (r, o), f"w{n}b": (r, site.shape[1]), f"t{n}": (r, r, *kernel)}
            else:
                i = site.d_in if site.kind == "linear" else math.prod(site.shape[1:])
                shapes = {f"w{n}a": (o, r), f"w{n}b": (r, i)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.keys = {new: key for key, new in form.tensor_names.items() if new in self._parameters}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kaiming(parameter, generator)
                if name == "w2b":
                    parameter.zero_()

    def matrix(self) -> Tensor:
        if not self.core:
            return (self.w1a @ self.w1b) * ((self.w2a @ self.w2b) * self.form.scale)
        return tucker(self.w1a, self.t1, self.w1b) * (tucker(self.w2a, self.t2, self.w2b) * self.form.scale)


def tucker(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """sum_mn a[m, o] core[m, n, k] b[n, c] as [o, c * k]."""
    r = core.shape[0]
    inner = torch.matmul(b.t(), core.flatten(2))  # [r, c, k]
    return a.t() @ inner.reshape(r, -1)


def kaiming(parameter: Tensor, generator: torch.Generator) -> None:
    """Uniform in +-1/sqrt(fan_in), as ``kaiming_uniform_(a=sqrt(5))``."""
    bound = (parameter[0].numel()) ** -0.5
    parameter.uniform_(-bound, bound, generator=generator)
