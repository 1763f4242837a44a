"""Ways and means on the sphere: SLERP and its relatives, and two rules that move from one model towards another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError
from polytask.merge.rule import Block, Rule, rules, total

from ._span import Axis, Spanned, arc, cosines, lengths

END = {"alone": "the base is one end of the way and the model the other"}


@rules.register("slerp")
@dataclass(frozen=True)
class Slerp(Spanned):
    """A point on the great circle from the base v0 to the model v1: ``(sin((1-t) o) v0 + sin(t o) v1) / sin o``, cos o their
    cosine. Each tensor is one vector, and is not normalised; nearly parallel ones (``|cos o| > 0.9995``) go straight.

    Args:
        t: 0 is the base, 1 the model.

    Reference: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, for weights as in mergekit's ``slerp``.

    Raises:
        ConfigError: t is no number.
    """

    t: float = 0.5

    weighted: ClassVar[bool] = False
    most: ClassVar[int | None] = 1
    ends: ClassVar[bool] = True
    paper: ClassVar[str] = "Shoemake 1985"
    exceptions: ClassVar[dict[str, str]] = END

    def __post_init__(self) -> None:
        _number("slerp", "t", self.t)

    def points(self, block: Block) -> list[Tensor]:
        return [block.zero, *block.tensors]

    def origin(self, block: Block) -> None:
        return None

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        return arc(gram, self.t, (1.0 - 0.9995**2) ** 0.5)

    def merge(self, block: Block) -> Tensor:
        if self.t in (0.0, 1.0):
            return block.tensors[0] if self.t else block.zero  # bit for bit
        return total(self.vectors(block), self.combine(block.facts[block.name], block).tolist())

    def factors(self, block: Block) -> None:
        return None  # the factors do not add up to one


@rules.register("nuslerp")
@dataclass(frozen=True)
class NuSlerp(Spanned):
    """SLERP of two models with weights: at ``t = w2 / (w1 + w2)``, of the differences where there is a base.
    Only where ``|sin o| < 1e-8`` does it go straight; weights that add up to nothing count as equal.

    Args:
        axis: what one vector is: ``whole`` tensors (mergekit's ``nuslerp_flatten``, its default), or each line along the
            ``last`` dimension (its ``nuslerp_flatten: false``) or the ``first`` (and ``nuslerp_row_wise: true``).

    Reference: mergekit's ``nuslerp``; here in fp32 with fp64 angles whatever the models' precision.

    Raises:
        ConfigError: an unknown axis.
    """

    axis: Axis = "whole"

    needs_base: ClassVar[bool] = False
    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    paper: ClassVar[str] = "mergekit"

    def __post_init__(self) -> None:
        if self.axis not in ("whole", "last", "first"):
            raise ConfigError(f"nuslerp: axis must be one of whole, last, first, got {self.axis!r}")

    def along(self) -> Axis:
        return self.axis

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        whole = sum(block.weights)
        return arc(gram, 0.5 if abs(whole) < 1e-6 else block.weights[1] / whole, 1e-8)


@rules.register("multislerp")
@dataclass(frozen=True)
class MultiSlerp(Spanned):
    """One step from the direction m of the weighted mean of unit vectors u_i: with ``x = sum_i w_i (u_i - <u_i, m> m)`` it is
    ``(cos|x| m + sin|x| x/|x|) sum_i w_i |v_i|``, of the differences where there is a base.

    Args:
        normalize_weights: divide by the sum of the weights.
        eps: is added to lengths before dividing by them.

    Reference: Goddard, Multi-SLERP, mergekit's ``multislerp``.

    Raises:
        MergeError: the weights or the weighted directions of more than two models add up to nothing.
    """

    normalize_weights: bool = True
    eps: float = 1e-8

    needs_base: ClassVar[bool] = False
    paper: ClassVar[str] = "mergekit"

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        weights = torch.tensor(block.weights, dtype=torch.float64)
        if len(weights) == 1:
            return torch.ones(1, dtype=torch.float64)
        whole = float(weights.sum())
        if self.normalize_weights:
            if abs(whole) < 1e-12:
                raise MergeError(
                    f"multislerp: the weights {block.weights} at {block.name} add up to nothing; change them, or say "
                    "normalize_weights=False"
                )
            weights = weights / whole
        size = lengths(gram)
        if not bool(size.any()):
            return weights
        unit = torch.where(size > 0, 1.0 / (size + self.eps), 0.0)  # u_i = unit_i v_i
        inner = gram * unit[:, None] * unit  # <u_i, u_j>
        mean = float(_length(weights, inner))
        if mean < self.eps:
            if len(weights) == 2:
                return weights
            raise MergeError(
                f"multislerp: the weighted directions at {block.name} add up to nothing, so they have no mean; change the "
                "weights, or use linear"
            )
        m = weights / mean  # in terms of the u_i
        x = weights - (weights * (inner @ m)).sum() * m
        far = float(_length(x, inner)) + self.eps
        found = m * torch.tensor(far).cos() + x * (torch.tensor(far).sin() / far)
        return found * unit * (weights * size).sum()


@rules.register("karcher")
@dataclass(frozen=True)
class Karcher(Spanned):
    """The point of the sphere with the smallest sum of squared angles to the models' directions, times their mean length.
    Found by steps ``u <- cos|T| u + sin|T| T/|T|`` along the mean T of the directions seen from u; a base is one more model.

    Args:
        max_iter: steps at most.
        tol: a step shorter than this is the last; models shorter than this have no direction.

    Reference: Karcher, Riemannian center of mass and mollifier smoothing, 1977; mergekit's ``karcher``. Opposite directions,
    between which no way is shorter than the others, are passed over.

    Raises:
        ConfigError: a setting is out of range.
    """

    max_iter: int = 10
    tol: float = 1e-5

    needs_base: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    paper: ClassVar[str] = "Karcher 1977"

    def __post_init__(self) -> None:
        if self.max_iter < 0 or not self.tol > 0:
            raise ConfigError(
                f"karcher: max_iter must be at least 0 and tol positive, got {self.max_iter} and {self.tol}"
            )

    def points(self, block: Block) -> list[Tensor]:
        return list(block.tensors) if block.base is None else [block.base, *block.tensors]

    def origin(self, block: Block) -> None:
        return None

    def combine(self, gram: Tensor, block: Block) -> Tensor:
        size = lengths(gram)
        count = len(size)
        if count == 1:
            return torch.ones(1, dtype=torch.float64)
        valid = (size > self.tol).nonzero().flatten()
        if not len(valid):
            return torch.zeros(count, dtype=torch.float64)
        inner = cosines(gram)[valid][:, valid]
        part = 1.0 / len(valid)
        u = torch.full((len(valid),), part, dtype=torch.float64)
        near = float(_length(u, inner))
        if near < self.tol:
            u = torch.zeros_like(u)
            u[0] = near = 1.0
        u = u / near
        for _ in range(self.max_iter):
            cos = (inner @ u).clamp(-1.0, 1.0)
            angle = cos.arccos()
            used = (angle >= self.tol) & (angle.sin() > 1e-7)
            pull = torch.where(used, part * angle / torch.where(used, angle.sin(), torch.ones_like(angle)), 0.0)
            step = pull - (pull * cos).sum() * u
            far = _length(step, inner)
            if float(far) < self.tol:
                break
            u = far.cos() * u + far.sin() * step / far
            u = u / _length(u, inner)
        out = torch.zeros(count, dtype=torch.float64)
        out[valid] = u / size[valid] * size.mean()
        return out

    def merge(self, block: Block) -> Tensor:
        factors = self.combine(block.facts[block.name], block).tolist()
        vectors = self.vectors(block)
        return vectors[0] if len(vectors) == 1 else total(vectors, factors)

    def factors(self, block: Block) -> list[float] | None:
        found: list[float] = self.combine(block.facts[block.name], block).tolist()
        return found if len(found) == len(block.models) else None  # a base is a model, not an origin


def _length(of: Tensor, inner: Tensor) -> Tensor:
    """The norm of a combination of vectors, from their inner products."""
    return (of @ inner @ of).clamp_min(0.0).sqrt()


@rules.register("nearswap")
@dataclass(frozen=True)
class NearSwap(Rule):
    """The base moved towards the model by at most t in every number: ``b + clip(x - b, -t, t)``.
    Numbers that differ by t or less become the model's.

    Args:
        t: how far a number may move.

    Reference: Alchemonaut, QuartetAnemoi, mergekit's ``nearswap``, whose weight ``t / max(|x - b|, 1e-6)`` says the same.

    Raises:
        ConfigError: t is negative or no number.
    """

    t: float = 0.001

    weighted: ClassVar[bool] = False
    most: ClassVar[int | None] = 1
    ends: ClassVar[bool] = True
    paper: ClassVar[str] = "mergekit"
    exceptions: ClassVar[dict[str, str]] = {"alone": "a number moves by at most t"}

    def __post_init__(self) -> None:
        if _number("nearswap", "t", self.t) < 0:
            raise ConfigError(f"nearswap: t must not be negative, got {self.t!r}")

    def merge(self, block: Block) -> Tensor:
        model, base = block.tensors[0], block.zero
        return torch.minimum(torch.maximum(model, base - self.t), base + self.t)


@rules.register("arcee_fusion")
@dataclass(frozen=True)
class ArceeFusion(Rule):
    """The base with the model's numbers where ``score = |x - b| KL(softmax(x) | softmax(b))`` reaches the median plus 1.5 times
    the distance of the quartiles. The softmax and its divergence are of each line along the last dimension.

    Reference: Arcee Fusion, mergekit's ``arcee_fusion``. There the quartiles of large tensors are those of a million scores drawn
    at random; here they are exact, so the same models always give the same result.
    """

    grain: ClassVar = "tensor"
    weighted: ClassVar[bool] = False
    most: ClassVar[int | None] = 1
    ends: ClassVar[bool] = True
    paper: ClassVar[str] = "mergekit"
    exceptions: ClassVar[dict[str, str]] = {"alone": "it takes only what changed most"}

    def merge(self, block: Block) -> Tensor:
        model, base = block.tensors[0], block.zero
        if not model.numel():
            return base
        lines = (model, base) if model.dim() else (model.view(1), base.view(1))
        p, q = ((tensor.softmax(-1) + 1e-8) for tensor in lines)
        kl = (p * (p / q).log()).sum(-1)
        kl = kl.unsqueeze(-1) if model.dim() else kl.view(())
        score = (model - base).abs_() * kl
        places = [int(share * (score.numel() - 1)) for share in (0.25, 0.5, 0.75)]
        low, middle, high = np.partition(score.flatten().numpy(), places)[places].tolist()
        return torch.where(score < middle + 1.5 * (high - low), base, model)


def _number(rule: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ConfigError(f"{rule}: {name} must be a number, got {value!r}")
    return float(value)
