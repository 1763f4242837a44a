"""PEFT's files of kind POLY, an inventory of LoRAs with shares by task, as a mixture.

Shapes: T tasks, H splits, S skills, r rank, i = d_in, o = d_out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polytask.core.errors import AdapterError
from polytask.core.peft_files import PREFIX, check_peft
from polytask.core.site import Site

KIND = "POLY"
A, B, Z = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the mixture: PEFT's tasks are numbers and become the names ``"0"``, ``"1"``, ...; its scale is 1 / r.

    Raises:
        AdapterError: another router than ``poly``.
    """
    check_peft(config, "mixture", ("r", "poly_type", "n_tasks", "n_skills", "n_splits"), {})
    if config.get("poly_type", "poly") != "poly":
        raise AdapterError(f"this PEFT adapter has the router {config['poly_type']!r}, and only 'poly' is known")
    tasks = [str(i) for i in range(int(config.get("n_tasks", 1)))]
    return {
        "router": {"name": "mhr", "tasks": tasks, "heads": int(config.get("n_splits", 1))},
        "experts": int(config.get("n_skills", 4)),
        "forms": {"name": "lora", "rank": int(config.get("r", 8)), "alpha": 1.0},
    }


def sites(tensors: Mapping[str, Tensor]) -> list[Site]:
    """Where the file has factors."""
    found = []
    for key, first in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(f".{A}")
        if key.endswith(f".{A}"):
            second = tensors[f"{PREFIX}{path}.{B}"]
            shape = (second.shape[0] * second.shape[3], first.shape[0] * first.shape[2])
            found.append(Site(path, "linear", "other", shape))
    return found


def parts(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], places: Sequence[Site]
) -> dict[str, dict[str, Tensor]]:
    """The parameters of the mixture's patches: A [H, S, i / H, r] and B [H, S, r, o / H] skill by skill, Z [T, H S] in heads."""
    found: dict[str, dict[str, Tensor]] = {}
    for site in places:
        first, second, Z_ = (tensors[f"{PREFIX}{site.path}.{name}"] for name in (A, B, Z))
        heads, skills = first.shape[:2]
        own = found[site.name] = {f"p{skills}_Z": Z_.view(-1, heads, skills).contiguous()}
        for i in range(skills):
            own[f"p{i}_A"] = first[:, i].flatten(0, 1).T.contiguous()  # [r, i]
            own[f"p{i}_B"] = second[:, i].transpose(1, 2).flatten(0, 1).contiguous()  # [o, r]
    return found
