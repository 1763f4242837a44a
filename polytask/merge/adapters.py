"""Adapters merged as adapters: the rule sees the exact changes of the weights, and the result is an adapter again.

Shapes: A [r, i] and B [o, r] of one adapter at one site, delta = s B A; N adapters, R the ranks of all together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import ConfigError, MergeError, listing
from polytask.core.form import Form, Patch
from polytask.core.site import Site
from polytask.forms.full import Full
from polytask.forms.lora import LoRA, LoRAPatch
from polytask.forms.sparse import LTSFT, SparsePatch

from .card import adapter_notes, versions
from .engine import Job, surveyed
from .factors import difference, ranks_of, reduced, split
from .heads import heads_of, mean_heads, starts_of
from .names import Named, renamed
from .patches import dense_patch, factors_of, general_form, lora_patch
from .rule import rules
from .source import Adapted, Source
from .together import Stand, Together, bare, check_independent, tensor_of, together

As = Literal["lora", "full", "sparse"]


class Changes(Source):
    """What an adapter changes, by the names of the tensors; zero where it has no patch.

    Args:
        adapter: of a form that has a dense change.
        base: of what it changes; a `Stand` where the changes do not depend on the weights.
        shapes: of all tensors that the result has.
    """

    def __init__(self, adapter: Adapter, base: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.within = Adapted(base, adapter, alone=True)
        self.name, self._shapes = self.within.name, shapes
        self.place = {
            tensor_of(adapter.patches[site].site, parameter): tensor
            for tensor, (site, parameter) in self.within.sites.items()
        }

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        change = self.within.change(self.place[name]) if name in self.place else None
        if change is None:
            return torch.zeros(self._shapes[name])[start:stop]
        return change[start:stop]


def merge_adapters(
    adapters: Sequence[Adapter],
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Source | Adapter | None = None,
    as_: As | None = None,
    rank: int | None = None,
    seed: int = 0,
    each: Mapping[str, Sequence[Any]] | None = None,
    name: str = "",
    companions: Sequence[Source] | None = None,
    about: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Adapter:
    """One adapter from several. The rule works on the changes of the weights, never on factors.

    A rule that is a weighted sum gives a LoRA exactly, from LoRAs: their factors side by side, of rank ``sum_i r_i``. The change
    that any other rule gives has a high rank: as a LoRA it is the nearest one of its rank, and the card has the relative error.
    Shares of all tensors (a density of TIES) are of those that the adapters change, and not of the whole model.

    Args:
        adapters: of forms that have dense changes, for one base. They may differ in form, rank, scale and sites.
        method: the rule.
        weights: one for each adapter.
        base: the adapters' base, which only forms need whose changes depend on the weights (DoRA); or an adapter that
            differences are taken to, or that is one end of the way (SLERP).
        as_: the result's form: ``lora``, ``full`` (a dense change) or ``sparse`` (LT-SFT's, of the numbers that are not zero). As
            the adapters are when None: ``full`` where they differ.
        rank: the LoRA's largest rank at a site; the sum of the adapters' ranks there when None.
        seed: of everything random.
        each: settings of each adapter, by name.
        name: of the result.
        companions: what the rule reads beside each adapter, by the base's names where one is given.
        about: what is known of how the weights were found; the card keeps it.
        settings: of the rule.

    Raises:
        MergeError: the adapters do not fit together, have no dense change, or cannot be expressed in the form.
        ConfigError: an unknown method or setting.
    """
    if as_ not in (None, "lora", "full", "sparse"):
        raise ConfigError(f"as_ must be one of lora, full, sparse, mix, got {as_!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}")
    everything = [*adapters, *([base] if isinstance(base, Adapter) else [])]
    kind = rules[method]
    job, union = job_of(adapters, method, weights, base, seed, each, companions, settings)
    form = as_ or _form_of(adapters, rank)
    if rank is not None and form != "lora":
        raise ConfigError(f"rank= is of a LoRA, and the result has the form {form}; say as_='lora'")
    with torch.no_grad():
        made, errors = _merged(job, union, adapters, base if isinstance(base, Adapter) else None, form, rank)
    if not made:
        raise MergeError(
            f"merging {listing(a.name or 'an adapter' for a in adapters)} by {method} leaves no change at any site"
        )
    heads = mean_heads(adapters) if kind.heads == "mean" else heads_of(everything)
    card = _card(job, everything, form, rank, errors)
    card.training["merge"] |= {"fit": dict(about)} if about else {}
    if starts := starts_of(everything):
        card.training["head_starts"] = starts
    general = general_form(list(made.values()))
    same = {a.short_targets for a in everything}
    targets = next(iter(same)) if len(same) == 1 and len(made) == len(adapters[0].patches) else ()
    return Adapter(general, made, heads, card, name or method, targets).trainable(False)


def job_of(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[Any] | None,
    base: Source | Adapter | None,
    seed: int,
    each: Mapping[str, Sequence[Any]] | None,
    companions: Sequence[Source] | None,
    settings: Mapping[str, Any],
) -> tuple[Job, Together]:
    """What is merged and how, and the adapters' sites; see `merge_adapters`."""
    everything = [*adapters, *([base] if isinstance(base, Adapter) else [])]
    union = together(everything)
    kind = rules[method]
    if kind.ends and not isinstance(base, Adapter):
        raise MergeError(f"{method} goes from one adapter to another; give the first one as base=")
    stand = base if isinstance(base, Source) else Stand(bare(union))
    if isinstance(stand, Stand):
        for adapter in everything:
            check_independent(adapter, union)
    sources = [Changes(adapter, stand, union.shapes) for adapter in adapters]
    origin: Source | None = Stand(union.shapes) if kind.needs_base else None
    if isinstance(base, Adapter):
        origin = Changes(base, stand, union.shapes)
    place = {ours: own for source in sources for ours, own in source.place.items()}
    chosen = {key: renamed(value, place) for key, value in settings.items()}
    weighed = None if weights is None else [renamed(weight, place) for weight in weights]
    beside = None if companions is None else [Named(companion, place) for companion in companions]
    return Job(sources, method, chosen, origin, weighed, each or {}, seed, companions=beside), union


