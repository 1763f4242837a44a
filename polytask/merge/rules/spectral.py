"""Rules that look at the singular values of the differences: TSV-Merge, Iso-C and Iso-CTS, and rules in a shared basis (KnOTS).

Shapes: a difference tau [o, i], m = min(o, i), N models, k components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError
from polytask.merge.rule import Block, Rule, rules, total

from ._nested import Nested

TINY = 1e-5  # singular values below this part of the largest are noise, whose directions are arbitrary


class Spectral(Rule):
    """A rule for matrices; other tensors have the mean of the differences."""

    grain: ClassVar = "tensor"
    scale: float

    def matrix(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged difference [o, i]."""
        raise NotImplementedError

    def merge(self, block: Block) -> Tensor:
        deltas = block.deltas
        if not _finite(deltas):
            return torch.full_like(block.zero, torch.nan)  # the engine says whose
        if len(block.shape) == 2 and block.count:
            change = self.matrix(deltas, block.weights)
        else:
            change = total(deltas, [w / len(deltas) for w in block.weights])
        return torch.add(block.zero, change, alpha=self.scale)


@rules.register("tsv")
@dataclass(frozen=True)
class TSV(Spectral):
    """Adds the largest m/N singular components of each difference, once their directions are made orthogonal to each other's:
    ``b + scale polar([U_1 .. U_N]) diag(w_1 s_1, .. w_N s_N) polar([V_1 .. V_N])^T``.

    Args:
        scale: the change's factor.

    Reference: Gargiulo et al., Task Singular Vectors, arXiv 2412.00081. At least one component of each model is kept, and
    directions that several models share count once.
    """

    scale: float = 1.0

    paper: ClassVar[str] = "arXiv 2412.00081"
    exceptions: ClassVar[dict[str, str]] = {"equal": "of N models each keeps a part of 1/N of its components"}

    def matrix(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        keep = max(1, min(deltas[0].shape) // len(deltas))
        parts = []
        for delta, weight in zip(deltas, weights, strict=True):
            u, s, v = _svd(delta)
            parts.append((u[:, :keep], s[:keep] * weight, v[:keep]))
        u, s, v = (torch.cat([part[i] for part in parts], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
        there = s != 0
        return (_polar(u[:, there]) * s[there]) @ _polar(v[there].T).T


@rules.register("iso-c")
@dataclass(frozen=True)
class IsoC(Spectral):
    """The sum of the differences with all singular values set to their mean: ``b + scale mean(S) U V^T``, where
    ``sum_i w_i tau_i = U diag(S) V^T``.

    Args:
        scale: the change's factor.

    Reference: Marczak et al., No Task Left Behind, arXiv 2502.04959. Where the sum has a lower rank than the matrix, the mean is
    over the singular values that are not zero: the directions of the others are arbitrary, so they stay zero.
    """

    scale: float = 1.0

    paper: ClassVar[str] = "arXiv 2502.04959"
    exceptions: ClassVar[dict[str, str]] = {
        "alone": "the singular values are made equal",
        "equal": "the singular values are made equal",
    }

    def matrix(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        u, s, v = _svd(total(deltas, weights))
        return (u @ v) * s.mean() if len(s) else torch.zeros_like(deltas[0])


@rules.register("iso-cts")
@dataclass(frozen=True)
class IsoCTS(Spectral):
    """Iso-C that keeps room for what is each task's own: the largest components of the sum, then as many of each difference
    without its part in their span, ``tau_i - U U^T tau_i``; all directions are made orthogonal, all singular values their mean.

    Args:
        scale: the change's factor.
        common: the part of the m components that the sum has; 1 is Iso-C.

    Reference: Marczak et al., No Task Left Behind, arXiv 2502.04959. Directions that are arbitrary stay zero, as in Iso-C.

    Raises:
        ConfigError: common is out of range.
    """

    scale: float = 1.0
    common: float = 0.8

    paper: ClassVar[str] = "arXiv 2502.04959"
    exceptions: ClassVar[dict[str, str]] = IsoC.exceptions

    def __post_init__(self) -> None:
        if not 0.0 <= self.common <= 1.0:
            raise ConfigError(f"iso-cts: common must be in [0, 1], got {self.common!r}")

    def matrix(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        size, count = min(deltas[0].shape), len(deltas)
        each = min(round((size - int(size * self.common)) / count), size // count)  # components of each task
        u, s, v = _svd(total(deltas, weights))
        u, s, v = u[:, : size - each * count], s[: size - each * count], v[: size - each * count]
        parts = [(u, s, v)]
        for delta, weight in zip(deltas, weights, strict=True):
            own = (delta - u @ (u.T @ delta)) * weight
            p, t, q = _svd(own, float(torch.linalg.matrix_norm(delta)) * abs(weight))
            parts.append((p[:, :each], t[:each], q[:each]))
        u, s, v = (torch.cat([part[i] for part in parts[1:] + parts[:1]], dim) for i, dim in ((0, 1), (1, 0), (2, 0)))
        return (_polar(u) @ _polar(v.T).T) * s.mean() if len(s) else torch.zeros_like(deltas[0])


@rules.register("knots")
@dataclass(frozen=True)
class Knots(Nested):
    """Another rule in the basis that all differences share: with ``[tau_1 .. tau_N] = U S [V_1 .. V_N]`` it merges the matrices
    ``S V_i`` [k, i] as if they were the differences, and adds ``U merged`` to the base.

    Args:
        inner: the rule, by name or with settings: ``{"name": "ties", "density": 0.2}``.
        tolerance: singular values up to this part of the largest are left out.

    Reference: Stoica et al., Model merging with SVD to tie the KnOTS, arXiv 2410.19735. There biases are a further column of
    their matrix and norms are diagonal matrices; here what is no matrix is merged by the inner rule as it is (kernels of
    convolutions are matrices of one row for each output).

    Raises:
        ConfigError: a setting is out of range, or the inner rule does not merge differences.
    """

    inner: Any = "ties"
    tolerance: float = 1e-6

    grain: ClassVar = "tensor"
    paper: ClassVar[str] = "arXiv 2410.19735"
    exceptions: ClassVar[dict[str, str]] = {
        "alone": "its own inner rule, TIES, keeps a part of the entries",
        "equal": "its own inner rule, TIES, keeps a part of the entries",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.tolerance < 1.0:
            raise ConfigError(f"knots: tolerance must be in [0, 1), got {self.tolerance!r}")

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return "tensor", self.rule.plan()[1]

    def survey(self, number: int, block: Block) -> Any:
        return self.rule.survey(number, self._coded(block)[1])

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        return self.rule.settle(number, found, facts)

    def merge(self, block: Block) -> Tensor:
        basis, coded = self._coded(block)
        merged = self.rule.merge(coded)
        if basis is None:
            return merged
        return block.zero + (basis @ merged.to(basis.dtype)).to(torch.float32).view(block.zero.shape)

    def factors(self, block: Block) -> Sequence[float] | None:
        return self.rule.factors(block)  # a weighted sum is the same in every basis

    def _coded(self, block: Block) -> tuple[Tensor | None, Block]:
        """U [o, k] in fp64, and the block of the codes; None and the block itself for what is no matrix."""
        if len(block.shape) < 2 or not block.count:
            return None, block
        if not _finite(block.deltas):
            raise MergeError(
                f"{block.name} of a model or the base has entries that are not finite numbers; leave it out"
            )
        deltas = [delta.flatten(1).double() for delta in block.deltas]
        # U from the sum of tau tau^T [o, o], which is small where the models are many; codes are then exact projections
        values, basis = torch.linalg.eigh(sum((d @ d.T for d in deltas[1:]), deltas[0] @ deltas[0].T))
        sizes = values.clamp_min(0.0).sqrt()
        there = (sizes > sizes[-1] * max(self.tolerance, 1e-8)).nonzero().flatten().flip(0)
        if not len(there):
            return None, block
        basis = basis[:, there]
        codes = tuple((basis.T @ delta).float() for delta in deltas)
        return basis, replace(block, base=torch.zeros_like(codes[0]), tensors=codes, shape=tuple(codes[0].shape))


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _svd(matrix: Tensor, like: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """U [o, k], S [k], V [k, i] of the components that are more than noise, beside the matrix's own size or ``like``."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    keep = int((s > TINY * max(float(s[0]), like)).sum())
    return u[:, :keep], s[:keep], v[:keep]


def _polar(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns; of columns that depend on each other, in the span that they have."""
    if not columns.shape[1]:
        return columns
    u, _, v = _svd(columns)
    return u @ v
