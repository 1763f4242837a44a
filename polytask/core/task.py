"""A task: a named set of examples with a kind, label names, an instruction, a metric and three splits.

The nouns stand here. `read` opens sources, `task_guess` says which columns and kind, `task_build` makes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask.core.errors import ConfigError, DataError, listing, nearest

if TYPE_CHECKING:
    from PIL import Image

METRICS = {
    "classify": "accuracy",
    "multilabel": "macro-f1",
    "regress": "pearson",
    "choose": "accuracy",
    "generate": "rouge-l",
    "lm": "perplexity",
}
KINDS = tuple(METRICS)
MODALITIES = ("text", "image")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """One example. Two are equal when their content is, wherever it was read from.

    `target` is a label name (classify), a list of them (multilabel), a float (regress), an index into `choices`
    (choose), a text (generate) or None (lm). `image` is a path, the bytes of an image file, or a uint8 array
    (H, W), (H, W, 1) or (H, W, 3); `digest` is the hash of its pixels, which readers fill in.
    """

    inputs: tuple[str, ...]
    target: Any
    choices: tuple[str, ...] = ()
    image: Any = field(default=None, compare=False)
    where: str = field(default="", compare=False)
    digest: str = field(default="", repr=False)

    def pixels(self) -> Image.Image:
        """The image as RGB, opened now. Raises DataError when there is none or it cannot be read."""
        return open_image(self.image, self.where)

    @property
    def key(self) -> str:
        """sha256 hex of what the model is given (texts and pixels, not the target): what splits are made by."""
        digest = self.digest or (image_digest(self.pixels()) if self.image is not None else "")
        return hashlib.sha256(json.dumps([self.inputs, digest]).encode()).hexdigest()


@dataclass
class Task:
    """A named set of examples in three splits. `notes` says what was guessed, left out, or made."""

    name: str
    kind: str
    train: list[Example]
    dev: list[Example]
    test: list[Example]
    labels: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    target: str = ""
    instruction: str = ""
    metric: str = ""
    modality: str = "text"
    description: str = ""
    about: dict[str, str] = field(default_factory=dict)  # label to what it means, for models that read class texts
    licence: str = ""
    notes: list[str] = field(default_factory=list)
    group: str = ""  # of tasks that may share an adapter
    direction: str = ""  # of a translation: de-en

    def __post_init__(self) -> None:
        if self.kind not in METRICS:
            raise ConfigError(
                f"Task {self.name!r} has the kind {self.kind!r}{nearest(self.kind, KINDS)}; "
                f"the kinds are {listing(KINDS)}."
            )
        self.metric = self.metric or METRICS[self.kind]
        if self.metric != METRICS[self.kind]:
            from polytask.core.metrics import choose_metric  # which takes numpy, and few tasks name a metric

            try:
                choose_metric(self.kind, self.metric)
            except ConfigError as error:
                raise ConfigError(f"Task {self.name!r}: {error}") from error

    @classmethod
    def read(cls, source: Any, *, name: str | None = None, skip_bad_rows: bool = False, **overrides: Any) -> Task:
        """Read a task from a file, a folder, a `datasets` object, a table, or a list of dicts.

        `overrides` takes the keys of task.yaml (kind, inputs, target, labels, instruction, metric, description,
        about, licence, modality, choices, files, group, direction) and `where`, a dict of column to value that picks rows.
        They win over task.yaml, which wins over what is guessed.

        Raises DataError for what cannot be read or a bad row (file and line are named), ConfigError for an unknown
        key or a value out of range, StorageError for a file that may not be opened.
        """
        from polytask.core.task_build import build

        return cls(**build(source, name, skip_bad_rows, overrides))

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: Iterable[Any],
        labels: Iterable[Any],
        splits: Sequence[str] | None = None,
        *,
        skip_bad_rows: bool = False,
        **overrides: Any,
    ) -> Task:
        """An image classification task from uint8 arrays (H, W), (H, W, 1) or (H, W, 3) and a label each.

        `splits` names the split of each image; without it they are made by a hash of the pixels. Give the names of
        integer labels as `label_names=["cat", "dog"]`. Raises DataError for lengths or arrays that do not fit.
        """
        columns = {"image": list(images), "label": [getattr(label, "tolist", lambda v=label: v)() for label in labels]}
        if splits is not None:
            columns["split"] = list(splits)
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{count} in {column}" for column, count in lengths.items())
            raise DataError(f"Task {name!r}: the arrays differ in length ({counts}). Give one label for each image.")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if (label_names := overrides.pop("label_names", None)) is not None:
            overrides["labels"] = label_names
        said = {"kind": "classify", "modality": "image", "inputs": "image", "target": "label", **overrides}
        return cls.read(rows, name=name, skip_bad_rows=skip_bad_rows, **said)

    @property
    def splits(self) -> dict[str, list[Example]]:
        """The three splits by name."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    @property
    def duplicates(self) -> int:
        """How many examples of dev and test have the inputs of an example in an earlier split."""
        return count_duplicates(self.splits.values())

    @property
    def hash(self) -> str:
        """sha256 hex of all examples and the split each is in, whatever their order and file format."""
        rows = []
        for split, examples in self.splits.items():
            for example in examples:
                target = sorted(example.target) if isinstance(example.target, list) else example.target
                content = json.dumps([split, example.key, target, example.choices])
                rows.append(hashlib.sha256(content.encode()).digest())
        return hashlib.sha256(b"".join(sorted(rows))).hexdigest()

    def summary(self) -> dict[str, Any]:
        """What the task is, as JSON can hold it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "modality": self.modality,
            "labels": list(self.labels),
            "sizes": {split: len(examples) for split, examples in self.splits.items()},
            "inputs": list(self.inputs),
            "target": self.target,
            "metric": self.metric,
            "notes": list(self.notes),
        }


def read_tasks(source: Any, *, skip_bad_rows: bool = False) -> list[Task]:
    """Read one task, a folder of tasks, or a list of such sources, sorted by name.

    Raises what `Task.read` raises, and DataError for a folder without a task or two tasks of one name.
    """
    from polytask.core.read import task_sources

    sources = source if isinstance(source, (list, tuple)) else [source]
    if sources and all(isinstance(item, dict) and "Instances" not in item for item in sources):
        sources = [source]  # rows, or splits of rows: one task, not a list of them
    if not sources:
        raise DataError("The list of tasks is empty. Give at least one file or folder.")
    tasks: dict[str, tuple[Task, Any]] = {}
    for item in sources:
        parts = task_sources(Path(item)) if isinstance(item, (str, os.PathLike)) else [item]
        for part in parts:
            task = part if isinstance(part, Task) else Task.read(part, skip_bad_rows=skip_bad_rows)
            if task.name in tasks:
                both = " and ".join(
                    str(s) if isinstance(s, Path) else type(s).__name__ for s in (tasks[task.name][1], part)
                )
                raise DataError(
                    f"Two tasks are named {task.name!r} ({both}). Names must differ: rename a file, "
                    f"or set `name` in its task.yaml."
                )
            tasks[task.name] = (task, part)
    return [tasks[name][0] for name in sorted(tasks)]


def count_duplicates(splits: Iterable[list[Example]]) -> int:
    """How many examples have the inputs of an example in an earlier split."""
    seen: set[tuple[tuple[str, ...], str]] = set()
    count = 0
    for examples in splits:
        keys = [(e.inputs, e.digest or e.key if e.image is not None else "") for e in examples]
        count += sum(key in seen for key in keys)
        seen.update(keys)
    return count


def open_image(image: Any, where: str = "") -> Image.Image:
    """An RGB image from a path, the bytes of a file, an array or a PIL image. Raises DataError when it is none."""
    from PIL import Image

    label = f"{where}: " if where else ""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, (str, os.PathLike, bytes)):
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return opened.convert("RGB")
        # PIL raises these, and not only its own, for damaged files.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{label}not an image that can be opened ({error}). Save it again as PNG or JPEG."
            ) from error
    if not hasattr(image, "shape"):
        raise DataError(f"{label}the image is {type(image).__name__}; give a path, bytes or a uint8 array.")
    return _image_from_array(image, label)


def _image_from_array(image: Any, label: str) -> Image.Image:
    """RGB from (H, W), (H, W, 1) or (H, W, 3), uint8."""
    import numpy as np
    from PIL import Image

    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise DataError(
            f"{label}the image array is {array.dtype}; pixels must be uint8 from 0 to 255. "
            f"For floats from 0 to 1: `(255 * a).round().astype('uint8')`."
        )
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]  # (H, W, 1) -> (H, W)
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise DataError(
            f"{label}the image array has shape {tuple(image.shape)}; it must be (H, W), (H, W, 1) or (H, W, 3), "
            f"channels last. For channels first: `a.transpose(1, 2, 0)`."
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def image_digest(image: Image.Image) -> str:
    """sha256 hex of an RGB image's size and pixels, so that an array and the PNG of it have the same."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()
