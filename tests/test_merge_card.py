"""Cards and records of merges: what they cite, and that a record makes the same bytes again, from the same parents only."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import tiny

import polytask as pt
from polytask.core.errors import MergeError
from polytask.merge import card
from polytask.merge.card import PAGE, RECORD, Digests, page
from polytask.merge.mergekit import merge_file
from polytask.merge.replay import replay

LORA = pt.LoRA(rank=3, alpha=5)
WEIGHTS = "model.safetensors"


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three llamas, and three LoRAs for the first."""
    place = tmp_path_factory.mktemp("parents")
    for seed in range(3):
        tiny("llama", seed=seed)[0].save_pretrained(place / f"m{seed}")
    model = pt.Model(tiny("llama", seed=0)[0], name="m0")
    for number in range(3):
        form = LORA if number < 2 else pt.LoRA(rank=2, init="random")
        adapter = pt.Adapter.new(model, form, name=f"a{number}", seed=number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        adapter.save(place / f"a{number}")
    return place


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A copy that a test may change, which is the working folder."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(folder):
    return json.loads((folder / RECORD).read_text())


def front(folder):
    return yaml.safe_load((folder / PAGE).read_text().split("---")[1])


def same(one, other, but=(PAGE, RECORD)):
    """Two folders have the same files with the same bytes; cards differ in the seconds."""
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, other)]
    assert names[0] == names[1]
    for name in set(names[0]) - set(but):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


ASKED = {
    "linear": (["m0", "m1", "m2"], {"weights": [1.0, 0.1 + 0.2, 2 / 3]}),
    "dare_ties": (["m1", "m2"], {"base": "m0", "seed": 7, "each": {"density": [0.4, [0.2, 0.9]]}, "scale": 0.7}),
    "ties": (["m1", "m2"], {"base": "m0", "density": 0.3, "shard": "30KB", "dtype": "bfloat16"}),
    "della": (["m1", "a0"], {"base": "m0", "seed": 2, "density": [{"filter": "mlp", "value": 0.4}, {"value": 0.6}]}),
    "slerp": (["m1"], {"base": "m0", "t": [0.0, 0.5, 1.0]}),
}


@pytest.mark.parametrize("method", ASKED)
def test_a_record_makes_the_same_bytes(place, method):
    inputs, asked = ASKED[method]
    pt.merge(inputs, method, out="out", **asked)
    replay("out/polytask_merge.json", "again")
    same(place / "out", place / "again")
    first, second = record(place / "out"), record(place / "again")
    for said in (first, second):
        del said["seconds"], said["peak_mb"]
    assert first == second


