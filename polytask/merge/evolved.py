"""What an evolution of merged models makes: the space of its genomes, its archives, and the model that is aggregated in the end.

A genome is a vector: a coefficient c_i for each model's difference t_i, and an addition m_ij to each singular value of its
matrices: ``sum_i c_i t_i + U_i diag(m_i * S_i) V_i``. Children are sums of genomes, so no genome grows and no model is kept.

Shapes: N models, K numbers in a genome, r_i singular values of a matrix's difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError, listing
from polytask.core.form import Patch
from polytask.core.head import Head
from polytask.core.model import Model
from polytask.core.storage import write, writing

from .changed import adapter_of, patch_at, places_of, thin_of
from .heads import heads_of
from .pool import Change, Pool
from .source import Source

CARD, GENOMES = "archives.json", "genomes.safetensors"


@dataclass(frozen=True)
class Directions:
    """A matrix's singular directions in one model's difference: ``U V`` is the difference as it is stored.

    Attributes:
        model: which.
        U: [rows, r], each column multiplied by its singular value.
        V: [r, columns].
        at: where the additions to the singular values stand in a genome.
    """

    model: int
    U: Tensor
    V: Tensor
    at: slice


class Space:
    """The models that genomes stand for.

    Args:
        pool: whose differences are mixed.

    Attributes:
        size: K.
        own: for each model the part of a genome that holds the additions to its singular values.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._within: dict[str, list[Directions]] = {name: [] for name in pool.changes}
        self.size = len(pool)
        self.own: list[slice] = []
        for i in range(len(pool)):
            start = self.size
            for name, change in pool.changes.items():
                found = directions(change, i, len(pool)) if change.base.dim() == 2 else None
                if found is not None:
                    at = slice(self.size, self.size + len(found[1]))
                    self._within[name].append(Directions(i, *found, at))
                    self.size = at.stop
            self.own.append(slice(start, self.size))

    def seed(self, i: int) -> Tensor:
        """The genome of model i, [K]."""
        return torch.nn.functional.one_hot(torch.tensor(i), self.size).float()

    def change(self, name: str, genome: Tensor) -> Tensor:
        """What a genome adds to a tensor."""
        change = self.pool.changes[name]
        genome = genome.to(change.base)
        total = change.sum(genome[: len(self.pool)])
        for d in self._within[name]:
            if bool(genome[d.at].any()):
                total = total + (d.U * genome[d.at]) @ d.V
        return total

    def compose(self, genome: Tensor) -> dict[str, Tensor]:
        """The tensors of a genome's model, in the base's types, for `Pool.acting`."""
        changes = self.pool.changes
        return {name: self.pool.cast(name, changes[name].base + self.change(name, genome)) for name in changes}

    @torch.no_grad()
    def patches(self, genome: Tensor) -> list[Patch]:
        """The patches of an adapter that changes the base as a genome says: where all models have factors, factors again."""
        found = []
        for place in places_of(self.pool):
            name = place.tensors.get(place.weight, "")
            thin = bool(name) and thin_of(place, self.pool.changes[name]) is not None
            factors = self._factors(name, genome) if thin else None
            rest = {p: t for p, t in place.tensors.items() if factors is None or p != place.weight}
            found.append(patch_at(place, factors, {p: self.change(t, genome).cpu() for p, t in rest.items()}))
        return found

    def _factors(self, name: str, genome: Tensor) -> tuple[Tensor, Tensor]:
        """A [R, i] and B [o, R] of a tensor whose differences are all thin: the directions of all models."""
        change = self.pool.changes[name]
        genome = genome.to(change.base)
        own = [(d.U * (genome[d.model] + genome[d.at]), d.V) for d in self._within[name]]
        if change.turned:
            own = [(V.mT, U.mT) for U, V in own]
        return torch.cat([V for _, V in own]), torch.cat([U for U, _ in own], 1)


