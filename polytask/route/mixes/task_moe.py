"""Task-level mixture of experts: every block chooses its experts by the task, not by the tokens.

Shapes: B rows, T tasks, N experts, v width of a task's vector, h hidden width of a block's router.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.by_task import check_tasks
from polytask.core.errors import ConfigError, MixError
from polytask.core.form import Call, Part, Weights
from polytask.core.gate import Gate, Router, by_row, learning, routers
from polytask.core.signature import signatures
from polytask.core.site import Site
from polytask.core.task import Task
from polytask.route.by_task import block_of, picked

if TYPE_CHECKING:
    from polytask.core.hub import Hub
    from polytask.core.model import Model

SELECTS = ("gumbel-st", "gumbel", "softmax")


@routers.register("task-moe")
@dataclass(frozen=True)
class TaskMoE(Router):
    """Each block weighs its experts by the task's vector z: ``p = softmax((W2 gelu(W1 z + b1) + b2 + g) / temperature)``.

    While it learns, g is Gumbel noise, drawn for each row and block; ``gumbel-st`` passes one expert on and the gradient of all.
    Afterwards the best expert acts alone. With ``softmax`` there is no noise, and the weights stay as they are. The temperature
    falls by ``exp(-decay)`` with each step.

    Args:
        tasks: those with a vector; those that are learned when empty.
        vectors: ``learned``, or from the task's ``text``: then a row of a task that is not known is served by its text, or name.
        texts: of tasks; `polytask.route` takes the instructions and descriptions of the tasks that are learned.
        select: ``gumbel-st``, ``gumbel`` or ``softmax``.
        width: v, of learned vectors.
        hidden: h.
        temperature, least, decay: what it starts with, does not fall below, and how fast it falls.
        held: whether vectors and routers stay as they are while the experts learn; see `second_stage`.

    Reference: Ye et al., Eliciting and Understanding Cross-Task Skills with Task-Level Mixture-of-Experts, arXiv 2205.12701:
    experts are copies of whole layers there. The vectors' learning rate is 10 times the routers', as there; the routers' is that
    of the experts, which are adapters here. Texts are embedded by the signature ``text``. Rows of other tasks weigh all alike.

    Raises:
        ConfigError: a setting is out of range.
    """

    tasks: tuple[str, ...] = ()
    vectors: Literal["learned", "text"] = "learned"
    texts: Mapping[str, str] = field(default_factory=dict)
    select: Literal["gumbel-st", "gumbel", "softmax"] = "gumbel-st"
    width: int = 128
    hidden: int = 64
    temperature: float = 2.0
    least: float = 0.1
    decay: float = 3e-4
    held: bool = False

    reads: ClassVar[Any] = "task"
    trains: ClassVar[Any] = "gates and adapters"
    paper: ClassVar[str] = "arXiv 2205.12701"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks) if not isinstance(self.tasks, str) else self.tasks)
        check_tasks(self.name, self.tasks)
        for name, allowed in (("select", SELECTS), ("vectors", ("learned", "text"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{self.name}: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("width", "hidden"):
            self.at_least(name, 1, whole=True)
        self.at_least("decay", 0.0)
        if not 0.0 < self.least <= self.temperature:
            raise ConfigError(
                f"{self.name}: least must be above 0 and not above temperature, got least={self.least!r} and "
                f"temperature={self.temperature!r}"
            )

    def told(self, tasks: Sequence[str]) -> Router:
        return self if self.tasks else replace(self, tasks=tuple(tasks))

    def informed(self, adapters: Mapping[str, Adapter], tasks: Sequence[Task]) -> Router:
        if self.vectors != "text":
            return self
        said = {task.name: f"{task.instruction} {task.description}".strip() for task in tasks}
        return replace(self, texts={**{name: text for name, text in said.items() if text}, **self.texts})

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return TaskGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return TaskShared(self, sites, names)

    def begin(self, shared: Any, hub: Hub, inputs: Mapping[str, Any], call: Call) -> None:
        noisy = self.select != "softmax" and learning(shared)
        shared.__dict__["draw"] = int(torch.randint(2**31, ())) if noisy else None

    def rate(self, name: str) -> float:
        return 10.0 if name == "z" else 1.0

    def stepped(self, gates: Sequence[Gate], shared: Any) -> None:
        with torch.no_grad():
            shared.heat.mul_(math.exp(-self.decay)).clamp_(min=self.least)

    def facts(self, adapters: Mapping[str, Adapter], gates: Sequence[Any], shared: Any) -> dict[str, Any]:
        return {"share of the experts by task": association(adapters, gates, self.tasks)}


class TaskShared(Part):
    """z [T, v]; of each block W1 [h, v], b1 [h], W2 [N, h], b2 [N]; and the temperature.

    Attributes:
        draw: of this forward's noise; None where there is none.
    """

    draw: int | None = None

    def __init__(self, router: TaskMoE, sites: Sequence[Site], names: Sequence[str]) -> None:
        super().__init__(router)
        self.router, self.names = router, tuple(names)
        made: Any = signatures.make("text") if router.vectors == "text" else None
        self.encoder, width = made, router.width if made is None else made.dimension
        self.z = nn.Parameter(torch.zeros(len(router.tasks), width))
        self.heat = nn.Parameter(torch.tensor(router.temperature), requires_grad=False)
        for block in dict.fromkeys(block_of(site) for site in sites):
            self.register_parameter(f"W1-{block}", nn.Parameter(torch.zeros(router.hidden, width)))
            self.register_parameter(f"b1-{block}", nn.Parameter(torch.zeros(router.hidden)))
            self.register_parameter(f"W2-{block}", nn.Parameter(torch.zeros(len(names), router.hidden)))
            self.register_parameter(f"b2-{block}", nn.Parameter(torch.zeros(len(names))))
        held = set(self._parameters) if router.held else {"heat"} if self.encoder is None else {"heat", "z"}
        self.frozen = frozenset(held)

    def start(self, generator: torch.Generator) -> None:
        """Vectors as an embedding has them, or of the texts; the routers as linear layers start."""
        with torch.no_grad():
            self.heat.fill_(self.router.temperature)
            if self.encoder is None:
                self.z.normal_(generator=generator)
            else:
                for i, task in enumerate(self.router.tasks):
                    self.z[i] = self.told(task)
            for name, value in self._parameters.items():
                if name[0] in "Wb" and value is not None:
                    bound = (self.z.shape[1] if name[1] == "1" else self.router.hidden) ** -0.5
                    value.uniform_(-bound, bound, generator=generator)

    def told(self, task: str) -> Tensor:
        """The vector [v] of a task's text."""
        kept = self.__dict__.setdefault("_told", {})
        if task not in kept:
            kept[task] = self.encoder.vectors([self.router.texts.get(task, task)])[0]
        found: Tensor = kept[task].to(self.z.device)
        return found

    def vector(self, task: str | None) -> Tensor | None:
        """z of a task; None where there is none."""
        if task in self.router.tasks:
            return self.z[self.router.tasks.index(task)]
        return None if task is None or self.encoder is None else self.told(task)

    def logits(self, block: str, z: Tensor) -> Tensor:
        """[..., v] to [..., N]."""
        W1, b1, W2, b2 = (self._parameters[f"{name}-{block}"] for name in ("W1", "b1", "W2", "b2"))
        return F.linear(F.gelu(F.linear(z, W1, b1)), W2, b2)  # type: ignore[arg-type]


