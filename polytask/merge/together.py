"""Which sites several adapters have together, and whether they fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError, listing
from polytask.core.form import Patch
from polytask.core.site import Site
from polytask.forms.full import DensePatch

from .source import Adapted, Source


class Stand(Source):
    """Stands where a base would: tensors of its shapes, with one value everywhere."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], value: float = 0.0, name: str = "no base") -> None:
        self.name, self._shapes, self.value = name, dict(shapes), value

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        whole = torch.full((), self.value).expand(self._shapes[name])
        return whole if whole.dim() == 0 else whole[start:stop]


@dataclass
class Together:
    """The sites of all adapters, and the parameters that change there."""

    sites: dict[str, Site] = field(default_factory=dict)
    parameters: dict[str, list[str]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            tensor_of(site, parameter): shape_of(site, parameter)
            for name, site in self.sites.items()
            for parameter in self.parameters[name]
        }


def together(adapters: Sequence[Adapter]) -> Together:
    """All sites. Raises `MergeError` where the adapters are of different bases, or have a site in different shapes."""
    prints = [(a.name, str(a.card.base["fingerprint"])) for a in adapters if a.card.base.get("fingerprint")]
    if len({weights for _, weights in prints}) > 1:
        said = listing(f"{name!r} (weights {weights[:8]})" for name, weights in prints)
        raise MergeError(f"the adapters were made for different bases: {said}; merge adapters of one base")
    union = Together()
    for adapter in adapters:
        if not adapter.form.mergeable:
            raise MergeError(
                f"the adapter {adapter.name!r} has the form {adapter.form.name!r}, which has no dense change of a weight, so it "
                "cannot be merged; keep it attached, or merge outputs with a mix"
            )
        for name, patch in adapter.patches.items():
            site = union.sites.setdefault(name, patch.site)
            if site.shape != patch.site.shape or site.kind != patch.site.kind:
                raise MergeError(
                    f"at {name!r} the adapter {adapter.name!r} is for a {patch.site.kind} of shape {patch.site.shape}, and "
                    f"another for a {site.kind} of shape {site.shape}; merge adapters of one base"
                )
            known = union.parameters.setdefault(name, [])
            known += [p for p in _changed(patch) if p not in known]
    return union


def _changed(patch: Patch) -> list[str]:
    """The parameters that a patch changes."""
    site = patch.site
    if site.param:
        return [site.param]
    if isinstance(patch, DensePatch):
        return list(patch.shapes)
    both = site.bias and type(patch).deltas is not Patch.deltas
    return ["weight", "bias"] if both else ["weight"]


def tensor_of(site: Site, parameter: str) -> str:
    return f"{site.path}.{parameter}".lstrip(".")


def shape_of(site: Site, parameter: str) -> tuple[int, ...]:
    if parameter != "bias" or site.param:
        return site.shape
    return site.shape if site.kind == "norm" else (site.d_out if site.kind == "linear" else site.shape[0],)


def bare(union: Together) -> dict[str, tuple[int, ...]]:
    """Every tensor that a base would have at the sites, also those that nobody changes."""
    return union.shapes | {
        tensor_of(s, p): shape_of(s, p)
        for s in union.sites.values()
        for p in ([s.param] if s.param else ["weight", *(["bias"] if s.bias else [])])
    }


def check_independent(adapter: Adapter, union: Together) -> None:
    """Raises `MergeError` where a change depends on the base's weights: it differs between two of them."""
    seen = set()
    for site, patch in adapter.patches.items():
        kind = (type(patch), type(patch.form), patch.site.kind)
        if kind in seen:
            continue
        seen.add(kind)
        shapes = bare(union)
        found = [Adapted(Stand(shapes, value), adapter, alone=True)._changes(site) for value in (0.0, 0.5)]
        if any(not torch.equal(change, found[1][key]) for key, change in found[0].items()):
            raise MergeError(
                f"what the adapter {adapter.name!r} ({adapter.form.name}) changes depends on the base's weights; give them too "
                "(base=, and as_= for an adapter as the result)"
            )
