"""TriAdaptLoRA: a LoRA with a triangular core on each side of the diagonal, whose rank can grow while it learns.

Shapes: i = d_in, o = d_out, R the current rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@forms.register("tri")
@dataclass(frozen=True)
class Tri(Form):
    """A low-rank change with a core that can grow at its border: ``c(x) = s B (L + U) A x``, L lower and U upper.

    Both triangles have the diagonal, and ``s = alpha / reference``. Growing adds rows to A, zero columns to B and a
    border to L and U; what is computed stays the same (see `TriPatch.grow`). The budget ``triangular`` decides which layers
    grow while a LoRA learns. Starts at zero, by B.

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
