"""TriAdaptLoRA: a LoRA with a triangular core on each side of the diagonal, whose rank can grow while it learns.

Shapes: i = d_in, o = d_out, R the current rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@forms.register("tri")
@dataclass(frozen=True)
class Tri(Form):
    """A low-rank change with a core that can grow at its border: ``c(x) = s B (L + U) A x``, L lower and U upper.

    Both triangles have the diagonal, and ``s = alpha / reference``. Growing adds rows to A, zero columns to B and a
    border to L and U; what is computed stays the same (see `TriPatch.grow` and `Growth`). Starts at zero, by B.

    Args:
        rank: R at first.
        alpha: the scale's numerator; twice ``reference`` when None.
        reference: what alpha is divided by; the rank when None. Growing keeps it.
        dropout: probability of zeroing each input feature, while the model is in training mode.

    Reference: TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning,
    arXiv 2501.08008. There s is divided by the current rank, so that growing shrinks what was learned, and core and B
    are zero, which no gradient leaves; ours keeps s and starts the core as the identity. The penalty for factors that
    are not orthogonal is left out.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    alpha: float | None = None
    reference: int | None = None
    dropout: float = 0.0

    peft_type: ClassVar[str] = "POLYTASK_TRI"
    paper: ClassVar[str] = "arXiv 2501.08008"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("reference", 1 if self.reference is None else self.reference)):
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"Tri: {name} must be a whole number of at least 1, got {value!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"Tri: dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def scale(self) -> float:
        """s, the number that the product is multiplied by."""
        reference = self.reference or self.rank
        return (2.0 * reference if self.alpha is None else self.alpha) / reference

    def patch(self, site: Site) -> Patch:
        return TriPatch(self, site)


class TriPatch(Patch):
    """A [R, i], B [o, R], and L and U [R, R], of which the lower and the upper triangle are read."""

    keys = {"A": "tri_A", "B": "tri_B", "L": "tri_L", "U": "tri_U"}
    form: Tri

    def __init__(self, form: Tri, site: Site) -> None:
        super().__init__(form, site)
        self.A = nn.Parameter(torch.empty(form.rank, site.d_in))
        self.B = nn.Parameter(torch.empty(site.d_out, form.rank))
        self.L = nn.Parameter(torch.empty(form.rank, form.rank))
        self.U = nn.Parameter(torch.empty(form.rank, form.rank))

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.A.uniform_(-(self.site.d_in**-0.5), self.site.d_in**-0.5, generator=generator)
            self.B.zero_()
            for triangle in (self.L, self.U):
                nn.init.eye_(triangle).mul_(0.5)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        if self.form.dropout and self.dropping:
            x = F.dropout(x, self.form.dropout, training=True)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self._up().to(x.dtype))

    def delta(self) -> Tensor:
        product = self._up() @ self.A
        return product.t() if self.site.transposed else product

    @property
    def core(self) -> Tensor:
        """L + U as [R, R]."""
        return torch.tril(self.L) + torch.triu(self.U)

    @torch.no_grad()
    def grow(self, by: int, generator: torch.Generator) -> None:
        """Raises the rank; what is computed stays as it is. A model that it is attached to needs `Model.rebind`."""
        old, form = self.form.rank, self.form
        fresh = TriPatch(replace(form, rank=old + by, reference=form.reference or old), self.site).to(self.A.device)
        fresh.start(generator)
        fresh.A[:old], fresh.B[:, :old] = self.A, self.B
        fresh.L[:old, :old], fresh.U[:old, :old] = self.L, self.U
        for name, parameter in self.named_parameters():
            own = nn.Parameter(fresh._parameters[name].to(parameter.dtype))  # type: ignore[union-attr]
            self._parameters[name] = own.requires_grad_(parameter.requires_grad)
        self.form = fresh.form

    def _up(self) -> Tensor:
        return self.B @ (self.core * self.form.scale)


@dataclass
class Growth:
    """Decides which sites of a `Tri` adapter grow: those whose core has gained most since the last look.

    Args:
        target: mean rank over the sites at which growing ends.
        by: what a site's rank grows by.
        steps: of the whole training.
        warmup: steps before the first look.
        schedule: how many sites grow at most, of the rank that is still to give: the fraction of the time that has
            passed (``"linear"``), or its power (``"exponential"``).
        seed: of the new rows.

    Attributes:
        ranks: the rank of every site after each look.
    """

    target: int = 8
    by: int = 4
    steps: int = 1000
    warmup: int = 0
    schedule: Literal["linear", "exponential"] = "linear"
    seed: int = 0
    ranks: list[dict[str, int]] = field(default_factory=list)
    _scores: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in ("linear", "exponential"):
            raise ConfigError(f"Growth: schedule must be one of linear, exponential, got {self.schedule!r}")
        if self.by < 1 or self.target < 1 or self.steps <= self.warmup:
            raise ConfigError("Growth: by and target must be at least 1, and steps more than warmup")

    def look(self, adapter: Adapter, step: int) -> list[str]:
        """Grows the sites that have earned it, and says which. The adapter's model must `rebind` it afterwards."""
        patches = {name: patch for name, patch in adapter.patches.items() if isinstance(patch, TriPatch)}
        total = sum(patch.form.rank for patch in patches.values())
        left = self.target * len(patches) - total
        size = {name: float(patch.core.detach().norm()) / patch.form.rank for name, patch in patches.items()}
        gain = {name: value - self._scores.get(name, 0.0) for name, value in size.items()}
        self._scores = size
        grown: list[str] = []
        if left > 0 and step >= self.warmup:
            t = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
            count = int(left * t) if self.schedule == "linear" else int(math.exp(t * math.log(left)))
            bar = sorted(gain.values(), reverse=True)[min(max(count, 1), len(gain)) - 1]
            grown = [name for name in patches if gain[name] >= bar]
        for name in grown:
            generator = torch.Generator().manual_seed(self.seed + len(self.ranks) * len(patches) + grown.index(name))
            patches[name].grow(self.by, generator)
        self.ranks.append({name: patch.form.rank for name, patch in patches.items()})
        return grown
