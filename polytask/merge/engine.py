"""The engine: every tensor of every model is read once (and once for each survey), merged in blocks, and put where it goes.

Reading runs ahead and writing behind in threads; what is in memory at once is a few blocks, whatever the models' size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError, listing, nearest

from .rule import Block, Rule, rules
from .source import Source, compare_sources
from .values import Layers, resolve

ELEMENTS = 1 << 20  # numbers of one model in a block, where a rule allows blocks
AHEAD = 2  # blocks that are read before they are needed


@dataclass
class Job:
    """What is merged, and how.

    Attributes:
        models: the models, in their order.
        rule: the name of the rule.
        settings: of the rule, each a number or a list that differs between tensors (see `values.resolve`).
        base: what differences are taken to.
        weights: of each model, numbers or lists; None where nobody says, which is 1 for each.
        each: settings of each model that stand in place of the rule's, by name.
        seed: of everything random.
        elements: numbers of one model in a block.
        stack: where each tensor stands among the layers; found from the names when None.
        companions: what the rule reads beside each model; tensors may lack.
    """

    models: Sequence[Source]
    rule: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: Source | None = None
    weights: Sequence[Any] | None = None
    each: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seed: int = 0
    elements: int = ELEMENTS
    stack: Layers | None = None
    companions: Sequence[Source] | None = None

    def __post_init__(self) -> None:
        knobs = rules[self.rule].knobs()
        for name in self.settings:
            if name not in knobs:
                raise ConfigError(
                    f"the merge method {self.rule!r} has no setting {name!r}{nearest(name, knobs)}; it has: "
                    f"{listing(knobs) or 'none'}"
                )
        first = self.base or self.models[0]
        self.shapes = first.shapes
        self.first = first
        self.layers = self.stack or Layers(self.shapes)
        # settings that are wrong are wrong before anything is read; and what a rule needs may follow from its settings
        kind = self.kind = self.rule_of(next(iter(self.shapes), ""))
        for name in self.each:
            if name not in kind.each:
                raise ConfigError(
                    f"the merge method {self.rule!r} has no setting {name!r} for single models; it has: "
                    f"{listing(('weight', *kind.each))}"
                )
        if kind.needs_base and self.base is None:
            raise MergeError(f"{self.rule} works on differences to a base; say which (base=, --base)")
        if len(self.models) < kind.least or (kind.most is not None and len(self.models) > kind.most):
            many = f"{kind.least}" if kind.most == kind.least else f"at least {kind.least}"
            raise MergeError(f"{self.rule} merges {many} models beside the base, and got {len(self.models)}")
        if self.weights is not None and not kind.weighted:
            raise ConfigError(f"the merge method {self.rule!r} knows no weights; leave them out")
        if self.companions is not None and not kind.companion:
            raise ConfigError(f"the merge method {self.rule!r} reads nothing beside the models; leave companions out")
        for name, values in {"weights": self.weights, "companions": self.companions, **self.each}.items():
            if values is not None and len(values) != len(self.models):
                raise ConfigError(f"there are {len(values)} {name} for {len(self.models)} models; give one for each")
        compare_sources(first, self.models if self.base is not None else self.models[1:])
        names = [model.name for model in self.models]
        self.names = tuple(n if names.count(n) == 1 else f"{n}#{i}" for i, n in enumerate(names))

    def rule_of(self, name: str) -> Rule:
        """The rule as it is for one tensor."""
        t = self.layers.t(name)
        chosen = {key: resolve(value, name, t) for key, value in self.settings.items()}
        return rules.make({"name": self.rule, **{k: v for k, v in chosen.items() if v is not None}})

    def copied(self, name: str) -> bool:
        """Whether a tensor is taken from the base (or the first model) as it is: numbers that are no weights."""
        return not self.first.dtype(name).is_floating_point

    def blocks(self, name: str) -> Iterator[tuple[int, int | None]]:
        """The rows of each block: start and stop."""
        shape = self.shapes[name]
        grain, _ = self.rule_of(name).plan()
        whole = grain == "tensor" or not shape or (grain == "row" and len(shape) < 2)
        if whole:
            yield 0, None
            return
        width = 1
        for side in shape[1:]:
            width *= side
        step = max(1, self.elements // max(1, width))
        for start in range(0, max(1, shape[0]), step):
            yield start, min(start + step, shape[0])

    def frame(self, name: str, facts: Any = None) -> Block:
        """What a block of the tensor says beside the tensors."""
        t, rule = self.layers.t(name), self.rule_of(name)

        def every(values: Sequence[Any] | None, default: Any) -> tuple[Any, ...]:
            found = [resolve(v, name, t) for v in values] if values is not None else [None] * len(self.models)
            return tuple(default if v is None else v for v in found)

        return Block(
            name=name,
            base=None,
            tensors=(),
            weights=every(self.weights, 1.0),
            settings={k: every(self.each.get(k), getattr(rule, k)) for k in self.kind.each},
            shape=self.shapes[name], facts=facts, seed=self.seed, models=self.names, layer=self.layers.place(name),
        )  # fmt: skip

    def block(self, name: str, start: int, stop: int | None, facts: Any) -> Block:
        """A block's tensors, read and in fp32. Raises `MergeError` for entries that are no numbers: a rule may trim them away."""
        seen = facts is not None  # a survey has read them all
        return replace(
            self.frame(name, facts),
            base=None if self.base is None else _numbers(self.base, name, start, stop, seen),
            tensors=tuple(_numbers(model, name, start, stop, seen) for model in self.models),
            start=start,
            companions=tuple(self._beside(source, name, start, stop) for source in self.companions or ()),
        )

    def _beside(self, source: Source, name: str, start: int, stop: int | None) -> Tensor | None:
        if name not in source.shapes:
            return None
        return (source.read(name, start, stop) if self.kind.companion == "rows" else source.read(name)).float()


