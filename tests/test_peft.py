"""Adapter folders against the PEFT library itself: what either writes, the other reads, with the same outputs."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import output
from zoo import tiny as make

import polytask as pt
from polytask.core.errors import AdapterError
from polytask.core.files import CARD, CONFIG, HEADS, WEIGHTS
from polytask.core.head import LinearHead

QUIET = (  # what PEFT says about things that are meant here
    "`is_gradient_checkpointing`",
    "Model has `tie_word_embeddings",
    "Unable to fetch remote file",
    "Could not find a config file",
    "OLoRA changes",
    "The following (rank|alpha)_pattern keys",
    "LoRA adapter added to ConvNd",
    "Adapter 'default'",
    "fan_in_fan_out is set to False",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{start}") for start in QUIET]

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SITES = {
    "bert": "linear",
    "roberta": "query | value",
    "gpt2": "linear",
    "llama": "linear",
    "qwen2": "q_proj | down_proj",
    "gemma2": "linear",
    "phi3": "linear",
    "opt": "attention",
    "t5": "query | value | up",
    "bart": "linear",
    "vit": "linear",
    "swin": "query | value",
    "clip": "query | value",
    "whisper": "query | value",
    "resnet": "conv",
}


_made = functools.cache(make)


def tiny(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of the caller's own; building one takes longer than copying it."""
    net, batch = _made(family)
    return copy.deepcopy(net), batch


def net_of(family: str) -> nn.Module:
    return tiny(family)[0]


