"""ReFT: an edit of the residual stream inside a low-dimensional subspace.

Shapes: d width of the stream, r dimensions of the subspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from ._blocks import BlockPatch


@forms.register("reft")
@dataclass(frozen=True)
class ReFT(Form):
    """LoReFT: sets r coordinates of what a block returns, ``c = R^T (W h + b - R h)``, R with orthonormal rows.

    Inside the subspace of R the edited stream is ``W h + b``, outside of it nothing changes. W starts as R, and b at
    zero, so a new one is the base.

    Args:
        rank: r.

    Reference: Wu et al., ReFT: Representation Finetuning for Language Models, arXiv 2404.03592. There W starts anywhere,
    so that a new one is not the base, and only some positions of a prompt are edited; here all are. R is a trained
    matrix whose rows are made orthonormal by its Cholesky factor.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 4

    kinds: ClassVar[tuple[str, ...]] = ("block",)
    default_sites: ClassVar[str] = "kind:block"
    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "POLYTASK_REFT"
    paper: ClassVar[str] = "arXiv 2404.03592"

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"ReFT: rank must be a whole number of at least 1, got {self.rank!r}")

    def patch(self, site: Site) -> Patch:
        return ReFTPatch(self, site)


class ReFTPatch(BlockPatch):
    """A [r, d], of which R is made; W [r, d]; b [r]."""

    form: ReFT
    A: nn.Parameter
    W: nn.Parameter
    b: nn.Parameter
    wide = ("A", 1)

    def sizes(self, width: int) -> dict[str, tuple[int, ...]]:
        r = min(self.form.rank, width)
        return {"A": (r, width), "W": (r, width), "b": (r,)}

    def start(self, generator: torch.Generator) -> None:
        self.grow()
        with torch.no_grad():
            self.A.normal_(std=self.width**-0.5, generator=generator)
            self.W.copy_(self.subspace())
            self.b.zero_()

    def subspace(self) -> Tensor:
        """R [r, d], in fp32."""
        A = self.A.to(torch.promote_types(self.A.dtype, torch.float32))
        L = torch.linalg.cholesky(A @ A.T)  # A A^T = L L^T, so the rows of L^-1 A are orthonormal
        R: Tensor = torch.linalg.solve_triangular(L, A, upper=False)
        return R

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        R = self.subspace()
        change = (self.W - R).to(y.dtype)  # in one product, and exactly zero where W is R
        edit = F.linear(self.rows(y), change, self.b.to(y.dtype))  # [..., r]
        return self.back(F.linear(edit, R.T.to(y.dtype)))