def _merged(
    job: Job, union: Together, adapters: Sequence[Adapter], first: Adapter | None, form: As, rank: int | None
) -> tuple[dict[str, Patch], dict[str, tuple[float, float]]]:
    """The patches, and of each site that is an approximation the squares of the error and of the change."""
    facts = surveyed(job)
    made: dict[str, Patch] = {}
    errors: dict[str, tuple[float, float]] = {}
    full = _dense_form(union, form)
    for name, site in union.sites.items():
        if form == "lora":
            patch, error = _lora(job, facts, union, adapters, first, site, rank)
            if error is not None:
                errors[name] = error
        else:
            patch = dense_patch(full, site, {p: _whole(job, tensor_of(site, p), facts) for p in union.parameters[name]})
        if patch is not None:
            made[name] = patch
    return made, errors


def _whole(job: Job, tensor: str, facts: Any) -> Tensor:
    merged = job.rule_of(tensor).merge(job.block(tensor, 0, None, facts))
    if not bool(torch.isfinite(merged).all()):
        raise MergeError(
            f"merging {tensor} by {job.rule} gave entries that are not finite numbers; look at its inputs there"
        )
    return merged


def _lora(
    job: Job,
    facts: Any,
    union: Together,
    adapters: Sequence[Adapter],
    first: Adapter | None,
    site: Site,
    rank: int | None,
) -> tuple[Patch | None, tuple[float, float] | None]:
    """The patch at a site; None where nothing changes there. And the squares of error and change where it is not exact."""
    reason = LoRA(rank=1).refuses(site)
    parameter = site.param or "weight"
    if reason or parameter not in union.parameters[site.name]:
        raise MergeError(f"at {site.name!r} a LoRA cannot say what changes ({reason or 'a bias'}); say as_='full'")
    for other in union.parameters[site.name]:
        if other != parameter and bool(_whole(job, tensor_of(site, other), facts).any()):
            raise MergeError(f"at {site.name!r} the {other} changes too, which a LoRA cannot say; say as_='full'")
    patches = [adapter.patches.get(site.name) for adapter in adapters]
    start = first.patches.get(site.name) if first is not None else None
    own = [None if patch is None else factors_of(patch) for patch in (*patches, start)]
    total = sum(f[0].shape[ranks_of(site)[0]] for f in own if f is not None)
    tensor = tensor_of(site, parameter)
    factors = None
    if all(patch is None or f is not None for patch, f in zip((*patches, start), own, strict=True)):
        factors = job.rule_of(tensor).factors(job.frame(tensor, facts))
    if factors is not None:
        weighed = [
            (f[0], f[1] * w) for f, w in zip(own, [*factors, 1.0 - sum(factors)], strict=True) if f is not None and w
        ]
        if not weighed:
            return None, None
        a, b = ranks_of(site)
        pair = torch.cat([A for A, _ in weighed], a), torch.cat([B for _, B in weighed], b)
        if rank is None or pair[0].shape[a] <= rank:
            return lora_patch(site, *pair), None
        A, B, error = reduced(site, *pair, rank)
        return lora_patch(site, A, B), error
    merged = _whole(job, tensor, facts)
    if not bool(merged.any()):
        return None, None
    A, B, error = split(site, merged, rank or total or min(site.d_in, site.d_out))
    return lora_patch(site, A, B), error


