"""The order in which examples are seen: shuffled by seed and epoch, similar lengths together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Item = tuple[int, int]  # (which task, which of its rows)


def epoch(
    lengths: Sequence[Sequence[int]],
    batch_size: int,
    seed: int,
    number: int,
    sampling: str = "proportional",
    temperature: float = 2.0,
) -> list[list[Item]]:
    """The batches of one epoch.

    Every epoch draws as many examples as there are. With one task, or ``proportional``, each is seen once. ``equal`` and
    ``temperature`` draw from the tasks by their share (equal, or sizes to the power 1/temperature), each task cycling through
    its own shuffled examples.

    Args:
        lengths: tokens of each row, by task.
        batch_size: rows in a batch; the last may have fewer.
        seed: of the order.
        number: the epoch, from 0.
        sampling: see above.
        temperature: of ``temperature``.
    """
    generator = torch.Generator().manual_seed((seed << 20) + number)
    items = _drawn([len(rows) for rows in lengths], sampling, temperature, generator)
    # lengths are sorted within pools of some batches: little padding, and still another order in every epoch
    pool = batch_size * 16
    made: list[list[Item]] = []
    for at in range(0, len(items), pool):
        part = sorted(items[at : at + pool], key=lambda item: lengths[item[0]][item[1]])
        made += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def _drawn(sizes: Sequence[int], sampling: str, temperature: float, generator: torch.Generator) -> list[Item]:
    total = sum(sizes)
    if len(sizes) == 1 or sampling == "proportional":
        everything = [(task, row) for task, size in enumerate(sizes) for row in range(size)]
        return [everything[i] for i in torch.randperm(total, generator=generator).tolist()]
    power = 0.0 if sampling == "equal" else 1.0 / temperature
    share = torch.tensor([size**power if size else 0.0 for size in sizes], dtype=torch.float64)
    chosen = torch.multinomial(share, total, replacement=True, generator=generator).tolist()
    orders = [torch.randperm(size, generator=generator).tolist() for size in sizes]
    at = [0] * len(sizes)
    items = []
    for task in chosen:
        items.append((task, orders[task][at[task] % sizes[task]]))
        at[task] += 1
    return items
