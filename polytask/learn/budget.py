"""Budgets of ranks: who gets how many of the same total while an adapter learns. Score, decide, resize.

The total is the form's rank times its sites, so a budget costs what plain LoRA of that rank does. While it learns, a patch
has room for more ranks than it may use; those in use are *live* and exactly as many in all as the budget says after every
step. What is saved in the end is plain LoRA with a rank for each site (in PEFT's files a ``rank_pattern``), which every mix
and PEFT's LoRA can take; a site without any rank has no patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError
from polytask.core.form import Form
from polytask.core.registry import Registry
from polytask.core.site import Site
from polytask.forms.factored import FactoredPatch
from polytask.forms.lora import LoRA, LoRAPatch

KEPT = 16  # how many entries a history of ranks has, at most


@dataclass(frozen=True)
class Budget:
    """The settings of a way to deal out ranks. A frozen dataclass, registered with ``@budgets.register("name")``."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def form(self, form: LoRA) -> LoRA:
        """The form that learns in place of the given one."""
        return form

    def control(self, adapter: Adapter, steps: int, seed: int) -> Controller | None:
        """What deals the ranks out in a run of so many steps; None where that has happened at the start."""
        return None

    def takes(self, form: Form) -> LoRA:
        """The given form, if ranks can be dealt out for it. Raises `ConfigError`."""
        if type(form) is not LoRA:
            raise ConfigError(f"the budget {self.name!r} deals out the ranks of the form 'lora', and got {form.name!r}")
        if form.init != "zero-B":
            raise ConfigError(f"the budget {self.name!r} has its own start; leave init={form.init!r} out")
        return form

    def settings(self) -> dict[str, Any]:
        """The fields as plain values, with the name."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def of(cls, spec: Budget | str | Mapping[str, Any]) -> Budget:
        """A budget from a budget, its name, or a mapping ``{"name": "adalora", "every": 10}``. Raises `ConfigError`."""
        return spec if isinstance(spec, Budget) else budgets.make(spec)

    def require(self, **rules: tuple[bool, str]) -> None:
        """Raises `ConfigError` for settings whose rule, (holds, what is allowed), does not hold."""
        bad = [f"{n} must be {say}, got {getattr(self, n)!r}" for n, (holds, say) in rules.items() if not holds]
        if bad:
            raise ConfigError(f"budget {self.name}: {'; '.join(bad)}")


budgets: Registry[Budget] = Registry("budget", "polytask.learn.budgets")


def number(value: Any, least: float, most: float = math.inf, whole: bool = False) -> bool:
    """Whether a setting is a number in [least, most]."""
    kind: Any = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


@dataclass(frozen=True)
class Room(LoRA):
    """LoRA while a budget deals out its ranks: ``rank`` is how many a site has room for.

    Args:
        first: how many a site begins with.
        apart: weight of the penalty ``mean(|A A^T - I|)`` over all A (rows) and B (columns) that are trained.
        result: what is left after learning, with the average rank.
    """

    first: int = 1
    apart: float = 0.0
    result: LoRA = field(default_factory=LoRA)

    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    @classmethod
    def around(cls, form: LoRA, rank: int, first: int, **more: Any) -> Room:
        """Room for so many ranks, with the scale of the form that they are dealt out for."""
        return cls(rank=rank, alpha=form.scale * rank, dropout=form.dropout, first=first, result=form, **more)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        if not self.apart:
            return None
        terms = []
        for patch in rooms(adapter).values():
            on = patch.trained().detach()
            for rows in (patch.A, patch.B.T):
                rows = rows * on[:, None]
                terms.append((rows @ rows.T - torch.diag(on)).norm())
        return self.apart * torch.stack(terms).mean()

    def finish(self, adapter: Adapter) -> Adapter:
        """Plain LoRA with the ranks that are live now."""
        packed = {n: p.packed(self.result) if isinstance(p, RoomPatch) else p for n, p in adapter.patches.items()}
        patches = {name: patch for name, patch in packed.items() if patch is not None}
        done = Adapter(self.result, patches, adapter.heads, adapter.card, adapter.name)
        if len(patches) == len(adapter.patches):
            done.targets = adapter.short_targets
        return done

    def refuses(self, site: Site) -> str:
        reason = super().refuses(site)
        return reason or ("" if site.read == "call" else f"the weight of {site.name!r} is read without a call")


class RoomPatch(FactoredPatch):
    """Factors with room. ``live`` [r] is 1 for the ranks in use: a value like any other, so that states carry it."""

    form: Room
    frozen = frozenset({"live"})

    def __init__(self, form: Room, site: Site) -> None:
        super().__init__(form, site)
        self.live = nn.Parameter(torch.zeros(form.rank), requires_grad=False)

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.live.copy_(torch.arange(len(self.live)) < self.form.first)

    @property
    def count(self) -> int:
        """How many ranks are live."""
        return int(self.live.sum())

    def trained(self) -> Tensor:
        """1 for the rows of A and columns of B that take gradients."""
        return self.live

    def packed(self, form: LoRA) -> LoRAPatch | None:
        """The live ranks as a plain LoRA with the scale of ``form``; None where there is none."""
        with torch.no_grad():
            A, B, _ = self.factors()
            keep = self.live.bool()
            rank = int(keep.sum())
            if not rank:
                return None
            alpha = form.scale * (rank if form.scaling == "classic" else math.sqrt(rank))
            patch = LoRAPatch(form if rank == form.rank else replace(form, rank=rank, alpha=alpha), self.site)
            patch.load({"A": A[keep].clone(), "B": B[:, keep].clone()})
        return patch


class Controller:
    """Deals the ranks of one adapter out: after every optimiser step `score`, now and then `decide`, always `resize`.

    Attributes:
        patches: by site.
        total: of the ranks, in the end.
        steps: of the run.
        warm, last: the first and the last step that may decide.
        memory: every tensor that a resumed run needs.
        history: rows of (step, rank at each site).
    """

    def __init__(self, adapter: Adapter, steps: int, seed: int, warm: float, settle: float) -> None:
        self.steps, self.seed = steps, seed
        self.patches = rooms(adapter)
        self.rank: int = adapter.form.result.rank  # type: ignore[attr-defined]
        self.total = self.rank * len(self.patches)
        self.last = max(1, min(steps, math.ceil(steps * (1 - settle))))
        self.warm = min(round(steps * warm), self.last - 1)
        self.memory: dict[str, Tensor] = {}
        self.history: list[list[int]] = [[0, *self.ranks().values()]]
        self._marks = {round(steps * (i + 1) / KEPT) for i in range(KEPT)} | {self.last, steps}

    # What a budget says

    def score(self) -> None:
        """Takes in the gradients of the step, which are still there."""

    def decide(self, step: int) -> None:
        """Changes which ranks are live."""

    def due(self, step: int) -> bool:
        """Whether this step decides; never after `last`."""
        return self.warm < step <= self.last

    def resize(self) -> None:
        """Makes the parameters what the live ranks say, after every step."""

    # What all have

    def after(self, step: int) -> None:
        """Called after the optimiser's step, before the gradients go."""
        with torch.no_grad():
            self.score()
            if self.due(step):
                self.decide(step)
            self.resize()
        if step in self._marks and step > self.history[-1][0]:
            self.history.append([step, *self.ranks().values()])

    def settled(self, step: int) -> bool:
        """Whether the ranks are what they will be: only such states may be kept as the best."""
        return step >= self.last

    def ranks(self) -> dict[str, int]:
        """The live ranks by site."""
        return {name: patch.count for name, patch in self.patches.items()}

    def smooth(self, key: str, value: Tensor, old: float = 0.85) -> Tensor:
        """AdaLoRA's importance: the moving average of a sensitivity times the moving average of its uncertainty."""
        zero = torch.zeros_like(value)
        mean = self.memory[f"{key}/mean"] = old * self.memory.get(f"{key}/mean", zero) + (1 - old) * value
        doubt = old * self.memory.get(f"{key}/doubt", zero) + (1 - old) * (value - mean).abs()
        self.memory[f"{key}/doubt"] = doubt
        return mean * doubt

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the adapter's own values."""
        return {**self.memory, "history": torch.tensor(self.history)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave."""
        device = next(iter(self.patches.values())).A.device
        self.memory = {name: value.to(device) for name, value in state.items() if name != "history"}
        self.history = state["history"].tolist()


def rooms(adapter: Adapter) -> dict[str, Any]:
    """The patches whose ranks are dealt out, by site."""
    return {name: patch for name, patch in adapter.patches.items() if isinstance(patch, RoomPatch)}


def ranks(adapter: Adapter, budget: Budget, sites: list[str], controller: Controller | None) -> dict[str, Any]:
    """What a card keeps: the total, each site's rank (0 where it got none), and how the ranks came about."""
    held = {name: int(getattr(patch.form, "rank", 0)) for name, patch in adapter.patches.items()}
    found = {name: held.get(name, 0) for name in sites}
    rows = controller.history if controller is not None else [[0, *found.values()]]
    return {"budget": budget.settings(), "total": sum(found.values()), "sites": found, "history": rows}