def _dense_form(union: Together, form: As) -> Form:
    named = {p for name, site in union.sites.items() if not site.param for p in union.parameters[name]}
    parameters: Any = next(iter(named)) if len(named) == 1 else "all"
    if form == "sparse":
        return LTSFT(parameters=parameters)
    return Full(parameters=parameters if parameters in ("weight", "bias") else "all")


def _form_of(adapters: Sequence[Adapter], rank: int | None) -> As:
    patches = [patch for adapter in adapters for patch in adapter.patches.values()]
    if rank is not None or all(isinstance(patch, LoRAPatch) for patch in patches):
        return "lora"
    return "sparse" if all(isinstance(patch, SparsePatch) for patch in patches) else "full"


def _card(
    job: Job, adapters: Sequence[Adapter], form: As, rank: int | None, errors: Mapping[str, tuple[float, float]]
) -> Card:
    base: dict[str, Any] = {}
    for adapter in reversed(adapters):
        unlike = {**base.get("unlike_peft", {}), **adapter.card.base.get("unlike_peft", {})}
        base = {**base, **adapter.card.base, **({"unlike_peft": unlike} if unlike else {})}
    base.pop("modules_to_save", None)
    tasks: list[dict[str, Any]] = []
    for adapter in adapters:
        tasks += [task for task in adapter.card.tasks if task not in tasks]
    licences = {adapter.card.licence for adapter in adapters}
    said: dict[str, Any] = {
        "method": job.rule, "paper": job.kind.paper, "settings": dict(job.settings), "seed": job.seed, "as": form, "rank": rank,
        "adapters": [adapter.name for adapter in adapters], "weights": None if job.weights is None else list(job.weights),
        "each": {k: list(v) for k, v in job.each.items()}, "relative_error": difference(errors.values()),
    }  # fmt: skip
    if errors:
        said["relative_error_by_site"] = {site: difference([e]) for site, e in errors.items()}
    parents = [adapter.hash for adapter in adapters]
    return Card(
        base=base,
        tasks=tasks,
        training={"merge": said},
        parents=parents,
        licence=licences.pop() if len(licences) == 1 else "",
        versions=versions(),
        notes=adapter_notes(said, parents),
    )
