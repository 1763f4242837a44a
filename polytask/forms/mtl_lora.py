"""MTL-LoRA: one LoRA for several tasks, with a transform between its factors for each.

Shapes: B rows, i = d_in, o = d_out, r rank, n up-projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.by_task import check_tasks
from polytask.core.errors import AdapterError, ConfigError, listing
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from ._tasks import rows_by_task


@forms.register("mtl-lora")
@dataclass(frozen=True)
class MTLLoRA(Form):
    """Tasks share a LoRA's factors and each has its own transform: ``c_t(x) = s (sum_i p_ti B_i) L_t (A x)``.

    ``p_t = softmax(w_t / temperature)`` weighs the n shared up-projections, and ``s = alpha / r``. Each row of a batch
    gets the parts of its task, and the parts of tasks that are not in the batch are not read. A row without a task, or
    with one that the adapter does not know, gets the mean of all tasks' changes, which is also what is merged.

    Args:
        tasks: their names. With fewer than two there is nothing to weigh: one up-projection, and one transform that
            every row gets.
        rank: r.
        alpha: the scale's numerator; twice the rank when None.
        ups: n.
        temperature: of the softmax.
        dropout: probability of zeroing each input feature, while the model is in training mode.

    Reference: Yang et al., MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning, arXiv 2410.09437. Starts at zero, by
    the B_i, with L_t = 1; a row without a task is ours.

    Raises:
        ConfigError: a setting is out of range.
    """

    tasks: tuple[str, ...] = ()
    rank: int = 8
    alpha: float | None = None
    ups: int = 3
    temperature: float = 0.1
    dropout: float = 0.0

    peft_type: ClassVar[str] = "POLYTASK_MTL_LORA"
    paper: ClassVar[str] = "arXiv 2410.09437"

    def __post_init__(self) -> None:
        check_tasks("MTLLoRA", self.tasks)
        for name, value in (("rank", self.rank), ("ups", self.ups)):
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"MTLLoRA: {name} must be a whole number of at least 1, got {value!r}")
        if not self.temperature > 0.0:
            raise ConfigError(f"MTLLoRA: temperature must be above 0, got {self.temperature!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"MTLLoRA: dropout must be in [0, 1), got {self.dropout!r}")

    @property
    def scale(self) -> float:
        """s, the number that the product is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    def patch(self, site: Site) -> Patch:
        return MTLLoRAPatch(self, site)


class MTLLoRAPatch(Patch):
    """A [r, i], B [n, o, r], and for each task L [r, r] and w [n]: parameters of their own, so that a step on one task
    leaves the others' alone."""

    form: MTLLoRA

    def __init__(self, form: MTLLoRA, site: Site) -> None:
        super().__init__(form, site)
        r, n = form.rank, form.ups if len(form.tasks) > 1 else 1
        self.A = nn.Parameter(torch.empty(r, site.d_in))
        self.B = nn.Parameter(torch.empty(n, site.d_out, r))
        self.keys = {"A": "mtl_lora_A", "B": "mtl_lora_B"}
        for i, task in enumerate(form.tasks or ("all",)):
            self.register_parameter(f"L{i}", nn.Parameter(torch.empty(r, r)))
            self.keys[f"L{i}"] = f"mtl_lora_L.{task}"
            if len(form.tasks) > 1:
                self.register_parameter(f"w{i}", nn.Parameter(torch.empty(n)))
                self.keys[f"w{i}"] = f"mtl_lora_w.{task}"

    def start(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.A.uniform_(-(self.site.d_in**-0.5), self.site.d_in**-0.5, generator=generator)
            self.B.zero_()
            for name, own in self._parameters.items():
                if name.startswith("L"):
                    nn.init.eye_(own)  # type: ignore[arg-type]
                elif name.startswith("w"):
                    bound = self.form.ups**-0.5
                    own.uniform_(-bound, bound, generator=generator)  # type: ignore[union-attr]

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        x, y, rows = rows_by_task(self.site, self.form.tasks, x, y, call)
        if self.form.dropout and self.dropping:
            x = F.dropout(x, self.form.dropout, training=True)
        h = F.linear(x, self.A.to(x.dtype))  # [B, ..., r]
        if not isinstance(rows, list):
            return F.linear(h, self._up(rows).to(h.dtype))
        used = sorted(set(rows))
        core = torch.stack([self._core(task) for task in used]).to(h.dtype)  # [used, n*r, r]
        mine = core[torch.tensor([used.index(task) for task in rows], device=h.device)]  # [B, n*r, r]
        inner = torch.bmm(h.reshape(len(rows), -1, h.shape[-1]), mine.transpose(1, 2))  # [B, ..., n*r]
        wide = self.B.permute(1, 0, 2).flatten(1)  # [o, n*r]
        return F.linear(inner, wide.to(h.dtype)).view(*h.shape[:-1], -1)

    def delta(self) -> Tensor:
        return self._change(None)

    def delta_of(self, task: str) -> Tensor:
        """The dense change for one task, in the weight's own layout."""
        if task not in self.form.tasks:
            raise AdapterError(f"this MTL-LoRA has no task {task!r}; it has: {listing(self.form.tasks)}")
        return self._change(self.form.tasks.index(task))

    def _change(self, task: int | None) -> Tensor:
        product = self._up(task) @ self.A
        return product.t() if self.site.transposed else product

    def _up(self, task: int | None) -> Tensor:
        """s (sum_i p_ti B_i) L_t as [o, r]."""
        core = self._core(task)
        return self.B[0] @ core if len(self.B) == 1 else self.B.permute(1, 0, 2).flatten(1) @ core

    def _core(self, task: int | None) -> Tensor:
        """s p_ti L_t for the n up-projections, as [n*r, r]; the mean over the tasks for no task, or another one."""
        own, count = self._parameters, max(1, len(self.form.tasks))
        if count == 1:
            return self.L0 * self.form.scale
        if task is None or task < 0:
            return torch.stack([self._core(i) for i in range(count)]).mean(0)
        p = torch.softmax(own[f"w{task}"] / self.form.temperature, 0)  # type: ignore[operator]
        return (p[:, None, None] * (own[f"L{task}"] * self.form.scale)).flatten(0, 1)  # type: ignore[operator]
