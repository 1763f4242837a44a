"""GenKnowSub: a task's LoRA without what general LoRAs know too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MergeError
from polytask.core.form import Patch

from .adapters import merge_adapters
from .patches import factors_of
from .together import together


def genknowsub(
    adapter: Adapter, general: Adapter | Sequence[Adapter], mode: Literal["factor", "delta"] = "factor"
) -> Adapter:
    """A LoRA without what general LoRAs know too: what is left is the task's own, for libraries that a router chooses from.

    Args:
        adapter: the task's.
        general: of general text, one or several, of which the mean is taken.
        mode: ``factor`` subtracts factor from factor, ``(B - B_g)(A - A_g)``, which keeps the rank and is not the difference of
            the changes; ``delta`` subtracts the changes, ``B A - B_g A_g``, exactly, with the sum of the ranks.

    Reference: Bagherifard et al., GenKnowSub, arXiv 2505.10939; ``factor`` is what its code does.

    Raises:
        MergeError: it has been subtracted before, or the LoRAs differ in sites, rank or scale (``factor``).
        ConfigError: an unknown mode.
    """
    others = [general] if isinstance(general, Adapter) else list(general)
    if mode not in ("factor", "delta"):
        raise ConfigError(f"genknowsub: mode must be one of factor, delta, got {mode!r}")
    if not others:
        raise MergeError("genknowsub needs at least one general adapter")
    if "genknowsub" in adapter.card.training:
        raise MergeError(
            f"general knowledge has been subtracted from {adapter.name!r} already; a second time would spoil it"
        )
    if mode == "delta":
        share = -1.0 / len(others)
        parts = [adapter, *[_without_heads(o) for o in others]]
        made = merge_adapters(
            parts, "linear", [1.0] + [share] * len(others), as_="lora", normalize=False, name=adapter.name
        )
        made.card.training = {**adapter.card.training, "merge": made.card.training["merge"]}
        made.card.tasks = list(adapter.card.tasks)
    else:
        made = _subtracted(adapter, others)
    made.card.training["genknowsub"] = {"mode": mode, "general": [other.name for other in others]}
    made.card.parents = [adapter.hash, *[other.hash for other in others]]
    return made


def _without_heads(adapter: Adapter) -> Adapter:
    return Adapter(adapter.form, adapter.patches, {}, adapter.card, adapter.name, adapter.targets, adapter.shared)


@torch.no_grad()
def _subtracted(adapter: Adapter, others: Sequence[Adapter]) -> Adapter:
    together([adapter, *others])
    made = adapter.copy()
    made.card.training = dict(made.card.training)
    made.card.metrics = {}
    for name, patch in made.patches.items():
        fellows = [other.patches.get(name) for other in others]
        if not all(fellow is not None and _alike(patch, fellow) for fellow in fellows):
            raise MergeError(
                f"genknowsub: at {name!r} the LoRAs differ in form, rank or scale, or a general one has none there; say "
                "mode='delta'"
            )
        for key in ("A", "B"):
            means = [fellow.get_parameter(key).float() for fellow in fellows if fellow is not None]
            patch.get_parameter(key).sub_(torch.stack(means).mean(0))
    return made


def _alike(patch: Patch, other: Patch) -> bool:
    """Whether both are plain LoRAs of one rank and scale, whose factors can be subtracted from each other."""
    if factors_of(patch) is None or factors_of(other) is None or type(patch) is not type(other):
        return False
    same = all(patch.get_parameter(key).shape == other.get_parameter(key).shape for key in ("A", "B"))
    return same and math.isclose(patch.form.scale, other.form.scale)
