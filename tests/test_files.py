"""Adapter folders: what a save leaves behind, what a load refuses, and which base an adapter belongs to."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import output, tiny

import polytask as pt
from polytask.core import storage
from polytask.core.errors import AdapterError, StorageError
from polytask.core.export import serving_problems
from polytask.core.files import CARD, CONFIG, HEADS, WEIGHTS
from polytask.core.head import LinearHead, TextHead

BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def model(family: str = "bert", seed: int = 0) -> pt.Model:
    return pt.Model(tiny(family, seed)[0], name=f"tiny/{family}-{seed}")


def adapter(base: pt.Model | None = None, form: Any = None, sites: str = "query | value", **options: Any) -> pt.Adapter:
    return pt.Adapter.new(base or model(), form or pt.LoRA(rank=2, init="random"), sites, name="a", **options)


def change(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def message(*args: Any, **options: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        pt.Adapter.load(*args, **options)
    return str(caught.value)


# --- what a save writes


def test_a_saved_adapter_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    first = adapter()
    first.heads["mood"] = LinearHead("classify", 32, ("no", "yes")).start(torch.Generator().manual_seed(1))
    first.heads["story/long"] = TextHead("generate", "Write.", 12)
    first.card.metrics["mood"] = {"accuracy": 0.5}
    first.save(tmp_path / "deep" / "a")
    again = pt.Adapter.load(tmp_path / "deep" / "a")
    assert again.hash == first.hash and again.form == first.form and again.card == first.card
    assert again.name == "a" and again.short_targets == ("query", "value")
    assert list(again.patches) == list(first.patches) and again.heads.keys() == first.heads.keys()
    assert [p.site for p in again.patches.values()] == [p.site for p in first.patches.values()]
    assert again.heads["mood"].settings() == first.heads["mood"].settings()
    assert all(torch.equal(value, again.state()[name]) for name, value in first.state().items())
    assert not any(p.requires_grad for p in again.parameters())
    assert all(p.requires_grad for p in pt.Adapter.load(tmp_path / "deep" / "a", trainable=True).parameters())
    assert pt.Adapter.load(tmp_path / "deep", subfolder="a").hash == first.hash


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    first = adapter()
    for patch in first.patches.values():
        patch.to(dtype)
    first.save(tmp_path)
    again = pt.Adapter.load(tmp_path)
    assert again.hash == first.hash and {p.dtype for p in again.parameters()} == {dtype}


def test_the_keys_of_the_card_are_pinned(tmp_path: Path) -> None:
    """Readers of these files exist elsewhere: a change here is a change of the format and needs a new FORMAT."""
    base = adapter()
    base.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    base.save(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    assert set(card) == {"format", "name", "form", "targets", "sites", "heads", "hash", "card"} and card["format"] == 1
    keys = {"base", "tasks", "metrics", "training", "parents", "licence", "versions", "notes"}
    assert set(card["card"]) == keys
    assert set(card["card"]["base"]) == {"name", "source", "fingerprint", "kind", "task_type"}
    assert set(card["form"]) == {"name", "rank", "alpha", "dropout", "scaling", "init"}
    assert set(card["sites"][0]) == {"path", "kind", "role", "shape", "layer", "depth", "bias"}
    config = json.loads((tmp_path / CONFIG).read_text())
    required = "peft_type task_type base_model_name_or_path revision inference_mode target_modules exclude_modules r"
    required += (
        " lora_alpha lora_dropout bias use_rslora use_dora fan_in_fan_out modules_to_save rank_pattern lora_bias"
    )
    required += " alpha_pattern layers_to_transform layers_pattern init_lora_weights target_parameters auto_mapping"
    assert set(config) == {*required.split(), "peft_version"} and config["inference_mode"] is True


def test_the_readme_has_the_hubs_front_matter(tmp_path: Path) -> None:
    first = adapter()
    first.name, first.card.licence = "mood: é", "Apache-2.0"
    first.card.tasks.append({"name": "mood"})
    first.card.metrics["mood"] = 0.75
    first.save(tmp_path)
    _, front, body = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")
    assert yaml.safe_load(front) == {
        "base_model": "tiny/bert-0",
        "library_name": "peft",
        "tags": ["base_model:adapter:tiny/bert-0", "lora", "polytask", "mood"],
        "license": "apache-2.0",
    }
    assert "# mood: é\n" in body and "- mood: 0.75" in body


def test_the_base_is_called_by_its_source(tmp_path: Path) -> None:
    base = pt.Model(tiny("bert")[0], name="alias", source="org/real-name")
    adapter(base).save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "org/real-name"
    assert 'base_model: "org/real-name"' in (tmp_path / "README.md").read_text()
    assert pt.Adapter.load(tmp_path).card.base["name"] == "alias"


def test_parameters_that_share_memory_are_written(tmp_path: Path) -> None:
    first = adapter()
    one, two, *_ = first.patches.values()
    two._parameters["A"] = one._parameters["A"]
    first.save(tmp_path)
    assert pt.Adapter.load(tmp_path).hash == first.hash


def test_saving_over_an_adapter(tmp_path: Path) -> None:
    first = adapter()
    first.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    first.save(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    second = adapter(form=pt.LoRA(rank=5, init="random"), sites="attention")
    second.save(tmp_path)
    again = pt.Adapter.load(tmp_path)
    assert again.hash == second.hash and not again.heads
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD, "README.md", "mine.txt"}


@pytest.mark.parametrize("failing", [WEIGHTS, HEADS, CARD, CONFIG])
@pytest.mark.parametrize("links", [True, False])
def test_a_save_that_fails_leaves_the_old_adapter(
    failing: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = adapter()
    first.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    first.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    second = adapter(form=pt.LoRA(rank=5), sites="attention")
    second.heads["tone"] = LinearHead("classify", 32, ("low", "high"))
    replace = os.replace

    def broken(source: Any, target: Any) -> None:
        if Path(target).name == failing and ".part" in Path(source).suffix:
            raise OSError(5, "Input/output error")
        replace(source, target)

    def no_links(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", broken)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(StorageError, match="Input/output error"):
        second.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert pt.Adapter.load(tmp_path).hash == first.hash
    with pytest.raises(StorageError):
        second.save(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_process_that_dies_between_two_renames_is_noticed(tmp_path: Path) -> None:
    adapter(seed=1).save(tmp_path)
    card = (tmp_path / CARD).read_bytes()
    adapter(seed=2).save(tmp_path)
    (tmp_path / CARD).write_bytes(card)
    assert "are of different saves (one was interrupted)" in message(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = adapter()
    first.save(tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        adapter(form=pt.LoRA(rank=5)).save(tmp_path)
    assert pt.Adapter.load(tmp_path).hash == first.hash
    with pytest.raises(StorageError, match="free some space"), storage.writing(tmp_path):
        storage.write(tmp_path / "x", b"x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose a folder that you may write to"):
        adapter().save(tmp_path / "file" / "a")
    with pytest.raises(StorageError, match="cannot write"):
        adapter().save(tmp_path / "file")


# --- what a load refuses


def test_what_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "mood").mkdir()
    assert "there is no adapter at" in message(tmp_path / "moood") and "did you mean 'mood'?" in message(
        tmp_path / "moood"
    )
    assert f"has no {CONFIG}, so it is not an adapter folder" in message(tmp_path / "mood")
    assert "give a folder or a hub name" in message("mood-without-a-slash")
    (tmp_path / "mood" / CONFIG).write_text("{}")
    assert "has no peft_type" in message(tmp_path / "mood")
    (tmp_path / "mood" / CONFIG).write_text("{")
    assert "cannot be read" in message(tmp_path / "mood")
    (tmp_path / "mood" / CONFIG).write_text("[1]")
    assert "holds list where an object is needed" in message(tmp_path / "mood")
    (tmp_path / "mood" / CONFIG).write_text('{"peft_type": "LORA"}')
    assert f"has no {WEIGHTS}; the adapter is not complete" in message(tmp_path / "mood")
    save_file({}, tmp_path / "mood" / WEIGHTS)
    assert "holds no tensor of the form 'lora'" in message(tmp_path / "mood")


def test_unknown_forms(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    change(tmp_path / CONFIG, peft_type="LORRA")
    assert "the form 'LORRA' is not known (did you mean 'LORA'?)" in message(tmp_path)


def test_adapterhub_folders_are_told_apart(tmp_path: Path) -> None:
    config = {
        "config": {"adapter_residual_before_ln": False, "architecture": None, "reduction_factor": 16},
        "hidden_size": 768, "model_class": "BertModel", "model_name": "bert-base-uncased", "model_type": "bert",
        "name": "sst-2", "version": "adapters.1.0.0",
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert "written by the AdapterHub library (adapters)" in message(tmp_path)


def test_a_newer_format(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    change(tmp_path / CARD, format=9)
    assert "newer version of polytask (format 9; this one reads 1); update" in message(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, HEADS])
@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_truncated_weights(name: str, keep: int, tmp_path: Path) -> None:
    first = adapter()
    first.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    first.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:keep])
    assert f"{name} is damaged or not complete" in message(tmp_path)


def test_files_that_miss_or_hold_too_much(tmp_path: Path) -> None:
    first = adapter()
    first.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    first.save(tmp_path)
    meta = {"polytask": first.hash}
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / WEIGHTS, meta)
    assert "do not match the form 'lora': missing" in message(tmp_path)
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / WEIGHTS, meta)
    assert "has 9 tensors, and polytask.json describes 8 of them" in message(tmp_path)
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, tmp_path / WEIGHTS, meta)
    assert "has shape" in message(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS, meta)
    (tmp_path / HEADS).unlink()
    assert "does not fit the head of 'mood'" in message(tmp_path)
    save_file({}, tmp_path / HEADS, {"polytask": "0"})
    assert f"{HEADS} and {CARD} are of different saves" in message(tmp_path)
    change(tmp_path / CARD, sites=[{"kind": "linear"}])
    assert f"{CARD} is damaged or not of this kind" in message(tmp_path)
    (tmp_path / CARD).unlink()
    change(tmp_path / CONFIG, r="eight")
    assert f"{CONFIG} is damaged or not of this kind: ValueError" in message(tmp_path)


def test_peft_tensors_that_do_not_belong(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    (tmp_path / CARD).unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(k for k in tensors if "lora_B" in k)
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / WEIGHTS)
    assert "lacks its tensor 'B'; the file is not complete" in message(tmp_path)
    save_file({**tensors, "base_model.model.pooler.dense.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    assert "is not one that the form 'lora' has" in message(tmp_path)
    change(tmp_path / CONFIG, modules_to_save=["classifier"])
    assert "and is in no module of modules_to_save classifier" in message(tmp_path)
    save_file({**tensors, "base_model.model.classifier.bias": torch.zeros(2)}, tmp_path / WEIGHTS)
    assert "has a bias and no weight" in message(tmp_path)


class Evil:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["EVIL"],))


@pytest.mark.parametrize("end", ["bin", "pt"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_are_not_executed(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "executed"
    monkeypatch.setenv("EVIL", str(trace))
    adapter().save(tmp_path / "a")
    for name in (WEIGHTS, CARD):
        (tmp_path / "a" / name).unlink()
    for write in (lambda f: torch.save({"x": Evil()}, f), lambda f: f.write_bytes(pickle.dumps(Evil()))):
        write(tmp_path / "a" / f"adapter_model.{end}")
        assert "is refused; it is damaged, or reading it would run code" in message(tmp_path / "a")
        assert not trace.exists()
    torch.save({"x": 3}, tmp_path / "a" / f"adapter_model.{end}")
    assert "does not hold tensors by name" in message(tmp_path / "a")
    pickle.loads(pickle.dumps(Evil()))
    assert trace.exists()  # the trap works


def test_hub_names_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = message("someone/an-adapter-that-is-not-here")
    assert "is no folder here, and could not be had from the hub" in text and "\n" not in text
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "on the hub has no adapter_config.json in 'sub'" in message("org/name", revision="v1", subfolder="sub")
    assert asked["name"] == "org/name" and asked["revision"] == "v1"
    assert "sub/adapter_config.json" in asked["allow_patterns"] and not any("*" in p for p in asked["allow_patterns"])
    adapter().save(tmp_path / "sub")
    assert pt.Adapter.load("org/name", subfolder="sub").patches


# --- which base it belongs to


def test_another_base_is_refused() -> None:
    made, other = model(seed=0), model(seed=1)
    first = adapter(made)
    with pytest.raises(AdapterError) as caught:
        other.attach(first)
    text = str(caught.value)
    assert "'tiny/bert-0'" in text and "'tiny/bert-1'" in text
    assert made.fingerprint[:8] in text and other.fingerprint[:8] in text and "check_base=False" in text
    assert other.attach(first, check_base=False) == "a"
    with pytest.raises(AdapterError, match="tiny/bert-0"):
        first.merge_into(model(seed=2))


def test_a_base_of_other_shapes_or_modules(tmp_path: Path) -> None:
    wide = pt.Model(transformers.BertModel(transformers.BertConfig(**{**BERT, "hidden_size": 48})), name="wide")
    with pytest.raises(AdapterError, match=r"does not fit 'wide' at 'encoder.layer.0.*\(32, 32\).*\(48, 48\)"):
        wide.attach(adapter(), check_base=False)
    with pytest.raises(AdapterError, match="has no such site.*it was made for tiny/bert-0"):
        model("llama").attach(adapter(), check_base=False)
    assert not wide.attached


def test_fingerprints_see_weights_and_nothing_else() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT)
    bare = transformers.BertModel(config)
    first = pt.Model(bare).fingerprint
    for kind in (transformers.BertForMaskedLM, transformers.BertForSequenceClassification):
        wrapped = kind(config)
        wrapped.bert.load_state_dict(bare.state_dict(), strict=False)
        assert pt.Model(wrapped).fingerprint == first
    half = transformers.BertModel(config)
    half.load_state_dict(bare.state_dict())
    assert pt.Model(half.to(torch.bfloat16)).fingerprint == first
    model = pt.Model(bare)
    attached = adapter(model)
    model.attach(attached)
    model.use("a")
    assert model.fingerprint == first
    model.detach()
    weight = bare.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        weight.add_(torch.randn_like(weight), alpha=1e-3)  # as much as a few steps of fine-tuning
    assert model.fingerprint != first and pt.Model(bare).fingerprint == model.fingerprint


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_an_adapter_fits_with_and_without_a_head(family: str, tmp_path: Path) -> None:
    net, batch = tiny(family)
    names = {
        "bert": ("bert", transformers.BertForSequenceClassification),
        "llama": ("model", transformers.LlamaForCausalLM),
        "vit": ("vit", transformers.ViTForImageClassification),
    }
    prefix, kind = names[family]
    bare = net if family != "llama" else net.model
    headed = kind(net.config).eval()
    getattr(headed, prefix).load_state_dict(bare.state_dict(), strict=False)

    def states(network: nn.Module, attached: pt.Adapter) -> torch.Tensor:
        inner = pt.Model(copy.deepcopy(network), name=pt.Model(network).name)
        inner.attach(attached, "a")
        with torch.no_grad(), inner.using("a"):
            return inner.module(**batch, output_hidden_states=True).hidden_states[-1]

    for home, away in ((bare, headed), (headed, bare)):
        first = adapter(pt.Model(home), sites="linear")
        first.save(tmp_path / "a")
        loaded = pt.Adapter.load(tmp_path / "a")
        torch.testing.assert_close(states(away, loaded), states(home, first))
        merged = loaded.merge_into(pt.Model(away)).module
        with torch.no_grad():
            found = merged(**batch, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(found, states(home, first), atol=1e-5, rtol=1e-4)


# --- seeds, states


def test_seeds() -> None:
    base = model()
    one, same, other = (adapter(base, seed=seed) for seed in (5, 5, 6))
    assert one.hash == same.hash != other.hash
    assert len({adapter(base, seed=seed).hash for seed in (0, 1, -1, 2**40, 2**70)}) == 5
    few, many = adapter(base, sites="query & layer==1"), adapter(base, sites="all")
    assert len(few.patches) == 1 and len(many.patches) > 10
    for name, patch in few.patches.items():
        for key, value in patch.named_parameters():
            assert torch.equal(value, dict(many.patches[name].named_parameters())[key])
    values = [patch.A.flatten()[:8] for patch in many.patches.values() if patch.site.kind == "linear"]
    assert len({tuple(v.tolist()) for v in values}) == len(values)


def test_states() -> None:
    first = adapter()
    state = first.state()
    held = next(first.parameters())
    with torch.no_grad():
        held.zero_()
    first.load_state(state)
    assert next(first.parameters()) is held and torch.equal(held, next(iter(state.values())))
    with pytest.raises(AdapterError, match="other parameters: more"):
        first.load_state({**state, "more": held})
    name = next(iter(state))
    with pytest.raises(AdapterError, match="here and .* in the state"):
        first.load_state({**state, name: torch.zeros(1)})
    twin = first.copy("twin")
    assert twin.hash == first.hash and twin.name == "twin"
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert twin.hash != first.hash


def test_the_hash_takes_scalars_and_empty_parameters() -> None:
    first = adapter()
    before = first.hash
    next(iter(first.patches.values())).register_parameter("gate", nn.Parameter(torch.tensor(0.5)))
    assert first.hash != before


# --- serving


def test_what_servers_take(tmp_path: Path) -> None:
    assert serving_problems(adapter()) == []
    assert serving_problems(pt.Adapter.load(adapter(form=pt.LoRA(rank=64)).save(tmp_path))) == []


@pytest.mark.parametrize(
    ("family", "form", "sites", "words"),
    [
        ("bert", "full", "query", "only LoRA is served, and the form is 'full'"),
        ("bert", pt.LoRA(rank=65), "query", "the rank 65 is above max_lora_rank=64"),
        ("bert", pt.LoRA(rank=2), "token | query", "kind embedding: embeddings.word_embeddings"),
        ("resnet", pt.LoRA(rank=2), "conv", "kind conv: embedder.embedder.convolution"),
        ("mixtral", pt.LoRA(rank=2), "experts", "kind experts: model.layers.0.mlp.experts.gate_up_proj"),
    ],
    ids=["form", "rank", "embedding", "conv", "experts"],
)
def test_what_servers_refuse(family: str, form: Any, sites: str, words: str) -> None:
    problems = serving_problems(adapter(model(family), form, sites))
    assert len(problems) == 1 and words in problems[0]


def test_what_servers_refuse_beside_the_form() -> None:
    def broken(**base: Any) -> list[str]:
        first = adapter()
        first.card.base |= base
        return serving_problems(first)

    assert "max_lora_rank must be one of 1, 8" in serving_problems(adapter(), max_rank=48)[0]
    assert "LoRAX needs the base's name" in broken(name="", source="")[0]
    assert "neither a hub name nor a folder" in broken(source="BertModel")[0]
    assert broken(source=str(Path(__file__).parent)) == []
    headed = adapter()
    headed.heads["mood"] = LinearHead("classify", 32, ("no", "yes"))
    assert serving_problems(headed) == ["heads are not served, only what the base computes: mood"]
    several = adapter()
    name = next(iter(several.patches))
    several.patches[name] = pt.LoRA(rank=3).patch(several.patches[name].site)
    assert "one rank and one alpha" in serving_problems(several)[0]
    saved = adapter()
    site = model().site("encoder.layer.0.output.LayerNorm")
    saved.patches[site.name] = pt.Full(stored="value").patch(site)
    assert serving_problems(saved) == [
        "modules_to_save are not served: encoder.layer.0.output.LayerNorm; merge the adapter into the base instead"
    ]


# --- speed


@pytest.mark.slow
def test_loading_costs_little_more_than_reading_the_file(tmp_path: Path) -> None:
    """At most four times safetensors' own time, median of 20, for 11 MB at the 224 linear sites of 32 layers."""
    import statistics
    import time

    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=768, num_hidden_layers=32, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=1024,
    )  # fmt: skip
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(config)
    first = adapter(pt.Model(net.to_empty(device="cpu"), name="org/llama"), pt.LoRA(rank=8, init="random"), "linear")
    first.save(tmp_path)
    assert len(first.patches) == 224 and 10e6 < (tmp_path / WEIGHTS).stat().st_size < 12e6

    def once(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    pairs = [(once(lambda: load_file(tmp_path / WEIGHTS)), once(lambda: pt.Adapter.load(tmp_path))) for _ in range(20)]
    bare, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert whole <= 4 * bare, f"{whole * 1e3:.1f} ms against {bare * 1e3:.1f} ms"


def test_outputs_survive_a_save(tmp_path: Path) -> None:
    for family in ("bert", "gpt2", "resnet"):
        net, batch = tiny(family)
        base = pt.Model(net)
        first = adapter(base, sites="kind:linear | conv | token" if family != "resnet" else "conv")
        first.save(tmp_path / family)
        base.attach(first, "one")
        base.attach(pt.Adapter.load(tmp_path / family), "two")
        with torch.no_grad():
            with base.using("one"):
                one = output(net(**batch))
            with base.using("two"):
                two = output(net(**batch))
        assert torch.equal(one, two)
