"""Writing a checkpoint tensor by tensor, in any order and in blocks of rows: the files' layout is known before their content.

The safetensors library writes only what is in memory as a whole; the format is eight bytes of length, a JSON header with each
tensor's place, and the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from polytask.core.errors import MergeError, StorageError
from polytask.core.storage import write, writing

from .source import DTYPES, INDEX, WHOLE

NAMES = {dtype: name for name, dtype in DTYPES.items()}
WORK = ".merging"  # the folder inside the output while it is being written


class Writer:
    """Files of a checkpoint that are filled in.

    Args:
        folder: where the checkpoint goes. Until `finish` its files lie in a folder inside, under other names.
        layout: (name, shape, dtype) of every tensor, in the order of the files.
        shard: bytes of a file at most (a tensor is never divided).
        key: what the content depends on; an interrupted write goes on only where it is the same.
        resume: go on where an interrupted write left off.

    Raises:
        StorageError: there is not enough space, or no permission.
        MergeError: the folder holds an interrupted write of something else, or a finished model.
    """

    def __init__(
        self, folder: Path, layout: Iterable[tuple[str, tuple[int, ...], torch.dtype]], *, shard: int = 5 * 10**9,
        key: str = "", resume: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.work = folder, folder / WORK
        shards = _shards(list(layout), shard)
        total = len(shards)
        self.names = [WHOLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        self.places: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}  # file, offset, dtype, shape
        self.done: set[str] = set()
        self.bytes = 0
        headers = []
        for number, tensors in enumerate(shards):
            header, sizes = _header(tensors)
            headers.append((header, len(header) + sum(sizes)))
            at = len(header)
            for (name, shape, dtype), size in zip(tensors, sizes, strict=True):
                self.places[name] = (number, at, dtype, shape)
                at += size
                self.bytes += size
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        again = self._again(key, resume)
        if not again:
            self._room(sum(size for _, size in headers))
        with writing(folder):
            self.work.mkdir(exist_ok=True)
            self._files = [os.open(self.work / name, os.O_RDWR | os.O_CREAT, 0o644) for name in self.names]
            if not again:
                for file, (header, size) in zip(self._files, headers, strict=True):
                    os.ftruncate(file, size)
                    os.pwrite(file, header, 0)
                (self.work / "key").write_text(key, encoding="utf-8")
            self._journal = open(self.work / "done", "a", encoding="utf-8")  # noqa: SIM115  closed in finish
        self._lock = Lock()

    def _again(self, key: str, resume: bool) -> bool:
        """Whether an interrupted write is gone on with."""
        state = self.work / "key"
        if not state.is_file():
            shutil.rmtree(self.work, ignore_errors=True)
            return False
        if not resume:
            raise MergeError(
                f"{self.folder} holds an interrupted merge; say resume=True (--resume) to go on, or remove {self.work}"
            )
        if state.read_text(encoding="utf-8") != key:
            raise MergeError(
                f"{self.folder} holds an interrupted merge of other models or settings; remove {self.work} to start anew"
            )
        done = self.work / "done"
        if done.is_file():
            text = done.read_text(encoding="utf-8")
            self.done = set(text[: text.rfind("\n") + 1].splitlines())  # a line that was cut short does not count
            done.write_text("".join(f"{name}\n" for name in text.splitlines() if name in self.done), encoding="utf-8")
        return True

    def _room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise StorageError(
                f"{self.folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB; choose another folder, "
                "free some space, or write in a smaller dtype"
            )

    def put(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Writes rows of a tensor from ``start``, cast to its type. Several threads may write at once."""
        number, at, dtype, shape = self.places[name]
        data = tensor.detach().to(dtype).contiguous()
        row = data[0].numel() * data.element_size() if data.dim() and len(data) else data.element_size()
        at += start * row
        view = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
        with writing(self.folder):
            while view:  # one call writes two gigabytes at most
                written = os.pwrite(self._files[number], view, at)
                view, at = view[written:], at + written

    def finished(self, name: str) -> None:
        """Notes that all rows of a tensor are there."""
        with self._lock, writing(self.folder):
            self.done.add(name)
            self._journal.write(f"{name}\n")
            self._journal.flush()

    def close(self) -> None:
        """Gives up the files as they are; what is done stays for `resume`."""
        self._journal.close()
        for file in self._files:
            os.close(file)

    def finish(self, extras: Mapping[str, bytes]) -> None:
        """Gives the files their names, with the index and other small files beside them."""
        with writing(self.folder):
            for file in self._files:
                os.fsync(file)
            self.close()
            for name, data in extras.items():
                write(self.folder / name, data)
            for name in self.names:
                os.replace(self.work / name, self.folder / name)
            if len(self.names) > 1:
                placed = {name: self.names[place[0]] for name, place in sorted(self.places.items())}
                index: dict[str, Any] = {"metadata": {"total_size": self.bytes}, "weight_map": placed}
                write(self.folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
            shutil.rmtree(self.work)


_Layout = tuple[str, tuple[int, ...], torch.dtype]


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = 1
    for side in shape:
        count *= side
    return count * dtype.itemsize


def _shards(layout: list[_Layout], most: int) -> list[list[_Layout]]:
    """Tensors in files of at most ``most`` bytes, in their order."""
    made: list[list[_Layout]] = [[]]
    filled = 0
    for name, shape, dtype in layout:
        size = _size(shape, dtype)
        if made[-1] and filled + size > most:
            made.append([])
            filled = 0
        made[-1].append((name, shape, dtype))
        filled += size
    return made


def _header(tensors: list[_Layout]) -> tuple[bytes, list[int]]:
    """The header's bytes, and the size of each tensor."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes, at = [], 0
    for name, shape, dtype in tensors:
        size = _size(shape, dtype)
        said[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        sizes.append(size)
        at += size
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, sizes
