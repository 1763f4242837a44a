"""A model whose difference to a base is cut to a low rank.

Shapes: a difference D [o, i] (kernels of convolutions have a row for each output), m = min(o, i), rank r.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .source import Source

EXACT = 512  # matrices with at most so many rows or columns have a whole SVD
MORE, ROUNDS = 16, 4  # directions beyond the rank, and rounds, of a randomised one


class LowRank(Source):
    """``b + U_r S_r V_r^T`` in every matrix, where ``U S V^T`` is the model's difference to the base; other tensors as they are.

    Args:
        source: the model.
        base: what the difference is taken to.
        rank: how many components are kept; matrices that have no more stay exactly as they are.
        seed: of the randomised SVD, which large matrices have.
        whole: tensors that stay as they are.

    Attributes:
        errors: of each tensor that has been read and cut, ``|D - D_r|^2`` and ``|D|^2``.
    """

    def __init__(self, source: Source, base: Source, rank: int, seed: int = 0, whole: Collection[str] = ()) -> None:
        self.source, self.base, self.rank, self.seed = source, base, rank, seed
        self.name, self.folder, self.tied = f"{source.name} (rank {rank})", source.folder, source.tied
        self.errors: dict[str, tuple[float, float]] = {}
        self._kept: tuple[str, Tensor] = ("", torch.empty(0))
        self._cut = {
            name
            for name, shape in source.shapes.items()
            if len(shape) > 1 and base.shapes.get(name) == shape and name not in whole
            and min(shape[0], math.prod(shape[1:])) > rank and source.dtype(name).is_floating_point
        }  # fmt: skip

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.source.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._cut:
            return self.source.read(name, start, stop)
        if self._kept[0] != name:  # asked for in blocks of rows, one after the other
            self._kept = (name, self._low(name))
        return self._kept[1][start:stop]

    @property
    def error(self) -> float:
        """``|D - D_r| / |D|`` over all tensors that are cut."""
        for name in self._cut - set(self.errors):  # those that an interrupted merge had written before
            self._low(name)
        lost, all_ = (sum(e[i] for e in self.errors.values()) for i in (0, 1))
        return math.sqrt(lost / all_) if all_ else 0.0

    def _low(self, name: str) -> Tensor:
        own = self.source.read(name).float()
        change = (own - self.base.read(name).float()).flatten(1)
        if not bool(torch.isfinite(change).all()):
            return own  # whoever merges it says what is wrong
        key = hashlib.sha256(f"{self.seed}\0{name}".encode()).digest()
        u, s, v = svd(change, self.rank, int.from_bytes(key[:7], "little"))
        lost = change - (u * s) @ v
        size = [float(matrix.square().sum(dtype=torch.float64)) for matrix in (lost, change)]
        self.errors[name] = (size[0], size[1])
        return own - lost.view(own.shape)


def svd(matrix: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The largest components: U [o, r], S [r], V [r, i]. Randomised where the matrix is large beside the rank.

    Reference: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4.
    """
    if min(matrix.shape) <= max(EXACT, 4 * (rank + MORE)):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    generator = torch.Generator().manual_seed(seed)
    basis = matrix @ torch.randn(matrix.shape[1], rank + MORE, generator=generator)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(basis).Q).Q
        basis = matrix @ basis
    basis = torch.linalg.qr(basis).Q  # [o, r + more]
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], v[:rank]
