"""Exact order statistics of more numbers than memory holds, by two histograms over the bits of fp32 numbers.

The upper 16 bits are counted first, then the lower 16 of the numbers whose upper bits are those of the one that is looked for.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BUCKETS = 1 << 16
CHUNK = 1 << 16  # entries that are looked through at a time
HIGH = 1 if sys.byteorder == "little" else 0  # which half of a number holds the upper bits


def share(density: float, count: int, *, floor: bool = False) -> int:
    """How many of ``count`` numbers a share is: rounded, and at least one of a share above zero.

    Args:
        density: the share, from 0 to 1.
        count: of how many.
        floor: round down, also to nothing.
    """
    if floor:
        return min(count, int(density * count))
    return min(count, max(round(density * count), 1)) if density > 0 else 0


def _halves(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower bits of fp32 numbers, without a copy where they lie together."""
    halves = x.reshape(-1).contiguous().numpy().view(np.uint16)
    return halves[HIGH::2], halves[1 - HIGH :: 2]


def upper(x: Tensor) -> Tensor:
    """How many numbers have each pattern of the upper bits, in the order of the numbers: [65536]."""
    counts = np.bincount(_halves(x)[0], minlength=BUCKETS)
    return torch.from_numpy(np.concatenate([counts[: BUCKETS // 2 - 1 : -1], counts[: BUCKETS // 2]]))


def lower(x: Tensor, bucket: int) -> Tensor:
    """The same for the lower bits, of numbers in one bucket of `upper`: [65536]."""
    high, low = _halves(x)
    negative = bucket < BUCKETS // 2  # whose bits grow as the numbers fall
    pattern = BUCKETS - 1 - bucket if negative else bucket - BUCKETS // 2
    counts = np.bincount(low[high == pattern], minlength=BUCKETS)
    return torch.from_numpy(counts[::-1].copy() if negative else counts)


def find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bucket that holds the number of a rank (0 is the least), and its rank in there."""
    before = torch.cumsum(counts, 0)
    bucket = int(torch.searchsorted(before, rank, right=True))
    return bucket, rank - (int(before[bucket - 1]) if bucket else 0)


def number(bucket: int, low: int) -> float:
    """The number with these upper and lower bits."""
    order = ((bucket - BUCKETS // 2) << 16) | low
    return float(np.array(order ^ ((order >> 31) & 0x7FFFFFFF), dtype=np.int32).view(np.float32))


def kth(x: Tensor, rank: int) -> float:
    """The number of a rank (0 is the least) of a tensor in memory."""
    return float(np.partition(x.reshape(-1).numpy(), rank)[rank])


def from_cut(sizes: Tensor, cut: float, equal: int | None = None) -> Tensor:
    """Where ``sizes`` are above a cut, or equal to it: all of those, or the first ``equal``."""
    if equal is None:
        return sizes >= cut
    mask = sizes > cut
    if equal:
        mask.view(-1)[(sizes.view(-1) == cut).nonzero()[:equal, 0]] = True
    return mask


def largest(sizes: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest are; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(sizes, dtype=torch.bool)
    if count >= sizes.numel():
        return torch.ones_like(sizes, dtype=torch.bool)
    sizes = sizes.contiguous()
    cut = kth(sizes, sizes.numel() - count)
    mask = sizes > cut
    equal = count - int(mask.count_nonzero())
    mask.view(-1)[(sizes.view(-1) == cut).nonzero()[:equal, 0]] = True
    return mask


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with zeros where the mask is not, in place. Torch takes four times as long for a product of numbers and truths."""
    np.multiply(x.numpy(), mask.numpy(), out=x.numpy())
    return x


def trim(x: Tensor, count: int) -> Tensor:
    """An fp32 tensor without its entries of least size: ``count`` are left, of equal ones the first. The tensor is used up."""
    if count <= 0:
        return x.zero_()
    if count >= x.numel():
        return x
    sizes, least = x.abs().reshape(-1).numpy(), x.numel() - count
    sizes.partition(least)
    cut = float(sizes[least])
    if not cut:  # the rest are zeros
        return x
    return _without(_above(x, cut), cut, int(np.count_nonzero(sizes[:least] == cut)))


def trim_at(x: Tensor, cut: float, equal: int | None = None) -> Tensor:
    """The same where the least size that is left is known: all entries of that size stay, or the first ``equal``."""
    if not cut:
        return x
    kept = _above(x, cut)
    return kept if equal is None else _without(kept, cut, int((kept.abs() == cut).count_nonzero()) - equal)


def _above(x: Tensor, cut: float) -> Tensor:
    below = float(np.nextafter(np.float32(cut), np.float32(0)))
    return F.hardshrink(x.contiguous(), below)  # one pass; a mask and a product with it are five times as slow


def _without(x: Tensor, size: float, count: int) -> Tensor:
    """Sets the last ``count`` entries of a size to zero, in place."""
    flat = x.view(-1)
    end = len(flat)
    while count > 0:  # from the end, and no further than to the first that goes
        part = flat[max(0, end - CHUNK) : end]
        gone = (part.abs() == size).nonzero()[-count:, 0]
        part[gone] = 0.0
        count, end = count - len(gone), end - len(part)
    return x
