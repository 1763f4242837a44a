"""MPT: one prompt for many tasks, with a rank-one factor for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError, listing
from polytask.core.form import Call, Patch, forms
from polytask.core.site import Site

from ._teacher import apart, check_teacher
from .prompt import PromptPatch, Tokens, TokensPatch

if TYPE_CHECKING:
    from polytask.core.head import Seen
    from polytask.core.model import Model


@forms.register("mpt")
@dataclass(frozen=True)
class MPT(Tokens):
    """A shared prompt times a rank-one factor of each task, entry by entry: ``P_k = P * (u_k v_k^T)``.

    The task of each row comes with the call (``model.using(..., tasks=...)``; learning and evaluation say it themselves). A
    row without a task, or with one that is not among ``tasks``, gets the shared prompt itself.

    Args:
        length: m, the number of virtual tokens.
        tasks: the tasks' names. A single unnamed one when empty: then every row has its factor.
        teachers: an adapter for each of ``tasks``, in their order: the name of one that is attached, or a folder. While this
            one learns, ``distil * (KL(teacher || student) + mean (h_teacher - h_student)^2)`` is added to each row's loss, over
            the scores of classes or of scored tokens, and the vectors that they are made of.
        distil: lambda of that sum.
        task_lr: the learning rate of u and v over that of the shared prompt.

    Reference: Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861.
    Factors start at one, so every task starts from the shared prompt (PEFT's normal start with deviation 0.02 makes
    prompts of nearly zero). Learn ``joint`` with teachers, then give `MPT.target` of the result to `polytask.learn` as the
    ``start`` of a new task. `MPT.from_prompts` starts from prompts that were learned apart, by their values alone.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base takes no token ids.
    """

    tasks: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    distil: float = 0.9
    task_lr: float = 1.0

    peft_type: ClassVar[str] = "POLYTASK_MPT"
    paper: ClassVar[str] = "arXiv 2303.02861"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"MPT: tasks must be different names, got {self.tasks}")
        if self.teachers and len(self.teachers) != max(1, len(self.tasks)):
            raise ConfigError(
                f"MPT: {len(self.teachers)} teachers ({listing(self.teachers)}) for {max(1, len(self.tasks))} tasks "
                f"({listing(self.tasks) or 'one without a name'}); give one for each, in the order of tasks"
            )
        if not self.distil >= 0 or not self.task_lr > 0:
            raise ConfigError(
                f"MPT: distil must not be negative and task_lr positive, got {self.distil!r} and {self.task_lr!r}"
            )

    def patch(self, site: Site) -> Patch:
        return MPTPatch(self, site)

    def rate(self, name: str) -> float:
        return self.task_lr if name in ("u", "v") else 1.0

    def teacher(self, task: str) -> str | None:
        """The adapter that the task is learned from."""
        if self.teachers and not self.tasks:
            return self.teachers[0]
        return self.teachers[self.tasks.index(task)] if self.teachers and task in self.tasks else None

    @contextmanager
    def beside(self, model: Model, adapter: Adapter) -> Iterator[None]:
        """Attaches the teachers that are not attached yet. Raises `AdapterError` for those that cannot teach a task."""
        taken: list[str] = []
        try:
            for name in self.teachers:
                if name not in model.attached:
                    if not Path(name).is_dir():
                        raise AdapterError(
                            f"the teacher {name!r} is neither a folder nor attached; attached are: "
                            f"{listing(n for n in model.attached if model.adapters[n] is not adapter) or 'none'}"
                        )
                    taken.append(model.attach(Adapter.load(name), name))
            for task, head in adapter.heads.items():
                if (name := self.teacher(task)) is not None:  # type: ignore[assignment]
                    check_teacher(name, model.adapters[name], task, head)
            found = dict.fromkeys(model.adapters[name].hash for name in self.teachers)
            adapter.card.parents += [made for made in found if made not in adapter.card.parents]
            yield
        finally:
            for name in taken:
                model.detach(name)

    def loss(self, seen: Seen, values: Tensor) -> Tensor:
        name = self.teacher(seen.task)
        return values if name is None or not self.distil else values + self.distil * apart(seen, name)

    def finish(self, adapter: Adapter) -> Adapter:
        """The same without its teachers; their hashes are among its card's parents."""
        return self._again(adapter, replace(self, teachers=())) if self.teachers else adapter

    @staticmethod
    def _again(adapter: Adapter, form: MPT, **tensors: Tensor) -> Adapter:
        (old,) = adapter.patches.values()
        patch = form.patch(old.site)
        patch.load({**{n: p.detach().clone() for n, p in old.named_parameters()}, **tensors})
        return Adapter(form, {old.site.name: patch}, adapter.heads, adapter.card, adapter.name, adapter.targets)

    @staticmethod
    def target(adapter: Adapter, task: str, **settings: Any) -> Adapter:
        """Where a new task starts: the shared prompt, with the mean of the tasks' u and the mean of their v.

        Args:
            adapter: of this form.
            task: the new task.
            settings: of the form, where they are to be others, such as ``task_lr``.

        Raises:
            AdapterError: an adapter of another form.
        """
        if not isinstance(adapter.form, MPT):
            raise AdapterError(
                f"the adapter {adapter.name!r} has the form {adapter.form.name!r}; MPT.target takes 'mpt'"
            )
        (own,) = adapter.patches.values()
        form = replace(adapter.form, **{"tasks": (task,), "teachers": (), **settings})
        made = MPT._again(adapter, form, **{n: getattr(own, n).detach().mean(0, keepdim=True) for n in ("u", "v")})
        made.heads, made.card, made.name = {}, replace(adapter.card, parents=[adapter.hash]), task
        return made

    @staticmethod
    def from_prompts(prompts: Mapping[str, Adapter], steps: int = 50) -> Adapter:
        """The shared prompt and factors that are nearest to learned prompts, in the sum of squares.

        Alternating least squares, exact in each part: P given the factors, then u, then v of each task. One source gives
        itself. It is the start from which the shared prompt is learned on; the paper distils it on the tasks' data.

        Args:
            prompts: adapters of the form ``prompt`` of one length over one base, by task.
            steps: rounds.

        Raises:
            AdapterError: an adapter of another form, or prompts of different shapes.
        """
        vectors: list[Tensor] = []
        for name, adapter in prompts.items():
            own = next(iter(adapter.patches.values()))
            if not isinstance(own, PromptPatch):
                raise AdapterError(
                    f"the adapter of {name!r} has the form {adapter.form.name!r}; MPT.from_prompts takes prompts"
                )
            vectors.append(own.P.detach().double())
        if len({v.shape for v in vectors}) != 1:
            raise AdapterError(f"MPT.from_prompts takes prompts of one shape, got {[tuple(v.shape) for v in vectors]}")
        target = torch.stack(vectors)  # [K, m, d]
        u, v = target.new_ones(target.shape[:2]), target.new_ones(len(target), target.shape[2])
        tiny = 1e-12
        for _ in range(steps):
            factor = u[:, :, None] * v[:, None, :]
            P = (target * factor).sum(0) / (factor.square().sum(0) + tiny)
            part = P * v[:, None, :]
            u = (target * part).sum(2) / (part.square().sum(2) + tiny)
            part = P * u[:, :, None]
            v = (target * part).sum(1) / (part.square().sum(1) + tiny)
        first = next(iter(prompts.values()))
        site = next(iter(first.patches.values())).site
        form = MPT(length=target.shape[1], tasks=tuple(prompts))
        patch = form.patch(site)
        patch.load({"P": P.float(), "u": u.float(), "v": v.float()})
        heads = {task: head for adapter in prompts.values() for task, head in adapter.heads.items()}
        card = replace(first.card, parents=[adapter.hash for adapter in prompts.values()])
        return Adapter(form, {site.name: patch}, heads, card, "mpt", first.targets)