class TaskGate(Gate):
    """What the router of its block says of the experts that are here."""

    shared: TaskShared

    def scores(self, tasks: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """The logits [len(tasks), N], zero for tasks that are not known, and which are known."""
        place = [self.shared.names.index(name) for name in self.names]
        rows = [self.shared.vector(task) for task in tasks]
        width = self.shared.z.shape[1]
        z = torch.stack([self.shared.z.new_zeros(width) if row is None else row for row in rows])
        known = torch.tensor([row is not None for row in rows], device=z.device)[:, None]
        return self.shared.logits(block_of(self.site), z)[:, place] * known, known

    def shares(self, tasks: Sequence[str | None]) -> list[dict[str, float]]:
        """What each task gives to each expert when nothing learns."""
        with torch.no_grad():
            logits, known = self.scores(tasks)
            p = (logits / self.shared.heat).softmax(-1)
            if self.router.select != "softmax":
                p = torch.where(known, F.one_hot(p.argmax(-1), len(self.names)).to(p.dtype), p)
        return [{n: w for n, w in zip(self.names, row, strict=True) if w} for row in p.tolist()]

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        tasks: Sequence[str | None] = call.tasks or (None,)
        if not learning(self.shared):
            each = dict.fromkeys(tasks)
            found = dict(zip(each, self.shares(list(each)), strict=True))
            return picked(self, [found[task] for task in tasks], x, y, call)
        if len(tasks) == 1 and call.rows and self.site.rows:
            tasks = list(tasks) * call.rows
        logits, known = self.scores(tasks)
        if self.shared.draw is not None:
            logits = logits + self._gumbel(logits.shape).to(logits) * known
        p = (logits / self.shared.heat).softmax(-1)
        if self.router.select == "gumbel-st":
            hard = F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)
            p = torch.where(known, hard + (p - p.detach()), p)
        if len(p) == 1:
            return Weights(self.names, p[0].to(y.device, y.dtype if y.is_floating_point() else torch.float32))
        return by_row(self.site, self.names, p, x, y)

    def _gumbel(self, shape: torch.Size) -> Tensor:
        """The same at all sites of a block, and when a forward is computed again for its backward."""
        seed = (self.shared.draw or 0) ^ zlib.crc32(block_of(self.site).encode())
        u = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).clamp(1e-10, 1.0 - 1e-7)
        return -(-u.log()).log()


