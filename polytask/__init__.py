"""polytask: one pretrained model, many tasks.

Names are looked up when they are first used, so that importing the package costs nothing. A form, a mix or any other
registered method is a name of this package as soon as its file exists.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Model": "core.model",
    "Site": "core.site",
    "Form": "core.form",
    "Patch": "core.form",
    "Bank": "core.form",
    "Call": "core.form",
    "Weights": "core.form",
    "Mix": "core.mix",
    "Single": "core.mix",
    "Fixed": "core.mix",
    "PerRow": "core.mix",
    "Adapter": "core.adapter",
    "Library": "core.library",
    "Card": "core.adapter",
    "Task": "core.task",
    "Example": "core.task",
    "read_tasks": "core.task",
    "Recipe": "core.recipe",
    "Stage": "core.recipe",
    "PolytaskError": "core.errors",
    "LibraryError": "core.errors",
    "compare": "jobs",
    "compare_merges": "jobs",
    "search": "jobs",
    "transferability": "grouping",
    "groupwise": "grouping",
    "Score": "core.metrics",
    "transfer_prompt": "learn.transfer",
    "genknowsub": "merge.subtract",
    "readapt": "merge.readapt",
    "MergeError": "core.errors",
    "Routing": "core.routing",
    "gradient_alignment": "route.alignment",
    "mbc": "experts",
    "kshot_experts": "experts",
}


_VERBS = ("learn", "evaluate", "merge", "route")  # packages that can be called


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _VERBS:
        return importlib.import_module(f"polytask.{name}")
    where = _WHERE.get(name)
    if where is not None:
        value = getattr(importlib.import_module(f"polytask.{where}"), name)
        globals()[name] = value
        return value
    if name[0].isupper():
        from .core.form import forms

        for kind in forms.values():
            if kind.__name__ == name:
                globals()[name] = kind
                return kind
    raise AttributeError(f"polytask has no {name!r}; it has {', '.join(sorted(_WHERE))}, and every registered form")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_VERBS})
