"""The contract of a merging rule: one tensor out of several, in blocks of rows where the rule allows it.

Shapes: N models, and a block of a tensor: the rows from ``start`` of a tensor of ``shape``, or the whole of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from polytask.core.registry import Registry

rules: Registry[Rule]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Some rows of one tensor, of every model, in fp32.

    Attributes:
        name: the tensor's name.
        base: of the base, or None where there is none.
        tensors: of each model, of the base's shape.
        weights: of each model at this tensor.
        settings: other settings of each model here (density, ...), by name.
        start: the first row.
        shape: of the whole tensor.
        facts: what the surveys found out about all tensors; None without surveys.
        seed: of everything random.
        models: the models' names, which random numbers depend on.
        layer: (layer, layers) of the tensor in its stack, or None.
        companions: what the rule reads beside each model (`Rule.companion`), None where there is nothing.
    """

    name: str
    base: Tensor | None
    tensors: tuple[Tensor, ...]
    weights: tuple[float, ...]
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    start: int = 0
    shape: tuple[int, ...] = ()
    facts: Any = None
    seed: int = 0
    models: tuple[str, ...] = ()
    layer: tuple[int, int] | None = None
    companions: tuple[Tensor | None, ...] = ()

    @property
    def deltas(self) -> list[Tensor]:
        """tau_i: each model minus the base; the models themselves without one."""
        return list(self.tensors) if self.base is None else [tensor - self.base for tensor in self.tensors]

    @property
    def zero(self) -> Tensor:
        """What a change is added to: the base, or zeros without one."""
        return torch.zeros_like(self.tensors[0]) if self.base is None else self.base

    @property
    def count(self) -> int:
        """Numbers of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    def uniform(self, model: int) -> Tensor:
        """Random numbers in [0, 1) of the block's shape, from the seed, the tensor's and the model's name and the place.

        The same whether the tensor comes whole or row by row, and in whatever order.
        """
        words = self._words(model)
        words >>= 8
        numbers = words.astype(np.float32)
        numbers *= np.float32(2.0**-24)
        return torch.from_numpy(numbers).view(self.tensors[model].shape)

    def drawn(self, model: int, chance: float) -> Tensor:
        """Where `uniform` is below a chance, without the numbers themselves."""
        below = math.ceil(float(np.float32(chance)) * 2**24) << 8
        words = self._words(model)
        found = words < np.uint32(below) if below < 2**32 else np.ones_like(words, dtype=bool)
        return torch.from_numpy(found).view(self.tensors[model].shape)

    def _words(self, model: int) -> np.ndarray:
        """32 random bits for each entry; the lowest eight are not used."""
        said = f"{self.seed}\0{self.name}\0{self.models[model] if self.models else model}"
        key = int.from_bytes(hashlib.sha256(said.encode()).digest()[:16], "little")
        tensor = self.tensors[model]
        width = tensor[0].numel() if tensor.dim() and len(tensor) else 1
        first = self.start * width
        bits = np.random.Philox(key=key)
        bits.advance(first // 8)  # a step gives four words of 64 bits, which are eight of ours
        skip, count = first % 8, tensor.numel()
        return bits.random_raw(-(-(skip + count) // 8) * 4).view(np.uint32)[skip : skip + count]


@dataclass(frozen=True)
class Rule:
    """How several tensors become one. A rule is a frozen dataclass, registered with ``@rules.register("name")``.

    Attributes:
        name: what the field calls it (set by the decorator).
        needs_base: whether it works on differences to a base.
        grain: the least that it must see at once: an ``element``, a ``row`` (the last dimension) or the whole ``tensor``.
        each: settings that every model may have its own of, beside its weight; the rule's own field is their default.
        weighted: whether it knows weights.
        least: how few models it takes.
        most: how many it takes, or None.
        surveys: how many times all tensors are read before the first is merged.
        paper: the reference that cards and lists show.
        companion: what stands beside each model: nothing, numbers of the tensor's shape (the same ``rows`` are read), or
            something of a shape of its own (the ``whole`` is).
        ends: whether its base is a model like the others (one end of a way between models), and not an origin.
        heads: what becomes of the heads of adapters: a task has the ``same`` in all, or they are averaged (``mean``).
        exceptions: checks of the rules' contract suite that do not hold for it, each with the reason.
    """

    name: ClassVar[str] = ""
    needs_base: ClassVar[bool] = True
    grain: ClassVar[Literal["element", "row", "tensor"]] = "element"
    each: ClassVar[tuple[str, ...]] = ()
    weighted: ClassVar[bool] = True
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    surveys: ClassVar[int] = 0
    paper: ClassVar[str] = ""
    companion: ClassVar[Literal["", "rows", "whole"]] = ""
    ends: ClassVar[bool] = False
    heads: ClassVar[Literal["same", "mean"]] = "same"
    exceptions: ClassVar[Mapping[str, str]] = {}

    def merge(self, block: Block) -> Tensor:
        """The merged rows, in fp32. The base's own memory may be returned, and must not be changed."""
        raise NotImplementedError

    def factors(self, block: Block) -> Sequence[float] | None:
        """f_i where the merged tensor is ``b + sum_i f_i (x_i - b)`` (b zero without a base), from the weights and facts alone:
        the block may have no tensors. None where it is not. Adapters of low rank are then merged exactly, factor by factor."""
        return None

    def plan(self) -> tuple[Literal["element", "row", "tensor"], int]:
        """The grain and the number of surveys, for rules whose settings decide about them."""
        return self.grain, self.surveys

    def survey(self, number: int, block: Block) -> Any:
        """What one block says in survey ``number``; `settle` puts the blocks together."""
        raise NotImplementedError

    def settle(self, number: int, found: Iterable[tuple[str, Any]], facts: Any) -> Any:
        """What all blocks (name, result), in their order, said in survey ``number``, given what earlier surveys found.

        The tensors are read while ``found`` is gone through: what is left unread costs nothing.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def knobs(cls) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(f.name for f in fields(cls))


rules = Registry("merge method", "polytask.merge.rules")


def total(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``sum_i w_i x_i``, models without weight left out."""
    there = [(t, w) for t, w in zip(tensors, weights, strict=True) if w]
    if not there:
        return torch.zeros_like(tensors[0])
    first, weight = there[0]
    out = first * weight
    for tensor, weight in there[1:]:
        out.add_(tensor, alpha=weight)
    return out
