"""Which task each row is of, for forms with parts that belong to one task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polytask.core.by_task import places
from polytask.core.errors import MixError
from polytask.core.form import Call, per_row
from polytask.core.site import Site


def rows_by_task(
    site: Site, tasks: Sequence[str], x: Tensor, y: Tensor, call: Call
) -> tuple[Tensor, Tensor, list[int] | int | None]:
    """The place in ``tasks`` of each leading entry of x (-1 for other tasks), a number where all have the same.

    Returns x and y, repeated for the rows where they share one entry, and None where the call knows no tasks.

    Raises:
        MixError: rows of several tasks at a site that does not see the rows of the batch.
    """
    found = places(tasks, call) if tasks else None
    if not isinstance(found, list):
        return x, y, found
    if not site.rows or x.dim() < 2:
        raise MixError(
            f"site {site.name!r} does not see the rows of the batch in its first dimension, so it cannot tell their "
            "tasks apart; leave it out of the adapter, or use one task at a time"
        )
    x, y, per = per_row(x, y, len(found), site.name)
    return x, y, [i for i in found for _ in range(per)]
