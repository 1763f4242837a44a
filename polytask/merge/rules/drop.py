"""Rules that drop entries of differences, by chance (DARE, DELLA) or for their size (Breadcrumbs), before adding or voting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, rules
from polytask.merge.select import largest, masked, share

from .elect import Sparse, one_of, within

Grain = tuple[Literal["element", "row", "tensor"], int]
RANDOM = {"alone": "entries are dropped by chance", "equal": "entries of equal models are dropped at different places"}


def keep_norm(delta: Tensor, mask: Tensor) -> Tensor:
    """The kept entries, scaled so that the sum of all sizes stays what it was."""
    before = float(delta.abs().sum())
    masked(delta, mask)
    after = float(delta.abs().sum())
    return delta if min(before, after) < 1e-7 else delta.mul_(before / after)


@rules.register("dare_linear")
@dataclass(frozen=True)
class DareLinear(Sparse):
    """Drops entries of each difference by chance, divides the others by the share that is kept, and adds them up:
    ``b + scale * sum_i w_i m_i t_i / density``, ``m ~ Bernoulli(density)``.

    Args:
        density: the share that is kept (1 - p), also for each model its own.
        scale: what the sum is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the sum of the weights.
        rescale: divide by the density, which keeps the expectation.
        compat: ``mergekit`` scales each tensor so that the sum of its sizes stays, in place of the division.

    Reference: Yu et al., Language models are super Mario, arXiv 2311.03099.

    Raises:
        ConfigError: a density outside 0 to 1.
    """

    density: float = 0.5
    rescale: bool = True

    paper: ClassVar[str] = "arXiv 2311.03099"
    exceptions: ClassVar[dict[str, str]] = RANDOM

    def plan(self) -> Grain:
        return ("tensor" if self.compat and self.rescale else "element"), 0

    def sparse(self, block: Block, model: int, delta: Tensor) -> Tensor:
        density = block.settings["density"][model]
        if density >= 1:
            return delta
        mask = block.drawn(model, density)
        if not self.rescale or density <= 0:
            return masked(delta, mask)
        return keep_norm(delta, mask) if self.compat else masked(delta.div_(density), mask)


@rules.register("dare_ties")
@dataclass(frozen=True)
class DareTies(DareLinear):
    """Drops entries of each difference by chance, divides the others by the share that is kept, and adds those that have the sign
    of their sum: ``b + scale * sum_i w_i d_i [sign d_i = sign(sum_j d_j)]``, ``d_i = m_i t_i / density``.

    Args:
        density: the share that is kept (1 - p), also for each model its own.
        scale: what the sum is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the weights of what agrees, which makes it the mean of TIES.
        rescale: divide by the density.
        compat: ``mergekit`` keeps each tensor's sum of sizes in place of the division, and weighs before the vote.

    Reference: Yu et al., Language models are super Mario, arXiv 2311.03099, before TIES, arXiv 2306.01708.

    Raises:
        ConfigError: a density outside 0 to 1.
    """

    votes: ClassVar[bool] = True


@rules.register("della_linear")
@dataclass(frozen=True)
class DellaLinear(Sparse):
    """As DARE, but entries that are larger in their row are kept more often, from ``density - epsilon`` for the least to
    ``density + epsilon`` for the largest, linear in the rank, and each is divided by its own chance.

    Args:
        density: the mean chance to be kept, also for each model its own.
        epsilon: how far the chances go from it; also for each model its own.
        scale: what the sum is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the sum of the weights.
        rescale: divide by the chances, which keeps the expectation.
        compat: ``mergekit`` scales each tensor so that the sum of its sizes stays, in place of the divisions.

    Reference: Deep et al., DELLA-merging, arXiv 2406.11617. A row of one entry has the chance ``density``.

    Raises:
        ConfigError: chances that leave 0 to 1.
    """

    density: float = 0.7
    epsilon: float = 0.15
    rescale: bool = True

    grain: ClassVar[Literal["element", "row", "tensor"]] = "row"
    each: ClassVar[tuple[str, ...]] = ("density", "epsilon")
    paper: ClassVar[str] = "arXiv 2406.11617"
    exceptions: ClassVar[dict[str, str]] = RANDOM

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self.name, "epsilon", self.epsilon)

    def plan(self) -> Grain:
        return ("tensor" if self.compat and self.rescale else "row"), 0

    def sparse(self, block: Block, model: int, delta: Tensor) -> Tensor:
        density, epsilon = (float(block.settings[name][model]) for name in ("density", "epsilon"))
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        if density - epsilon <= 0 or density + epsilon > 1:
            raise ConfigError(
                f"{self.name} keeps entries of {block.name} with chances from {density - epsilon:g} to {density + epsilon:g}, "
                "which must be above 0 and at most 1; lower epsilon or change density"
            )
        chances = chances_of(delta, density, epsilon)
        mask = block.uniform(model) < chances
        if not self.rescale:
            return masked(delta, mask)
        return keep_norm(delta, mask) if self.compat else masked(delta.div_(chances), mask)


def chances_of(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """How likely each entry is kept: linear in the rank of its size in its row."""
    width = delta.shape[-1] if delta.dim() else 1
    if width < 2:
        return torch.full_like(delta, density)
    order = np.argsort(delta.abs().numpy(), axis=-1)
    ranks = np.empty_like(order, dtype=np.float32)
    steps = np.linspace(density - epsilon, density + epsilon, width, dtype=np.float32)
    np.put_along_axis(ranks, order, np.broadcast_to(steps, order.shape), axis=-1)
    return torch.from_numpy(ranks)


@rules.register("della")
@dataclass(frozen=True)
class Della(DellaLinear):
    """Drops entries of each difference as `della_linear` does, more often where they are small in their row, then elects signs
    and adds the mean of what agrees, as TIES does.

    Args:
        density: the mean chance to be kept, also for each model its own.
        epsilon: how far the chances go from it; also for each model its own.
        scale: what the mean is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the weights of what agrees.
        rescale: divide by the chances.
        compat: ``mergekit`` keeps each tensor's sum of sizes in place of the divisions, and weighs before the vote.

    Reference: Deep et al., DELLA-merging, arXiv 2406.11617. A row of one entry has the chance ``density``.

    Raises:
        ConfigError: chances that leave 0 to 1.
    """

    normalize: bool = True

    votes: ClassVar[bool] = True


@rules.register("breadcrumbs")
@dataclass(frozen=True)
class Breadcrumbs(Sparse):
    """Drops the largest entries of each tensor's difference (the share ``gamma``), keeps the next (the share ``density``), drops
    the rest, and adds up: ``b + scale * sum_i w_i m_i t_i``.

    Args:
        density: the share that is kept, exactly and at least one; also for each model its own.
        gamma: the share of largest entries that is dropped, less where the density leaves less; also for each model its own.
        scale: what the sum is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the sum of the weights.
        scope: what is counted: each whole ``tensor``, as in the paper, or each ``row``, as in its code.
        compat: ``mergekit`` counts in tensors and rounds down, also to nothing.

    Reference: Davari and Belilovsky, Model breadcrumbs, arXiv 2312.06795.

    Raises:
        ConfigError: a share outside 0 to 1, or an unknown scope.
    """

    density: float = 0.15
    gamma: float = 0.01
    scope: str = "tensor"

    grain: ClassVar[Literal["element", "row", "tensor"]] = "tensor"
    each: ClassVar[tuple[str, ...]] = ("density", "gamma")
    paper: ClassVar[str] = "arXiv 2312.06795"
    exceptions: ClassVar[dict[str, str]] = {
        "alone": "most entries are dropped",
        "equal": "most entries are dropped",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self.name, "gamma", self.gamma)
        one_of(self.name, "scope", self.scope, ("tensor", "row"))

    def plan(self) -> Grain:
        return ("row" if self.scope == "row" and not self.compat else "tensor"), 0

    def sparse(self, block: Block, model: int, delta: Tensor) -> Tensor:
        density = block.settings["density"][model]
        gamma = within(self.name, "gamma", block.settings["gamma"][model], block.name)
        if density >= 1:
            return delta
        floor = bool(self.compat)
        rows = self.scope == "row" and not floor and delta.dim() > 1
        count = delta.shape[-1] if rows else delta.numel()
        kept = share(density, count, floor=floor)
        top = min(int(gamma * count) if floor else round(gamma * count), count - kept)
        sizes = delta.abs()
        if not rows:
            return masked(delta, largest(sizes, top + kept).logical_xor_(largest(sizes, top)))
        order = sizes.argsort(-1, descending=True)[..., top : top + kept]
        return delta.mul_(torch.zeros_like(delta).scatter_(-1, order, 1.0))


@rules.register("breadcrumbs_ties")
@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Masks each tensor's difference as `breadcrumbs` does, without its largest and its small entries, then adds the entries that
    have the sign of their sum.

    Args:
        density: the share that is kept, exactly and at least one; also for each model its own.
        gamma: the share of largest entries that is dropped, less where the density leaves less; also for each model its own.
        scale: what the sum is multiplied by (``lambda`` in a mergekit file).
        normalize: divide by the weights of what agrees, which makes it the mean of TIES.
        scope: what is counted: each whole ``tensor``, or each ``row``.
        compat: ``mergekit`` counts in tensors, rounds down, also to nothing, and weighs before the vote.

    Reference: Davari and Belilovsky, Model breadcrumbs, arXiv 2312.06795, before TIES, arXiv 2306.01708.

    Raises:
        ConfigError: a share outside 0 to 1, or an unknown scope.
    """

    votes: ClassVar[bool] = True
