"""Where a task's examples lie in the base's own features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polytask.core.errors import ConfigError
from polytask.core.model import Model
from polytask.core.reading import inputs_of, means
from polytask.core.signature import Signature, Subject, signatures
from polytask.core.task import Example, Task


@signatures.register("data")
@dataclass(frozen=True)
class Data(Signature):
    """The mean over examples of the mean over their real tokens of what each block of the bare base gives, for each task.

    Args:
        examples: of each task's train split (else dev, test) at most, the first ones.
        batch_size: of them per forward.

    Texts are cut where the adapter cut them while it learned.

    Shapes: [tasks, d] by the block's site, and by the empty name the same of the last hidden states.

    Reference: the centroids of arXiv 2311.10847, there of sentence embeddings; here at every layer, of the base itself.

    Raises:
        ConfigError: a setting is below 1.
        ModelError: the base cannot read the task.
    """

    examples: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"data: {name} must be a whole number of at least 1, got {value!r}")

    def sign(self, subject: Subject) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        used = {task.name: (task.train or task.dev or task.test)[: self.examples] for task in subject.tasks}
        if subject.model is None or not used or not all(used.values()):
            return None
        longest = subject.adapter.schedule.get("longest")
        found = [self._centroids(subject.model, task, used[task.name], longest) for task in subject.tasks]
        about = [{"task": t.name, "hash": t.hash, "examples": len(used[t.name])} for t in subject.tasks]
        one = {"task": subject.tasks[0].hash} if len(subject.tasks) == 1 else {}
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}, {"tasks": about, **one}

    @torch.no_grad()
    def _centroids(
        self, model: Model, task: Task, examples: Sequence[Example], longest: int | None
    ) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        training = model.module.training
        model.module.eval()
        try:
            for at in range(0, len(examples), self.batch_size):
                batch = inputs_of(model, task, examples[at : at + self.batch_size], longest)
                for name, rows in _vectors(model, batch).items():
                    sums[name] = sums.get(name, 0.0) + rows.double().sum(0)
        finally:
            model.module.train(training)
        return {name: (total / len(examples)).float().cpu() for name, total in sums.items()}


def _vectors(model: Model, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector of each row by block, [B, d], and that of the last hidden states under the empty name."""
    mask = batch.get("attention_mask")
    rows = len(next(iter(batch.values())))
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            states = out if isinstance(out, Tensor) else out[0]
            if isinstance(states, Tensor) and states.dim() >= 2 and len(states) == rows:
                found[name] = _mean(states.float(), mask)

        return hook

    with ExitStack() as stack, model.using(None):
        for site in model.sites:
            if site.kind == "block":
                handle = model.module.get_submodule(site.path).register_forward_hook(keep(site.name))
                stack.callback(handle.remove)
        last = model.features(batch) if model.kind == "dual" else means(model, batch)
    return {"": last.float(), **found}


def _mean(states: Tensor, mask: Tensor | None) -> Tensor:
    """[B, d] of tokens [B, T, d] or of a map [B, d, H, W]; padding does not count."""
    if states.dim() == 4:
        return states.mean((2, 3))
    if states.dim() == 2:
        return states
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    real = mask.to(states).unsqueeze(-1)
    return (states * real).sum(1) / real.sum(1).clamp(min=1)
