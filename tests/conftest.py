"""Small bases and tasks that every test can use. Nothing here needs a network."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import polytask as pt
from polytask.core.task import Example

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "tasks"


@pytest.fixture(scope="session")
def minilm_tokenizer():
    import transformers

    from polytask.core.load import ALIASES

    return transformers.AutoTokenizer.from_pretrained(ALIASES["minilm"]())


@pytest.fixture
def encoder(minilm_tokenizer):
    """A tiny BERT with a real tokenizer, mean-pooled."""
    return tiny_bert(minilm_tokenizer)


def tiny_bert(tokenizer) -> pt.Model:
    """What `encoder` is; the same weights each time."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=128, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        )  # fmt: skip
        module = transformers.BertModel(config).eval()
    return pt.Model(module, tokenizer, name="tiny-bert", pooling="mean")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Bytes as tokens: any text, 259 entries."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


@pytest.fixture
def decoder(byte_tokenizer):
    """A tiny Llama over bytes."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=259, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        module = transformers.LlamaForCausalLM(config).eval()
    return pt.Model(module, byte_tokenizer, name="tiny-llama")


@pytest.fixture
def seq2seq(byte_tokenizer):
    """A tiny T5 over bytes."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.1, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0,
        )  # fmt: skip
        module = transformers.T5ForConditionalGeneration(config).eval()
    return pt.Model(module, byte_tokenizer, name="tiny-t5")


def colours(n: int = 24, name: str = "colours", start: int = 0) -> pt.Task:
    """A task that a tiny model can learn: is the word red or blue in the sentence?"""
    nouns = ["car", "house", "bird", "chair", "stone", "door", "shirt", "boat"]
    rows = []
    for i in range(start, start + n):
        colour = "red" if i % 2 else "blue"
        rows.append(
            Example((f"the {nouns[i % 8]} number {i} is {colour} today",), colour, where=f"{name}.jsonl:{i + 1}")
        )
    return pt.Task(
        name=name, kind="classify", train=rows[: n // 2], dev=rows[n // 2 : 3 * n // 4], test=rows[3 * n // 4 :],
        labels=("blue", "red"), metric="accuracy",
    )  # fmt: skip


@pytest.fixture
def task() -> pt.Task:
    return colours()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""
    from polytask.cli import main

    def go(*arguments):
        monkeypatch.setattr(sys, "argv", ["polytask", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return go


@pytest.fixture(scope="session")
def saved_base(minilm_tokenizer, tmp_path_factory):
    """`encoder` as a folder, made once."""
    folder = tmp_path_factory.mktemp("saved") / "base"
    model = tiny_bert(minilm_tokenizer)
    model.module.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def base(saved_base, tmp_path):
    """A tiny base as a folder, which a test may change."""
    return shutil.copytree(saved_base, tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    """Two small tasks as folders of JSON lines: ``one`` and ``two``."""
    folder = tmp_path / "tasks"
    for number, name in enumerate(("one", "two")):
        task = colours(40, name, start=100 * number)
        (folder / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [json.dumps({"text": e.inputs[0], "label": e.target}) for e in getattr(task, split)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def same_state(before: dict, module: torch.nn.Module) -> bool:
    """Whether a module's tensors are bit for bit what they were."""
    now = module.state_dict()
    return before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before)


@pytest.fixture(scope="session")
def clip_processor():
    """Bytes between a start token (1) and an end token (258), and images of 16 by 16."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)} | {"</s>": 258}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 258)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=96
    )
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    return transformers.CLIPProcessor(images, tokenizer)


@pytest.fixture
def clip(clip_processor):
    """A tiny CLIP over bytes: text tower of width 32, image tower of width 48, a common space of 16."""
    import transformers
    from zoo import _jitter

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={**size, "vocab_size": 259, "max_position_embeddings": 96, "pad_token_id": 0,
                         "bos_token_id": 1, "eos_token_id": 258},
            vision_config={**size, "hidden_size": 48, "image_size": 16, "patch_size": 4}, projection_dim=16,
        )  # fmt: skip
        module = transformers.CLIPModel(config).eval()
        _jitter(module)
    return pt.Model(module, clip_processor, name="tiny-clip")
