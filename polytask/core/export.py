"""Whether the common servers of adapters take one: vLLM and LoRAX load a part of what PEFT can write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import listing
from .peft_files import is_saved, obstacles

if TYPE_CHECKING:
    from .adapter import Adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be


def serving_problems(adapter: Adapter, max_rank: int = 64) -> list[str]:
    """Which rules of the subset that vLLM and LoRAX serve an adapter breaks; empty when both take it.

    A server reads one rank and one scale from the configuration and applies plain LoRA at linear layers. Heads are
    never served.

    Args:
        adapter: the adapter.
        max_rank: the server's ``max_lora_rank``.

    Returns:
        One line for each broken rule: what the rule is, and where the adapter breaks it.
    """
    problems = []
    if max_rank not in VLLM_RANKS:
        problems.append(f"vLLM's max_lora_rank must be one of {listing(map(str, VLLM_RANKS))}, and is {max_rank}")
    if adapter.form.peft_type != "LORA":
        return [*problems, f"only LoRA is served, and the form is {adapter.form.name!r}"]
    problems += [f"PEFT's own format cannot hold it: {reason}" for reason in obstacles(adapter)]
    saved = [name for name, patch in adapter.patches.items() if is_saved(patch)]
    own = {name: patch for name, patch in adapter.patches.items() if name not in saved}
    if saved:
        problems.append(f"modules_to_save are not served: {listing(saved, 4)}; merge the adapter into the base instead")
    if adapter.heads:
        problems.append(f"heads are not served, only what the base computes: {listing(adapter.heads, 4)}")
    for kind in ("embedding", "conv", "experts"):
        names = [name for name, patch in own.items() if patch.site.kind == kind]
        if names:
            problems.append(f"only linear layers are served, and these are of kind {kind}: {listing(names, 4)}")
    written = [getattr(patch.form, "in_file", patch.form) for patch in own.values()]
    ranks = sorted({form.rank for form in written if hasattr(form, "rank")})
    if ranks and ranks[-1] > max_rank:
        problems.append(f"the rank {ranks[-1]} is above max_lora_rank={max_rank}; start the server with a larger one")
    scales = {patch.form.scale for patch in own.values() if hasattr(patch.form, "scale")}
    if len(ranks) > 1 or len(scales) > 1:
        problems.append(
            "a server reads one rank and one alpha, and this adapter has several (rank_pattern, alpha_pattern)"
        )
    base = str(adapter.card.base.get("source") or adapter.card.base.get("name") or "")
    if not base or base == "unknown":
        problems.append("LoRAX needs the base's name (base_model_name_or_path), and the card has none")
    elif not (base.count("/") == 1 and not base.startswith((".", "~"))) and not Path(base).expanduser().is_dir():
        problems.append(f"LoRAX needs a base that it can load, and {base!r} is neither a hub name nor a folder")
    return problems
