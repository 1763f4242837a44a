"""Hydra: a low-rank branch beside a layer and another behind it.

Shapes: i = d_in, o = d_out, r and q the ranks of the parallel and the sequential branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site


@forms.register("hydra")
@dataclass(frozen=True)
class Hydra(Form):
    """Two LoRAs at once, one of the layer's input and one of its output: ``c(x, y) = s (B_p A_p x + B_s A_s y)``.

    The sequential branch sees the output with its bias, so merging changes both: ``W + s (B_p A_p + B_s A_s W)`` and
    ``b + s B_s A_s b``. Starts at zero, by both B; by default it acts at the second layer of each MLP, as in the paper.

    Args:
        rank: r of the parallel branch; 0 leaves it out.
        sequential_rank: q of the sequential branch; 0 leaves it out.
        scale: s, a plain multiplier.
        dropout: probability of zeroing each feature that a branch sees, while the model is in training mode.

    Reference: Kim et al., Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning, arXiv 2309.06922.
    The branches have no biases of their own, as in the paper's language models.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 4
    sequential_rank: int = 4
    scale: float = 1.0
    dropout: float = 0.0

    default_sites: ClassVar[str] = "down"
    peft_type: ClassVar[str] = "POLYTASK_HYDRA"
    paper: ClassVar[str] = "arXiv 2309.06922"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("sequential_rank", self.sequential_rank)):
            if not (isinstance(value, int) and value >= 0):
                raise ConfigError(f"Hydra: {name} must be a whole number of at least 0, got {value!r}")
        if self.rank == self.sequential_rank == 0:
            raise ConfigError("Hydra: rank and sequential_rank are both 0, which leaves no branch")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"Hydra: dropout must be in [0, 1), got {self.dropout!r}")

    def patch(self, site: Site) -> Patch:
        return HydraPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and site.param and self.sequential_rank:
            return f"{site.name!r} is a raw parameter whose output nobody sees; Hydra's sequential branch needs it"
        return reason


class HydraPatch(Patch):
    """A [r, i] and B [o, r] beside the layer, C [q, o] and D [o, q] behind it."""

    form: Hydra

    def __init__(self, form: Hydra, site: Site) -> None:
        super().__init__(form, site)
        self.keys = {}
        for down, up, rank, size, name in (
            ("A", "B", form.rank, site.d_in, "parallel"),
            ("C", "D", form.sequential_rank, site.d_out, "sequential"),
        ):
            if rank:
                self.register_parameter(down, nn.Parameter(torch.empty(rank, size)))
                self.register_parameter(up, nn.Parameter(torch.empty(site.d_out, rank)))
                self.keys |= {down: f"hydra_{name}_A", up: f"hydra_{name}_B"}

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            for name, own in self.named_parameters():
                if name in ("A", "C"):
                    own.uniform_(-(own.shape[1] ** -0.5), own.shape[1] ** -0.5, generator=generator)
                else:
                    own.zero_()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        s, parts = self.form.scale, []
        if self.form.rank:
            parts.append(F.linear(F.linear(self._drop(x), self.A.to(x.dtype)), (self.B * s).to(x.dtype)))
        if self.form.sequential_rank:
            parts.append(F.linear(F.linear(self._drop(y), self.C.to(y.dtype)), (self.D * s).to(y.dtype)))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def delta(self) -> Tensor | None:
        return self.deltas()[self.site.param or "weight"]

    def deltas(self) -> dict[str, Tensor]:
        """Of the weight, and of the bias where there is one."""
        s, name = self.form.scale, self.site.param or "weight"
        product = (self.B @ self.A) * s if self.form.rank else None
        changes = {}
        if self.form.sequential_rank:
            if self.base is None:
                raise AdapterError(f"the Hydra at {self.site.name!r} must be attached to a model before it is merged")
            stored = self.base._parameters
            weight, bias = stored[name].detach(), stored.get("bias")  # type: ignore[union-attr]
            weight = (weight.t() if self.site.transposed else weight).to(self.C.dtype)
            behind = self.D @ (self.C @ weight) * s
            product = behind if product is None else product + behind
            if bias is not None:
                changes["bias"] = self.D @ (self.C @ bias.detach().to(self.C.dtype)) * s
        assert product is not None  # a form without branches is refused
        return {name: product.t() if self.site.transposed else product, **changes}

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.form.dropout, training=True) if self.form.dropout and self.dropping else x
