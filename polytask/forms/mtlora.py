"""MTLoRA: a LoRA that all tasks share, and one for each task in the last block.

Shapes: B rows, i = d_in, o = d_out, r rank, q rank of a task's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.by_task import check_tasks
from polytask.core.errors import AdapterError, ConfigError, listing
from polytask.core.form import NO_CALL, Call, Form, Patch, forms
from polytask.core.site import Site

from ._tasks import rows_by_task

SHARED_ONLY = ("query", "key", "value", "qkv", "key_value")  # roles that never have parts of a task


@forms.register("mtlora")
@dataclass(frozen=True)
class MTLoRA(Form):
    """What tasks have in common and what is their own, side by side: ``c_t(x) = s B (A x) + s_t B_t (A_t x)``.

    The second part is there in the last block only (not at its queries, keys and values), and for each row that of its
    task; the parts of tasks that are not in the batch are not read. A row without a task, or with one that the adapter
    does not know, gets the shared part, which is also what is merged. Starts at zero, by B and B_t.

    Args:
        tasks: their names; without any there is the shared part only.
        rank: r of the shared part.
        task_rank: q of each task's.
        scale: s, a plain multiplier.
        task_scale: s_t.
        where: ``"last"`` block, or ``"all"`` sites have the tasks' parts.
        dropout: probability of zeroing each input feature, while the model is in training mode.

    Reference: Agiza, Neseem and Reda, MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning, arXiv
    2403.20320. There every task has a stream of its own through the last block of each stage; here a row is of one
    task, so its stream is the row (the code's variant "matrixv2"), and the last block is that of the whole stack.

    Raises:
        ConfigError: a setting is out of range.
    """

    tasks: tuple[str, ...] = ()
    rank: int = 16
    task_rank: int = 4
    scale: float = 4.0
    task_scale: float = 4.0
    where: Literal["last", "all"] = "last"
    dropout: float = 0.0

    peft_type: ClassVar[str] = "POLYTASK_MTLORA"
    paper: ClassVar[str] = "arXiv 2403.20320"

    def __post_init__(self) -> None:
        check_tasks("MTLoRA", self.tasks)
        for name, value in (("rank", self.rank), ("task_rank", self.task_rank)):
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"MTLoRA: {name} must be a whole number of at least 1, got {value!r}")
        if self.where not in ("last", "all"):
            raise ConfigError(f"MTLoRA: where must be one of last, all, got {self.where!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"MTLoRA: dropout must be in [0, 1), got {self.dropout!r}")

    def patch(self, site: Site) -> Patch:
        return MTLoRAPatch(self, site)

    def own_parts(self, site: Site) -> bool:
        """Whether each task has a part of its own at a site."""
        return bool(self.tasks) and (self.where == "all" or (site.depth == 1.0 and site.role not in SHARED_ONLY))


class MTLoRAPatch(Patch):
    """A [r, i] and B [o, r], and for each task A [q, i] and B [o, q] where tasks have parts of their own."""

    form: MTLoRA

    def __init__(self, form: MTLoRA, site: Site) -> None:
        super().__init__(form, site)
        self.A = nn.Parameter(torch.empty(form.rank, site.d_in))
        self.B = nn.Parameter(torch.empty(site.d_out, form.rank))
        self.keys = {"A": "mtlora_A", "B": "mtlora_B"}
        self.tasks = form.tasks if form.own_parts(site) else ()
        for i, task in enumerate(self.tasks):
            self.register_parameter(f"A{i}", nn.Parameter(torch.empty(form.task_rank, site.d_in)))
            self.register_parameter(f"B{i}", nn.Parameter(torch.empty(site.d_out, form.task_rank)))
            self.keys |= {f"A{i}": f"mtlora_A.{task}", f"B{i}": f"mtlora_B.{task}"}

    def start(self, generator: torch.Generator) -> None:
        bound = self.site.d_in**-0.5
        with torch.no_grad():
            for name, own in self.named_parameters():
                if name.startswith("A"):
                    own.uniform_(-bound, bound, generator=generator)
                else:
                    own.zero_()

    def contribute(self, x: Tensor, y: Tensor, call: Call = NO_CALL) -> Tensor:
        x, y, rows = rows_by_task(self.site, self.tasks, x, y, call)
        if self.form.dropout and self.dropping:
            x = F.dropout(x, self.form.dropout, training=True)
        shared = F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.form.scale
        if rows is None or rows == -1:
            return shared
        if isinstance(rows, int):
            return shared + self._own(rows, x)
        for task in sorted(set(rows) - {-1}):
            index = torch.tensor([row for row, of in enumerate(rows) if of == task], device=x.device)
            shared = shared.index_add(0, index, self._own(task, x[index]))
        return shared

    def delta(self) -> Tensor:
        return self._turned((self.B @ self.A) * self.form.scale)

    def delta_of(self, task: str) -> Tensor:
        """The dense change for one task, in the weight's own layout."""
        if task not in self.form.tasks:
            raise AdapterError(f"this MTLoRA has no task {task!r}; it has: {listing(self.form.tasks)}")
        if not self.tasks:
            return self.delta()
        i = self.tasks.index(task)
        A, B = self._parameters[f"A{i}"], self._parameters[f"B{i}"]
        return self.delta() + self._turned((B @ A) * self.form.task_scale)  # type: ignore[operator]

    def _own(self, task: int, x: Tensor) -> Tensor:
        A, B = self._parameters[f"A{task}"], self._parameters[f"B{task}"]
        h = F.linear(x, A.to(x.dtype))  # type: ignore[union-attr]
        return F.linear(h, B.to(x.dtype)) * self.form.task_scale  # type: ignore[union-attr]

    def _turned(self, product: Tensor) -> Tensor:
        return product.t() if self.site.transposed else product
