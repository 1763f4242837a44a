"""AdapterFusion of the ``adapters`` library over its bare forward, under that library's own Python: ``-m benchmarks._fuser``.

It may import nothing of ours but `benchmarks.measure`. Prints what `interleave` finds as one line of JSON.
"""

from __future__ import annotations

import copy
import json
import sys

import torch

from .measure import interleave, version


@torch.no_grad()
def main(threads: int, rounds: int, vocab: int) -> None:
    """The decoder of `benchmarks.core`, 8 x 64 tokens and eight bottlenecks, as `benchmarks.route.fusion_of_8` has them."""
    import adapters
    from adapters.composition import Fuse
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, intermediate_size=1408, vocab_size=vocab, num_attention_heads=8,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    fused = copy.deepcopy(base)
    adapters.init(fused)
    names = [f"a{i}" for i in range(8)]
    for name in names:
        fused.add_adapter(name, config="seq_bn")
    fused.add_adapter_fusion(Fuse(*names))
    fused.set_active_adapters(Fuse(*names))
    fused.eval()
    ids = torch.randint(5, vocab, (8, 64))
    took = interleave({"bare": lambda: base(ids), "theirs": lambda: fused(ids)}, rounds, "bare")
    print(json.dumps({"version": version("adapters"), **took["theirs"]}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
