"""Thin factors of a change: side by side, of a smaller rank, and of a dense change.

Shapes: A [r, i], B [o, r] with the change B A as a matrix [o, i]; per expert [E, r, i], [E, o, r]; kernels flattened into i.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from polytask.core.site import Site


def ranks_of(site: Site) -> tuple[int, int]:
    """The dimensions of A and of B that the rank is."""
    return (1, 2) if site.kind == "experts" else (0, 1)


def reduced(site: Site, A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The nearest factors of a smaller rank, without forming the change; and the squares of the error and of the change."""
    a, b = (A, B) if site.kind == "experts" else (A.flatten(1), B.flatten(1))
    left, upper = torch.linalg.qr(b.double())  # [o, R'], [R', R]
    right, lower = torch.linalg.qr(a.double().mT)  # [i, R'], [R', R]
    u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return _cut(site, left @ u, s, v @ right.mT, rank)


def split(site: Site, change: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The nearest factors of a dense change as it is stored; and the squares of the error and of the change."""
    turned = site.kind == "embedding" or (site.kind == "linear" and site.transposed)
    matrix = change.mT if turned else change if site.kind == "experts" else change.flatten(1)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _cut(site, u, s, v, rank)


def _cut(site: Site, u: Tensor, s: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    error = float(s[..., rank:].square().sum()), float(s.square().sum())
    root = s[..., :rank].sqrt()
    A, B = root.unsqueeze(-1) * v[..., :rank, :], u[..., :rank] * root.unsqueeze(-2)
    if site.kind == "conv":
        A, B = A.reshape(-1, *site.shape[1:]), B.reshape(*B.shape, *[1] * (len(site.shape) - 2))
    return A.float(), B.float(), error


def difference(errors: Iterable[tuple[float, float]]) -> float:
    """The relative error of several sites together; 0 where nothing was approximated."""
    found = list(errors)
    whole = sum(size for _, size in found)
    return (sum(error for error, _ in found) / whole) ** 0.5 if whole else 0.0