def run(
    job: Job,
    put: Callable[[str, Tensor, int], None],
    finished: Callable[[str], None] = lambda name: None,
    skip: Callable[[str], bool] = lambda name: False,
) -> None:
    """Merges everything.

    Args:
        job: what and how.
        put: takes a tensor's name, merged rows and the first one's number; called from a thread.
        finished: is told when all rows of a tensor have been put.
        skip: says which tensors are there already.

    Raises:
        MergeError: a tensor has entries that are no numbers.
    """
    with torch.no_grad(), ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        facts = _surveyed(job, reader)
        left = [name for name in job.shapes if not skip(name)]
        writing: deque[Future[None]] = deque()

        def later(call: Callable[[], None]) -> None:
            writing.append(writer.submit(call))
            while len(writing) > AHEAD:
                writing.popleft().result()

        def write(name: str, start: int, rows: Tensor, last: bool) -> None:
            put(name, rows, start)
            if last:
                finished(name)

        for name in (n for n in left if job.copied(n)):
            later(partial(write, name, 0, job.first.read(name), True))
        for block in _read(job, reader, [n for n in left if not job.copied(n)], facts):
            merged = job.rule_of(block.name).merge(block)
            _check(merged, block, job)
            last = not block.shape or block.start + (len(merged) if merged.dim() else 1) >= block.shape[0]
            part = partial(write, block.name, block.start, merged, last)
            del block, merged  # the models' rows need not wait for the writer
            later(part)
        while writing:
            writing.popleft().result()


def surveyed(job: Job) -> Any:
    """What the rule's surveys find out; None where it has none."""
    with torch.no_grad(), ThreadPoolExecutor(1) as reader:
        return _surveyed(job, reader)


def _surveyed(job: Job, reader: ThreadPoolExecutor) -> Any:
    facts: Any = None
    floats = [name for name in job.shapes if not job.copied(name)]
    for number in range(job.kind.plan()[1]):
        found = (
            (block.name, job.rule_of(block.name).survey(number, block)) for block in _read(job, reader, floats, facts)
        )
        facts = job.kind.settle(number, found, facts)
    return facts


def _read(job: Job, reader: ThreadPoolExecutor, names: Sequence[str], facts: Any) -> Iterator[Block]:
    """The blocks in their order, read ahead as long as they are small: of large ones, one is in memory at a time."""
    ahead: deque[tuple[Future[Block], int]] = deque()
    for name in names:
        for start, stop in job.blocks(name):
            rows = 1 if stop is None else stop - start
            size = math.prod(job.shapes[name] if stop is None else (rows, *job.shapes[name][1:]))
            while ahead and (len(ahead) > AHEAD or sum(n for _, n in ahead) + size > (AHEAD + 1) * job.elements):
                yield ahead.popleft()[0].result()
            ahead.append((reader.submit(job.block, name, start, stop, facts), size))
    while ahead:
        yield ahead.popleft()[0].result()


def _numbers(source: Source, name: str, start: int, stop: int | None, seen: bool) -> Tensor:
    """Rows in fp32. Raises `MergeError` where there are entries that are no numbers, unless that was ``seen`` before."""
    tensor = source.read(name, start, stop).float()
    if not (seen or _finite(tensor)):
        raise MergeError(
            f"{name} of {source.name} has entries that are not finite numbers; a merge with it would have them too"
        )
    return tensor


def _finite(tensor: Tensor) -> bool:
    """One sum says it; only where large numbers add up to infinity is each entry looked at, which takes eight times as long."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _check(merged: Tensor, block: Block, job: Job) -> None:
    if any(merged is tensor for tensor in block.tensors) or _finite(merged):
        return
    raise MergeError(
        f"merging {block.name} by {job.rule} gave entries that are not finite numbers, from models that have none; its "
        "settings may be too large"
    )
