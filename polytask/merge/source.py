"""What can be merged, read tensor by tensor: checkpoints on disk, modules in memory, and a base with an adapter on it."""

from __future__ import annotations

import json
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask.core.errors import MergeError, listing, nearest

if TYPE_CHECKING:
    from polytask.core.adapter import Adapter

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Source(ABC):
    """Named tensors that are read when they are needed, in rows where that is enough.

    Attributes:
        name: what messages and cards call it.
        folder: where its configuration and tokenizer lie, or None.
        tied: names that are other names for a tensor that is listed.
    """

    name: str
    folder: Path | None = None
    tied: Mapping[str, str] = {}

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order of the file."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor (all of one without dimensions), as stored. It may share memory."""


class Checkpoint(Source):
    """A file, or a folder as `transformers` writes it: safetensors, whole or in shards, or pickled weights read safely.

    Args:
        path: the file or folder.
        name: what messages call it; the path when empty.

    Raises:
        MergeError: there are no weights, or a file is missing or damaged.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.path = Path(path).expanduser()
        self.name = name or str(path)
        self.folder = self.path if self.path.is_dir() else None
        self._files: dict[Path, Any] = {}
        self._place: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file, wanted in self._find().items():
            self._read_header(file, wanted)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return list(self._files)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        file = self._file(self._place[name])
        if isinstance(file, Safe):
            return file.read(name, self._shapes[name], self._dtypes[name], start, stop)
        whole: Tensor = file[name]
        return whole if whole.dim() == 0 else whole[start:stop]

    def _find(self) -> dict[Path, list[str] | None]:
        """The files, each with the names that an index promises of it."""
        if not self.path.exists():
            siblings = [p.name for p in self.path.parent.iterdir()] if self.path.parent.is_dir() else []
            hint = nearest(self.path.name, siblings)
            raise MergeError(f"there is no {self.name}{hint}; give a folder or a file of weights")
        if self.path.is_file():
            return {self.path: None}
        for name in (INDEX, PICKLED_INDEX):
            if (self.path / name).is_file():
                return self._sharded(self.path / name)
        loose = [self.path / name for name in (WHOLE, PICKLED) if (self.path / name).is_file()]
        loose = loose[:1] or sorted(self.path.glob("*.safetensors"))
        if len(loose) == 1:
            return {loose[0]: None}
        there = listing(sorted(p.name for p in self.path.iterdir()), 8) or "nothing"
        raise MergeError(f"{self.name} has no {WHOLE}, {INDEX} or {PICKLED}; it holds {there}")

    def _sharded(self, index: Path) -> dict[Path, list[str] | None]:
        try:
            placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise MergeError(
                f"{index} is no index of shards ({type(error).__name__}); copy the folder again"
            ) from error
        missing = sorted({file for file in placed.values() if not (self.path / file).is_file()})
        if missing:
            raise MergeError(f"{self.name} lacks {listing(missing, 4)}, which its index names; copy the folder again")
        found: dict[Path, list[str] | None] = {}
        for tensor, file in placed.items():
            names = found.setdefault(self.path / file, [])
            assert names is not None
            names.append(tensor)
        return found

    def _file(self, path: Path) -> Any:
        """The opened file: of safetensors, or the mapping that a pickled one holds."""
        if path not in self._files:
            from safetensors import SafetensorError

            try:
                if path.suffix == ".safetensors":
                    self._files[path] = Safe(path)
                else:
                    self._files[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
                reason = str(error).partition("\n")[0][:120]
                raise MergeError(
                    f"{path} cannot be read ({reason}); it is cut short or no file of weights, so copy it again"
                ) from error
            except Exception as error:  # pickles fail in many ways, also on purpose
                raise MergeError(
                    f"{path} is pickled and holds more than tensors, which is not loaded; convert it to safetensors"
                ) from error
        return self._files[path]

    def _read_header(self, path: Path, wanted: list[str] | None) -> None:
        file = self._file(path)
        names: Iterable[str] = file.places if isinstance(file, Safe) else file
        lacking = sorted(set(wanted or ()) - set(names))
        if lacking:
            raise MergeError(f"{path} lacks {listing(lacking, 4)}, which the index places there; copy the folder again")
        for name in wanted or names:
            self._place[name] = path
            if not isinstance(file, Safe):
                value = file[name]
                if not isinstance(value, Tensor):
                    raise MergeError(f"{path} holds {name!r}, which is no tensor; give a file of a model's weights")
                self._shapes[name], self._dtypes[name] = tuple(value.shape), value.dtype
                continue
            kind, shape, _ = file.places[name]
            if kind not in DTYPES:
                raise MergeError(f"{name} of {self.name} is stored as {kind}, which cannot be merged; convert it first")
            self._shapes[name], self._dtypes[name] = shape, DTYPES[kind]


class Safe:
    """A safetensors file that is read in pieces into memory of its own.

    The library maps a file into memory, where every page that was read once counts as the process's. It checks the file
    here; the pieces are read at their places.

    Args:
        path: the file.

    Raises:
        SafetensorError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt"):
            pass  # its header fits its size, and its tensors its header
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        header = json.loads(os.pread(self._file, length, 8))
        self.places: dict[str, tuple[str, tuple[int, ...], int]] = {  # type, shape, first byte
            name: (said["dtype"], tuple(said["shape"]), 8 + length + said["data_offsets"][0])
            for name, said in header.items()
            if name != "__metadata__"
        }

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, start: int, stop: int | None) -> Tensor:
        """Rows of a tensor, all of one without dimensions."""
        at = self.places[name][2]
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            shape, whole = (max(0, last - first), *shape[1:]), math.prod(shape[1:])
            at += first * whole * dtype.itemsize
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        left = memoryview(data.numpy().data)
        while left:  # one call reads two gigabytes at most
            count = os.preadv(self._file, [left], at)
            if not count:
                raise MergeError(f"{name} ends before it should; the file was changed while it was read")
            left, at = left[count:], at + count
        return data.view(dtype).view(shape)


