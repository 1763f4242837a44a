"""How two adapters differ: cosine of what they change, and how much their subspaces overlap, layer by layer.

Shapes: changes D = B A with B [o, r], A [r, i]; R the numerical rank of a change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..change import Change, change_at
from ..errors import LibraryError, listing

if TYPE_CHECKING:
    from ..adapter import Adapter
    from ..model import Model

OUTSIDE = "outside the layers"
SMALLEST = 1e-5  # singular values below this part of the largest one are rounding


@dataclass(frozen=True)
class Layer:
    """What was found in a layer, or in everything.

    Attributes:
        name: ``layer 0``, or what it is called.
        sites: how many sites at least one of the two changes.
        cosine: of the changes of all its sites; a site that only one changes counts as unchanged by the other. None where one
            of the two changes nothing.
        columns: mean over the sites that both change of the overlap of the column spaces (where the changes point to), from
            0 to 1: the mean squared cosine of the principal angles. None where there is no such site.
        rows: the same of the row spaces (what the changes read).
    """

    name: str
    sites: int
    cosine: float | None
    columns: float | None
    rows: float | None


@dataclass(frozen=True)
class Diff:
    """What `diff` found.

    Attributes:
        names: of the two.
        whole: of everything.
        layers: of each layer in its order, and what is outside of them last.
        only: the sites that only the first, and only the second, changes.
    """

    names: tuple[str, str]
    whole: Layer
    layers: list[Layer]
    only: tuple[list[str], list[str]]

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'':<20} sites  cosine  columns  rows"]
        for part in (self.whole, *self.layers):
            cells = [f"{'-' if v is None else format(v, '.3f'):>6}" for v in (part.cosine, part.columns, part.rows)]
            lines.append(f"{part.name:<20} {part.sites:>5}  {cells[0]}   {cells[1]} {cells[2]}")
        lines += [
            f"only {n} changes {listing(sites, 4)}" for n, sites in zip(self.names, self.only, strict=True) if sites
        ]
        return "\n".join(lines)


@torch.no_grad()
def diff(first: Adapter, second: Adapter, model: Model | None = None) -> Diff:
    """Compares what two adapters of one base change. Thin factors are never multiplied out.

    ``cos = sum_s tr(D_s^T E_s) / (|D| |E|)`` over the sites s; of factors ``tr(D^T E) = sum (B^T C) * (A F^T)`` for ``E = C F``.
    With orthonormal bases U, V of two spaces of dimensions p, q the overlap is ``|U^T V|^2 / min(p, q)``.

    Args:
        first: an adapter.
        second: another.
        model: the base, for forms whose change depends on its weights.

    Raises:
        LibraryError: one has no dense change, or the two change a site of another shape.
    """
    one, two = _changes(first, model), _changes(second, model)
    sites = {**{n: p.site for n, p in first.patches.items()}, **{n: p.site for n, p in second.patches.items()}}
    sums: dict[int, _Sums] = {}
    for name, site in sites.items():
        part = sums.setdefault(-1 if site.layer is None else site.layer, _Sums())
        part.add(name, one.get(name), two.get(name))
    whole = _Sums()
    for part in sums.values():
        whole.join(part)
    order = sorted(sums, key=lambda layer: (layer < 0, layer))
    return Diff(
        (first.name, second.name),
        whole.layer("all"),
        [sums[layer].layer(OUTSIDE if layer < 0 else f"layer {layer}") for layer in order],
        ([name for name in one if name not in two], [name for name in two if name not in one]),
    )


def _changes(adapter: Adapter, model: Model | None) -> Mapping[str, Change]:
    found = {}
    for name, patch in adapter.patches.items():
        change = change_at(patch, name, model)
        if change is None:
            raise LibraryError(
                f"the adapter {adapter.name!r} of the form {patch.form.name!r} has no dense change at {name!r}"
                + ("" if model else " without its base")
                + "; compare others"
                + ("" if model else ", or open the library with its model")
            )
        found[name] = tuple(None if part is None else part.detach().cpu().double() for part in change)
    return found  # type: ignore[return-value]


class _Sums:
    """What sites are added to."""

    def __init__(self) -> None:
        self.dot = self.left = self.right = 0.0
        self.sites = 0
        self.columns: list[float] = []
        self.rows: list[float] = []

    def add(self, name: str, one: Change | None, two: Change | None) -> None:
        self.sites += 1
        self.left += _product(one, one) if one else 0.0
        self.right += _product(two, two) if two else 0.0
        if one is None or two is None:
            return
        shapes = [(c[0].shape[0], (c[0] if c[1] is None else c[1]).shape[1]) for c in (one, two)]
        if shapes[0] != shapes[1]:
            raise LibraryError(
                f"at {name!r} one adapter changes {shapes[0]} and the other {shapes[1]}; they are of two bases"
            )
        self.dot += _product(one, two)
        spaces = [(_spaces(one), _spaces(two))]
        for (u, v), (w, z) in spaces:
            if min(u.shape[1], w.shape[1]):
                self.columns.append(_overlap(u, w))
                self.rows.append(_overlap(v, z))

    def join(self, other: _Sums) -> None:
        self.dot, self.left, self.right = self.dot + other.dot, self.left + other.left, self.right + other.right
        self.sites += other.sites
        self.columns += other.columns
        self.rows += other.rows

    def layer(self, name: str) -> Layer:
        scale = (self.left * self.right) ** 0.5
        cosine = max(-1.0, min(1.0, self.dot / scale)) if scale else None
        means = [sum(values) / len(values) if values else None for values in (self.columns, self.rows)]
        return Layer(name, self.sites, cosine, *means)


def _product(one: Change, two: Change) -> float:
    """tr(D^T E)."""
    (B, A), (C, F) = one, two
    if A is not None and F is not None:
        return float(((B.mT @ C) * (A @ F.mT)).sum())
    if A is not None:
        return float(((B.mT @ C) * A).sum())
    if F is not None:
        return float(((B @ F.mT) * C).sum())
    return float((B * C).sum())


def _spaces(change: Change) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column space [o, R] and of the row space [i, R]."""
    B, A = change
    if A is None:
        u, s, v = torch.linalg.svd(B, full_matrices=False)
    else:
        left, upper = torch.linalg.qr(B)
        right, lower = torch.linalg.qr(A.mT)
        u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, v = left @ u, v @ right.mT
    rank = int((s > SMALLEST * s.max()).sum()) if s.numel() and float(s.max()) else 0
    return u[:, :rank], v[:rank].mT


def _overlap(one: Tensor, two: Tensor) -> float:
    return float((one.mT @ two).square().sum()) / min(one.shape[1], two.shape[1])