class MPTPatch(TokensPatch):
    """P [m, d], u [K, m], v [K, d]."""

    form: MPT

    def __init__(self, form: MPT, site: Site) -> None:
        super().__init__(form, site)
        count = max(1, len(form.tasks))
        self.P = nn.Parameter(torch.empty(form.length, self.width))
        self.u = nn.Parameter(torch.empty(count, form.length))
        self.v = nn.Parameter(torch.empty(count, self.width))

    def start(self, generator: torch.Generator) -> None:
        table = self.table()
        with torch.no_grad():
            ids = torch.randint(table.num_embeddings, (self.tokens,), generator=generator)
            self.P.copy_(table(ids.to(table.weight.device)))
            self.u.fill_(1.0)
            self.v.fill_(1.0)

    def prompt(self, task: int) -> Tensor:
        """P_k [m, d]."""
        return self.P * torch.outer(self.u[task], self.v[task])

    def virtual(self, call: Call) -> Tensor:
        if not self.form.tasks:
            return self.prompt(0)
        if call.tasks is None:
            return self.P
        places = {task: k for k, task in enumerate(self.form.tasks)}
        rows: Sequence[str] = call.tasks
        found = {task: self.prompt(places[task]) if task in places else self.P for task in dict.fromkeys(rows)}
        return torch.stack([found[task] for task in rows])  # [B, m, d]
