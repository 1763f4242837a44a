"""LoraHub: one weight for each LoRA, found by trying, from a handful of examples of a task that none of them may know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import ConfigError, MergeError, listing
from polytask.core.form import Form
from polytask.core.mix import Fixed
from polytask.forms.lora import LoRA, LoRAPatch
from polytask.merge.card import versions
from polytask.merge.fit import Fit, fits
from polytask.merge.pool import Pool

Weights = tuple[float, ...]


@fits.register("lorahub")
@dataclass(frozen=True)
class LoraHub(Fit):
    """``A = sum_i w_i A_i`` and ``B = sum_i w_i B_i`` with the same weights, whose product is the change: quadratic in w, so
    all signs turned give the same. The weights minimise ``loss + penalty * mean_i |w_i|`` on a few examples, by CMA-ES from
    all zeros (the bare base) and without gradients.

    Args:
        examples: drawn from each task's split; the loss is their mean, over all tasks alike.
        budget: how many weights are tried, the start among them.
        bound: weights stay within [-bound, bound].
        penalty: of the mean size of the weights.
        spread: standard deviation of the first weights that are tried.

    Reference: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition, arXiv 2307.13269.
    There nevergrad's NGOpt searches, where ours is CMA-ES of the package cmaes with the deviation that nevergrad would start
    with. Its code divides the mean loss of a batch by the number of examples once more, which makes the penalty five times
    as heavy; ours is the formula.

    Raises:
        ConfigError: a setting is out of range, or the package cmaes is not installed.
        MergeError: an input is no LoRA, or the LoRAs differ in sites, rank or scale.
    """

    examples: int = 5
    budget: int = 40
    bound: float = 1.5
    penalty: float = 0.05
    spread: float = 0.5

    gives: ClassVar[Literal["model", "adapter", "parts"]] = "adapter"
    paper: ClassVar[str] = "arXiv 2307.13269"
    labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.at_least("examples", 1)
        self.at_least("budget", 1)
        self.at_least("penalty", 0)
        for name in ("bound", "spread"):
            self.at_least(name, 0)
            if not getattr(self, name):
                raise ConfigError(f"lorahub: {name} must be above 0, got 0")

    def fit(self, pool: Pool) -> Adapter:
        modules = alike(pool.inputs)
        seen = [(reader, next(reader.batches(self.examples, answers=True))) for reader in pool.readers]
        with torch.inference_mode(), _attached(pool, modules) as names:

            def value(weights: Weights) -> float:
                mix = Fixed(dict(zip(names, weights, strict=True)), combines="parameters")
                with pool.model.using(mix):
                    loss = sum(float(reader.loss(rows)) for reader, rows in seen) / len(seen)
                return loss + self.penalty * sum(map(abs, weights)) / len(weights)

            tried = self.search(value, len(modules), pool.seed, pool.say)
        best, weights = min(tried, key=lambda one: one[0])
        if not math.isfinite(best):
            raise MergeError("lorahub: no weights gave a loss that is a number; look at the adapters and the examples")
        pool.say(
            f"lorahub: {best:.4f} with the weights {', '.join(f'{w:.2f}' for w in weights)}; base {tried[0][0]:.4f}"
        )
        made = mixed(modules, weights)
        made.name = self.name
        made.heads = {reader.task.name: reader.head for reader in pool.readers}
        made.card = self._card(pool, modules, weights, [value if math.isfinite(value) else None for value, _ in tried])
        return made

    def search(
        self, value: Callable[[Weights], float], count: int, seed: int, say: Callable[[str], None] = lambda text: None
    ) -> list[tuple[float, Weights]]:
        """All that was tried, in order: what it is worth, and the ``count`` weights; zeros are first."""
        try:
            from cmaes import CMA
        except ImportError:
            raise ConfigError(
                "lorahub searches with the package cmaes, which is not installed: pip install 'polytask[merge]'"
            ) from None
        import numpy as np

        size = max(2, count)  # it searches in two dimensions or more, of which one may mean nothing
        limits = np.array([[-self.bound, self.bound]] * size)
        optimiser = CMA(mean=np.zeros(size), sigma=self.spread, bounds=limits, seed=seed)
        start = (0.0,) * count
        tried = [(_number(value(start)), start)]
        while len(tried) < self.budget and not optimiser.should_stop():
            generation = []
            for _ in range(min(optimiser.population_size, self.budget - len(tried))):
                place = optimiser.ask()
                weights = tuple(float(w) for w in place[:count])
                tried.append((_number(value(weights)), weights))
                generation.append((place, tried[-1][0]))
            if len(generation) == optimiser.population_size:
                optimiser.tell(generation)
            say(f"lorahub: {len(tried)} of {self.budget} tried, best {min(tried)[0]:.4f}")
        return tried

    def _card(self, pool: Pool, modules: Sequence[Adapter], weights: Weights, values: list[float | None]) -> Card:
        licences = {module.card.licence for module in modules}
        parents = [module.hash for module in modules]
        said: dict[str, Any] = {
            "method": self.name, "paper": self.paper, "settings": self.settings(), "seed": pool.seed, "as": "lora",
            "adapters": list(pool.names), "weights": list(weights),
            "fit": {
                "objective": values, "best": min(v for v in values if v is not None),
                "tasks": [reader.task.name for reader in pool.readers],
            },
        }  # fmt: skip
        rows = [
            f"| {name} | {weight:.4f} | `{own}` |"
            for name, weight, own in zip(pool.names, weights, parents, strict=True)
        ]
        return Card(
            base={key: value for key, value in modules[0].card.base.items() if key != "modules_to_save"},
            tasks=[{**reader.task.summary(), "hash": reader.task.hash} for reader in pool.readers],
            training={"merge": said},
            parents=parents,
            licence=licences.pop() if len(licences) == 1 else "",
            versions=versions(),
            notes=[
                f"Made by `{self.name}` ({self.paper}): factors added up with one weight for each adapter.", "",
                "| adapter | weight | sha256 of its values |", "|---|---|---|", *rows,
            ],
        )  # fmt: skip


def mixed(modules: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The LoRA with ``sum_i w_i A_i`` and ``sum_i w_i B_i``, of the same rank and without heads. Raises as `alike`."""
    alike(modules)
    first = modules[0]
    patches = {}
    for site, patch in first.patches.items():
        made = LoRAPatch(_plain(patch.form), patch.site)
        own = [module.patches[site] for module in modules]
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                each = torch.stack([p.get_parameter(name).detach().float() for p in own])
                parameter.copy_(torch.tensordot(torch.tensor(weights), each.cpu(), 1))
        patches[site] = made
    card = Card(base=first.card.base)
    return Adapter(_plain(first.form), patches, card=card, targets=first.short_targets).trainable(False)


