"""ComPEFT: a difference as signs and one size. ``alpha * sigma(t) * sign(top(t))``: two masks of bits and a number per tensor.

Reference: Yadav et al., ComPEFT, arXiv 2311.13171.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from polytask.core.errors import MergeError
from polytask.core.files import WEIGHTS
from polytask.core.packed import FILE, Ternary, decode, encode, packed, read, write
from polytask.core.storage import writing

from .rules.elect import within
from .select import find, from_cut, lower, number, share, upper
from .source import Source, compare_sources

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter

Parts = Callable[[], Iterable[tuple[str, Tensor]]]


def ternary(parts: Parts, density: float = 0.2, alpha: float = 1.0) -> Iterable[tuple[str, Ternary]]:
    """Keeps the signs of the entries of largest size of all tensors together, exactly the share of them, and gives all one size.

    Args:
        parts: gives the names and tensors of a difference, as often as it is called (three times).
        density: the share of entries that is kept, at least one.
        alpha: the size, in standard deviations of all entries of the difference.

    Raises:
        ConfigError: a density outside 0 to 1.
        MergeError: entries that are no numbers.
    """
    within("compeft", "density", density)
    counts, count, first, second = torch.zeros(1 << 16, dtype=torch.int64), 0, 0.0, 0.0
    for name, tensor in parts():
        wide = tensor.float().reshape(-1)
        counts += upper(wide.abs())
        count += wide.numel()
        first += float(wide.numpy().sum(dtype=np.float64))
        second += float(np.einsum("i,i", wide.numpy(), wide.numpy(), dtype=np.float64))
        if not math.isfinite(second):
            raise MergeError(f"{name} has entries that are not finite numbers, so it cannot be compressed")
    if not count:
        return
    scale = alpha * math.sqrt(max(0.0, second - first * first / count) / max(1, count - 1))
    scale = scale or alpha * abs(first) / count  # entries that are all the same have no deviation
    bucket, rank = find(counts, min(count - 1, count - share(density, count)))
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for _, tensor in parts():
        low += lower(tensor.float().abs(), bucket)
    least, rank = find(low, rank)
    cut, left = number(bucket, least), int(low[least]) - rank  # how many of those at the cut are kept
    for name, tensor in parts():
        sizes = tensor.float().abs()
        equal = min(left, int((sizes == cut).count_nonzero()))
        mask = from_cut(sizes, cut, equal) if density > 0 else sizes < 0
        left -= equal
        yield name, encode(tensor, mask, float(torch.tensor(scale).to(tensor.dtype)))


def compress(model: Source, base: Source, out: str | Path, density: float = 0.2, alpha: float = 1.0) -> Path:
    """Writes the difference between two models as signs and a size.

    Args:
        model: what is tuned.
        base: what it was tuned from.
        out: the file.
        density: the share of entries that is kept.
        alpha: the size in standard deviations.

    Raises:
        MergeError: the models do not fit each other.
        StorageError: the file cannot be written.
    """
    compare_sources(base, [model])
    floats = [name for name in base.shapes if base.dtype(name).is_floating_point]
    found = ternary(lambda: ((n, model.read(n).float() - base.read(n).float()) for n in floats), density, alpha)
    with writing(Path(out)):
        return write(out, dict(found))


class Compressed(Source):
    """A base with a compressed difference added.

    Args:
        path: the file.
        base: what it was a difference to.
        name: what messages call it.

    Raises:
        MergeError: the file is damaged, or not for this base.
    """

    def __init__(self, path: str | Path, base: Source, name: str = "") -> None:
        self.base, self.name = base, name or str(path)
        self.folder, self.tied = base.folder, base.tied
        try:
            self._packed, _ = read(path)
        except ValueError as error:
            raise MergeError(f"{error}; copy it again") from error
        self._kept: tuple[str, Tensor | None] = ("", None)
        for key, held in self._packed.items():
            if base.shapes.get(key) != tuple(held.shape):
                there = base.shapes.get(key, "no such tensor")
                raise MergeError(
                    f"{self.name} does not fit {base.name}: {key} {tuple(held.shape)}, and the base has {there}"
                )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self.base.read(name, start, stop)
        held = self._packed.get(name)
        if held is None:
            return stored
        change = self._kept[1] if self._kept[0] == name else None
        if change is None:
            change = decode(held) if isinstance(held, Ternary) else held
            self._kept = (name, change)  # blocks of a tensor are asked for one after the other
        return stored.float() + (change[start:stop] if change.dim() else change).float()


def compress_adapter(adapter: Adapter, density: float = 0.2, alpha: float = 1.0) -> Adapter:
    """A copy of an adapter with ternary parameters, all of them taken as one vector."""
    made = adapter.copy()
    own = {
        f"{i}:{name}": parameter
        for i, part in enumerate(made.parts.values())
        for name, parameter in part.named_parameters()
        if name not in part.frozen
    }
    found = ternary(lambda: ((name, p.detach().cpu()) for name, p in own.items()), density, alpha)
    with torch.no_grad():
        for name, tensor in [(name, decode(tensor)) for name, tensor in found]:
            own[name].copy_(tensor)
    return made


def save_adapter(adapter: Adapter, folder: str | Path, density: float = 0.2, alpha: float = 1.0) -> Path:
    """Writes an adapter with its parameters compressed: its folder with `FILE` in place of the weights.

    Args:
        adapter: of any form.
        folder: where it goes. `Adapter.load` reads it, bit for bit.
        density: the share of entries that is kept.
        alpha: the size in standard deviations. The best is found by trying some on held-out rows, from 0.5 to 10.
    """
    from safetensors import safe_open

    folder = compress_adapter(adapter, density, alpha).save(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: packed(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  no mapping
    with writing(folder):
        write(folder / FILE, tensors, metadata)
    (folder / WEIGHTS).unlink()
    return folder
