"""Layers of models as layers of another: sources under other names, and stacks put together from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError, listing

from .source import Source
from .values import Layers

FIRST = ("embed", "wte", "wpe", "tok_")  # parts of names of what lies before the layers; the rest lies behind them
MODULES = {  # parts of names that stand for a module of mergekit's beside its own
    "text_decoder": ("language_model", "text_model", "lm_head"),
    "vision_tower": ("vision_model", "visual"),
    "vision_model": ("vision_tower", "visual"),
    "multi_modal_projector": ("merger", "connector"),
    "decoder": ("lm_head", "proj_out"),
}
REST = ("text_decoder", "decoder")  # the modules that have what names no module


class Part(Layers):
    """Some layers of the output, as a stack of their own: t from 0 to 1 in them, and 1 in a single one."""

    def __init__(self, stack: str, first: int, count: int) -> None:
        self.stack, self.first, self.count = stack, first, count

    def place(self, name: str) -> tuple[int, int] | None:
        if not name.startswith(f"{self.stack}."):
            return None
        return int(name[len(self.stack) + 1 :].split(".")[0]) - self.first, self.count


class View(Source):
    """A source under other names.

    Args:
        source: what is read.
        names: the name there of each name here.
    """

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names
        self.name, self.folder = source.name, source.folder

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {new: self.source.shapes[old] for new, old in self.names.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self.names[name])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self.source.read(self.names[name], start, stop)


def stack_of(source: Source) -> str:
    """The numbered list that holds a model's layers. Raises `MergeError` where there are none or several."""
    counts = Layers(source.shapes).counts
    prefixes = {name.split(".0.")[0].lstrip(".") for name in counts} if counts else _single(source)
    outer = [p for p in prefixes if not any(p != q and p.startswith(f"{q}.") for q in prefixes)]
    if len(outer) != 1:
        raise MergeError(
            f"slices need models with one stack of layers; {source.name} has {listing(sorted(outer)) or 'none'}"
        )
    return outer[0]


def _single(source: Source) -> set[str]:
    """Stacks of one layer."""
    return {name.split(".0.")[0] for name in source.shapes if ".0." in name}


def layers_of(source: Source) -> int:
    stack = stack_of(source)
    return 1 + max(int(name[len(stack) + 1 :].split(".")[0]) for name in source.shapes if name.startswith(f"{stack}."))


def names_of(
    source: Source, start: int, count: int, at: int, stack: str, first: bool, last: bool, where: str
) -> dict[str, str]:
    """Each name of the output that comes from a source, with its name there."""
    own, out = stack_of(source), {}
    for name in source.shapes:
        if name.startswith(f"{own}."):
            layer, rest = name[len(own) + 1 :].split(".", 1)
            if start <= int(layer) < start + count:
                out[f"{stack}.{int(layer) - start + at}.{rest}"] = name
        elif first if any(part in name for part in FIRST) else last:
            out[name] = name
    if not out:
        raise MergeError(f"{source.name} has no tensors for {where}")
    return out


def modules_of(source: Source, modules: Sequence[str]) -> dict[str, list[str]]:
    """The tensors of each module: those with its name, or one that stands for it, between the dots of theirs.

    Raises:
        ConfigError: a module without tensors, or tensors that no module has.
    """
    found: dict[str, list[str]] = {module: [] for module in modules}
    rest: list[str] = []
    for name in source.shapes:
        own = [
            module
            for piece in name.split(".")
            for module in modules
            if piece == module or piece in MODULES.get(module, ()) and piece not in modules
        ]
        (found[own[-1]] if own else rest).append(name)
    home = next((module for module in REST if module in found), None)
    if rest and home is None:
        raise ConfigError(f"no module says what becomes of {listing(rest, 4)} of {source.name}; add one that has them")
    if home is not None:
        found[home] += rest
    for module, names in found.items():
        if not names:
            starts = dict.fromkeys(".".join(name.split(".")[:2]) for name in source.shapes)
            raise ConfigError(
                f"{source.name} has no tensors of a module {module!r}; its names begin with {listing(starts, 8)}"
            )
    return found
