"""Modules that tasks assemble: masks over the base's weights, of which each task adds up its own.

Shapes: o = d_out, i = d_in, K modules, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.by_task import check_tasks
from polytask.core.errors import AdapterError, ConfigError, listing
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from ._tasks import rows_by_task

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter
    from polytask.core.model import Model
    from polytask.core.task import Task


KEPT = 8  # masks of a site that are kept, a byte per weight each


@forms.register("module-bank")
@dataclass(frozen=True)
class ModuleBank(Form):
    """Each task keeps its share of the base's weights: ``W_t = W * top(sum_k [sigmoid(T_tk) > 0.5] M_k)``.

    M_k, a number per weight, says how much module k wants it; a task adds up the modules that its row of T selects, and ``top``
    keeps the ``1 - sparsity`` largest sums of a site, the rest is zero. The gradient passes both steps as if they were not there.
    A row without a task, or with one that is not known, gets the sum of all modules, which is also what is merged.

    Args:
        tasks: with a row of T; those that are learned when empty. With none at all there is one row, for everything.
        modules: K.
        sparsity: the share of each site's weights that is switched off.
        learns: tasks whose rows alone learn, everything else staying as it is; everything learns when empty. See `grown`.

    Reference: Yu et al., Master-ASR, arXiv 2306.15686, with sparsity 0.3 at the attention. There the base's weights learn too.
    T has 10 times the learning rate, as there, but takes every step, not each fifth. The start is ours: M_k by the weights'
    sizes, so that small ones are off, and all modules selected.

    Raises:
        ConfigError: a setting is out of range.
    """

    tasks: tuple[str, ...] = ()
    modules: int = 4
    sparsity: float = 0.3
    learns: tuple[str, ...] = ()

    default_sites: ClassVar[str] = "attention & linear"
    peft_type: ClassVar[str] = "POLYTASK_MODULE_BANK"
    paper: ClassVar[str] = "arXiv 2306.15686"
    routes: ClassVar[bool] = True
    exceptions: ClassVar[Mapping[str, str]] = {"start": "it starts with the smallest weights off, not as the base"}

    def __post_init__(self) -> None:
        for name in ("tasks", "learns"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, str) else tuple(value))
            check_tasks("ModuleBank", getattr(self, name))
        if not (isinstance(self.modules, int) and self.modules >= 1):
            raise ConfigError(f"ModuleBank: modules must be a whole number of at least 1, got {self.modules!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"ModuleBank: sparsity must be in [0, 1), got {self.sparsity!r}")
        odd = [task for task in self.learns if task not in self.tasks]
        if odd:
            raise ConfigError(f"ModuleBank: learns has {odd[0]!r}, which is none of the tasks {listing(self.tasks)}")

    def patch(self, site: Site) -> Patch:
        return ModulePatch(self, site)

    def told(self, tasks: Sequence[Task]) -> Form:
        return self if self.tasks else replace(self, tasks=tuple(task.name for task in tasks))

    def rate(self, name: str) -> float:
        return 1.0 if name == "M" else 10.0

    def measured(self, model: Model, adapter: Adapter) -> dict[str, Any]:
        names, table = similarity(adapter)
        rounded = [[round(value, 4) for value in row] for row in table.tolist()]
        return {"similarity of the tasks": dict(zip(names, rounded, strict=True))} if len(names) > 1 else {}


class ModulePatch(Patch):
    """M [K, *shape of the weight], and T [K] of each task: parameters of their own, so that rows can learn alone."""

    form: ModuleBank

    def __init__(self, form: ModuleBank, site: Site) -> None:
        super().__init__(form, site)
        self._kept: tuple[list[tuple[Tensor, int]], dict[int | None, Tensor]] = (
            [],
            {},
        )  # masks by task, while no parameter changes
        self.kept = math.ceil((1.0 - form.sparsity) * math.prod(site.shape))
        self.M = nn.Parameter(torch.empty(form.modules, *site.shape))
        self.keys = {"M": "module_bank_M"}
        for i, task in enumerate(form.tasks or ("all",)):
            self.register_parameter(f"T{i}", nn.Parameter(torch.empty(form.modules)))
            self.keys[f"T{i}"] = f"module_bank_T.{task}"
        if form.learns:
            rows = {f"T{form.tasks.index(task)}" for task in form.learns}
            self.frozen = frozenset(name for name in self._parameters if name not in rows)

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            size = self._weight().detach().float().abs()
            noise = torch.randn(self.M.shape, generator=generator).to(size.device)
            self.M.copy_((size / size.mean().clamp_min(1e-12) + 0.01 * noise) / self.form.modules)
            for name, own in self._parameters.items():
                if name != "M" and own is not None:
                    own.copy_(0.02 * torch.rand(own.shape, generator=generator) + 0.01)

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        x, y, rows = rows_by_task(self.site, self.form.tasks, x, y, call)
        if not isinstance(rows, list):
            return self._product(x, rows)
        total = torch.zeros_like(y)
        for task in sorted(set(rows)):
            own = torch.tensor([i for i, row in enumerate(rows) if row == task], device=x.device)
            total = total.index_add(0, own, self._product(x[own], task).to(total.dtype))
        return total

    def delta(self) -> Tensor:
        return self._change(None)

    def mask(self, task: str | None = None) -> Tensor:
        """Which weights a task keeps, as flags of the weight's shape; that of all modules for no task.

        Raises:
            AdapterError: there is no such task.
        """
        if task is not None and task not in self.form.tasks:
            raise AdapterError(f"this module bank has no task {task!r}; it has: {listing(self.form.tasks)}")
        return self._mask(None if task is None else self.form.tasks.index(task)).detach().bool()

    def _product(self, x: Tensor, task: int | None) -> Tensor:
        change = self._change(task).to(x.dtype)
        return F.linear(x, change.T if self.site.transposed else change)

    def _change(self, task: int | None) -> Tensor:
        weight = self._weight().detach()
        change: Tensor = weight * (self._mask(task) - 1.0)
        return change

    def _mask(self, task: int | None) -> Tensor:
        """Zeros and ones, through which gradients pass."""
        own: list[Tensor] = list(self.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in own):
            sums = self._sums(task)
            return self._top(sums.detach()).to(sums.dtype) + (sums - sums.detach())
        if torch.compiler.is_compiling() or any(
            p.is_inference() for p in own
        ):  # such tensors do not say when they change
            return self._top(self._sums(task)).to(self.M.dtype)
        key = [(p, p._version) for p in own]
        before, masks = self._kept
        same = len(before) == len(key) and all(p is q and v == w for (p, v), (q, w) in zip(before, key, strict=True))
        if not same or (task not in masks and len(masks) >= KEPT):
            masks = {}
            self._kept = (key, masks)
        if task not in masks:
            with torch.no_grad():
                masks[task] = self._top(self._sums(task))
        return masks[task].to(self.M.dtype)

    def _top(self, sums: Tensor) -> Tensor:
        """Flags of the largest."""
        flags = torch.zeros(sums.numel(), dtype=torch.bool, device=sums.device)
        flags[sums.flatten().topk(self.kept, sorted=False).indices] = True
        return flags.view(sums.shape)

    def _sums(self, task: int | None) -> Tensor:
        """The modules that a task selects, added up."""
        if not self.form.tasks:
            task = 0
        if task is None or task < 0:
            return self.M.sum(0)
        own = self._parameters[f"T{task}"]
        assert own is not None
        on = (own.detach() > 0.0).to(self.M.dtype)  # sigmoid(T) > 0.5
        if not bool(on.any()):
            on = F.one_hot(own.detach().argmax(), len(own)).to(self.M.dtype)  # nothing would say what to keep
        soft = torch.sigmoid(own)
        total: Tensor = torch.tensordot(on + (soft - soft.detach()), self.M, 1)
        return total

    def _weight(self) -> Tensor:
        if self.base is None:
            raise AdapterError(f"the module bank at {self.site.name!r} must be attached to a model before it is used")
        weight = self.base._parameters[self.site.param or "weight"]
        assert weight is not None
        return weight


def grown(adapter: Adapter, task: str, like: str = "") -> Adapter:
    """A copy with a row of T for a new task, which alone learns: what the other tasks compute stays bit for bit.

    Args:
        adapter: of the form ``module-bank``.
        task: the new one's name.
        like: the task whose row it starts from; a row of the mean of all where empty.

    Returns:
        An adapter to go on from: ``polytask.learn(model, data, form=it.form, start=it)``.

    Raises:
        AdapterError: it has another form, knows the task, or not the one to start from.
    """
    from polytask.core.adapter import Adapter

    form = adapter.form
    if not isinstance(form, ModuleBank) or not form.tasks:
        raise AdapterError(
            f"the adapter {adapter.name!r} is no module bank with tasks of its own, so it cannot take one more"
        )
    if task in form.tasks or (like and like not in form.tasks):
        raise AdapterError(
            f"the module bank has the tasks {listing(form.tasks)}; give a new one, and start it like one of them"
        )
    made = replace(form, tasks=(*form.tasks, task), learns=(task,))
    patches: dict[str, Patch] = {}
    for place, patch in adapter.patches.items():
        own = {name: value.detach().clone() for name, value in patch.named_parameters()}
        rows = [own[f"T{i}"] for i in ([form.tasks.index(like)] if like else range(len(form.tasks)))]
        patches[place] = made.patch(patch.site)
        patches[place].load({**own, f"T{len(form.tasks)}": torch.stack(rows).mean(0)})
    copy = adapter.copy()
    return Adapter(made, patches, copy.heads, copy.card, adapter.name, adapter.targets)


def similarity(adapter: Adapter) -> tuple[tuple[str, ...], Tensor]:
    """The tasks of a module bank, and the cosines of their rows ``sigmoid(T)`` over all sites.

    Raises:
        AdapterError: it has another form.
    """
    form = adapter.form
    if not isinstance(form, ModuleBank):
        raise AdapterError(f"the adapter {adapter.name!r} is no module bank; it has the form {form.name!r}")
    rows = [
        torch.cat([torch.sigmoid(patch._parameters[f"T{i}"].detach().float()) for patch in adapter.patches.values()])  # type: ignore[union-attr]
        for i in range(len(form.tasks))
    ]
    if not rows:
        return (), torch.zeros(0, 0)
    unit = F.normalize(torch.stack(rows), dim=-1)
    return form.tasks, unit @ unit.T
