"""SkillNet: named skills, of which each task declares those that it needs; the others are not computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, listing, nearest
from polytask.core.form import Call, Weights
from polytask.core.gate import Gate, Router, routers
from polytask.core.gates import RowShared
from polytask.core.site import Site
from polytask.route.by_task import picked


@routers.register("skillnet")
@dataclass(frozen=True)
class SkillNet(Router):
    """Each task uses the skills that it declares, alike: ``w_n = 1 / |declared|``. No other is called or gets a gradient.

    Rows of tasks that declare nothing, and rows without a task, use all skills.

    Args:
        skills: of each task the names of its skills: experts of a mixture, or adapters.
        general: the name of one that every task uses beside its own; none where empty.

    Reference: Tan et al., SkillNet-NLU, arXiv 2203.03312, and Dai et al., One Model, Multiple Modalities, arXiv 2205.06126:
    skills are copies of the feed-forward or of the attention's projections there, and any form here. Their outputs are averaged.

    Raises:
        ConfigError: a task declares no skill.
        MixError: a task declares a skill that is not there.
    """

    skills: Mapping[str, Sequence[str]] = field(default_factory=dict)
    general: str = ""

    reads: ClassVar[Any] = "task"
    trains: ClassVar[Any] = "adapters"
    paper: ClassVar[str] = "arXiv 2205.06126"

    def __post_init__(self) -> None:
        if not isinstance(self.skills, Mapping) or any(isinstance(own, str) or not own for own in self.skills.values()):
            raise ConfigError(
                f"skillnet: skills must be names for each task, such as {{'mood': ['words', 'tone']}}, got {self.skills!r}"
            )
        object.__setattr__(self, "skills", {task: list(dict.fromkeys(own)) for task, own in self.skills.items()})

    def of_task(self, task: str | None, names: Sequence[str]) -> dict[str, float]:
        """The weights of a task's skills, where ``names`` are all that there are.

        Raises:
            MixError: it declares one that is not among them.
        """
        own = self.skills.get(task or "")
        used = list(names) if own is None else list(dict.fromkeys([*([self.general] if self.general else []), *own]))
        odd = [name for name in (*used, *([self.general] if self.general else [])) if name not in names]
        if odd:
            raise MixError(
                f"skillnet: {odd[0]!r} is none of the skills{nearest(odd[0], names)}; they are: {listing(names)}"
            )
        return dict.fromkeys(used, 1.0 / len(used))

    def fitted(self, adapters: Mapping[str, Adapter]) -> Router:
        for task in (None, *self.skills):
            self.of_task(task, tuple(adapters))
        return self

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return DeclaredGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> RowShared:
        return RowShared(self, names)  # which names there are in all

    def facts(self, adapters: Mapping[str, Adapter], gates: Sequence[Any], shared: Any) -> dict[str, Any]:
        total = sum(adapter.size for adapter in adapters.values())
        each = {}
        for task in self.skills:
            used = self.of_task(task, tuple(adapters))
            each[task] = {"skills": list(used), "activated": sum(adapters[name].size for name in used)}
        return {"parameters of the skills": total, "activated by task": each}


class DeclaredGate(Gate):
    """No parameters."""

    shared: RowShared

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        names = self.shared.names
        rows = [self.router.of_task(task, names) for task in call.tasks or (None,)]
        return picked(self, rows, x, y, call)
