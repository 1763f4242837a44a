"""Which task each row of a batch is of, and which block a site is in: for routers that weigh adapters by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from polytask.core.form import Call, Weights
from polytask.core.gate import Gate
from polytask.core.mix import PerRow
from polytask.core.site import Site


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


def block_of(site: Site) -> str:
    """The block that a site is in, as a name without dots (``encoder-layer-0``); ``rest`` outside of all blocks."""
    if site.layer is None:
        return "rest"
    parts = site.path.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "rest" if end is None else "-".join(parts[: end + 1])