def directions(change: Change, i: int, count: int) -> tuple[Tensor, Tensor] | None:
    """U with the singular values, and V, of model i's difference, of ``count`` models; None where it has none."""
    mine = change.ranks == i
    if change.A is not None and change.B is not None and bool(mine.any()):
        left, upper = torch.linalg.qr(change.B[:, mine].double())
        right, lower = torch.linalg.qr(change.A[mine].double().mT)
        u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        u, v = left @ u, v @ right.mT
        u, v = (v.mT, u.mT) if change.turned else (u, v)
    else:
        u, s, v = torch.linalg.svd(change.of(i, count).double(), full_matrices=False)
    kept = s > 1e-6 * s.max()  # what is only rounding has no direction
    if not bool(kept.any()):
        return None
    return (u[:, kept] * s[kept]).float(), v[kept].float()


@dataclass
class Evolved:
    """What an evolution found.

    Attributes:
        adapter: the model that is aggregated from the archives' elites, as an adapter of the base.
        genome: its genome, [K].
        genomes: of every elite, by its number.
        archives: of each task the grid and what is in its cells: plain values.
        lineage: of every individual its parents, weights, mutation and scores: plain values.
        about: settings and scores: plain values.
    """

    adapter: Adapter
    genome: Tensor
    genomes: dict[int, Tensor]
    archives: list[dict[str, Any]]
    lineage: list[dict[str, Any]]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``archives.json`` has them."""
        return {"format": 1, "archives": self.archives, "lineage": self.lineage, "about": self.about}

    def individual(self, number: int, model: Model, inputs: Sequence[Adapter | Source]) -> Adapter:
        """An elite as an adapter.

        Args:
            number: of the individual.
            model: the base.
            inputs: the models that the evolution began with, in their order.

        Raises:
            MergeError: there is no such elite, or the models are others.
        """
        if number not in self.genomes:
            raise MergeError(
                f"individual {number} is no elite; these are: {listing(map(str, sorted(self.genomes)), 12)}"
            )
        with Pool(model, inputs, []) as pool:
            space = Space(pool)
            if space.size != len(self.genome):
                raise MergeError(
                    f"the genomes have {len(self.genome)} numbers, and these models give {space.size}; give those that the "
                    "evolution began with, in their order"
                )
            heads, tasks = of_inputs(inputs)
            patches = space.patches(self.genomes[number])
            return adapter_of(model, patches, f"individual-{number}", heads=heads, tasks=tasks)

    def save(self, folder: str | Path) -> Path:
        """Writes the adapter, and beside it the archives with their heat maps' values, the lineage and the genomes.

        Raises:
            StorageError: the folder cannot be written.
        """
        from safetensors.torch import save as encode

        folder = self.adapter.save(folder)
        tensors = {"final": self.genome, **{str(number): genome for number, genome in self.genomes.items()}}
        with writing(folder):
            write(folder / GENOMES, encode({name: t.contiguous() for name, t in tensors.items()}))
            write(folder / CARD, (json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Evolved:
        """Reads what `save` wrote.

        Raises:
            MergeError: the folder is none of these, or damaged.
            AdapterError: the adapter is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder).expanduser()
        try:
            said = json.loads((folder / CARD).read_text(encoding="utf-8"))
            genomes = load_file(folder / GENOMES)
            final = genomes.pop("final")
            found = {int(number): genome for number, genome in genomes.items()}
            parts = said["archives"], said["lineage"], said["about"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise MergeError(
                f"{folder} holds no archives ({str(error).splitlines()[0]}); write them with the method cycleqd"
            ) from error
        return cls(Adapter.load(folder), final, found, *parts)


def of_inputs(inputs: Sequence[Adapter | Source]) -> tuple[dict[str, Head], list[dict[str, Any]]]:
    """The heads of adapters, and what their cards say of tasks."""
    adapters = [item for item in inputs if isinstance(item, Adapter)]
    tasks: list[dict[str, Any]] = []
    for adapter in adapters:
        tasks += [task for task in adapter.card.tasks if task not in tasks]
    return heads_of(adapters), tasks