class Module(Source):
    """A network in memory. Parameters that are tied are listed once, under their first name.

    Args:
        module: the network.
        name: what messages call it.
    """

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name or type(module).__name__
        self._tensors: dict[str, Tensor] = {}
        self.tied = {}
        first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        for key, tensor in module.state_dict().items():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and place in first:
                self.tied[key] = first[place]
                continue
            first[place] = key
            self._tensors[key] = tensor.detach()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        return (tensor if tensor.dim() == 0 else tensor[start:stop]).cpu()


class Held(nn.Module):
    """Stands where a base's module would, for patches whose change depends on the base's weight."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


class Adapted(Source):
    """A base with an adapter added to it, whose changes are formed one tensor at a time and never written down.

    Args:
        base: the checkpoint or module that the adapter is for; None gives the changes alone.
        adapter: of a form that has a dense change.
        name: what messages call it.

    Raises:
        MergeError: the form has no dense change, or the base has no tensor for a site.
    """

    def __init__(self, base: Source, adapter: Adapter, name: str = "", alone: bool = False) -> None:
        self.base, self.adapter, self.alone = base, adapter, alone
        self.name = name or adapter.name or "adapter"
        self.folder, self.tied = base.folder, base.tied
        self.sites: dict[str, tuple[str, str]] = {}  # tensor -> (site, parameter)
        self._kept: tuple[str, dict[str, Tensor]] = ("", {})
        if not adapter.form.mergeable:
            raise MergeError(
                f"the adapter {self.name!r} has the form {adapter.form.name!r}, which has no dense change of a weight, so it "
                "cannot be merged; keep it attached, or merge outputs with a mix"
            )
        prefix = _prefix(base, [patch.site.path for patch in adapter.patches.values()], self.name)
        for site, patch in adapter.patches.items():
            own = [patch.site.param] if patch.site.param else ["weight", "bias"]
            for parameter in own:
                tensor = f"{prefix}{patch.site.path}.{parameter}".lstrip(".")
                tensor = base.tied.get(tensor, tensor)
                if tensor in base.shapes:
                    self.sites[tensor] = (site, parameter)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        if not self.alone:
            return self.base.shapes
        return {name: shape for name, shape in self.base.shapes.items() if name in self.sites}

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        change = self.change(name)
        if change is None:
            stored = self.base.read(name, start, stop)
            return torch.zeros_like(stored) if self.alone else stored
        if self.alone:
            return change[start:stop]
        return self.base.read(name, start, stop).float() + change[start:stop]

    def change(self, name: str) -> Tensor | None:
        """What the adapter adds to a tensor of the base, in fp32; None where it adds nothing."""
        if name not in self.sites:
            return None
        site, parameter = self.sites[name]
        if self._kept[0] != site:  # a site's tensors are asked for one after the other, in blocks of rows
            self._kept = (site, self._changes(site))
        return self._kept[1].get(parameter)

    @torch.no_grad()
    def _changes(self, site: str) -> dict[str, Tensor]:
        patch = self.adapter.patches[site]
        own = {p: t for t, (s, p) in self.sites.items() if s == site}
        held = Held({p: self.base.read(t).float() for p, t in own.items()})
        found = patch.bound(held, patch.site).deltas()
        if found is None:
            raise MergeError(f"the adapter {self.name!r} has no dense change at {site!r}, so it cannot be merged")
        return {name: change.detach().float() for name, change in found.items()}


def _prefix(base: Source, paths: list[str], name: str) -> str:
    """What a checkpoint puts before the paths of an adapter: a model with a head names its network inside it."""
    path = paths[0]
    ends = (f"{path}.", path)
    found = {
        key[: key.index(path)]
        for key in base.shapes
        if path in key and (key.startswith(ends) or f".{path}." in f".{key}")
    }
    fits = [p for p in sorted(found, key=len) if all(any(k.startswith(f"{p}{q}.") for k in base.shapes) for q in paths)]
    if not fits:
        raise MergeError(
            f"the base {base.name} has no tensor for the site {path!r} of the adapter {name!r}; is it an adapter of another base?"
        )
    return fits[0]


def compare_sources(base: Source, others: Iterable[Source]) -> None:
    """Raises `MergeError` with the differences where a source has other names or shapes than ``base``."""
    own = base.shapes
    for other in others:
        shapes = other.shapes
        missing, extra = [n for n in own if n not in shapes], [n for n in shapes if n not in own]
        shaped = [f"{n} {shapes[n]} instead of {own[n]}" for n in own if n in shapes and shapes[n] != own[n]]
        parts = [f"{what} {listing(names, 4)}" for what, names in
                 (("it lacks", missing), ("it has besides", extra), ("it has in another shape", shaped)) if names]  # fmt: skip
        if parts:
            raise MergeError(
                f"{other.name} does not fit {base.name}: {'; '.join(parts)}. Models that are merged must have the same tensors; "
                "for vocabularies of different sizes say tokenizer='union' or 'base'"
            )


def config_of(folder: Path | None, name: str = "config.json") -> dict[str, Any]:
    """What a model's configuration says; empty where there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
