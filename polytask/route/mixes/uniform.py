"""What everything else is measured against: all adapters alike, and the right one for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from polytask.core.adapter import Adapter
from polytask.core.errors import MixError, listing
from polytask.core.form import Call, Part, Weights
from polytask.core.gate import Gate, Router, routers, serving
from polytask.core.gates import RowShared
from polytask.core.site import Site
from polytask.route.by_task import picked


@routers.register("uniform")
@dataclass(frozen=True)
class Uniform(Router):
    """Every adapter with the weight ``1 / N``, of all N also where some have no patch."""

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return UniformGate(self, site, names)

    def shared(self, sites: Sequence[Site], names: tuple[str, ...]) -> Part:
        return RowShared(self, names)


class UniformGate(Gate):
    """No parameters."""

    shared: RowShared

    def fixed(self) -> dict[str, float]:
        return dict.fromkeys(self.names, 1.0 / len(self.shared.names))

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        return Weights(self.names, (1.0 / len(self.shared.names),) * len(self.names))


@routers.register("oracle")
@dataclass(frozen=True)
class Oracle(Router):
    """Each row the adapter of its task, which the call names (``model.using(mix, tasks=...)``): what a perfect router would do.

    Args:
        serves: task to adapter; read off the adapters' cards, heads and names when empty. Rows of other tasks get none.

    Raises:
        MixError: rows without a task, when it acts.
    """

    serves: Mapping[str, str] = field(default_factory=dict)

    reads: ClassVar[Any] = "task"

    def fitted(self, adapters: Mapping[str, Adapter]) -> Router:
        if self.serves:
            unknown = sorted(set(self.serves.values()) - set(adapters))
            if unknown:
                raise MixError(f"oracle: {listing(unknown)} is none of the adapters, which are {listing(adapters)}")
            return self
        return replace(self, serves=serving(adapters))

    def gate(self, site: Site, names: tuple[str, ...]) -> Gate:
        return OracleGate(self, site, names)


class OracleGate(Gate):
    """No parameters."""

    def weigh(self, x: Tensor, y: Tensor, call: Call) -> Weights:
        if call.tasks is None:
            raise MixError(
                "oracle needs the task of each row; say model.using(mix, tasks=...) with a task, or one for each row"
            )
        rows = [{own: 1.0} if (own := self.router.serves.get(task)) is not None else {} for task in call.tasks]
        return picked(self, rows, x, y, call)
