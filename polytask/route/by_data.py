"""Rows beside adapters by the data that those learned from, in the bare base's own vectors.

Shapes: B rows, N adapters, m vectors of each, d the width of the base's hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polytask.core.adapter import Adapter
from polytask.core.errors import MixError
from polytask.core.gate import Router
from polytask.core.gates import RowShared
from polytask.core.model import Model
from polytask.core.reading import inputs_of, means
from polytask.core.signature import Subject, signatures
from polytask.core.task import Task

AT_ONCE = 16  # examples in a forward


class Kept(RowShared):
    """v [N, m, d] of unit length: the vectors of each adapter's data; computed, not trained."""

    frozen = frozenset({"v"})

    def __init__(self, router: Router, names: Sequence[str]) -> None:
        super().__init__(router, names)
        self.v = nn.Parameter(torch.zeros(len(names), 0, 0), requires_grad=False)

    def fill(self, signs: Sequence[Tensor]) -> None:
        """Takes vectors [m, d] of each adapter."""
        widths = {sign.shape[-1] for sign in signs}
        if len(widths) > 1:
            raise MixError(
                f"the signatures of the adapters have widths {sorted(widths)}: they are of different bases; sign all with one"
            )
        most = max(len(sign) for sign in signs)
        # whose has fewer repeats its last one, which changes no maximum
        filled = [torch.cat([sign, sign[-1:].expand(most - len(sign), -1)]) for sign in signs]
        self.v = nn.Parameter(F.normalize(torch.stack(filled).float(), dim=-1), requires_grad=False)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if (v := tensors.get("v")) is not None and v.dim() == 3:  # how many and how wide is known from the data only
            self.v = nn.Parameter(torch.zeros(len(self.names), *v.shape[1:]), requires_grad=False)
        super().load(tensors)

    def near(self, rows: Tensor) -> Tensor:
        """The cosine of each row [B, d] and the nearest vector of each adapter, [B, N]. Raises `MixError`."""
        if not self.v.shape[1]:
            raise MixError(f"the router {self.form.name!r} knows no data of the adapters; make it with polytask.route")
        if rows.shape[1] != self.v.shape[2]:
            raise MixError(
                f"the base gives vectors of width {rows.shape[1]}, and the adapters' data have {self.v.shape[2]}; use the base "
                "that they were signed with"
            )
        found: Tensor = torch.einsum("bd,nmd->bnm", F.normalize(rows, dim=1), self.v).amax(-1)
        return found


def centroids(name: str, adapter: Adapter, model: Model | None, data: Task | None) -> dict[str, Tensor]:
    """The signature ``data`` of an adapter, as a library keeps it: under the empty name [tasks, d].

    Args:
        name: of the router that asks.
        adapter: whose.
        model: the base.
        data: its task.

    Raises:
        MixError: the base or the data are not given, or the base reads two sides.
    """
    found = signatures.make("data").sign(Subject(adapter, *_given(name, model, data)))
    assert found is not None  # all it needs is there
    return found[0]


def vectors(name: str, adapter: Adapter, model: Model | None, data: Task | None, most: int) -> Tensor:
    """One vector of each of the first examples, [m, d] on the CPU, their texts cut where the adapter cut them while it
    learned. Raises `MixError` as `centroids` does."""
    base, (task,) = _given(name, model, data)
    examples = (task.train or task.dev or task.test)[:most]
    longest = adapter.schedule.get("longest")
    parts = [inputs_of(base, task, examples[i : i + AT_ONCE], longest) for i in range(0, len(examples), AT_ONCE)]
    return torch.cat([means(base, part).cpu() for part in parts])


def _given(name: str, model: Model | None, data: Task | None) -> tuple[Model, tuple[Task]]:
    if model is None or data is None:
        raise MixError(
            f"{name} compares rows with the adapter's own data; give the base (model=) and its task among data="
        )
    if model.kind == "dual":
        raise MixError(
            f"{name} reads rows with the base, and the dual model {model.name!r} reads two sides; use another"
        )
    if not (data.train or data.dev or data.test):
        raise MixError(f"the task {data.name!r} has no examples, and {name} compares rows with them; give it some")
    return model, (data,)