def association(
    adapters: Mapping[str, Adapter], gates: Sequence[TaskGate], tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each task each expert's share over all sites."""
    found = {task: dict.fromkeys(adapters, 0.0) for task in tasks}
    for gate in gates:
        for task, shares in zip(tasks, gate.shares(list(tasks)) if tasks else [], strict=True):
            for name, value in shares.items():
                found[task][name] += value / len(gates)
    return {task: {name: round(value, 4) for name, value in row.items()} for task, row in found.items()}


def second_stage(
    model: Model, adapter: Adapter, seed: int = 0, temperature: float = 300.0, least: float = 1.0, decay: float = 1e-4
) -> Adapter:
    """A mixture with fresh experts and the routes that another one learned, which stay: what learns next are the experts.

    The weights are a softmax whose temperature falls, from the mean of all experts to the learned routes.

    Args:
        model: the base.
        adapter: a mixture that ``task-moe`` has learned.
        seed: of the experts.
        temperature, least, decay: as `TaskMoE` takes them.

    Returns:
        An adapter to go on from: ``polytask.learn(model, tasks, form=it.form, start=it, joint=True)``.

    Raises:
        MixError: it is no such mixture.
    """
    form: Any = adapter.form
    former = getattr(form, "router", None)
    if not isinstance(former, TaskMoE) or adapter.shared is None:
        raise MixError(
            f"the adapter {adapter.name!r} is no mixture that task-moe has learned, so it has no routes to keep"
        )
    router = replace(former, select="softmax", held=True, temperature=temperature, least=least, decay=decay)
    made = type(form)(router, form.experts, form.forms, form.train)
    fresh = Adapter.new(model, made, list(adapter.patches), seed, adapter.name)
    last = f"p{len(form.forms)}_"
    with torch.no_grad():
        for name, value in adapter.shared.named_parameters():
            if name.startswith(last) and not name.endswith("_heat"):
                fresh.shared._parameters[name].copy_(value)  # type: ignore[union-attr]
    return fresh


def relative_gain(scores: Mapping[str, float], base: Mapping[str, float]) -> float:
    """ARG, the mean over tasks of ``(score - base) / base``.

    Raises:
        ConfigError: the tasks differ, or a base's score is zero.
    """
    if set(scores) != set(base) or not scores or not all(base.values()):
        raise ConfigError("relative_gain: give the same tasks in both, and base scores that are not zero")
    return sum((scores[task] - base[task]) / base[task] for task in scores) / len(scores)
