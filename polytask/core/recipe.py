"""Recipes: what may move, what it learns from, towards what, from where. One stage is the ordinary case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field

from .config import Settings, read_yaml
from .errors import ConfigError


class Schedule(Settings):
    """How a stage is optimised.

    Attributes:
        epochs: passes over the training examples.
        batch_size: rows per step (of each adapter, when several learn together).
        lr: peak learning rate of the adapter; the form's own default when None.
        head: ``auto``; for dual models (CLIP) also ``linear`` (a layer on the images' vectors) or ``decoupled`` (a classifier
            beside the class texts).
        head_lr: of the heads; the adapter's when None, times what the head says.
        head_start: ``probe`` starts a linear head from a regression on the frozen features, ``random`` from small values.
        schedule: its course after the warm-up.
        warmup: fraction of the steps in which it rises from zero.
        weight_decay: AdamW's, on the adapter and not on the heads.
        max_grad_norm: gradients of each adapter are scaled down to this norm; 0 turns that off.
        accumulate: batches whose gradients are added up before a step.
        precision: ``auto`` takes bf16 for the frozen base where the processor is quicker in it and one batch's loss agrees.
        longest: tokens read of a text; what the model can take (512 at most) when None.
        base_dropout: whether the base's own dropout is on while learning. Off is quicker on a CPU.
        patience: evaluations on dev without a better score before it stops; 0 never stops early.
        evaluations: evaluations on dev, spread over the whole run; one per epoch when None.
        snapshots: states that are kept on the way, spread over the whole run up to its end: ``out/snapshots/001`` and so on,
            each an adapter with its heads, for `polytask.merge` by the rule ``average``.
    """

    epochs: float = Field(3.0, gt=0)
    batch_size: int = Field(16, ge=1)
    lr: float | None = Field(None, gt=0)
    head: Literal["auto", "linear", "similarity", "decoupled"] = "auto"
    head_lr: float | None = Field(None, gt=0)
    head_start: Literal["probe", "random"] = "probe"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.06, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    accumulate: int = Field(1, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    longest: int | None = Field(None, ge=2)
    base_dropout: bool = False
    patience: int = Field(0, ge=0)
    evaluations: int | None = Field(None, ge=1)
    snapshots: int = Field(0, ge=0)


class Stage(Settings):
    """One stage of a recipe.

    Attributes:
        name: what later stages call it.
        form: the form that learns, as a mapping with its name and settings; nothing else moves.
        sites: the selector of where it acts; the form's own choice when None.
        tasks: names of the tasks it sees; all when empty.
        mixture: one adapter per task in one run (``together``), one for all (``joint``), or one task (``single``).
        sampling: of the tasks of a joint stage.
        temperature: of ``sampling: temperature``; task sizes are taken to the power 1/temperature.
        objective: the loss's name; each head's own when None.
        budget: how the ranks of low-rank forms are dealt out, as a mapping with its name and settings; evenly when None.
        start: ``base``, a folder with an adapter, or an earlier stage's name.
        schedule: how it is optimised.
        seed: of everything random in it.
    """

    name: str = "learn"
    form: dict[str, Any] = Field(default_factory=lambda: {"name": "lora"})
    sites: str | tuple[str, ...] | None = None
    tasks: tuple[str, ...] = ()
    mixture: Literal["single", "together", "joint"] = "single"
    sampling: Literal["proportional", "equal", "temperature"] = "proportional"
    temperature: float = Field(2.0, gt=0)
    objective: str | None = None
    budget: dict[str, Any] | None = None
    start: str = "base"
    schedule: Schedule = Field(default_factory=lambda: Schedule())
    seed: int = 0


class Recipe(Settings):
    """A list of stages over one base.

    Attributes:
        base: what `Model.load` takes.
        stages: in their order.
    """

    base: str = "minilm"
    stages: tuple[Stage, ...] = Field(default_factory=lambda: (Stage(),))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A recipe from a YAML file. Raises `ConfigError` with every problem in it."""
        return cls.of(read_yaml(path), str(path))

    @classmethod
    def one(cls, base: str = "minilm", **stage: Any) -> Self:
        """A recipe of one stage."""
        return cls.of({"base": base, "stages": (Stage.of(stage),)})

    def to_yaml(self) -> str:
        """The recipe as text that `read` gives back."""
        return str(yaml.safe_dump(_plain(self.model_dump()), sort_keys=False, allow_unicode=True))

    def stage(self, name: str) -> Stage:
        """The stage called ``name``. Raises `ConfigError`."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"the recipe has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