@given(weights=st.lists(st.floats(0.01, 5), min_size=3, max_size=3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_weights_come_back_to_the_last_digit(models, tmp_path_factory, weights):
    out = tmp_path_factory.mktemp("w")
    pt.merge([models / f"m{i}" for i in range(3)], weights=weights, out=out / "out")
    replay(out / "out" / RECORD, out / "again")
    same(out / "out", out / "again")


def test_an_expression_is_made_again(place):
    pt.merge("base + 0.8*(a - base)", base="m0", a="m1", out="out")
    pt.merge("base + 0.8*(a - base)", base="m0", a="a0", out="mixed")  # an adapter, so the base is needed twice
    for name in ("out", "mixed"):
        replay(f"{name}/{RECORD}", f"{name}-again")
        same(place / name, place / f"{name}-again")


@pytest.mark.parametrize("slices", [False, True])
def test_a_mergekit_file_is_made_again_without_it(place, slices):
    own = "{weight: 0.3, density: 0.5}"
    said = f"merge_method: dare_ties\nbase_model: m0\nmodels:\n- {{model: m1, parameters: {own}}}\n"
    said += f"- {{model: m2+a0, parameters: {own}}}\n"
    if slices:
        layers = "sources: [{model: m0, layer_range: [0, 1]}, {model: m1, layer_range: [0, 1]}]"
        said = f"merge_method: slerp\nbase_model: m0\nparameters: {{t: 0.3}}\nslices:\n- {{{layers}}}\n- {{{layers}}}\n"
    (place / "c.yml").write_text(said)
    merge_file("c.yml", "out", seed=5)
    (place / "c.yml").unlink()
    replay(f"out/{RECORD}", "again")
    same(place / "out", place / "again")
    found = record(place / "out")
    assert found["mergekit"] == yaml.safe_load(said)
    text = (place / "out" / PAGE).read_text()
    assert ("layer_range" if slices else "model: m2+a0") in text and front(place / "out")["base_model"][0] == "m0"
    parents = {entry["path"] for entry in found["parents"]}
    assert parents == ({"m0", "m1"} if slices else {"m0", "m1", "m2", "a0"})
    name = "m1/model.safetensors" if slices else "a0/adapter_model.safetensors"
    change(place / name)
    with pytest.raises(MergeError, match=name.split("/")[0]):
        replay(f"out/{RECORD}", "third")


def change(path):
    """One bit of the last number."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_card_cites_method_settings_parents_and_hashes(place):
    pt.merge(["m1", "m2"], "ties", "m0", out="out", density=0.3, weights=[1.0, 0.5], seed=3)
    text, said = (place / "out" / PAGE).read_text(), record(place / "out")
    assert front(place / "out") == {
        "base_model": ["m0", "m1", "m2"], "library_name": "transformers", "tags": ["merge", "polytask", "ties"],
    }  # fmt: skip
    for name in ("m0", "m1", "m2"):
        assert f"| {name} |" in text and digest(place / name / WEIGHTS) in text
    assert "https://arxiv.org/abs/2306.01708" in text and f"polytask merge {RECORD} again" in text
    for line in ("- density: 0.3", "- scale: 1.0", '- scope: "global"', "- weights: [1.0, 0.5]", "- seed: 3"):
        assert f"\n{line}\n" in text, line
    assert [(p["path"], p["role"], p["sha256"]) for p in said["parents"]] == [
        (name, role, {WEIGHTS: digest(place / name / WEIGHTS)})
        for name, role in (("m0", "base"), ("m1", "model"), ("m2", "model"))
    ]
    assert set(said) == {
        "method", "paper", "settings", "seed", "base", "models", "weights", "each", "dtype", "seconds", "peak_mb", "versions",
        "parents", "hashes", "shard",
    }  # fmt: skip


def test_every_shard_has_its_hash(place):
    pt.merge(["m0", "m1"], out="parts", shard="30KB")
    pt.merge(["parts", "m2"], out="out")
    entry = record(place / "out")["parents"][0]
    files = sorted((place / "parts").glob("*.safetensors"))
    assert len(files) > 1 and entry["sha256"] == {file.name: digest(file) for file in files}
    change(files[-1])
    with pytest.raises(MergeError, match=rf"parts \({files[-1].name}\) has other bytes"):
        replay(f"out/{RECORD}", "again")


@pytest.mark.parametrize("name", ["m0/model.safetensors", "m1/model.safetensors", "a0/adapter_config.json"])
def test_a_changed_parent_is_refused_by_name(place, name):
    pt.merge(["m1", "a0"], "task_arithmetic", "m0", out="out")
    folder, file = name.split("/")
    change(place / name) if file == WEIGHTS else (place / name).write_text((place / name).read_text() + " ")
    with pytest.raises(MergeError, match=rf"{folder} \({file}\) has other bytes"):
        replay(f"out/{RECORD}", "again")
    assert not (place / "again").exists()


def test_a_parent_that_is_gone_is_named(place):
    pt.merge(["m0", "m1"], out="out")
    shutil.rmtree(place / "m1")
    with pytest.raises(MergeError, match="m1"):
        replay(f"out/{RECORD}", "again")


def test_without_hashes_nothing_is_read_twice_and_the_doubt_is_said(place):
    pt.merge(["m0", "m1"], out="out", hashes=False)
    assert all(entry["sha256"] == {} for entry in record(place / "out")["parents"])
    assert "not taken" in (place / "out" / PAGE).read_text()
    heard = []
    replay(f"out/{RECORD}", "again", say=heard.append)
    same(place / "out", place / "again")
    assert "no hashes of m0, m1" in heard[0]
    assert record(place / "again")["hashes"] is False


def test_parents_in_memory_are_cited_and_not_made_again(place):
    pt.merge([tiny("llama", seed=1)[0], "m0"], out="out")
    assert "in memory" in (place / "out" / PAGE).read_text()
    with pytest.raises(MergeError, match="LlamaForCausalLM was in memory"):
        replay(f"out/{RECORD}", "again")


@pytest.mark.parametrize(
    "content", ["[]", "{}", "{", '{"card": {"training": {}}}', '{"card": 3}', '{"method": "linear"}']
)
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(MergeError, match="x.json"):
        replay(tmp_path / "x.json", tmp_path / "out")
    with pytest.raises(MergeError, match="cannot be read"):
        replay(tmp_path / "y.json", tmp_path / "out")


def test_what_looked_at_data_is_not_made_again(place):
    pt.merge(["m0", "m1"], out="out")
    said = record(place / "out") | {"fit": {"method": {"name": "x", "paper": "arXiv 1", "steps": 3}}}
    (place / "r.json").write_text(json.dumps(said))
    with pytest.raises(MergeError, match="looked at data"):
        replay("r.json", "again")
    assert f"polytask merge {RECORD}" not in page(said)
    assert "merged by `x` ([arXiv 1]" in page(said) and "- x, steps: 3" in page(said)


# Adapters


def test_weights_that_data_gave_are_enough_to_make_an_adapter_again(encoder, tmp_path, monkeypatch):
    from test_merge_pool import tasks, two

    monkeypatch.chdir(tmp_path)
    encoder.module.save_pretrained("base")
    encoder.processor.save_pretrained("base")
    for adapter, name in zip(two(encoder), "ab", strict=True):
        adapter.save(name)
    base, looking = pt.Model.load("base"), {"data": tasks(), "steps": 2, "lr": 0.1}
    pt.merge(["a", "b"], "adamerging", "base", out="out", **looking)
    text = (tmp_path / "out" / PAGE).read_text()
    assert "`adamerging` ([arXiv 2310.02575]" in text and "- adamerging, steps: 2" in text and "for each tensor" in text
    replay("out/polytask.json", "again")
    first, second = (tmp_path / folder / "adapter_model.safetensors" for folder in ("out", "again"))
    assert pt.Adapter.load("out").hash == pt.Adapter.load("again").hash
    assert len(first.read_bytes()) == len(second.read_bytes())
    pt.merge(["a", "b"], "regmean", base, data=tasks(), out="gram")
    with pytest.raises(MergeError, match="looked at data and used more of it than weights"):
        replay("gram/polytask.json", "never")


MIXED = {
    "linear": (["a0", "a1"], {"weights": [0.3, 0.7], "normalize": False}),
    "dare_ties": (["a0", "a1", "a2"], {"density": 0.5, "seed": 3, "as_": "sparse"}),
    "ties": (["a0", "a2"], {"density": 0.5, "rank": 2, "each": {"density": [0.4, 0.9]}}),
    "slerp": (["a1"], {"base": "a0", "t": 0.3, "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("method", MIXED)
def test_a_merged_adapter_cites_its_parents_and_is_made_again(place, method):
    inputs, asked = MIXED[method]
    pt.merge(inputs, method, out="out", **asked)
    replay("out/polytask.json", "again")
    same(place / "out", place / "again", but=())
    text = (place / "out" / PAGE).read_text()
    names = [*inputs, *([asked["base"]] if "base" in asked else [])]
    for name in names:
        assert f"| {name} | `{pt.Adapter.load(place / name).hash}` |" in text
    paper = json.loads((place / "out" / "polytask.json").read_text())["card"]["training"]["merge"]["paper"]
    assert (
        f"`{method}`" in text and paper.removeprefix("arXiv ") in text and "polytask merge polytask.json again" in text
    )
    assert all(
        f"- {key}: " in text for key in ("seed", *(k for k in asked if k in ("density", "t", "normalize", "weights")))
    )
    change_values(place / names[-1])
    with pytest.raises(MergeError, match=rf"{names[-1]} \(adapter_model.safetensors"):
        replay("out/polytask.json", "third")


def change_values(folder):
    """Saves the adapter anew with other values."""
    adapter = pt.Adapter.load(folder)
    with torch.no_grad():
        next(adapter.parameters()).add_(1.0)
    adapter.save(folder)


def test_a_merged_adapter_keeps_what_it_cites_when_it_is_saved_elsewhere(place):
    pt.merge(["a0", "a1"], out="out")
    pt.Adapter.load("out").save(place / "copy")
    same(place / "out", place / "copy", but=())
    assert "in memory" in pt.merge([pt.Adapter.load("a0"), "a1"]).card.notes[-2]


# Digests, and the command


def test_digests_are_those_of_the_files(place, monkeypatch):
    monkeypatch.setattr(card, "PARTS", 1000)  # of several parts
    files = [place / "m0" / WEIGHTS, place / "a0" / "adapter_config.json"]
    with Digests([files, files[:1], []]) as digests:
        assert digests.of(files) == {file.name: digest(file) for file in files} and digests.of([]) == {}
    with Digests([[place / "gone"]]) as digests, pytest.raises(MergeError, match="gone cannot be read"):
        digests.of([place / "gone"])


def test_the_command_makes_it_again(place, run):
    assert run("merge", "m0", "m1", "--out", "out", "--no-hash")[0] == 0
    assert not any(entry["sha256"] for entry in record(place / "out")["parents"])
    assert run("merge", "m0", "m1", "--out", "hashed")[0] == 0
    code, out, _ = run("merge", f"hashed/{RECORD}", "again")
    assert code == 0 and "saved in again" in out
    same(place / "hashed", place / "again")
    assert run("merge", "a0", "a1", "--out", "adapter")[0] == 0
    assert run("merge", "adapter/polytask.json", "--out", "adapter-again")[0] == 0
    same(place / "adapter", place / "adapter-again", but=())
    change(place / "m1" / WEIGHTS)
    code, _, error = run("merge", f"hashed/{RECORD}", "third")
    assert code != 0 and "m1 (model.safetensors) has other bytes" in error
    code, _, error = run("merge", f"hashed/{RECORD}", "x", "y")
    assert code != 0 and "names its parents itself" in error
