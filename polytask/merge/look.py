"""How task vectors stand to each other: cosines, and signs that conflict, in all and layer by layer.

Shapes: N models, tau_i their differences to a base; P numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError

from .adapters import Changes
from .engine import Job
from .source import Source
from .together import Stand, bare, check_independent, together

ELEMENTS = 1 << 18  # numbers of one model in a block: all models' lie in float64 beside each other
OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Part:
    """What was counted in a layer, or in everything.

    Attributes:
        name: ``layers.0``, or what it is called.
        cosine: [N, N] of the task vectors; None where one of the two is zero.
        norms: [N] their lengths.
        numbers: how many numbers there are.
        shared: share of the numbers that at least two of the models change, from 0 to 1.
        conflict: share of these whose signs differ, from 0 to 1; None where no number is shared.
        chance: what ``conflict`` would be if the signs were drawn independently.
    """

    name: str
    cosine: list[list[float | None]]
    norms: list[float]
    numbers: int
    shared: float
    conflict: float | None
    chance: float | None


@dataclass(frozen=True)
class Look:
    """What `look` found.

    Attributes:
        names: of the models.
        whole: of everything.
        layers: of each layer in its order, and what is outside of them last.
    """

    names: list[str]
    whole: Part
    layers: list[Part]

    def as_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return asdict(self)


class _Sums:
    """Sums in float64 that blocks are added to."""

    def __init__(self, count: int) -> None:
        self.dots = torch.zeros(count, count, dtype=torch.float64)
        self.numbers = self.shared = self.conflicts = 0
        self.chance = 0.0

    def add(self, vectors: Tensor) -> None:
        """Adds a block [N, P] of all models."""
        self.dots += vectors @ vectors.T
        up, down = (vectors > 0).sum(0), (vectors < 0).sum(0)
        changed = up + down
        self.numbers += vectors.shape[1]
        self.shared += int((changed > 1).sum())
        self.conflicts += int(((up > 0) & (down > 0)).sum())
        # k independent signs are all equal with probability 2^(1-k)
        self.chance += float((1 - torch.exp2(1.0 - changed[changed > 1])).sum(dtype=torch.float64))

    def join(self, other: _Sums) -> None:
        self.dots += other.dots
        self.numbers, self.shared = self.numbers + other.numbers, self.shared + other.shared
        self.conflicts, self.chance = self.conflicts + other.conflicts, self.chance + other.chance

    def part(self, name: str) -> Part:
        norms = self.dots.diagonal().sqrt()
        scale = norms[:, None] * norms[None, :]
        cosine = (self.dots / scale).clamp(-1, 1).tolist()
        count = len(norms)
        return Part(
            name=name,
            cosine=[[cosine[i][j] if float(scale[i, j]) else None for j in range(count)] for i in range(count)],
            norms=norms.tolist(),
            numbers=self.numbers,
            shared=self.shared / self.numbers if self.numbers else 0.0,
            conflict=self.conflicts / self.shared if self.shared else None,
            chance=self.chance / self.shared if self.shared else None,
        )


def look(models: Sequence[Source], base: Source, elements: int = ELEMENTS) -> Look:
    """Compares the models' differences to a base, which are read block by block: memory does not grow with them.

    Args:
        models: one or more.
        base: what differences are taken to.
        elements: numbers of one model in a block.

    Raises:
        MergeError: the models do not fit the base, or have entries that are no numbers.
    """
    job = Job(models, "linear", base=base, elements=elements)
    sums: dict[tuple[str, int], _Sums] = {}
    with torch.no_grad():
        for name in (n for n in job.shapes if not job.copied(n)):
            own = sums.setdefault(_place(job, name), _Sums(len(models)))
            for start, stop in job.blocks(name):
                own.add(torch.stack([d.flatten().double() for d in job.block(name, start, stop, None).deltas]))
    whole = _Sums(len(models))
    for part in sums.values():
        whole.join(part)
    stacks = list(dict.fromkeys(stack for stack, _ in sums))
    order = sorted(sums, key=lambda key: (key[1] < 0, stacks.index(key[0]), key[1]))
    parts = [sums[key].part(f"{key[0]}.{key[1]}" if key[1] >= 0 else OUTSIDE) for key in order]
    return Look(list(job.names), whole.part("all"), parts)


def look_adapters(adapters: Sequence[Adapter], base: Source | None = None, elements: int = ELEMENTS) -> Look:
    """The same of what adapters change: sites that one of them lacks count as unchanged.

    Args:
        adapters: of forms that have dense changes, for one base.
        base: the adapters' base, for forms whose changes depend on its weights (DoRA).
        elements: numbers of one adapter in a block.

    Raises:
        MergeError: the adapters do not fit together, or have no dense change.
    """
    union = together(adapters)
    if base is None:
        for adapter in adapters:
            check_independent(adapter, union)
    stand = base or Stand(bare(union))
    return look([Changes(adapter, stand, union.shapes) for adapter in adapters], Stand(union.shapes), elements)


def independent(adapters: Sequence[Adapter]) -> bool:
    """Whether what the adapters change is the same whatever the base's weights are."""
    union = together(adapters)
    try:
        for adapter in adapters:
            check_independent(adapter, union)
    except MergeError:
        return False
    return True


def _place(job: Job, name: str) -> tuple[str, int]:
    """The stack and the layer of a tensor; -1 outside of them."""
    place = job.layers.place(name)
    if place is None:
        return "", -1
    return f".{name}".partition(f".{place[0]}.")[0].lstrip("."), place[0]
