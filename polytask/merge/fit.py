"""The contract of merge methods that look at data: they find out how the models are merged, and a rule then merges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError, nearest
from polytask.core.head import Head
from polytask.core.mix import Mix
from polytask.core.model import Model
from polytask.core.registry import Registry
from polytask.core.task import Task, read_tasks

from .pool import Pool
from .source import Source

fits: Registry[Fit]


class Tensors(Source):
    """Named tensors in memory: statistics of a model, or masks.

    Args:
        tensors: by name.
        name: what messages call them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str = "statistics") -> None:
        self.tensors, self.name = dict(tensors), name

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self.tensors[name]
        return tensor if tensor.dim() == 0 else tensor[start:stop]


@dataclass
class Plan:
    """How models are merged.

    Attributes:
        rule: the name of a rule.
        weights: of each model, as `polytask.merge` takes them.
        settings: of the rule.
        companions: for each model what a rule reads beside it, by the names of the network's parameters.
        about: what was found out, for the card: plain values.
        method: how it was found out.
        files: what is written beside the result, by file name.
        heads: of tasks that no model brings one for, by task; the adapter that is made keeps them.
    """

    rule: str
    weights: Sequence[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    companions: Sequence[Source] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    heads: Mapping[str, Head] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """A merge method that looks at data. It is a frozen dataclass, registered with ``@fits.register("name")``.

    Attributes:
        name: what the field calls it (set by the decorator).
        paper: the reference that cards and lists show.
        labels: whether it needs answers; else it looks at inputs alone.
        least: how few models it takes.
        most: how many it takes, or None.
        gives: a plan for a ``model`` of any form, one ``adapter`` of its own making, or several ``parts``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    gives: ClassVar[Literal["model", "adapter", "parts"]] = "model"
    labels: ClassVar[bool] = False
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None

    def fit(self, pool: Pool) -> Plan | Any:
        """What to merge and how. A method whose result is no single model gives an object with ``save(folder)``."""
        raise NotImplementedError

    def starts(self) -> bool:
        """Whether it fits the heads itself that no model brings (`Pool.fresh`), and gives them in `Plan.heads`."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def knobs(cls) -> tuple[str, ...]:
        """The names of its settings."""
        return tuple(f.name for f in fields(cls))

    def at_least(self, name: str, least: float) -> None:
        """Raises `ConfigError` for a setting below the least value."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise ConfigError(f"{self.name}: {name} must be at least {least}, got {value!r}")


@runtime_checkable
class Parts(Protocol):
    """Several parts that act together through a mix: what a method gives that makes no single model."""

    @property
    def heads(self) -> Mapping[str, Head]:
        """By task."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of all parts."""

    def attach(self, model: Model) -> Mix:
        """Attaches the parts to a base, and gives the mix by which they act."""

    def detach(self, model: Model) -> None:
        """Takes them away again."""

    def save(self, folder: str | Path) -> Path:
        """Writes them."""


fits = Registry("merge method that looks at data", "polytask.merge.fits")


def per_tensor(coefficients: Mapping[str, Tensor], models: int, rest: float = 0.0) -> list[dict[str, Any]]:
    """Coefficients [N] of each tensor as the weights of N models; other tensors have the weight ``rest``."""
    return [{"tensors": {name: float(c[i]) for name, c in coefficients.items()}, "else": rest} for i in range(models)]


def fitted(
    inputs: Sequence[Adapter | Source],
    method: str,
    model: Model,
    data: Sequence[Task] | Task | str | Path | None,
    *,
    split: str = "train",
    longest: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Plan | Any:
    """Lets a method look at data.

    Args:
        inputs: what is merged.
        method: its name.
        model: the live base.
        data: one task or several, or a path that `read_tasks` takes.
        split: of the tasks.
        longest: tokens kept of a text.
        seed: of everything random.
        say: is told what goes on.
        settings: of the method.

    Raises:
        ConfigError: no data, or a wrong setting.
        MergeError: the models do not fit the base or each other.
    """
    kind = fits[method]
    for name in settings:
        if name not in kind.knobs():
            raise ConfigError(f"the merge method {method!r} has no setting {name!r}{nearest(name, kind.knobs())}")
    chosen = fits.make({"name": method, **settings})
    if data is None:
        what = "examples with answers" if kind.labels else "examples, without answers"
        raise ConfigError(f"{method} looks at {what}; say which (data=, --data)")
    if len(inputs) < kind.least or (kind.most is not None and len(inputs) > kind.most):
        many = f"{kind.least}" if kind.most == kind.least else f"at least {kind.least}"
        raise MergeError(f"{method} takes {many} models, and got {len(inputs)}")
    tasks = [data] if isinstance(data, Task) else read_tasks(data) if isinstance(data, str | Path) else list(data)
    if not tasks:
        raise ConfigError(f"{method} looks at data, and there are no tasks; give at least one")
    if isinstance(data, str | Path) and not chosen.starts():  # a folder may hold more tasks than these models are for
        tasks = _readable(model, inputs, tasks, say)
    pool = Pool(model, inputs, tasks, split=split, seed=seed, longest=longest, say=say, starts=chosen.starts())
    with pool, torch.random.fork_rng():
        torch.manual_seed(seed)
        found = chosen.fit(pool)
    if isinstance(found, Plan):
        found.method = {
            "name": method,
            "paper": kind.paper,
            **chosen.settings(),
            "tasks": [task.name for task in tasks],
        }
    return found


def _readable(
    model: Model, inputs: Sequence[Adapter | Source], tasks: Sequence[Task], say: Callable[[str], None]
) -> list[Task]:
    """The tasks whose answers can be read: by an adapter's head, or by a generative base."""
    heads = {task for item in inputs if isinstance(item, Adapter) for task in item.heads}
    if model.kind in ("causal", "seq2seq") or not heads:
        return list(tasks)
    for task in tasks:
        if task.name not in heads:
            say(f"no adapter brings a head for {task.name}, so it is not looked at")
    return [task for task in tasks if task.name in heads] or list(tasks)
