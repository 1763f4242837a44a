"""Several models on one live base, whose weights are made anew from coefficients: what methods work with that look at data.

Shapes: N models, a tensor W [...] with differences t_i; factors A [r, i], B [o, r] with t = B A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import DataError, MergeError, ModelError, listing
from polytask.core.head import Head, Out, collate, head_for
from polytask.core.metrics import score
from polytask.core.model import Model
from polytask.core.predict import predict
from polytask.core.rows import Row
from polytask.core.task import Example, Task

from .heads import heads_of
from .patches import factors_of
from .source import Adapted, Module, Source, compare_sources


@dataclass
class Change:
    """How the models change one tensor: some by a dense difference, some by factors, some not at all.

    Attributes:
        base: the tensor as the base has it, fp32.
        dense: differences side by side, [n, ...].
        owners: whose each of them is, [n].
        A: all factors below each other, [R, i]; None without any.
        B: [o, R], scaled.
        ranks: whose each of the R ranks is, [R].
        turned: whether the tensor is stored as [i, o].
    """

    base: Tensor
    dense: Tensor | None = None
    owners: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    A: Tensor | None = None
    B: Tensor | None = None
    ranks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    turned: bool = False

    def sum(self, weights: Tensor) -> Tensor:
        """``sum_i w_i t_i`` for weights [N]; gradients reach the weights."""
        total: Tensor | None = None
        if self.A is not None and self.B is not None:
            total = (self.B * weights[self.ranks]) @ self.A
            total = total.mT if self.turned else total
        if self.dense is not None:
            part = torch.tensordot(weights[self.owners], self.dense, 1)
            total = part if total is None else total + part
        return torch.zeros_like(self.base) if total is None else total

    def of(self, model: int, count: int) -> Tensor:
        """t_i of one of ``count`` models."""
        return self.sum(torch.nn.functional.one_hot(torch.tensor(model), count).to(self.base))


class Reader:
    """A task's examples and what reads the answers.

    Args:
        model: the base.
        task: whose ``split`` is used.
        head: of the task.
        split: ``train``, ``dev`` or ``test``.
        longest: tokens kept of a text.
        seed: of the batches' order.

    Raises:
        DataError: the split is empty.
    """

    def __init__(
        self, model: Model, task: Task, head: Head, split: str = "train", longest: int | None = None, seed: int = 0
    ) -> None:
        self.model, self.task, self.head, self.split, self.longest, self.seed = model, task, head, split, longest, seed
        self.examples: Sequence[Example] = getattr(task, split)
        if not self.examples:
            raise DataError(
                f"the split {split!r} of the task {task.name!r} is empty; choose another or give it examples"
            )
        self._rows: dict[bool, list[Row]] = {}

    def rows(self, answers: bool) -> list[Row]:
        """All examples: with their true ``answers``, for losses; or with all candidates, for probabilities."""
        if answers not in self._rows:
            self._rows[answers] = self.head.rows(self.model, self.examples, scoring=not answers, longest=self.longest)
        return self._rows[answers]

    def batches(self, size: int, answers: bool) -> Iterator[list[Row]]:
        """Batches without end, every example once in each round."""
        rows = self.rows(answers)
        key = hashlib.sha256(f"{self.seed}\0{self.task.name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        while True:
            order = torch.randperm(len(rows), generator=generator).tolist()
            for at in range(0, len(order), size):
                yield [rows[i] for i in order[at : at + size]]

    def out(self, rows: Sequence[Row]) -> Out:
        """What the base computes of rows as its weights are now."""
        return self.head.run(self.model, collate(self.model, self.head, rows))

    def loss(self, rows: Sequence[Row]) -> Tensor:
        """Mean loss of rows with answers."""
        values, divisors = self.head.loss(self.out(rows), rows)
        return values.sum() / divisors.sum()

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Of the classes, [B, C], of rows with all candidates. Raises `ModelError` where there are no classes."""
        return self.head.scores(self.out(rows), rows).float()

    def score(self, examples: Sequence[Example] | None = None, batch_size: int = 32) -> float:
        """The task's metric as the base's weights are now, on these examples or the reader's own."""
        chosen = self.examples if examples is None else examples
        rows = (
            self.rows(False)
            if examples is None
            else self.head.rows(self.model, chosen, scoring=True, longest=self.longest)
        )
        found = predict(self.model, self.head, rows, batch_size=batch_size)
        task = self.task
        targets = [None] * len(found) if task.kind == "lm" else [example.target for example in chosen]
        return score(task.kind, found, targets, metric=task.metric or None, labels=task.labels, resamples=0).value