@torch.no_grad()
def run(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return output(net.eval()(**batch))


@torch.no_grad()
def applied(net: nn.Module, batch: dict[str, Tensor], adapter: pt.Adapter) -> Tensor:
    """What polytask computes with an adapter."""
    model = pt.Model(net)
    model.attach(adapter, "a")
    with model.using("a"):
        return output(net(**batch))


def in_peft(family: str, folder: Path) -> tuple[Tensor, Any]:
    """What PEFT computes with a folder, and its model. Any warning about keys is an error."""
    net, batch = tiny(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(net, str(folder))
    return run(wrapped, batch), wrapped


def new(family: str, form: Any, sites: str) -> pt.Adapter:
    return pt.Adapter.new(pt.Model(tiny(family)[0], name=f"tiny/{family}"), form, sites, seed=3, name="a")


def randomise(net: nn.Module, seed: int = 7) -> None:
    """Values for everything PEFT trains, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def by_peft(net: nn.Module, batch: dict[str, Tensor], folder: Path, **config: Any) -> Tensor:
    """Saves an adapter of PEFT's with random values; returns what PEFT computes with it."""
    wrapped = peft.get_peft_model(net, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    randomise(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(folder))
    return run(wrapped, batch)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# --- ours, read by PEFT


@pytest.mark.parametrize("family", SITES)
def test_peft_reads_ours(family: str, tmp_path: Path) -> None:
    adapter = new(family, pt.LoRA(rank=4, alpha=6, init="random"), SITES[family])
    adapter.save(tmp_path / "a")
    net, batch = tiny(family)
    base, ours = run(net, batch), applied(net, batch, adapter)
    theirs, _ = in_peft(family, tmp_path / "a")
    assert not torch.allclose(ours, base, atol=1e-3)
    torch.testing.assert_close(theirs, ours, **CLOSE)
    config = config_of(tmp_path / "a")
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == f"tiny/{family}"


@pytest.mark.parametrize(
    ("family", "sites"),
    [("llama", "embed_tokens"), ("gpt2", "wte"), ("gemma2", "embed_tokens"), ("bert", "token | query")],
)
def test_peft_reads_our_embeddings(family: str, sites: str, tmp_path: Path) -> None:
    adapter = new(family, pt.LoRA(rank=4, init="random"), sites)
    adapter.save(tmp_path / "a")
    net, batch = tiny(family)
    ours = applied(net, batch, adapter)
    torch.testing.assert_close(in_peft(family, tmp_path / "a")[0], ours, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_peft_reads_ranks_that_differ(family: str, tmp_path: Path) -> None:
    adapter = new(family, pt.LoRA(rank=4, alpha=6, init="random", scaling="rank-stabilised"), "linear")
    settings = [(2, None), (8, 3.5), (4, 6), (3, 6)]
    for i, (name, patch) in enumerate(list(adapter.patches.items())):
        rank, alpha = settings[i % len(settings)]
        other = pt.LoRA(rank=rank, alpha=alpha, init="random", scaling="rank-stabilised").patch(patch.site)
        other.start(torch.Generator().manual_seed(i))
        adapter.patches[name] = other
    adapter.save(tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert config["use_rslora"] and set(config["rank_pattern"].values()) == {2, 8, 3}
    net, batch = tiny(family)
    ours = applied(net, batch, adapter)
    torch.testing.assert_close(in_peft(family, tmp_path / "a")[0], ours, **CLOSE)
    loaded = pt.Adapter.load(tmp_path / "a")
    assert {n: p.form for n, p in loaded.patches.items()} == {n: p.form for n, p in adapter.patches.items()}
    (tmp_path / "a" / CARD).unlink()
    torch.testing.assert_close(applied(net_of(family), batch, pt.Adapter.load(tmp_path / "a")), ours, **CLOSE)


def test_peft_reads_both_scalings_in_one_adapter(tmp_path: Path) -> None:
    adapter = new("bert", pt.LoRA(rank=4, init="random"), "query")
    first = next(iter(adapter.patches))
    other = pt.LoRA(rank=4, init="random", scaling="rank-stabilised").patch(adapter.patches[first].site)
    other.start(torch.Generator().manual_seed(1))
    adapter.patches[first] = other
    adapter.save(tmp_path / "a")
    net, batch = tiny("bert")
    ours = applied(net, batch, adapter)
    torch.testing.assert_close(in_peft("bert", tmp_path / "a")[0], ours, **CLOSE)


class Nested(nn.Module):
    """Two layers of which one's path is the end of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"lin": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["lin"](self.lin(x))


def test_patterns_of_nested_paths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Nested(), torch.randn(2, 4)
    model = pt.Model(net)
    adapter = pt.Adapter.new(model, pt.LoRA(rank=2, init="random"), "kind:linear", name="a")
    patch = pt.LoRA(rank=3, init="random").patch(adapter.patches["lin"].site)
    patch.start(torch.Generator().manual_seed(0))
    adapter.patches["lin"] = patch
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["rank_pattern"] == {"^lin": 3}
    model.attach(adapter, "a")
    with torch.no_grad(), model.using("a"):
        ours = net(x)
    model.detach()
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(net, str(tmp_path / "a"))(x)
    torch.testing.assert_close(theirs, ours, **CLOSE)


def test_our_extra_files_do_not_disturb_peft(tmp_path: Path) -> None:
    adapter = new("bert", pt.LoRA(rank=4, init="random"), "query | value")
    head = LinearHead("classify", 32, ("yes", "no")).start(torch.Generator().manual_seed(0))
    adapter.heads["mood"] = head
    adapter.card.tasks.append({"name": "mood", "kind": "classify"})
    adapter.save(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS, CARD, HEADS, "README.md"}
    _, batch = tiny("bert")
    ours = applied(net_of("bert"), batch, adapter)
    theirs, wrapped = in_peft("bert", tmp_path / "a")
    torch.testing.assert_close(theirs, ours, **CLOSE)
    # PEFT merges it, and writes it again beside our files
    with torch.no_grad():
        torch.testing.assert_close(output(wrapped.merge_and_unload()(**batch)), ours, **CLOSE)
    again, _ = tiny("bert")
    peft.PeftModel.from_pretrained(again, str(tmp_path / "a")).save_pretrained(str(tmp_path / "a"))
    with pytest.warns(UserWarning, match="written by another program than polytask.json"):
        reread = pt.Adapter.load(tmp_path / "a")
    assert not reread.heads
    torch.testing.assert_close(applied(net_of("bert"), batch, reread), ours, **CLOSE)


def test_target_names_are_short_where_they_can_be(tmp_path: Path) -> None:
    adapter = new("bert", pt.LoRA(rank=2), "query | value")
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["target_modules"] == ["query", "value"]
    del adapter.patches[next(iter(adapter.patches))]
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["target_modules"] == list(adapter.patches)
    adapter = new("bert", pt.LoRA(rank=2), "query & layer==1")
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["target_modules"] == ["encoder.layer.1.attention.self.query"]


@pytest.mark.slow
def test_peft_reads_ours_on_minilm(tmp_path: Path) -> None:
    model = pt.Model.load("minilm")
    adapter = pt.Adapter.new(model, pt.LoRA(rank=8, init="random"), "query | value", name="a")
    adapter.save(tmp_path / "a")
    source = config_of(tmp_path / "a")["base_model_name_or_path"]
    assert source == "sentence-transformers/all-MiniLM-L6-v2"
    assert f"base_model: {json.dumps(source)}\n" in (tmp_path / "a" / "README.md").read_text()
    batch = dict(model.processor(["a film", "the second, longer sentence"], padding=True, return_tensors="pt"))
    ours = applied(model.module, batch, adapter)
    model.detach()
    base = run(model.module, batch)
    theirs = run(peft.PeftModel.from_pretrained(model.module, str(tmp_path / "a")), batch)
    assert not torch.allclose(base, ours, atol=1e-2)
    torch.testing.assert_close(theirs, ours, **CLOSE)


# --- PEFT's, read by us

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {"target_modules": ["query", "value"]}),
    "rank-pattern": (
        "bert",
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"query": 2, r"layer\.1\..*dense": 5},
            "alpha_pattern": {"encoder.layer.0.attention.self.value": 9, "dense": 3.5},
        },
    ),
    "anchored-pattern": ("bert", {"target_modules": ["query"], "rank_pattern": {r"^encoder.layer.0.*query": 1}}),
    "rslora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}}),
    "fan-in-fan-out": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-unsaid": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "regex": ("llama", {"target_modules": r".*\.layers\.1\..*(q_proj|up_proj)"}),
    "all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "layers": ("bert", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    "excluded": ("bert", {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.attention.self.value"]}),
    "conv": ("resnet", {"target_modules": ["convolution"], "rank_pattern": {"embedder.embedder.convolution": 3}}),
    "seq2seq": ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "vit": ("vit", {"target_modules": "all-linear"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "position-embedding": ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    "saved-norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "saved-embedding": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]}),
    "saved-conv1d": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}),
    "saved-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "dropout": ("bert", {"target_modules": ["query"], "lora_dropout": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_we_read_pefts_and_write_it_again(case: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    net, batch = tiny(family)
    base = run(net, batch)
    theirs = by_peft(net, batch, tmp_path / "theirs", **config)
    adapter = pt.Adapter.load(tmp_path / "theirs")
    ours = applied(net_of(family), batch, adapter)
    assert not torch.allclose(theirs, base, atol=1e-3)
    torch.testing.assert_close(ours, theirs, **CLOSE)

    adapter.save(tmp_path / "ours")
    reread = pt.Adapter.load(tmp_path / "ours")
    assert reread.hash == adapter.hash
    assert all(torch.equal(v, reread.state()[k]) for k, v in adapter.state().items())
    torch.testing.assert_close(in_peft(family, tmp_path / "ours")[0], theirs, **CLOSE)


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_classifiers_of_peft(kind: str, tmp_path: Path) -> None:
    """``modules_to_save`` as PEFT adds it for SEQ_CLS; RoBERTa's classifier is a module with layers inside."""
    size = {"vocab_size": 99, "num_labels": 3, "pad_token_id": 0}
    wide = {**size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    small = {**size, "n_embd": 32, "n_layer": 2, "n_head": 4}
    name = {"bert": "Bert", "roberta": "Roberta", "gpt2": "GPT2"}[kind]
    config = getattr(transformers, f"{name}Config")(**(small if kind == "gpt2" else wide))

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForSequenceClassification")(config).eval()

    _, batch = tiny("bert")
    base = run(fresh(), batch)
    theirs = by_peft(fresh(), batch, tmp_path / "theirs", task_type="SEQ_CLS")
    adapter = pt.Adapter.load(tmp_path / "theirs")
    saved = {name for name, patch in adapter.patches.items() if patch.form.name == "full"}
    assert (
        saved
        == {
            "bert": {"classifier"},
            "roberta": {"classifier.dense", "classifier.out_proj"},
            "gpt2": {"score"},
        }[kind]
    )
    assert not torch.allclose(base, theirs, atol=1e-2)
    torch.testing.assert_close(applied(fresh(), batch, adapter), theirs, **CLOSE)
    adapter.save(tmp_path / "ours")
    again = config_of(tmp_path / "ours")
    assert again["task_type"] == "SEQ_CLS" and again["modules_to_save"] == [{"gpt2": "score"}.get(kind, "classifier")]
    reread = pt.Adapter.load(tmp_path / "ours")
    assert reread.hash == adapter.hash
    torch.testing.assert_close(
        run(peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "ours")), batch), theirs, **CLOSE
    )
    merged = adapter.merge_into(pt.Model(fresh()))
    torch.testing.assert_close(run(merged.module, batch), theirs, **CLOSE)


def test_a_named_adapter_lies_in_a_subfolder(tmp_path: Path) -> None:
    net, batch = tiny("bert")
    config = peft.LoraConfig(r=4, target_modules=["query"])
    wrapped = peft.get_peft_model(net, config, adapter_name="other")
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"its subfolders other are adapters \(use subfolder=\)"):
        pt.Adapter.load(tmp_path)
    adapter = pt.Adapter.load(tmp_path, subfolder="other")
    assert adapter.name == "other"
    torch.testing.assert_close(applied(net_of("bert"), batch, adapter), run(wrapped, batch), **CLOSE)


@pytest.mark.parametrize("end", ["bin", "pt"])
def test_pickled_weights(end: str, tmp_path: Path) -> None:
    net, batch = tiny("bert")
    theirs = by_peft(net, batch, tmp_path, target_modules=["query", "value"])
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / f"adapter_model.{end}")
    (tmp_path / WEIGHTS).unlink()
    adapter = pt.Adapter.load(tmp_path)
    torch.testing.assert_close(applied(net_of("bert"), batch, adapter), theirs, **CLOSE)
    adapter.save(tmp_path)  # and now both lie there: the safe one is read
    assert pt.Adapter.load(tmp_path).hash == adapter.hash


def test_an_embedding_comes_with_a_copy_of_the_base(tmp_path: Path) -> None:
    net, batch = tiny("llama")
    by_peft(net, batch, tmp_path, target_modules=["embed_tokens"])
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in load_file(tmp_path / WEIGHTS))
    adapter = pt.Adapter.load(tmp_path)
    assert list(adapter.patches) == ["model.embed_tokens"]
    assert adapter.card.notes == [
        "model.embed_tokens.base_layer.weight in the file is a copy of the base's weight and was not used"
    ]


def test_embeddings_that_were_saved_whole(tmp_path: Path) -> None:
    """``save_embedding_layers=True`` adds them without naming them in ``modules_to_save``."""
    net, batch = tiny("llama")
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    randomise(wrapped)
    with torch.no_grad():
        net.get_input_embeddings().weight.mul_(1.5)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=True)
    adapter = pt.Adapter.load(tmp_path)
    assert {n for n, p in adapter.patches.items() if p.form.name == "full"} == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(applied(net_of("llama"), batch, adapter), run(wrapped, batch), **CLOSE)


