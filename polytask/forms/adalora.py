"""PEFT's AdaLoRA files, read as the plain LoRA that they compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polytask.core.errors import AdapterError
from polytask.core.peft_files import pattern_keys

_OWN = (  # settings of AdaLoRA's alone, which only matter while it learns
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
)  # fmt: skip


def as_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of the LoRA with the same change: ``alpha / (init_r + 1e-5) B diag(E) A``.

    The gates E go into A, and the scale, which does not follow the ranks, into an alpha for each. A layer without any rank
    is left out. A rank is also left out where its gate is zero: PEFT keeps what was pruned last until the next save.

    Raises:
        AdapterError: the file is not complete, or no layer has a rank left.
    """
    first = int(config.get("init_r") or 0)
    if first < 1:
        raise AdapterError(
            f"this PEFT adapter of type ADALORA has init_r={config.get('init_r')!r}; its scale is not known"
        )
    alpha = float(config.get("lora_alpha") or 0)
    done: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        place, dot, name = key.rpartition(".lora_")
        if not dot or name not in ("A", "B", "E"):
            done[key] = tensor
            continue
        if name != "E":
            continue
        A, B = (tensors.get(f"{place}.lora_{factor}") for factor in "AB")
        if A is None or B is None:
            raise AdapterError(f"the file has {key!r} without lora_A and lora_B beside it; it is not complete")
        live = tensor.flatten() != 0
        path = place.removeprefix("base_model.model.")
        ranks[path] = int(live.sum())
        if ranks[path]:
            done[f"{place}.lora_A.weight"] = (A * tensor.reshape(-1, 1))[live]
            done[f"{place}.lora_B.weight"] = B[:, live].contiguous()
    emptied = any(not rank for rank in ranks.values())
    ranks = {path: rank for path, rank in ranks.items() if rank}
    if not ranks:
        raise AdapterError("no layer of this PEFT adapter of type ADALORA has a rank left, so it does nothing")
    scale = (alpha if alpha > 0 else float(first)) / (first + 1e-5)
    keys = pattern_keys(ranks)
    lora = {key: value for key, value in config.items() if key not in _OWN}
    lora |= {
        "peft_type": "LORA", "r": config.get("target_r") or first, "lora_alpha": scale * (config.get("target_r") or first),
        "use_rslora": False,
        "rank_pattern": {keys[path]: rank for path, rank in ranks.items()},
        "alpha_pattern": {keys[path]: scale * rank for path, rank in ranks.items()},
    }  # fmt: skip
    if emptied:
        lora["target_modules"] = list(ranks)
    return lora, done
