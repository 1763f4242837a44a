"""mergekit's methods in our terms: which rule, what its parameters are called here, and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A method of mergekit's in our terms.

    Attributes:
        rule: our rule.
        base: what a base is: what ``differences`` are taken to (or optionally: ``maybe``), one more ``member``, or nothing but a
            model that is listed (``listed``).
        shared: settings of all models: mergekit's name and ours.
        own: settings of each model.
        weight: whether each model needs a weight.
        ignored: what changes nothing here.
        defaults: mergekit's, where ours are others.
    """

    rule: str
    base: Literal["differences", "maybe", "member", "listed"] = "differences"
    shared: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)
    weight: bool = False
    ignored: tuple[str, ...] = ("int8_mask",)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SUM = {"normalize": "normalize", "lambda": "scale"}
_CHANCE = {**_SUM, "rescale": "rescale"}
_SIZE = {"density": "density"}
METHODS = {
    "linear": Method("linear", "listed", {"normalize": "normalize"}, weight=True),
    "task_arithmetic": Method("task_arithmetic", shared=_SUM, weight=True, ignored=("int8_mask", "rescale", "density")),
    "ties": Method("ties", shared=_SUM, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "dare_linear": Method("dare_linear", shared=_CHANCE, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "dare_ties": Method("dare_ties", shared=_CHANCE, own=_SIZE, weight=True, defaults={"density": 1.0}),
    "della": Method(
        "della", shared=_CHANCE, own={**_SIZE, "epsilon": "epsilon"}, weight=True, defaults={"density": 1.0, "epsilon": 0.15}
    ),
    "della_linear": Method(
        "della_linear", shared=_CHANCE, own={**_SIZE, "epsilon": "epsilon"}, weight=True,
        defaults={"density": 1.0, "epsilon": 0.15},
    ),
    "breadcrumbs": Method(
        "breadcrumbs", shared=_SUM, own={**_SIZE, "gamma": "gamma"}, weight=True, defaults={"density": 1.0, "gamma": 0.01}
    ),
    "breadcrumbs_ties": Method(
        "breadcrumbs_ties", shared=_SUM, own={**_SIZE, "gamma": "gamma"}, weight=True,
        defaults={"density": 1.0, "gamma": 0.01},
    ),
    "sce": Method("sce", shared={"select_topk": "select_topk"}),
    "model_stock": Method("model_stock", shared={"filter_wise": "filter_wise"}),
    "slerp": Method("slerp", shared={"t": "t"}, ignored=()),
    "nearswap": Method("nearswap", shared={"t": "t"}, ignored=()),
    "nuslerp": Method("nuslerp", "maybe", {"nuslerp_flatten": "", "nuslerp_row_wise": ""}, weight=True, ignored=()),
    "multislerp": Method(
        "multislerp", "maybe", {"normalize_weights": "normalize_weights", "eps": "eps"}, weight=True, ignored=()
    ),
    "karcher": Method("karcher", "member", {"max_iter": "max_iter", "tol": "tol"}, ignored=()),
    "arcee_fusion": Method("arcee_fusion", ignored=()),
    "passthrough": Method("passthrough", "listed", own={"scale": "scale"}, ignored=()),
}  # fmt: skip
