"""A merge that is a weighted sum, without making it: the adapters stay as they are, and a mix weighs them at each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError
from polytask.core.form import Call, Weights
from polytask.core.mix import Mix
from polytask.core.site import Site

from .adapters import job_of
from .engine import surveyed
from .source import Source
from .together import tensor_of


class Summed(Mix):
    """Numbers for each adapter that differ between sites, the same for every input.

    Args:
        weights: site to adapter name to weight. An adapter that a site does not name does not act there.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, float]]) -> None:
        self.weights = {site: {n: float(w) for n, w in own.items() if w} for site, own in weights.items()}
        self._names = tuple(dict.fromkeys(name for own in weights.values() for name in own))

    def names(self) -> tuple[str, ...]:
        return self._names

    def fixed(self, site: Site, names: tuple[str, ...]) -> dict[str, float]:
        own = self.weights.get(site.name, {})
        return {name: weight for name, weight in own.items() if name in names}

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        here = self.fixed(site, names)
        return Weights(tuple(here), tuple(here.values()))

    def __repr__(self) -> str:
        return f"Summed({len(self.weights)} sites of {', '.join(self._names)})"


def summed(
    adapters: Sequence[Adapter],
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Source | Adapter | None = None,
    seed: int = 0,
    each: Mapping[str, Sequence[Any]] | None = None,
    companions: Sequence[Source] | None = None,
    **settings: Any,
) -> Summed:
    """The mix that acts as `merge_adapters` would make it, of adapters that are attached under their own names.

    Args:
        adapters: as `merge_adapters` takes them, each with a name of its own.
        method: a rule whose result is a weighted sum: linear, task_arithmetic, model_stock, karcher, ...
        weights: one for each adapter.
        base: as there; an adapter that differences are taken to is weighed too.
        seed: of everything random.
        each: settings of each adapter, by name.
        companions: what the rule reads beside each adapter.
        settings: of the rule.

    Raises:
        MergeError: the rule is no weighted sum, a site's tensors would have different weights, or names are not unique.
    """
    everything = [*adapters, *([base] if isinstance(base, Adapter) else [])]
    names = [adapter.name for adapter in everything]
    if not all(names) or len(set(names)) != len(names):
        raise MergeError(f"a mix knows adapters by their names, and these have {names}; give each a name of its own")
    job, union = job_of(adapters, method, weights, base, seed, each, companions, settings)
    facts = surveyed(job)
    found: dict[str, dict[str, float]] = {}
    for name, site in union.sites.items():
        for parameter in union.parameters[name]:
            tensor = tensor_of(site, parameter)
            factors = job.rule_of(tensor).factors(job.frame(tensor, facts))
            if factors is None:
                raise MergeError(
                    f"{method} is no weighted sum of the adapters, so no mix gives it; say as_='lora', 'full' or 'sparse'"
                )
            own = [*factors, *([1.0 - sum(factors)] if isinstance(base, Adapter) else [])]
            weighed = dict(zip(names, map(float, own), strict=True))
            if found.setdefault(name, weighed) != weighed:
                raise MergeError(
                    f"at {name!r} the weights of {' and '.join(union.parameters[name])} differ, and a mix has one for a site; "
                    "say as_='full'"
                )
    return Summed(found)
