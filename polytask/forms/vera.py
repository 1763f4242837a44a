"""VeRA: two random matrices that all sites share, and two trained vectors at each.

Shapes: i = d_in, o = d_out, r rank, I and O the largest i and o among the sites.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Part, Patch, forms
from polytask.core.peft_files import check_peft
from polytask.core.site import Site


@forms.register("vera")
@dataclass(frozen=True)
class VeRA(Form):
    """Scales of shared random projections are all that is trained: ``c(x) = l_b * (B (l_d * (A x)))``.

    ``A`` [r, I] and ``B`` [O, r] are frozen and one pair for all sites, which read the part that fits them; a site has
    ``l_d`` [r] and ``l_b`` [o]. Starts at zero, by ``l_b``; a change of rank up to r for ``o + r`` numbers per site.

    Args:
        rank: r.
        dropout: probability of zeroing each input feature, while the model is in training mode.
        d_initial: what ``l_d`` starts as.
        projection_prng_key: the seed of A and B; the seed of the adapter is not used for them, so that all adapters of
            a base have the same.
        save_projection: whether A and B are written into the file; without them a file is a few kilobytes, and they are
            drawn again from their seed when it is loaded.

    Reference: Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454; the start of A and B is
    that of PEFT.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True

    peft_type: ClassVar[str] = "VERA"
    in_peft: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2
    paper: ClassVar[str] = "arXiv 2310.11454"
    tensor_names: ClassVar[dict[str, str]] = {"vera_lambda_b": "l_b", "vera_lambda_d": "l_d"}
    shared_names: ClassVar[dict[str, str]] = {"base_model.vera_A": "A", "base_model.vera_B": "B"}

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"VeRA: rank must be a whole number of at least 1, got {self.rank!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"VeRA: dropout must be in [0, 1), got {self.dropout!r}")

    def patch(self, site: Site) -> Patch:
        return VeRAPatch(self, site)

    def shared(self, sites: Sequence[Site]) -> Part:
        return Projections(self, max(site.d_in for site in sites), max(site.d_out for site in sites))

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {
            "r": self.rank, "vera_dropout": self.dropout, "d_initial": self.d_initial, "bias": "none",
            "projection_prng_key": self.projection_prng_key, "save_projection": self.save_projection,
            "fan_in_fan_out": any(p.site.transposed for p in patches.values()), "init_weights": True,
            "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip

    def unlike_peft(self, patch: Patch) -> str:
        return "" if patch.form == self else "settings that differ from site to site"

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> VeRA:
        own = ("r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection")
        if not path:
            check_peft(config, cls.name, own, {})
        return cls(
            rank=int(config.get("r", 256)),
            dropout=float(config.get("vera_dropout") or 0.0),
            d_initial=float(config.get("d_initial", 0.1)),
            projection_prng_key=int(config.get("projection_prng_key") or 0),
            save_projection=bool(config.get("save_projection", True)),
        )

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The file does not tell d_in; 0 stands for that, and the model knows it."""
        o = tensors["l_b"].shape[0]
        return Site(path, "linear", "other", (0, o) if config.get("fan_in_fan_out") else (o, 0),
                    transposed=bool(config.get("fan_in_fan_out")))  # fmt: skip


class Projections(Part):
    """A [r, I] and B [O, r]; parameters where they are saved, buffers where they are not."""

    keys = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
    frozen = frozenset({"A", "B"})
    form: VeRA

    def __init__(self, form: VeRA, d_in: int, d_out: int) -> None:
        super().__init__(form)
        A, B = torch.empty(form.rank, d_in), torch.empty(d_out, form.rank)
        if form.save_projection:
            self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        else:
            self.register_buffer("A", A)
            self.register_buffer("B", B)

    def start(self, generator: torch.Generator) -> None:
        """Kaiming-uniform with gain sqrt(2), A before B, from the form's own seed: independent of ``generator``."""
        own = torch.Generator().manual_seed(self.form.projection_prng_key)
        with torch.no_grad():
            for tensor in (self.A, self.B):
                bound = (6.0 / max(1, tensor.shape[1])) ** 0.5
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=own))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.form.save_projection:  # also where a file has them all the same, as PEFT does
            self.start(torch.Generator())
            return
        # the sites of a file of PEFT's do not tell I, so the file's own width holds
        A = tensors.get("A")
        if A is not None and A.dim() == 2 and self.A.shape[1] == 0:
            self.A = nn.Parameter(A.new_empty(self.form.rank, A.shape[1]), requires_grad=False)
        super().load(tensors)

    def reach(self, d_in: int, where: str) -> None:
        """Makes A wide enough for a site that is bound, where the file did not say how wide it was drawn."""
        if d_in <= self.A.shape[1]:
            return
        if self.form.save_projection:
            raise AdapterError(
                f"the VeRA's projection has {self.A.shape[1]} columns, and {where!r} has {d_in} inputs; the file is for "
                "another model"
            )
        self.A = self.A.new_empty(self.form.rank, d_in)
        self.start(torch.Generator())

    def project(self, x: Tensor) -> Tensor:
        """``A x``, made once where several sites get the same x, as queries, keys and values do.

        Nothing is kept alive for that: with gradients the product lives in the graph, without as long as x itself.
        """
        A = self.A
        if torch.compiler.is_compiling() or x.is_inference() or A.is_inference():
            return F.linear(x, A[:, : x.shape[-1]].to(x.dtype))
        grad = torch.is_grad_enabled() and x.requires_grad
        key = (grad, x._version, A._version, id(A))
        kept = self.__dict__.get("_last")
        if kept is not None and kept[0]() is x and kept[1] == key and (h := kept[2]()) is not None:
            return h  # type: ignore[no-any-return]
        h = F.linear(x, A[:, : x.shape[-1]].to(x.dtype))
        # a site's product with l_d keeps h in its graph; where there is none, the entry keeps it until x is gone
        last: Any = weakref.ref(h) if torch.is_grad_enabled() else lambda h=h: h
        self.__dict__["_last"] = (weakref.ref(x, self._forget), key, last)
        return h

    def _forget(self, gone: Any) -> None:
        kept = self.__dict__.get("_last")
        if kept is not None and kept[0] is gone:
            del self.__dict__["_last"]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_last"}


