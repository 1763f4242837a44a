"""Which task each row of a batch is of, and which block a site is in: for routers that weigh adapters by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.core.form import Call, Part, Weights
from polytask.core.gate import Gate, by_row
from polytask.core.mix import PerRow
from polytask.core.site import Site


def check_tasks(what: str, tasks: Sequence[str]) -> None:
    """Raises `ConfigError` where the names of tasks are not a sequence of different names."""
    if isinstance(tasks, str) or not all(isinstance(t, str) and t for t in tasks) or len({*tasks}) != len(tasks):
        raise ConfigError(f"{what}: tasks must be different names, such as ('mood', 'topic'), got {tasks!r}")


def places(tasks: Sequence[str], call: Call) -> list[int] | int:
    """The place in ``tasks`` of each row's task, a number where all rows have the same; -1 for other tasks and for none."""
    if call.tasks is None:
        return -1
    place = {task: i for i, task in enumerate(tasks)}
    found = [place.get(task, -1) for task in call.tasks]
    return found[0] if len(set(found)) == 1 else found


def by_place(
    site: Site, names: tuple[str, ...], table: Tensor, found: list[int] | int, x: Tensor, y: Tensor
) -> Weights:
    """The weights of the rows of a batch from a table.

    Args:
        site: where.
        names: the N adapters there.
        table: [T + 1, N], a row for each task, and the last one for all others.
        found: what `places` gave.
        x, y: the site's input and the base's output.

    Raises:
        MixError: rows of several tasks at a site that does not see the rows of the batch.
    """
    if isinstance(found, int):
        return Weights(names, table[found].to(y.device, y.dtype if y.is_floating_point() else torch.float32))
    return by_row(site, names, table[found], x, y)


def picked(gate: Gate, rows: Sequence[Mapping[str, float]], x: Tensor, y: Tensor, call: Call) -> Weights:
    """The weights of rows whose adapters are known without looking at the input; the others are not touched.

    Args:
        gate: where; what the last rows had to be is kept there.
        rows: for each row of the batch, or for all, names and weights.
        x, y, call: as `Gate.weigh` has them.

    Raises:
        MixError: rows that differ at a site that does not see the rows of the batch.
    """
    kept = gate.__dict__.get("_kept")
    if kept is None or kept[0] != rows:
        kept = gate.__dict__["_kept"] = (rows, PerRow(rows))
    mix: PerRow = kept[1]
    same = mix.fixed(gate.site, gate.names)
    if same is not None:
        return Weights(tuple(same), tuple(same.values()))
    return mix.weigh(gate.site, gate.names, x, y, call)


def learning(part: Part) -> bool:
    """Whether a part's parameters are being learned by the forward that runs."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())


def block_of(site: Site) -> str:
    """The block that a site is in, as a name without dots (``encoder-layer-0``); ``rest`` outside of all blocks."""
    if site.layer is None:
        return "rest"
    parts = site.path.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "rest" if end is None else "-".join(parts[: end + 1])
