"""One difference for all tasks, with a mask and a rescaler for each: TALL masks and EMR. Each task's own model comes back.

A folder holds the difference as a checkpoint, with ``<name>.masks`` beside each tensor (one bit for each entry and task), and
`CARD` with the tasks and their rescalers.

References: Wang et al., TALL masks, arXiv 2405.07813; Huang et al., EMR-merging, arXiv 2405.17461.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError, listing, nearest

from .given import source_of
from .rules.elect import one_of
from .rules.local import emr_unified, tall_mask
from .source import Checkpoint, Source, compare_sources
from .write import Writer

CARD = "polytask_unified.json"


def split(
    models: Sequence[Any],
    base: Any,
    out: str | Path,
    method: str = "emr",
    *,
    names: Sequence[str] | None = None,
    threshold: float | Sequence[float] = 0.6,
    rescale: str = "whole",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes one difference with a mask for each model.

    Args:
        models: what `polytask.merge` takes, one for each task.
        base: what they were tuned from.
        out: the folder.
        method: ``emr`` (elected signs and largest sizes, masks by sign, rescaled) or ``tall`` (the sum, masks where a task stands
            out, not rescaled).
        names: of the tasks; the models' names when None.
        threshold: of ``tall``: ``|t_i| > threshold * |t - t_i|``, one for all tasks or one for each.
        rescale: of ``emr``: sizes are those of the ``whole`` vector, or the sum over tensors of their ``means``, as in its code.
        dtype: that the difference is stored in.

    Raises:
        MergeError: the models do not fit the base.
        ConfigError: an unknown method.
    """
    one_of("split", "method", method, ("emr", "tall"))
    one_of("split", "rescale", rescale, ("whole", "means"))
    root = source_of(base, None)
    sources = [source_of(model, root) for model in models]
    tasks = list(names or (source.name for source in sources))
    if not sources or len(set(tasks)) != len(sources):
        raise ConfigError(
            f"each of {len(sources)} models needs a name of its own, got {listing(tasks)}; say names=[...]"
        )
    strict = [threshold] * len(tasks) if isinstance(threshold, int | float) else list(threshold)
    compare_sources(root, sources)
    floats = [name for name in root.shapes if root.dtype(name).is_floating_point]
    layout = []
    for name in floats:
        count = int(np.prod(root.shapes[name], dtype=np.int64))
        layout += [(name, root.shapes[name], dtype), (f"{name}.masks", (len(tasks), -(-count // 8)), torch.uint8)]
    writer = Writer(Path(out).expanduser(), layout, key=json.dumps([tasks, method]))
    own, shared = np.zeros(len(tasks)), np.zeros(len(tasks))
    for name in floats:
        stored = root.read(name).float()
        deltas = [source.read(name).float() - stored for source in sources]
        one = emr_unified(deltas) if method == "emr" else torch.stack(deltas).sum(0)
        masks = [d * one > 0 if method == "emr" else tall_mask(d, one, s) for d, s in zip(deltas, strict, strict=True)]
        parts = one.numel() if rescale == "means" else 1
        for i, (delta, mask) in enumerate(zip(deltas, masks, strict=True)):
            own[i] += float(delta.abs().sum(dtype=torch.float64)) / max(1, parts)
            shared[i] += float((one * mask).abs().sum(dtype=torch.float64)) / max(1, parts)
        writer.put(name, one)
        bits = np.stack([np.packbits(mask.reshape(-1).numpy(), bitorder="little") for mask in masks])
        writer.put(f"{name}.masks", torch.from_numpy(bits))
    scales = (
        np.where(shared > 0, own / np.where(shared > 0, shared, 1), 1.0) if method == "emr" else np.ones(len(tasks))
    )
    card = {"method": method, "base": root.name, "tasks": dict(zip(tasks, scales.tolist(), strict=True))}
    writer.finish({CARD: (json.dumps(card, indent=2) + "\n").encode()})
    return writer.folder


class Unified:
    """What `split` wrote.

    Args:
        folder: where.
        base: what the models were tuned from.

    Attributes:
        tasks: names and rescalers.

    Raises:
        MergeError: the folder is none of these, or not for the base.
    """

    def __init__(self, folder: str | Path, base: Any) -> None:
        self.folder = Path(folder).expanduser()
        try:
            card = json.loads((self.folder / CARD).read_text(encoding="utf-8"))
            self.tasks: dict[str, float] = {str(task): float(scale) for task, scale in card["tasks"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MergeError(f"{self.folder} holds no difference with masks ({error}); write one with split") from error
        self.base = source_of(base, None)
        self.held = Checkpoint(self.folder)
        wanted = {name: shape for name, shape in self.held.shapes.items() if not name.endswith(".masks")}
        wrong = [name for name, shape in wanted.items() if self.base.shapes.get(name) != shape]
        if wrong:
            raise MergeError(
                f"{self.folder} does not fit {self.base.name}: it changes {listing(wrong, 4)}, which is not there"
            )

    def model(self, task: str) -> Source:
        """A task's own model, to be merged, saved or loaded. Raises `MergeError` for one that is not there."""
        if task not in self.tasks:
            raise MergeError(f"there is no task {task!r}{nearest(task, self.tasks)}; there are: {listing(self.tasks)}")
        return _Task(self, task)

    def state(self, task: str) -> dict[str, Tensor]:
        """A task's own model as a state dictionary, for `load_state_dict` with ``strict=False`` where tensors are tied."""
        model = self.model(task)
        return {name: model.read(name).to(model.dtype(name)) for name in model.shapes}

    def mask(self, task: str, name: str) -> Tensor:
        """A task's mask of a tensor."""
        shape = self.base.shapes[name]
        row = list(self.tasks).index(task)
        bits = self.held.read(f"{name}.masks", row, row + 1).numpy()[0]
        kept = np.unpackbits(bits, count=int(np.prod(shape, dtype=np.int64)), bitorder="little").view(bool)
        return torch.from_numpy(kept).view(shape)


class _Task(Source):
    """``b + scale * mask * difference``."""

    def __init__(self, unified: Unified, task: str) -> None:
        self.unified, self.task, self.name = unified, task, task
        self.folder, self.tied = unified.base.folder, unified.base.tied

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.unified.base.shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.unified.base.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        base, held = self.unified.base.read(name, start, stop), self.unified.held
        if name not in held.shapes:
            return base
        mask = self.unified.mask(self.task, name)
        change = held.read(name, start, stop).float() * (mask[start:stop] if mask.dim() else mask)
        return base.float() + change * self.unified.tasks[self.task]