class VeRAPatch(Patch):
    """l_d [r] and l_b [o]."""

    keys = {"l_b": "vera_lambda_b", "l_d": "vera_lambda_d"}
    form: VeRA

    def __init__(self, form: VeRA, site: Site) -> None:
        super().__init__(form, site)
        self.l_d = nn.Parameter(torch.empty(form.rank))
        self.l_b = nn.Parameter(torch.empty(site.d_out))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.l_d.fill_(self.form.d_initial)
            self.l_b.zero_()

    def bound(self, base: nn.Module, site: Site) -> Self:
        self.shared.reach(site.d_in, site.name)
        return super().bound(base, site)

    def misfit(self, site: Site) -> str:
        known = self.site.d_in != 0 or site.kind != "linear" or self.site.d_out != site.d_out
        return super().misfit(site) if known else ""

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        return F.linear(self._inner(x), self._B().to(x.dtype)) * self.l_b.to(x.dtype)

    def add(self, x: Tensor, y: Tensor, out: Tensor, weight: float = 1.0, call: Call = NO_CALL) -> Tensor:
        if x.dtype != out.dtype:
            return super().add(x, y, out, weight, call)
        if torch.is_grad_enabled():
            product = F.linear(self._inner(x), self._B().to(x.dtype))
            return torch.addcmul(out, product, self.l_b.to(x.dtype), value=weight)
        # no gradients: l_b goes into B, which is smaller than the output
        B = (self._B() * (self.l_b * weight)[:, None]).to(x.dtype)
        h = self._inner(x)
        return torch.addmm(out.reshape(-1, out.shape[-1]), h.reshape(-1, h.shape[-1]), B.t()).view(out.shape)

    def delta(self) -> Tensor:
        A = self.shared.A[:, : self.site.d_in]
        product = (self.l_b[:, None] * self._B()) @ (self.l_d[:, None] * A)
        return product.t() if self.site.transposed else product

    def _inner(self, x: Tensor) -> Tensor:
        if self.form.dropout and self.dropping:
            x = F.dropout(x, self.form.dropout, training=True)
        return self.shared.project(x) * self.l_d.to(x.dtype)  # type: ignore[no-any-return]  # [..., r]

    def _B(self) -> Tensor:
        return self.shared.B[: self.site.d_out]
