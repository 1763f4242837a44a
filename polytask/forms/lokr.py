"""LoKr: a change of a weight as a Kronecker product.

Shapes: o = a * b and i = c * d (output and input features or channels), k the kernel's size, r rank, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.peft_files import check_peft, pattern, pattern_keys
from polytask.core.site import Site

from ._shapes import MatrixPatch
from .loha import cored, kaiming, no_peft, tucker


@forms.register("lokr")
@dataclass(frozen=True)
class LoKr(Form):
    """A small matrix times a larger one, blockwise: ``dW = (alpha / r) kron(w1, w2)``, w1 [a, c] and w2 [b, d].

    ``w2`` is a product of rank r where that is smaller than itself, and the rank of the change is the product of both
    ranks. Starts at zero, by ``w1``; at linear layers the dense change is never built.

    Args:
        rank: r of the factors of w2 (and of w1, with ``both``).
        alpha: the scale's numerator; the rank when None.
        factor: the wanted size of w1, -1 for about the square root of the sizes.
        both: factor w1 too, where that is smaller.
        effective: at convolutions with a kernel, a core [r, r, k] in w2 instead of a flattened kernel.

    Reference: Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv
    2309.14859. The zero factor and the scale (also where nothing is of low rank) are PEFT's; LyCORIS starts with w2
    zero.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    factor: int = -1
    both: bool = False
    effective: bool = False

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    peft_type: ClassVar[str] = "LOKR"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2309.14859"
    tensor_names: ClassVar[dict[str, str]] = {
        f"lokr_{name}": name.replace("_", "") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    }

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"LoKr: rank must be a whole number of at least 1, got {self.rank!r}")
        if not (isinstance(self.factor, int) and (self.factor >= 1 or self.factor == -1)):
            raise ConfigError(f"LoKr: factor must be a whole number of at least 1, or -1, got {self.factor!r}")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def patch(self, site: Site) -> Patch:
        return LoKrPatch(self, site)

    def unlike_peft(self, patch: Patch) -> str:
        mine, other = (self.factor, self.both, self.effective), patch.form
        if mine != (other.factor, other.both, other.effective):
            return "settings that differ from site to site"
        if len(patch.site.shape) == 3 and "w2" in patch._parameters:
            return "a convolution in one dimension with a whole w2, whose product PEFT lays out otherwise"
        return no_peft(patch.site)

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        own = {path: p.form for path, p in patches.items() if isinstance(p.form, type(self))}
        keys = pattern_keys(own)

        def alpha(form: LoKr) -> float:
            return form.rank if form.alpha is None else form.alpha

        return {
            "r": self.rank, "alpha": alpha(self), "use_effective_conv2d": self.effective, "rank_dropout": 0.0,
            "decompose_both": self.both, "decompose_factor": self.factor, "rank_dropout_scale": False,
            "rank_pattern": {keys[path]: f.rank for path, f in own.items() if f.rank != self.rank},
            "alpha_pattern": {keys[path]: alpha(f) for path, f in own.items() if alpha(f) != alpha(self)},
            "module_dropout": 0.0, "init_weights": True, "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> LoKr:
        """PEFT's dropout of whole ranks or modules acts in training only and is left out."""
        if not path:
            own = ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d", "decompose_both")
            training = ("rank_dropout", "module_dropout", "rank_dropout_scale")
            check_peft(config, cls.name, (*own, "decompose_factor", *training), {})
        return cls(
            rank=int(pattern(config.get("rank_pattern") or {}, path, config.get("r", 8))),
            alpha=pattern(config.get("alpha_pattern") or {}, path, config.get("alpha", 8)),
            factor=int(config.get("decompose_factor", -1)),
            both=bool(config.get("decompose_both")),
            effective=bool(config.get("use_effective_conv2d")),
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        a, c = tensors["w1"].shape if "w1" in tensors else (tensors["w1a"].shape[0], tensors["w1b"].shape[1])
        if "w2" in tensors:
            b, d, *kernel = tensors["w2"].shape
            if len(kernel) == 1:
                raise AdapterError(
                    f"PEFT lays out the Kronecker product of the one-dimensional convolution {path!r} otherwise than "
                    "its factors say; merge it with PEFT's merge_and_unload"
                )
        elif "t2" in tensors:
            kernel = list(tensors["t2"].shape[2:])
            kernel = kernel[:1] if kernel[1] == 1 else kernel
            b, d = tensors["w2a"].shape[1], tensors["w2b"].shape[1]
        else:
            b, d, kernel = tensors["w2a"].shape[0], tensors["w2b"].shape[1], []
        return Site(path, "conv" if kernel else "linear", "other", (a * b, c * d, *kernel))


def split(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product of two, the smaller first: ``factor`` where it divides it, else as square as allowed."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small = max(m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and (m <= most or m == 1))
    return small, size // small


class LoKrPatch(MatrixPatch):
    """w1 [a, c] or its factors; w2 [b, d, k...], its factors [b, r] and [r, d*k], or with a core [r, b], [r, d], t2."""

    form: LoKr

    def __init__(self, form: LoKr, site: Site) -> None:
        super().__init__(form, site)
        r = form.rank
        o, i = (site.d_out, site.d_in) if site.kind == "linear" else site.shape[:2]
        kernel = site.shape[2:] if site.kind == "conv" else ()
        (a, b), (c, d) = split(o, form.factor), split(i, form.factor)
        self.core = False
        shapes: dict[str, tuple[int, ...]]
        shapes = {"w1a": (a, r), "w1b": (r, c)} if form.both and r < max(a, c) / 2 else {"w1": (a, c)}
        if r >= max(b, d) / 2:
            shapes |= {"w2": (b, d, *kernel)}
        elif cored(form, site):
            self.core = True
            shapes |= {"w2a": (r, b), "w2b": (r, d), "t2": (r, r, *(*kernel, 1)[:2])}
        else:
            shapes |= {"w2a": (b, r), "w2b": (r, d * math.prod(kernel))}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.keys = {new: key for key, new in form.tensor_names.items() if new in self._parameters}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kaiming(parameter, generator)
                if name in ("w1", "w1a"):
                    parameter.zero_()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        one, two = self._size(tensors, "w1"), self._size(tensors, "w2")
        if self.site.kind == "linear" and (one[0] * two[0], one[1] * two[1]) == (self.site.d_out, self.site.d_in):
            # in a file of PEFT's a convolution looks like this; it was split before its kernel was flattened
            self._parameters.clear()
            for name, tensor in tensors.items():
                self.register_parameter(name, nn.Parameter(torch.empty(tensor.shape)))
            self.keys = {new: key for key, new in self.form.tensor_names.items() if new in tensors}
        super().load(tensors)

    def _size(self, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
        """Of w1 or w2 in a file, as a matrix or as two factors of this rank; zeros where it is neither."""
        whole, left, right = (tensors.get(name + end) for end in ("", "a", "b"))
        if whole is not None and whole.dim() == 2 and left is right is None:
            return whole.shape[0], whole.shape[1]
        if whole is not None or left is None or right is None or not left.dim() == right.dim() == 2:
            return 0, 0
        fits = left.shape[1] == right.shape[0] == self.form.rank
        return (left.shape[0], right.shape[1]) if fits else (0, 0)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.site.kind != "linear":
            return super().contribute(x, y, call)
        w1, w2 = self._factors()
        (a, c), (b, d) = w1.shape, w2.shape
        if (d + a) * b * c > a * b * c * d:  # the dense change is the smaller work
            return super().contribute(x, y, call)
        inner = nn.functional.linear(x.reshape(-1, c, d), w2.to(x.dtype))  # [T, c, b]
        outer = nn.functional.linear(inner.transpose(1, 2), (w1 * self.form.scale).to(x.dtype))  # [T, b, a]
        return outer.transpose(1, 2).reshape(*x.shape[:-1], a * b)

    def matrix(self) -> Tensor:
        w1, w2 = self._factors()
        b = w2.shape[0]
        d = w2.shape[1] // (math.prod(self.site.shape[2:]) if self.site.kind == "conv" else 1)
        product = (w1 * self.form.scale)[:, None, :, None, None] * w2.view(1, b, 1, d, -1)  # [a, b, c, d, k]
        return product.reshape(w1.shape[0] * b, -1)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """w1 [a, c] and w2 [b, d * k]."""
        own: Mapping[str, Any] = self._parameters
        w1 = own["w1"] if "w1" in own else self.w1a @ self.w1b
        if "w2" in own:
            return w1, self.w2.flatten(1)
        return w1, tucker(self.w2a, self.t2, self.w2b) if self.core else self.w2a @ self.w2b
