"""ComPEFT: a difference as signs and one size. ``alpha * sigma(t) * sign(top(t))``: two masks of bits and a number per tensor.

A file holds for each tensor ``<name>.kept`` (one bit for each entry), ``<name>.signs`` (one bit for each kept entry: is it
positive?) and ``<name>.scale``; shapes and types stand in the metadata. Other tensors are held as they are.

Reference: Yadav et al., ComPEFT, arXiv 2311.13171.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from polytask.core.errors import MergeError
from polytask.core.files import CARD, CONFIG, WEIGHTS, writing

from .rules.elect import within
from .select import find, from_cut, lower, number, share, upper
from .source import Source, compare_sources

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter

FILE = "compressed.safetensors"
MARK = "polytask_ternary"
Parts = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Ternary:
    """A tensor of ``-scale``, 0 and ``scale``.

    Attributes:
        shape: of the tensor.
        kept: where it is not zero, eight places in a byte.
        signs: where it is positive, of those that are kept.
        scale: the size, above zero.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    kept: Tensor
    signs: Tensor
    scale: float
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        """Of both masks and the scale."""
        return self.kept.numel() + self.signs.numel() + 4


def encode(tensor: Tensor, mask: Tensor, scale: float) -> Ternary:
    """The signs of a tensor where a mask is true; zeros are never kept."""
    values = tensor.reshape(-1).numpy() if tensor.dtype != torch.bfloat16 else tensor.float().reshape(-1).numpy()
    kept = mask.reshape(-1).numpy() & (values != 0)
    signs = np.packbits((values > 0)[kept], bitorder="little")
    bits = np.packbits(kept, bitorder="little")
    return Ternary(tuple(tensor.shape), torch.from_numpy(bits), torch.from_numpy(signs), scale, tensor.dtype)


def decode(packed: Ternary) -> Tensor:
    """The tensor."""
    count = math.prod(packed.shape)
    kept = np.unpackbits(packed.kept.numpy(), count=count, bitorder="little").view(bool)
    signs = np.unpackbits(packed.signs.numpy(), bitorder="little")[: int(kept.sum())]
    out = np.zeros(count, dtype=np.float32)
    out[kept] = np.array([-packed.scale, packed.scale], dtype=np.float32)[signs]
    return torch.from_numpy(out).view(packed.shape).to(packed.dtype)


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
    return write(
        out, dict(ternary(lambda: ((n, model.read(n).float() - base.read(n).float()) for n in floats), density, alpha))
    )


def write(path: str | Path, tensors: Mapping[str, Ternary | Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes tensors, compressed and others, to a file."""
    from safetensors.torch import save_file

    path, held, said = Path(path).expanduser(), {}, {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            held[name] = value.contiguous()
            continue
        held |= {f"{name}.kept": value.kept, f"{name}.signs": value.signs, f"{name}.scale": torch.tensor(value.scale)}
        said[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, path, {**(metadata or {}), "format": "pt", MARK: json.dumps(said)})
    return path


def read(path: str | Path) -> tuple[dict[str, Ternary | Tensor], dict[str, str]]:
    """The tensors of a file, and what else its metadata says. Raises `MergeError` for files that are damaged or others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = set(file.keys())
            found: dict[str, Ternary | Tensor] = {}
            for name, (shape, dtype) in json.loads(metadata.pop(MARK)).items():
                kept, signs, scale = (file.get_tensor(f"{name}.{part}") for part in ("kept", "signs", "scale"))
                names -= {f"{name}.{part}" for part in ("kept", "signs", "scale")}
                if kept.numel() != -(-math.prod(shape) // 8):
                    raise ValueError(f"{name} has {kept.numel()} bytes for the shape {shape}")
                found[name] = Ternary(tuple(shape), kept, signs, float(scale), getattr(torch, dtype))
            found |= {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MergeError(f"{path} is damaged or holds no compressed difference: {error}") from error
    return found, metadata


def is_compressed(path: str | Path) -> bool:
    """Whether a file holds a compressed difference."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return MARK in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


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
        self._packed, _ = read(path)
        self._kept: tuple[str, Tensor | None] = ("", None)
        for key, packed in self._packed.items():
            if base.shapes.get(key) != tuple(packed.shape):
                there = base.shapes.get(key, "no such tensor")
                raise MergeError(
                    f"{self.name} does not fit {base.name}: {key} {tuple(packed.shape)}, and the base has {there}"
                )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        stored = self.base.read(name, start, stop)
        packed = self._packed.get(name)
        if packed is None:
            return stored
        change = self._kept[1] if self._kept[0] == name else None
        if change is None:
            change = decode(packed) if isinstance(packed, Ternary) else packed
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
    packed = ternary(lambda: ((name, p.detach().cpu()) for name, p in own.items()), density, alpha)
    with torch.no_grad():
        for name, tensor in [(name, decode(tensor)) for name, tensor in packed]:
            own[name].copy_(tensor)
    return made


def save_adapter(adapter: Adapter, folder: str | Path, density: float = 0.2, alpha: float = 1.0) -> Path:
    """Writes an adapter with its parameters compressed: its folder with `FILE` in place of the weights.

    Args:
        adapter: of any form.
        folder: where it goes. `load_adapter` and `polytask.merge` read it.
        density: the share of entries that is kept.
        alpha: the size in standard deviations. The best is found by trying some on held-out rows, from 0.5 to 10.
    """
    from safetensors import safe_open

    folder = compress_adapter(adapter, density, alpha).save(folder)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: _packed(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  no mapping
    write(folder / FILE, tensors, metadata)
    (folder / WEIGHTS).unlink()
    return folder


def _packed(tensor: Tensor) -> Ternary | Tensor:
    """Compressed where that loses nothing."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not tensor.numel():
        return tensor
    scale = float(tensor.abs().max())
    mask = tensor != 0
    if scale == 0.0 or not bool((tensor[mask].abs() == scale).all()):
        return tensor
    return encode(tensor, mask, scale)


def load_adapter(folder: str | Path) -> Adapter:
    """An adapter that `save_adapter` wrote, bit for bit."""
    import shutil

    from safetensors.torch import save_file

    from polytask.core.adapter import Adapter

    folder = Path(folder).expanduser()
    packed, metadata = read(folder / FILE)
    tensors: dict[str, Any] = {n: decode(t) if isinstance(t, Ternary) else t for n, t in packed.items()}
    with tempfile.TemporaryDirectory() as held:
        for name in (CONFIG, CARD, "heads.safetensors"):
            if (folder / name).is_file():
                shutil.copy2(folder / name, held)
        save_file(tensors, Path(held) / WEIGHTS, metadata)
        return Adapter.load(held)