def _plain(form: Form) -> LoRA:
    """Without what matters only while it is learned."""
    assert isinstance(form, LoRA)
    return replace(form, init="zero-B", dropout=0.0)


def alike(inputs: Sequence[Any]) -> list[Adapter]:
    """The inputs, which are LoRAs of linear layers with the same sites, ranks and scales.

    Raises:
        MergeError: they are not; it says which and where.
    """
    for item in inputs:
        kind = item.form.name if isinstance(item, Adapter) else "whole model"
        if not isinstance(item, Adapter) or type(item.form) is not LoRA:
            raise MergeError(f"lorahub adds up the factors of LoRAs, and {item.name!r} is a {kind}; leave it out")
    modules: list[Adapter] = list(inputs)
    first = modules[0]
    for other in modules:
        if other.patches.keys() != first.patches.keys():
            apart = sorted(other.patches.keys() ^ first.patches.keys())
            raise MergeError(
                f"lorahub needs LoRAs at the same sites: {first.name!r} and {other.name!r} differ at {listing(apart, 4)}; "
                "learn them with the same sites"
            )
        for site, patch in other.patches.items():
            if type(patch) is not LoRAPatch or patch.site.kind != "linear":
                what = f"a {patch.site.kind}" if type(patch) is LoRAPatch else f"with the start {patch.form.init!r}"
                raise MergeError(
                    f"lorahub adds up factors of plain LoRAs at linear layers, and {other.name!r} has one at {site!r}, "
                    f"{what}; leave that adapter out (saved and loaded, a LoRA with a start of its own is plain)"
                )
            mine = first.patches[site].form
            for what in ("rank", "scale"):
                own, wanted = getattr(patch.form, what), getattr(mine, what)
                if own != wanted:
                    raise MergeError(
                        f"lorahub needs LoRAs of one {what}: at {site!r} {first.name!r} has {wanted}, and {other.name!r} "
                        f"{own}; leave that adapter out, or learn it again"
                    )
    return modules


@contextmanager
def _attached(pool: Pool, modules: Sequence[Adapter]) -> Iterator[list[str]]:
    """The adapters present in the base, under names of their own, and gone afterwards."""
    names: list[str] = []
    try:
        for i, module in enumerate(modules):
            names.append(pool.model.attach(module, f"lorahub/{i}"))
        yield names
    finally:
        for name in names:
            pool.model.detach(name)


def _number(value: float) -> float:
    """Worse than everything where it is none."""
    return value if math.isfinite(value) else math.inf
