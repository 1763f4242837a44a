"""Adapters from changes of a network's tensors: thin factors where a weight changes by them, dense tensors everywhere else.

Shapes: A [r, i], B [o, r] with the change B A, as `polytask.merge.factors` has them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import MergeError, listing
from polytask.core.form import Patch
from polytask.core.head import Head
from polytask.core.model import Model
from polytask.core.site import Site
from polytask.forms.full import Full
from polytask.forms.lora import LoRA
from polytask.forms.union import Union

from .card import versions
from .patches import dense_patch, lora_patch
from .pool import Change, Pool

PLACES = ("linear", "conv", "embedding", "norm", "experts", "parameter")  # sites whose parameters are somebody's change
THIN = ("linear", "conv", "embedding")  # those where a matrix changes by thin factors

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Place:
    """A site where models change something.

    Attributes:
        site: the site.
        tensors: of the site's parameters those that change, with their names in the network.
    """

    site: Site
    tensors: Mapping[str, str]

    @property
    def weight(self) -> str:
        """The parameter that thin factors can change; empty where there is none."""
        name = self.site.param or "weight"
        return name if self.site.kind in THIN and name in self.tensors else ""

    @property
    def size(self) -> tuple[int, int]:
        """d_out and d_in of the weight as a matrix."""
        site = self.site
        return (site.shape[0], math.prod(site.shape[1:])) if site.kind == "conv" else (site.d_out, site.d_in)

    @property
    def most(self) -> int:
        """The largest rank that a change of the weight can have."""
        return min(self.size)


def places_of(pool: Pool) -> list[Place]:
    """Where the pool's models change something: every site that reads a tensor that changes, also where two share it.

    Raises:
        MergeError: a tensor that changes belongs to no site.
    """
    module = pool.model.module
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found, seen = [], set()
    for site in pool.model.sites:
        if site.kind not in PLACES:
            continue
        held = module.get_submodule(site.path)._parameters
        own = {p: held.get(p) for p in ([site.param] if site.param else ["weight", "bias"])}
        tensors = {p: name for p, t in own.items() if t is not None and (name := names[id(t)]) in pool.changes}
        if tensors:
            found.append(Place(site, tensors))
            seen |= set(tensors.values())
    lost = [name for name in pool.changes if name not in seen]
    if lost:
        raise MergeError(
            f"{listing(lost, 4)} change, and belong to no site where an adapter can act; merge models that leave them as the "
            "base has them"
        )
    return found


def thin_of(place: Place, change: Change) -> tuple[Tensor, Tensor] | None:
    """All models' factors of a weight side by side, [R, i] and [o, R]; None where one changes it otherwise."""
    if change.dense is not None or change.A is None or change.B is None or place.site.kind != "linear":
        return None
    return change.A, change.B


def patch_at(place: Place, factors: Factors | None, dense: Mapping[str, Tensor]) -> Patch:
    """The patch of a place.

    Args:
        place: where.
        factors: of the weight's change; None where it is dense, or where the weight does not change.
        dense: the changes of the other parameters.
    """
    site = place.site
    if factors is None:
        form = Full(parameters="all" if site.param or len(dense) > 1 else next(iter(dense)))  # type: ignore[arg-type]
        patch = dense_patch(form, site, dense)
        assert patch is not None
        return patch
    lora = lora_patch(site, *factors)
    if not dense:
        return lora
    both = Union(lora.form, Full(parameters="bias"), sites=("all", "all")).patch(site)
    both.load({"p0_A": lora.A, "p0_B": lora.B, "p1_bias": dense["bias"].float().contiguous().clone()})
    return both


def adapter_of(
    model: Model,
    patches: Sequence[Patch],
    name: str,
    *,
    heads: Mapping[str, Head] | None = None,
    tasks: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
) -> Adapter:
    """An adapter of patches of several forms, for a base.

    Args:
        model: the base.
        patches: in the order of the sites.
        name: of the adapter.
        heads: by task.
        tasks: what the card says of them.
        parents: hashes of the adapters that it was made from.
        about: what the card says of how it was made.
    """
    loras = [patch.form for patch in patches if isinstance(patch.form, LoRA)]
    general = max(loras, key=lambda form: form.rank) if loras else patches[0].form
    base = {"name": model.name, "source": model.source or model.name}
    base |= {"fingerprint": model.fingerprint, "kind": model.kind}
    card = Card(
        base=base,
        tasks=[dict(task) for task in tasks],
        training={"merge": dict(about or {})},
        parents=list(parents),
        versions=versions(),
    )
    own = copy.deepcopy(dict(heads or {}))
    return Adapter(general, {patch.site.name: patch for patch in patches}, own, card, name).trainable(False)


@torch.no_grad()
def weighted(pool: Pool, places: Sequence[Place], weights: Tensor) -> list[Patch]:
    """The patches of ``sum_i w_i t_i``, exactly: of all models' factors, or dense where those would not be fewer numbers.

    Args:
        pool: the models.
        places: of the result.
        weights: [N].
    """

    def thin(place: Place, change: Change) -> Factors | None:
        found = thin_of(place, change)
        if found is None or len(found[0]) * sum(place.size) >= math.prod(place.size):
            return None
        return found[0], found[1] * weights[change.ranks]

    return [made(pool, place, thin, lambda change: change.sum(weights)) for place in places]


def made(
    pool: Pool,
    place: Place,
    thin: Callable[[Place, Change], Factors | None],
    dense: Callable[[Change], Tensor],
) -> Patch:
    """The patch of a place whose weight has the factors that ``thin`` gives, or else, as all else, the change of ``dense``."""
    changes = {parameter: pool.changes[name] for parameter, name in place.tensors.items()}
    factors = thin(place, changes[place.weight]) if place.weight else None
    rest = {p: dense(change).cpu() for p, change in changes.items() if factors is None or p != place.weight}
    return patch_at(place, factors, rest)
