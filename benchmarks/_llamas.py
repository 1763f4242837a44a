"""Folders of Llama's architecture with random weights, and mergekit files about them, for `merge.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

# (hidden, layers, inner, vocabulary), head and embeddings apart
SIZES = {
    "tiny": (64, 2, 128, 512), "40m": (384, 10, 1024, 32_000), "160m": (768, 16, 2048, 32_000),
    "500m": (1280, 21, 3456, 32_000), "1.5b": (2048, 28, 5632, 32_000),
}  # fmt: skip

_WEIGHT = {"weight": 0.4}
_MASK = {**_WEIGHT, "density": 0.4}
# the methods that both have: parameters of the file, of each model, and how many models they take beside the base
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "linear": ({}, _WEIGHT, 4), "task_arithmetic": ({}, _WEIGHT, 3), "ties": ({}, _MASK, 3), "dare_linear": ({}, _MASK, 3),
    "dare_ties": ({}, _MASK, 3), "della": ({}, {**_MASK, "epsilon": 0.1}, 3),
    "della_linear": ({}, {**_MASK, "epsilon": 0.1}, 3), "breadcrumbs": ({}, {**_MASK, "gamma": 0.01}, 3),
    "breadcrumbs_ties": ({}, {**_MASK, "gamma": 0.01}, 3), "sce": ({"select_topk": 0.2}, {}, 3), "model_stock": ({}, {}, 3),
    "slerp": ({"t": 0.4}, {}, 1), "nearswap": ({"t": 0.001}, {}, 1), "nuslerp": ({}, _WEIGHT, 2),
    "multislerp": ({}, _WEIGHT, 3), "karcher": ({}, {}, 3), "arcee_fusion": ({}, {}, 1), "passthrough": ({}, {}, 1),
}  # fmt: skip
NO_BASE = ("linear", "multislerp", "karcher", "nuslerp", "passthrough")


def largest(size: str) -> int:
    """Numbers of the largest tensor."""
    hidden, _, inner, vocab = SIZES[size]
    return hidden * max(inner, vocab)


def parameters(size: str) -> int:
    """Numbers of a model."""
    return sum(torch.Size(shape).numel() for _, shape in _shapes(size))


def _shapes(size: str) -> list[tuple[str, tuple[int, ...]]]:
    hidden, layers, inner, vocab = SIZES[size]
    own = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden), "self_attn.v_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    inside = [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in own.items()]
    ends = [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]
    return [("model.embed_tokens.weight", (vocab, hidden)), *inside, *ends]


def write_models(folder: Path, size: str, count: int) -> list[Path]:
    """Folders of a base and of tuned models whose weights are a tenth away from it.

    Raises:
        OSError: there is not enough space for them and a result.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    need, free = 2 * parameters(size) * (count + 2), shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            f"{count} models of {size} and two results need {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
    hidden, layers, inner, vocab = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=False,
        num_attention_heads=hidden // 64, architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = []
    for number in range(count):
        tensors = {}
        for place, (name, shape) in enumerate(_shapes(size)):
            base = torch.empty(shape, dtype=torch.bfloat16).normal_(
                0, 0.02, generator=torch.Generator().manual_seed(place)
            )
            if number:
                own = torch.Generator().manual_seed(1000 * number + place)
                base += torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.002, generator=own)
            tensors[name] = base
        made.append(folder / f"m{number}")
        config.save_pretrained(made[-1])
        save_file(tensors, made[-1] / "model.safetensors", {"format": "pt"})
    return made


def write_config(folder: Path, method: str, models: list[Path], **more: Any) -> Path:
    """A mergekit file for a method."""
    import yaml

    shared, own, count = METHODS[method]
    based = method not in NO_BASE
    chosen = models[1 : 1 + count] if based or len(models) > count else models[:count]
    said = {
        "merge_method": method, "dtype": "bfloat16", "parameters": shared,
        "models": [{"model": str(model), **({"parameters": own} if own else {})} for model in chosen], **more,
    }  # fmt: skip
    if based:
        said["base_model"] = str(models[0])
    file = folder / f"{method}{''.join(f'-{k}' for k in more)}.yml"
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    return file
