"""What grafting gives: a sparse adapter for each model, how good it is for how few weights, and how the masks overlap."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.core.adapter import Adapter, Card
from polytask.core.errors import MergeError, listing
from polytask.core.head import Head
from polytask.core.model import Model
from polytask.core.storage import write_together, writing
from polytask.forms.importance import largest
from polytask.forms.sparse import LTSFT, SparsePatch

from .card import versions
from .patches import dense_patch, general_form
from .pool import Pool

FILE, OVERLAP = "graft.json", "overlap.csv"
Masks = Mapping[str, Tensor]


class Grafts:
    """A sparse adapter for each model, and what was measured. A folder has one for each adapter, ``graft.json`` and
    ``overlap.csv``.

    Args:
        adapters: by the models' names; each is an ordinary adapter of the form ``lt-sft``.
        about: what was measured, as plain values: the settings, ``weights`` (numbers of the network), ``models`` (scores and
            calibration errors of base, tuned model and each sparsity) and ``overlap``.
    """

    def __init__(self, adapters: Mapping[str, Adapter], about: Mapping[str, Any]) -> None:
        self.adapters, self.about = dict(adapters), dict(about)

    @property
    def overlap(self) -> list[list[float]]:
        """The share of each model's weights (rows) that each other's (columns) has too."""
        found: list[list[float]] = self.about["overlap"]
        return found

    def as_dict(self) -> dict[str, Any]:
        """What was measured, JSON-able."""
        return dict(self.about)

    def save(self, folder: str | Path) -> Path:
        """Writes the folder. Raises `StorageError`."""
        target = Path(folder).expanduser()
        names = list(self.adapters)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["share of its weights that are in", *names])
        for name, values in zip(names, self.overlap, strict=True):
            rows.writerow([name, *values])
        for name, adapter in self.adapters.items():
            adapter.save(target / name)
        with writing(target):
            data = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
            write_together(target, {OVERLAP: text.getvalue().encode(), FILE: data.encode()})
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Grafts:
        """The reverse. Raises `MergeError` where the folder is none of these."""
        file = Path(folder).expanduser() / FILE
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            names = [str(entry["name"]) for entry in about["models"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MergeError(
                f"{folder} holds no grafts ({error}); polytask merge --method graft --out {folder} makes some"
            ) from error
        return cls({name: Adapter.load(file.parent / name) for name in names}, about)

    def __str__(self) -> str:
        lines = []
        for entry in self.about["models"]:
            lines.append(f"{entry['name']} on {entry['task']} ({entry['metric']}, {entry['split']}):")
            for point in entry["points"]:
                mark = "*" if point["sparsity"] == entry["kept"] else " "
                said = "" if point["ece"] is None else f", calibration error {point['ece']:.3f}"
                lines.append(f" {mark}{point['entries']:>10,} weights: {point['score']:.3f}{said}")
            for what in ("tuned", "base"):
                found = entry[what]
                said = "" if found["ece"] is None else f", calibration error {found['ece']:.3f}"
                lines.append(f"  {what:>18}: {found['score']:.3f}{said}")
        return "\n".join(lines)


class Skill:
    """One model's weights beside the base's, and what can be taken from it.

    Args:
        pool: the models.
        model: which of them.

    Attributes:
        base, tuned: tensors by name, those that differ, in the base's type.
        change: their difference, in fp32.
    """

    def __init__(self, pool: Pool, model: int) -> None:
        self.pool, self.name = pool, pool.names[model]
        device = pool.model.device
        self.base: dict[str, Tensor] = {}
        self.tuned: dict[str, Tensor] = {}
        for name in pool.changes:
            base = pool.root.read(name).to(device)
            tuned = pool.cast(name, pool.sources[model].read(name).to(device))
            if not torch.equal(base, tuned):
                self.base[name], self.tuned[name] = base, tuned
        if not self.base:
            raise MergeError(f"{self.name!r} is the base itself; leave it out")
        self.change = {name: self.tuned[name].float() - base.float() for name, base in self.base.items()}

    def grafted(self, mask: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's own numbers where the mask is true and the base's elsewhere, both bit for bit."""
        return {
            name: torch.where(own, self.tuned[name], base)
            for (name, base), own in zip(self.base.items(), mask, strict=True)
        }

    def soft(self, mask: Sequence[Tensor]) -> dict[str, Tensor]:
        """``b + m (t - b)`` for a mask of numbers."""
        return {
            name: self.pool.cast(name, base.float() + own * self.change[name])
            for (name, base), own in zip(self.base.items(), mask, strict=True)
        }

    def moved_most(self, count: int) -> list[Tensor]:
        """The mask of the ``count`` numbers that differ most; of fewer where fewer differ."""
        sizes = [change.abs() for change in self.change.values()]
        made = []
        for size, at in zip(sizes, largest(sizes, count), strict=True):
            flat = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
            flat[at] = True
            made.append(flat.view(size.shape) & (size > 0))
        return made


def overlap(masks: Sequence[Masks]) -> list[list[float]]:
    """``|a and b| / |a|`` of every two masks; an empty one overlaps with itself alone.

    Args:
        masks: truth values by tensor; a tensor that lacks has none.
    """

    def count(mask: Masks) -> int:
        return sum(int(own.sum()) for own in mask.values())

    def both(a: Masks, b: Masks) -> int:
        return sum(int((own & b[name]).sum()) for name, own in a.items() if name in b)

    return [
        [both(a, b) / count(a) if count(a) else float(i == j) for j, b in enumerate(masks)] for i, a in enumerate(masks)
    ]


def sparse(
    model: Model, masks: Masks, changes: Mapping[str, Tensor], heads: Mapping[str, Head], card: Card, name: str
) -> Adapter:
    """The changes where the masks are true, as an adapter of the form ``lt-sft``, at every module that reads the tensors.

    Args:
        model: the base.
        masks: by the names of the network's parameters.
        changes: of the same names, in fp32.
        heads: of the adapter, by task.
        card: that gets the base's part.
        name: of the adapter.

    Raises:
        MergeError: a tensor is no part of a place where an adapter can act, or nothing changes.
    """
    first = {id(p): key for key, p in model.module.named_parameters()}
    form = LTSFT(parameters="all")
    patches, left = {}, {key for key, mask in masks.items() if bool(mask.any())}
    for site in model.sites:
        if form.refuses(site):
            continue
        module, empty = model.module.get_submodule(site.path), form.patch(site)
        assert isinstance(empty, SparsePatch)
        own = {p: first.get(id(module._parameters.get(p)), "") for p in empty.shapes}
        chosen = {p: key for p, key in own.items() if key in masks}
        merged = {p: torch.where(masks[key], changes[key], 0.0).cpu() for p, key in chosen.items()}
        patch = dense_patch(form, site, merged) if merged else None
        if patch is not None:
            patches[site.name] = patch
        left -= set(chosen.values())
    if left or not patches:
        raise MergeError(
            f"{name}: no adapter can change {listing(sorted(left), 4)}; leave these tensors as the base has them"
            if left
            else f"{name}: nothing of it is kept, so there is no adapter; give a larger sparsity"
        )
    card.base = {
        "name": model.name, "source": getattr(model, "source", "") or model.name, "fingerprint": model.fingerprint,
        "kind": model.kind,
    }  # fmt: skip
    card.versions = versions()
    return Adapter(general_form(list(patches.values())), patches, heads, card, name).trainable(False)