@pytest.mark.parametrize("converted", [False, True])
def test_starts_that_change_the_base(converted: bool, tmp_path: Path) -> None:
    net, batch = tiny("bert")
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="olora"))
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    wrapped.peft_config["default"].init_lora_weights = "olora"
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.3)
    theirs = run(wrapped, batch)
    if not converted:
        wrapped.save_pretrained(str(tmp_path / "a"))
        with pytest.raises(AdapterError, match="olora.*path_initial_model_for_weight_conversion"):
            pt.Adapter.load(tmp_path / "a")
        return
    wrapped.save_pretrained(str(tmp_path / "a"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(applied(net_of("bert"), batch, pt.Adapter.load(tmp_path / "a")), theirs, **CLOSE)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.RandLoraConfig(target_modules=["query"]), "'RANDLORA' is not known"),
        (peft.AdaLoraConfig(target_modules=["query"], total_step=10), "ADALORA has a rank left"),
        (peft.LoraConfig(target_modules=["query"], bias="lora_only"), "trained biases.*'lora_only'"),
        (peft.LoraConfig(target_modules=["query"], lora_bias=True), "a bias in B"),
        (peft.LoraConfig(target_modules=["query"], trainable_token_indices=[1, 2]), "trained tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lora_cannot_express_is_refused_by_name(config: Any, words: str, tmp_path: Path) -> None:
    net, _ = tiny("bert")
    peft.get_peft_model(net, config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=words):
        pt.Adapter.load(tmp_path)


def test_unknown_settings_are_told(tmp_path: Path) -> None:
    net, batch = tiny("bert")
    by_peft(net, batch, tmp_path, target_modules=["query"])
    config = config_of(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**config, "new_thing": 3, "off_thing": None}))
    with pytest.warns(UserWarning, match="ignored: new_thing;"):
        pt.Adapter.load(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["query"], "r": 4}))
    assert pt.Adapter.load(tmp_path).patches  # what a reader may count on


