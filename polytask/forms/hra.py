"""HRA: a layer's input goes through a chain of reflections.

Shapes: i = d_in, r reflections, p = r / 2 pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.errors import ConfigError
from polytask.core.form import Form, Patch, forms
from polytask.core.site import Site

from .oft import TurnPatch, plain_peft


@forms.register("hra")
@dataclass(frozen=True)
class HRA(Form):
    """Reflects the input of a linear layer r times: ``W' = W H_1 ... H_r`` with ``H_k = I - 2 u_k u_k^T / |u_k|^2``.

    The change has rank r at most, and is orthogonal. The vectors start in equal pairs, which undo one another.

    Args:
        rank: r, even: an odd number of reflections cannot start as the base.
        orthonormal: the vectors are made orthonormal first, ``W' = W (I - 2 Q Q^T)``. Does not start as the base.

    Reference: Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation, arXiv 2405.17484. Its penalty on vectors that are not orthogonal is left out, as in most of its code.

    Raises:
        ConfigError: a setting is out of range.
    """

    rank: int = 8
    orthonormal: bool = False

    acts: ClassVar[str] = "around"
    peft_type: ClassVar[str] = "HRA"
    in_peft: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2405.17484"
    tensor_names: ClassVar[dict[str, str]] = {"hra_u": "U"}

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ConfigError(f"HRA: rank must be a whole number of at least 1, got {self.rank!r}")

    def patch(self, site: Site) -> Patch:
        return HRAPatch(self, site)

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        if not reason and self.orthonormal and self.rank > site.d_in:
            return f"site {site.name!r} has {site.d_in} inputs, so no {self.rank} vectors are orthonormal there"
        return reason

    def unlike_peft(self, patch: Patch) -> str:
        return "a weight that is stored transposed" if patch.site.transposed else ""

    def to_peft(self, patches: Mapping[str, Patch]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "apply_GS": self.orthonormal,
            "init_weights": True,
            "bias": "none",
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], path: str = "") -> HRA:
        plain_peft(config, "hra", {})
        return cls(rank=int(config.get("r") or 8), orthonormal=bool(config.get("apply_GS")))

    @classmethod
    def infer_site(cls, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Site:
        """The site of a file's tensor, which does not tell d_out."""
        return Site(path, "linear", "other", (0, tensors["U"].shape[0]))


class HRAPatch(TurnPatch):
    """U [i, r]. ``H_1 ... H_r = I + P T Q^T``, so that the chain costs two thin products."""

    keys = {"U": "hra_u"}
    form: HRA

    def __init__(self, form: HRA, site: Site) -> None:
        super().__init__(form, site)
        self.U = nn.Parameter(torch.empty(site.d_in, form.rank))

    def start(self, generator: torch.Generator) -> None:
        pairs = self.form.rank // 2 if self.form.rank % 2 == 0 and not self.form.orthonormal else self.form.rank
        bound = pairs**-0.5  # Kaiming-uniform with a = sqrt 5 of an [i, pairs] matrix
        with torch.no_grad():
            half = torch.empty(self.site.d_in, pairs).uniform_(-bound, bound, generator=generator)
            self.U.copy_(half.repeat_interleave(self.form.rank // pairs, 1))

    def _make(self) -> Tensor:
        """P T and Q as [2, i, k]: the chain is ``I + P T Q^T``.

        For a pair of unit vectors u, v with d = u - v and e = |d|^2 / 2 the product of both reflections is
        ``I + u (-2d - 4e v)^T + d (2v)^T``, which is exactly the identity where they are equal.
        """
        U = self.U.to(torch.promote_types(self.U.dtype, torch.float32))
        if self.form.orthonormal:
            q = torch.linalg.qr(U).Q
            return torch.stack([-2.0 * q, q])
        U = U / U.norm(dim=0)
        r, pairs = U.shape[1], U.shape[1] // 2
        u, v = U[:, 0 : 2 * pairs : 2], U[:, 1 : 2 * pairs : 2]  # [i, p]
        d = u - v
        e = 0.5 * d.square().sum(0)
        P = torch.stack([u, d], 2).flatten(1)  # [i, 2p], pair by pair
        Q = torch.stack([-2.0 * d - 4.0 * e * v, 2.0 * v], 2).flatten(1)
        if r % 2:
            P, Q = torch.cat([P, U[:, -1:]], 1), torch.cat([Q, -2.0 * U[:, -1:]], 1)
        # a_k = Q_k^T (x + sum of P_j a_j over the later pairs j)
        later = torch.arange(P.shape[1], device=U.device) // 2
        mixed = (Q.T @ P) * (later[:, None] < later)
        eye = torch.eye(len(mixed), dtype=U.dtype, device=U.device)
        T = torch.linalg.solve_triangular(eye - mixed, eye, upper=True, unitriangular=True)
        return torch.stack([P @ T, Q])

    def turn(self, x: Tensor, change: Tensor, back: bool = False) -> Tensor:
        left, right = change if back else (change[1], change[0])  # the chain less I is P T Q^T
        turned: Tensor = (x @ left) @ right.T
        return turned

    def turned(self, x: Tensor, change: Tensor) -> Tensor:
        left, right = change
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(rows, rows @ right, left.T).view(x.shape)