class Pool:
    """Several models of one base and the data to look at. Use it as a context: inside, the base is frozen and evaluates.

    Args:
        model: the base; adapters that are attached to it do not act.
        inputs: adapters of forms with dense changes, or sources of whole models with the base's tensors.
        tasks: what is looked at. Heads come from the adapters; generative bases need none.
        split: of the tasks.
        seed: of everything random.
        longest: tokens kept of a text.
        say: is told what goes on.
        starts: whether a task whose head no model brings gets one that has learned nothing yet.

    Attributes:
        names: of the models.
        readers: one for each task.
        fresh: the tasks with such heads.
        holders: of each parameter by name, the modules that hold it and what they call it.
        changes: by the names of the network's parameters, those that any model changes.

    Raises:
        MergeError: a model does not fit the base, or no model brings a task's head.
    """

    def __init__(
        self,
        model: Model,
        inputs: Sequence[Adapter | Source],
        tasks: Sequence[Task],
        *,
        split: str = "train",
        seed: int = 0,
        longest: int | None = None,
        say: Callable[[str], None] = lambda text: None,
        starts: bool = False,
    ) -> None:
        self.model, self.inputs, self.seed, self.say, self.starts = model, list(inputs), seed, say, starts
        self.fresh: list[str] = []
        self.root = Module(model.module, model.name)
        self.sources = [Adapted(self.root, item) if isinstance(item, Adapter) else item for item in inputs]
        compare_sources(self.root, self.sources)
        self.names = tuple(source.name for source in self.sources)
        self.heads = heads_of([item for item in inputs if isinstance(item, Adapter)])
        self.readers = [Reader(model, task, self._head(task), split, longest, seed) for task in tasks]
        first = {id(p): name for name, p in model.module.named_parameters()}
        self.holders: dict[str, list[tuple[nn.Module, str]]] = {}
        for module in model.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.holders.setdefault(first[id(parameter)], []).append((module, name))
        self.changes = {name: change for name in self.holders if (change := self._change(name)) is not None}
        if not self.changes:
            raise MergeError(f"none of {listing(self.names)} changes anything; give other models")
        self._kept: list[tuple[Any, bool]] = []

    def __len__(self) -> int:
        return len(self.sources)

    def __enter__(self) -> Pool:
        heads = [p for reader in self.readers for p in reader.head.parameters()]
        self._kept = [(p, p.requires_grad) for p in (*self.model.module.parameters(), *heads)]
        self._training = [module for module in self.model.module.modules() if module.training]
        for parameter, _ in self._kept:
            parameter.requires_grad_(False)
        self.model.module.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        for parameter, flag in self._kept:
            parameter.requires_grad_(flag)
        for module in self._training:
            module.training = True

    def compose(self, weights: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights ``b + sum_i w_i t_i`` of every tensor that changes, in the base's types.

        Args:
            weights: [N] for all tensors, or [N] for each by name.
        """
        return {
            name: self.cast(name, change.base + change.sum(weights if isinstance(weights, Tensor) else weights[name]))
            for name, change in self.changes.items()
        }

    def alone(self, model: int) -> dict[str, Tensor]:
        """The weights of one of the models."""
        return self.compose(torch.nn.functional.one_hot(torch.tensor(model), len(self)).float().to(self.model.device))

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the type and place of the base's."""
        return tensor.to(self.root.dtype(name))

    @contextmanager
    def acting(self, tensors: Mapping[str, Tensor]) -> Iterator[Model]:
        """The base with other tensors in place of its own, by name; gradients reach them."""
        kept = [(module, name, module._parameters[name]) for key in tensors for module, name in self.holders[key]]
        try:
            for key, tensor in tensors.items():
                for module, name in self.holders[key]:
                    module._parameters[name] = tensor  # type: ignore[assignment]
            with self.model.using(None):
                yield self.model
        finally:
            for module, name, parameter in kept:
                module._parameters[name] = parameter

    def reader_of(self, model: int) -> Reader:
        """The reader of a model's own task: the one that its adapter has a head or a card for, else the one at its place.

        Raises:
            MergeError: there is none.
        """
        item = self.inputs[model]
        if isinstance(item, Adapter):
            own = {*item.heads, *(str(task.get("name")) for task in item.card.tasks)}
            found = [reader for reader in self.readers if reader.task.name in own]
            if found:
                return found[0]
        if len(self.readers) == len(self):
            return self.readers[model]
        raise MergeError(
            f"which task {self.names[model]!r} was tuned for is not known; give a task for each of {len(self)} models, in "
            "their order"
        )

    def _head(self, task: Task) -> Head:
        if task.name in self.heads:
            return self.heads[task.name]
        try:
            head = head_for(self.model, task, self.seed)
        except ModelError as error:
            raise MergeError(str(error)) from error
        if next(head.parameters(), None) is None:
            return head
        if not self.starts:
            raise MergeError(
                f"no adapter brings a head for the task {task.name!r}; there are heads for: {listing(self.heads) or 'none'}"
            )
        self.fresh.append(task.name)
        return head

    def _change(self, name: str) -> Change | None:
        base = self.root.read(name).to(self.model.device)
        if not base.is_floating_point():
            return None
        base = base.float()
        dense, owners, thin = [], [], []
        for i, source in enumerate(self.sources):
            factors = _factors(source, name)
            if factors is not None:
                thin.append((i, *factors))
                continue
            change = source.change(name) if isinstance(source, Adapted) else source.read(name).float() - base.cpu()
            if change is not None and bool(change.any()):
                dense.append(change.to(base))
                owners.append(i)
        if not dense and not thin:
            return None
        made = Change(base)
        if dense:
            made.dense, made.owners = torch.stack(dense), torch.tensor(owners)
        if thin:
            made.A = torch.cat([A for _, A, _, _ in thin]).to(base)
            made.B = torch.cat([B for _, _, B, _ in thin], 1).to(base)
            made.ranks = torch.cat([torch.full((len(A),), i) for i, A, _, _ in thin])
            made.turned = thin[0][3]
        return made


def _factors(source: Source, name: str) -> tuple[Tensor, Tensor, bool] | None:
    """A, s B and whether the tensor is stored turned, of an adapter's LoRA at a linear layer; None of anything else."""
    if not isinstance(source, Adapted) or name not in source.sites:
        return None
    site, parameter = source.sites[name]
    patch = source.adapter.patches[site]
    if patch.site.kind != "linear" or parameter != (patch.site.param or "weight"):
        return None
    factors = factors_of(patch)
    return None if factors is None else (*factors, patch.site.transposed)
