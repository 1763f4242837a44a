"""What people give to be merged, as sources: names, folders, files, modules, models, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from polytask.core.adapter import Adapter
from polytask.core.errors import MergeError
from polytask.core.packed import FILE, is_packed

from .compress import Compressed
from .source import Adapted, Checkpoint, Module, Source

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.tiktoken")  # what lies beside weights and is copied


def adapter_of(item: Any) -> Adapter | None:
    """The adapter, where an input is one or the folder of one."""
    if isinstance(item, str | Path) and (Path(item).expanduser() / "adapter_config.json").is_file():
        folder = Path(item).expanduser()
        item = Adapter.load(folder)
        item.name = item.name or folder.name
    return item if isinstance(item, Adapter) else None


def packed_in(item: str | Path) -> Path | None:
    """The file of a compressed difference, where an input is one or the folder of one."""
    path = Path(item).expanduser()
    return next((file for file in (path, path / FILE) if is_packed(file)), None)


def source_of(item: Any, base: Source | None) -> Source:
    """A source from what people give. Raises `MergeError` for what is none."""
    from polytask.core.model import Model

    if isinstance(item, Source):
        return item
    if isinstance(item, Model):
        return Module(item.module, item.name)
    if isinstance(item, nn.Module):
        return Module(item)
    item = adapter_of(item) or item
    if isinstance(item, str | Path) and (packed := packed_in(item)) is not None:
        if base is None:
            raise MergeError(f"{item} is a difference and needs its base; say which (base=, --base)")
        return Compressed(packed, base, str(item))
    if isinstance(item, str | Path):
        place = _downloaded(str(item))
        found = adapter_of(place)  # of a hub name: a folder was looked at above
        if found is None:
            return Checkpoint(place, str(item))
        item = found
    if isinstance(item, Adapter):
        if base is None:
            raise MergeError(
                f"the adapter {item.name!r} needs its base to be merged with models; say which (base=, --base)"
            )
        return Adapted(base, item)
    raise MergeError(f"{type(item).__name__} cannot be merged; give a folder, a file, a module, a model or an adapter")


def _downloaded(name: str) -> Path:
    """The folder of a hub name (``org/model``, ``org/model@revision``), downloaded where it is not in the cache; other paths as
    they are."""
    from polytask.core.load import ALIASES

    if name in ALIASES:
        return Path(ALIASES[name]())
    path = Path(name).expanduser()
    place, _, revision = name.partition("@")
    if path.exists() or name.startswith((".", "/", "~")) or place.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.bin", *SMALL]
        return Path(snapshot_download(place, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MergeError(
            f"{name!r} is no folder, and could not be had from the hub: {str(error).splitlines()[0]}"
        ) from error
