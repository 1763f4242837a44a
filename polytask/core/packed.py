"""Tensors as signs and one size, in a file: two masks of bits and a number for each.

A file holds for each tensor ``<name>.kept`` (one bit for each entry), ``<name>.signs`` (one bit for each kept entry: is it
positive?) and ``<name>.scale``; shapes and types stand in the metadata. Other tensors are held as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = "compressed.safetensors"  # in place of an adapter's weights
MARK = "polytask_ternary"


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


def packed(tensor: Tensor) -> Ternary | Tensor:
    """Compressed where that loses nothing."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not tensor.numel():
        return tensor
    scale = float(tensor.abs().max())
    mask = tensor != 0
    if scale == 0.0 or not bool((tensor[mask].abs() == scale).all()):
        return tensor
    return encode(tensor, mask, scale)


def write(path: str | Path, tensors: Mapping[str, Ternary | Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes tensors, compressed and others, to a file. Raises OSError."""
    from safetensors.torch import save_file

    path, held, said = Path(path).expanduser(), {}, {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            held[name] = value.contiguous()
            continue
        held |= {f"{name}.kept": value.kept, f"{name}.signs": value.signs, f"{name}.scale": torch.tensor(value.scale)}
        said[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(held, path, {**(metadata or {}), "format": "pt", MARK: json.dumps(said)})
    return path


def read(path: str | Path) -> tuple[dict[str, Ternary | Tensor], dict[str, str]]:
    """The tensors of a file, and what else its metadata says. Raises ValueError for files that are damaged or others."""
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
        raise ValueError(f"{path} is damaged or holds no compressed difference: {error}") from error
    return found, metadata


def is_packed(path: str | Path) -> bool:
    """Whether a file holds a compressed difference."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return MARK in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
