"""MPT: one prompt for many tasks, with a rank-one factor for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Call, Patch, forms
from polytask.core.site import Site

from .prompt import PromptPatch, Tokens, TokensPatch


@forms.register("mpt")
@dataclass(frozen=True)
class MPT(Tokens):
    """A shared prompt times a rank-one factor of each task, entry by entry: ``P_k = P * (u_k v_k^T)``.

    The task of each row comes with the call (``model.using(..., tasks=...)``; learning and evaluation say it themselves). A
    row without a task, or with one that is not among ``tasks``, gets the shared prompt itself.

    Args:
        length: m, the number of virtual tokens.
        tasks: the tasks' names. A single unnamed one when empty: then every row has its factor.

    Reference: Wang et al., Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861.
    Factors start at one, so every task starts from the shared prompt (PEFT's normal start with deviation 0.02 makes
    prompts of nearly zero). `MPT.from_prompts` makes the shared prompt and the factors of prompts that were learned apart.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: the base takes no token ids.
    """

    tasks: tuple[str, ...] = ()

    peft_type: ClassVar[str] = "POLYTASK_MPT"
    paper: ClassVar[str] = "arXiv 2303.02861"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"MPT: tasks must be different names, got {self.tasks}")

    def patch(self, site: Site) -> Patch:
        return MPTPatch(self, site)

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
