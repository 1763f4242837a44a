"""What was found out by a base's names of tensors, under the names that an adapter has for them.

A base may put something before an adapter's paths (``bert.encoder`` for ``encoder``), or tie a tensor to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .source import Source


class Named(Source):
    """A source under other names.

    Args:
        source: by the base's names; tensors may lack.
        place: the base's name of each of ours.
    """

    def __init__(self, source: Source, place: Mapping[str, str]) -> None:
        self.source, self.name = source, source.name
        there = source.shapes
        self.place = {name: name for name in there} | {ours: own for ours, own in place.items() if own in there}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self.source.shapes
        return {name: shapes[own] for name, own in self.place.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.place[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.place[name], start, stop)


def renamed(value: Any, place: Mapping[str, str]) -> Any:
    """A setting ``{tensors, else}`` by the adapters' names; any other as it is."""
    if not isinstance(value, Mapping) or set(value) != {"tensors", "else"}:
        return value
    own, taken = value["tensors"], set(place.values())
    found = {name: own[there] for name, there in place.items() if there in own}
    return {"tensors": {k: v for k, v in own.items() if k not in taken} | found, "else": value["else"]}