# --- experts


def by_peft_experts(folder: Path, **config: Any) -> tuple[Tensor, Tensor]:
    net, batch = tiny("mixtral")
    return run(net, batch), by_peft(net, batch, folder, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
            "rank_pattern": {"gate_up_proj": 3, "v_proj": 2},
            "alpha_pattern": {r"layers\.0.*gate_up_proj": 2},
            "use_rslora": True,
        },
    ],
    ids=["both", "one", "patterns"],
)
def test_experts_of_peft(config: dict[str, Any], tmp_path: Path) -> None:
    base, theirs = by_peft_experts(tmp_path / "theirs", **config)
    _, batch = tiny("mixtral")
    adapter = pt.Adapter.load(tmp_path / "theirs")
    assert not torch.allclose(base, theirs, atol=1e-3)
    torch.testing.assert_close(applied(net_of("mixtral"), batch, adapter), theirs, **CLOSE)
    adapter.save(tmp_path / "ours")
    assert pt.Adapter.load(tmp_path / "ours").hash == adapter.hash
    torch.testing.assert_close(in_peft("mixtral", tmp_path / "ours")[0], theirs, **CLOSE)
    their_keys = {k: v.shape for k, v in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    assert {k: v.shape for k, v in load_file(tmp_path / "ours" / WEIGHTS).items()} == their_keys


@pytest.mark.parametrize("sites", ["experts", "experts | query", "down_proj"])
def test_peft_reads_our_experts(sites: str, tmp_path: Path) -> None:
    adapter = new("mixtral", pt.LoRA(rank=3, alpha=4, init="random", dropout=0.1), sites)
    adapter.save(tmp_path / "a")
    _, batch = tiny("mixtral")
    ours = applied(net_of("mixtral"), batch, adapter)
    torch.testing.assert_close(in_peft("mixtral", tmp_path / "a")[0], ours, **CLOSE)
    reread = pt.Adapter.load(tmp_path / "a")
    assert reread.hash == adapter.hash and reread.form == adapter.form


def test_experts_in_an_order_that_is_not_known(tmp_path: Path) -> None:
    by_peft_experts(tmp_path, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    config = config_of(tmp_path)
    config["target_parameters"] = ["experts.gate_up_proj", "experts.other"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="order of the parameters gate_up_proj, other"):
        pt.Adapter.load(tmp_path)
    config["target_parameters"] = ["experts.down_proj"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="nested deeper than target_parameters experts.down_proj"):
        pt.Adapter.load(tmp_path)


# --- what PEFT would compute otherwise is written so that PEFT refuses it


class Convolutions(nn.Module):
    """Convolutions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.groups = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.reflect(self.dilated(self.groups(self.plain(x))))


@pytest.mark.parametrize("name", ["groups", "dilated", "reflect"])
def test_convolutions_that_peft_computes_otherwise(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Convolutions(), torch.randn(2, 4, 6, 6)
    model = pt.Model(net, name="tiny/conv")
    adapter = pt.Adapter.new(model, pt.LoRA(rank=2, init="random"), f"plain | {name}", name="a")
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "POLYTASK_LORA"
    assert 'library_name: "polytask"' in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(KeyError, match="POLYTASK_LORA"):
        peft.PeftModel.from_pretrained(Convolutions(), str(tmp_path / "a"))
    reread = pt.Adapter.load(tmp_path / "a")
    assert reread.hash == adapter.hash and reread.form == adapter.form
    model.attach(reread, "a")
    with torch.no_grad(), model.using("a"):
        torch.testing.assert_close(net(x), adapter.merge_into(pt.Model(net)).module(x), **CLOSE)
    model.detach()
    (tmp_path / "a" / CARD).unlink()
    with pytest.raises(AdapterError, match=r"has no polytask\.json"):
        pt.Adapter.load(tmp_path / "a")
    pt.Adapter.new(model, pt.LoRA(rank=2), "plain", name="a").save(tmp_path / "b")
    assert config_of(tmp_path / "b")["peft_type"] == "LORA"


def test_grouped_convolutions_of_peft_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Convolutions(), peft.LoraConfig(r=2, target_modules=["groups"]))
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match="grouped convolution 'groups' mixes the groups"):
        pt.Adapter.load(tmp_path)


def test_forms_and_mixtures_that_peft_lacks_are_refused_by_it(tmp_path: Path) -> None:
    full = new("bert", "full", "query")
    full.save(tmp_path / "full")
    assert config_of(tmp_path / "full")["peft_type"] == "POLYTASK_FULL"
    mixed = new("bert", pt.LoRA(rank=2), "query")
    mixed.patches |= new("bert", "full", "value").patches
    mixed.save(tmp_path / "mixed")
    assert pt.Adapter.load(tmp_path / "mixed").hash == mixed.hash
    for name in ("full", "mixed"):
        with pytest.raises(KeyError, match="POLYTASK_"):
            peft.PeftModel.from_pretrained(net_of("bert"), str(tmp_path / name))


def gpt_oss() -> nn.Module:
    """A tiny model whose experts are stored [E, d_in, d_out], and square, so that shapes tell nothing."""
    config = transformers.GptOssConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(config).eval()


def test_experts_stored_the_other_way_round(tmp_path: Path) -> None:
    adapter = pt.Adapter.new(pt.Model(gpt_oss()), pt.LoRA(rank=2, init="random"), "down_proj", name="a")
    adapter.save(tmp_path / "a")
    assert config_of(tmp_path / "a")["peft_type"] == "POLYTASK_LORA"
    assert pt.Adapter.load(tmp_path / "a").hash == adapter.hash
    _, batch = tiny("llama")
    by_peft(gpt_oss(), batch, tmp_path / "b", target_modules=[], target_parameters=["experts.down_proj"])
    theirs = pt.Adapter.load(tmp_path / "b")
    with pytest.raises(AdapterError, match=r"stored as \[E, d_in, d_out\] are not read"):
        pt.Model(gpt_oss()).attach(theirs, "b")
