"""TIES: trim, elect a sign, and average what agrees; and what all rules share that drop entries before they add up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.merge.rule import Block, Rule, rules, total
from polytask.merge.select import find, lower, number, share, trim, trim_at, upper


@dataclass(frozen=True)
class Sparse(Rule):
    """Differences that lose entries, are added up or vote, and go onto the base.

    Args:
        density: the share of entries that are kept, also for each model its own.
        scale: what the sum is multiplied by.
        normalize: divide by the weights that took part.
        compat: ``mergekit`` counts, weights and rescales as mergekit does.
    """

    density: float = 1.0
    scale: float = 1.0
    normalize: bool = False
    compat: str = ""

    each: ClassVar[tuple[str, ...]] = ("density",)
    votes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        within(self.name, "density", self.density)
        one_of(self.name, "compat", self.compat, ("", "mergekit"))

    def sparse(self, block: Block, model: int, delta: Tensor) -> Tensor:
        """A difference without what is dropped. It is fresh and may be changed in place."""
        raise NotImplementedError

    def merge(self, block: Block) -> Tensor:
        assert block.base is not None
        there = [i for i, weight in enumerate(block.weights) if weight]
        if not there:
            return block.base
        for i in there:
            within(self.name, "density", block.settings["density"][i], block.name)
        deltas = [self.sparse(block, i, block.tensors[i] - block.base) for i in there]
        weights = [block.weights[i] for i in there]
        if self.votes:
            change = elect(deltas, weights, self.normalize, weighted=self.compat == "mergekit")
        else:
            whole = sum(weights) if self.normalize else 1.0
            change = total(deltas, [w / (whole if abs(whole) >= 1e-8 else 1.0) for w in weights])
        return change.mul_(self.scale).add_(block.base)


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, weighted: bool = False) -> Tensor:
    """The weighted mean (or sum) of the entries that have the sign of their sum, a sum of nothing being positive.

    Args:
        deltas: fresh tensors, which are used up.
        weights: of each.
        normalize: divide by the weights of what agrees.
        weighted: weights count in the vote, also.
    """
    if weighted:
        for delta, weight in zip(deltas, weights, strict=True):
            delta.mul_(weight)
    sign = deltas[0].clone()
    for delta in deltas[1:]:
        sign.add_(delta)
    sign = torch.copysign(torch.ones(()), sign)  # entries that cancel add up to a positive zero
    out, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.mul_(sign).clamp_min_(0)
        out.add_(agrees, alpha=1.0 if weighted else weight)
        if normalize:
            divisor.add_(agrees.sign_(), alpha=weight)
    out.mul_(sign)
    return out.div_(divisor.masked_fill_(divisor == 0, 1.0)) if normalize else out


@dataclass(frozen=True)
class Cut:
    """Where a model's kept entries begin: found in steps.

    Attributes:
        count: how many entries there are.
        bucket: the upper bits of the least that is kept.
        rank: what is kept begins at this rank, in the bucket and later among the equal ones.
        value: the least that is kept.
        places: how many of the equal ones are kept of each block; None keeps all.
    """

    count: int
    bucket: int
    rank: int
    value: float = 0.0
    places: dict[tuple[str, int], int] | None = None


@rules.register("ties")
@dataclass(frozen=True)
class Ties(Sparse):
    """Keeps the entries of largest size of each difference, elects a sign for each place (of the sum), and adds the mean of the
    kept entries that have it: ``b + scale * sum_i w_i t_i [sign t_i = s] / sum_i w_i [sign t_i = s]``, ``s = sign(sum_i t_i)``.

    Args:
        density: the share that is kept of each difference, exactly and at least one; also for each model its own.
        scale: lambda (``lambda`` in a mergekit file).
        normalize: divide by the weights of what agrees.
        scope: what is trimmed as one vector: ``global``, all tensors of equal density, or ``tensor``, each for itself.
        compat: ``mergekit`` trims each tensor, rounds counts down, and weighs before the vote.

    Reference: Yadav et al., TIES-merging, arXiv 2306.01708. Differs from its code, which keeps one entry more, and whose places
    where the kept entries cancel take the sign of most others (they are positive here).

    Raises:
        ConfigError: a density outside 0 to 1, or an unknown scope.
    """

    density: float = 0.2
    normalize: bool = True
    scope: str = "global"

    votes: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2306.01708"
    exceptions: ClassVar[dict[str, str]] = {
        "alone": "four fifths of a difference are trimmed",
        "equal": "four fifths of a difference are trimmed",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.name, "scope", self.scope, ("global", "tensor"))

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        return ("tensor", 0) if self.scope == "tensor" or self.compat else ("element", 3)

    def sparse(self, block: Block, model: int, delta: Tensor) -> Tensor:
        density = block.settings["density"][model]
        if density >= 1:
            return delta
        if density <= 0:
            return delta.zero_()
        if block.facts is None:
            return trim(delta, max(1, share(density, delta.numel(), floor=bool(self.compat))))
        cut: Cut = block.facts[model, density]
        return trim_at(delta, cut.value, None if cut.places is None else cut.places[block.name, block.start])

    def survey(self, step: int, block: Block) -> Any:
        said: list[tuple[tuple[int, float], Tensor]] = []
        for model, delta in enumerate(block.deltas):
            key = (model, within(self.name, "density", block.settings["density"][model], block.name))
            cut: Cut | None = block.facts and block.facts[key]
            sizes = delta.abs_()
            if cut is None:
                said.append((key, upper(sizes)))
            elif step == 1:
                said.append((key, lower(sizes, cut.bucket)))
            elif cut.places is not None:
                said.append((key, (sizes == cut.value).count_nonzero()))
        return block.start, said

    def settle(self, step: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        if step == 2:
            return self._places(found, facts)
        counts: dict[tuple[int, float], Tensor] = {}
        for _, (_, said) in found:
            for key, seen in said:
                counts[key] = counts[key].add_(seen) if key in counts else seen
        cuts = {}
        for key, seen in counts.items():
            if step == 0:
                count = int(seen.sum())
                rank = count - max(1, share(key[1], count))
                cuts[key] = Cut(count, *find(seen, rank))
            else:
                old: Cut = facts[key]
                low, rank = find(seen, old.rank)
                value = number(old.bucket, low)
                # equal ones stay out where the place of some must decide; zeros change nothing
                cuts[key] = replace(old, rank=rank, value=value, places={} if rank and value else None)
        return cuts

    def _places(self, found: Iterable[tuple[str, Any]], cuts: dict[tuple[int, float], Cut]) -> Any:
        """The first of the equal ones are kept; a block must know how many of its own."""
        if all(cut.places is None for cut in cuts.values()):
            return cuts
        seen: dict[tuple[int, float], list[tuple[tuple[str, int], int]]] = {}
        for name, (start, said) in found:
            for key, equal in said:
                seen.setdefault(key, []).append(((name, start), int(equal)))
        for key, blocks in seen.items():
            places = cuts[key].places
            assert places is not None
            left = sum(equal for _, equal in blocks) - cuts[key].rank
            for place, equal in blocks:
                places[place] = min(equal, left)
                left -= places[place]
        return cuts


def within(rule: str, setting: str, value: Any, where: str = "") -> float:
    """A share. Raises `ConfigError` outside 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        at = f" at {where}" if where else ""
        raise ConfigError(f"{setting} of {rule} must be from 0 to 1, got {value!r}{at}; it is the share of entries")
    return float(value)


def one_of(rule: str, setting: str, value: str, allowed: Sequence[str]) -> None:
    """Raises `ConfigError` for what is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{setting} of {rule} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
