"""mergekit's files: what they ask for, what is refused, and stacks put together from layers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import tiny

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.merge.mergekit import METHODS, chain, load, merge_file
from polytask.merge.rule import rules
from polytask.merge.source import Checkpoint
from polytask.merge.values import resolve


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three llamas of four layers, near the first."""
    folder = tmp_path_factory.mktemp("llamas")
    kind = tiny("llama")[0].config
    kind.num_hidden_layers = 4
    if getattr(kind, "layer_types", None):
        kind.layer_types = ["full_attention"] * 4
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(kind)
    for name in ("a", "b", "c"):
        if name != "a":
            with torch.no_grad():
                for parameter in base.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        base.save_pretrained(folder / name)
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    return {name: tensors(place / name) for name in "abc"}


def tensors(folder):
    source = Checkpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def same(found, wanted, atol=1e-6):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.allclose(found[name].float(), value.float(), atol=atol), name


def merged(text, tmp_path, **options):
    return tensors(merge_file(text, tmp_path / "out", **options))


# What a file asks for


def test_a_linear_merge_with_gradients_and_filters(inside, tmp_path):
    text = """
merge_method: linear
models:
  - model: a
    parameters: {weight: [0.0, 1.0]}
  - model: b
    parameters:
      weight:
        - {filter: mlp, value: 2.0}
        - {filter: "*", value: 1.0}
dtype: float32
"""
    found = merged(text, tmp_path)
    wanted = {}
    for name, a in inside["a"].items():
        t = int(name.split(".")[2]) / 3 if ".layers." in name else 0.0
        b = 2.0 if "mlp" in name else 1.0
        wanted[name] = (t * a + b * inside["b"][name]) / (t + b)
    same(found, wanted)


def test_levels_count_in_their_order(inside, tmp_path):
    text = """
merge_method: task_arithmetic
base_model: a
models:
  - model: b
    parameters:
      weight: [{filter: self_attn, value: 0.5}]
  - model: c
parameters:
  weight: 0.25
  lambda: 2.0
  int8_mask: true
"""
    found = merged(text, tmp_path)
    a, b, c = (inside[name] for name in "abc")
    wanted = {n: a[n] + 2 * ((0.5 if "self_attn" in n else 0.25) * (b[n] - a[n]) + 0.25 * (c[n] - a[n])) for n in a}
    same(found, wanted, 1e-5)


def test_slerp_of_slices_has_t_over_each_slice(inside, tmp_path):
    text = """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
    parameters: {t: [0, 1]}
  - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]
    parameters: {t: [0.5, 1]}
dtype: bfloat16
"""
    found = merged(text, tmp_path)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    for name, value in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer == 0 or "embed" in name:  # at the first slice's first value
            assert torch.equal(value, inside["a"][name].bfloat16()), name
        if layer in (2, 3):  # the last of a slice, and a slice of one
            assert torch.allclose(value.float(), inside["b"][name], rtol=1e-2, atol=1e-6), name
    norm = found["model.norm.weight"].float()  # behind the layers: the last slice's first value
    assert not torch.equal(norm, inside["a"]["model.norm.weight"].bfloat16().float())


def test_layers_stacked_give_a_deeper_model_that_loads(inside, tmp_path, place):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: b
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]}
dtype: float32
"""
    out = merge_file(text, tmp_path / "deep")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert (
        model.config.num_hidden_layers == 6 and json.loads((out / "config.json").read_text())["num_hidden_layers"] == 6
    )
    state = model.state_dict()
    for layer in range(6):
        for name, value in inside["a" if layer < 3 else "b"].items():
            own = f"model.layers.{layer if layer < 3 else layer - 2}."
            if name.startswith(own):
                silent = layer >= 3 and ("o_proj" in name or "down_proj" in name)
                got = state[name.replace(own, f"model.layers.{layer}.")]
                assert torch.equal(got, torch.zeros_like(value) if silent else value), name
    assert torch.equal(state["model.embed_tokens.weight"], inside["a"]["model.embed_tokens.weight"])
    assert torch.equal(state["model.norm.weight"], inside["b"]["model.norm.weight"])
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        deep = model.model(ids, output_hidden_states=True).hidden_states
        shallow = transformers.AutoModelForCausalLM.from_pretrained(place / "a").model(ids, output_hidden_states=True)
    # three layers of a, and three that add nothing
    assert torch.allclose(deep[3], shallow.hidden_states[3], atol=1e-5) and torch.allclose(deep[5], deep[3], atol=1e-6)


def test_a_slice_has_its_own_base_and_settings(inside, tmp_path):
    text = """
merge_method: task_arithmetic
base_model: a
parameters: {weight: 1.0}
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: c, layer_range: [2, 4]}, {model: b, layer_range: [2, 4], parameters: {weight: 0.5}}]
    base_model: c
"""
    found = merged(text, tmp_path)
    for name, value in found.items():
        if name.startswith("model.layers."):
            base, w = ("a", 1.0) if int(name.split(".")[2]) < 2 else ("c", 0.5)
            assert torch.allclose(value, inside[base][name] * (1 - w) + w * inside["b"][name], atol=1e-6), name


def test_modules_and_out_dtype_and_what_is_said_about_tokenizers(inside):
    text = """
merge_method: linear
modules:
  default:
    models: [{model: a}, {model: b}]
    parameters: {weight: 2}
parameters: {weight: 1, normalize: false}
dtype: float32
out_dtype: float16
tokenizer_source: union
chat_template: auto
"""
    plan = load(text)
    (job,) = plan.jobs
    assert plan.dtype == torch.float16 and plan.words is None and plan.chat_template == "auto"
    assert job.weights == [2, 2] and job.settings == {"normalize": False}
    assert {dtype for *_, dtype in plan.layout} == {torch.float16}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_with_mergekit_s_defaults(name, inside, tmp_path):
    method, kind = METHODS[name], rules[METHODS[name].rule]
    models = [{"model": m} for m in ("b", "c")[: kind.most or 2]]
    said = {"merge_method": name, "models": models, "dtype": "float32", "parameters": {}}
    if method.base in ("differences", "member"):
        said["base_model"] = "a"
    if method.weight:
        said["parameters"]["weight"] = 0.5
    if "t" in method.shared:
        said["parameters"]["t"] = 0.5
    if "density" in method.own:
        said["parameters"]["density"] = 0.6
    plan = load(yaml.safe_dump(said))
    (job,) = plan.jobs
    assert (job.base is not None) == (method.base == "differences")
    assert len(job.models) == len(models) + (method.base == "member")
    if "compat" in kind.knobs():
        assert job.settings["compat"] == "mergekit"
        assert "compat" in load(yaml.safe_dump({**said, "compat": ""})).jobs[0].settings
    found = merged(yaml.safe_dump(said), tmp_path)
    assert set(found) == set(inside["a"])
    assert any(not torch.equal(value, inside["a"][key]) for key, value in found.items())


def test_defaults_of_density_are_mergekit_s(inside):
    plan = load("merge_method: ties\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1}}]\n")
    assert plan.jobs[0].each == {"density": [1.0]}
    plan = load("merge_method: della\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5}}]\n")
    assert plan.jobs[0].each == {"density": [0.5], "epsilon": [0.15]}


def test_a_model_with_an_adapter_on_it(inside, tmp_path, monkeypatch):
    model = pt.Model(transformers.AutoModelForCausalLM.from_pretrained("a"))
    adapter = pt.Adapter.new(model, "lora", seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    adapter.save(tmp_path / "lora")
    wanted = adapter.merge_into(model).module.state_dict()
    found = merged(
        f"merge_method: linear\nmodels: [{{model: a+{tmp_path}/lora, parameters: {{weight: 1}}}}]\n", tmp_path
    )
    same(found, {name: wanted[name] for name in found})


@given(
    own=st.sampled_from([None, 3, "1e-1", [{"filter": "mlp", "value": 5}]]),
    slice_=st.sampled_from([None, [1, 2], [{"filter": "attn", "value": "2e0"}, {"filter": "norm", "value": [0, 8]}]]),
    top=st.sampled_from([None, 7]),
    name=st.sampled_from(["mlp", "attn", "norm", "x"]),
    t=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_a_chain_of_levels_is_what_one_after_the_other_gives(own, slice_, top, name, t):
    levels = [level if level is None else {"weight": level} for level in (own, slice_, top)]

    def plain(value):
        if isinstance(value, list) and isinstance(value[0], dict):
            found = [entry["value"] for entry in value if entry["filter"] in name]
            return plain(found[0]) if found else None
        if isinstance(value, list):
            return value[0] + (value[1] - value[0]) * t
        return None if value is None else float(value)

    wanted = next((v for v in (plain(level) for level in (own, slice_, top)) if v is not None), 9.0)
    assert resolve(chain("weight", levels, 9.0), name, t) == pytest.approx(wanted)


# What is refused

WEIGHT = "parameters: {weight: 1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tie\nmodels: [{model: a}]\n", "merge_method 'tie' is not known .did you mean 'ties'"),
        ("merge_method: ram\nmodels: [{model: a}]\n", "merge_method 'ram' is not known"),
        (f"merge_method: linear\nmodels: [{{model: a}}]\nmergemethod: x\n{WEIGHT}", "no key 'mergemethod'"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]\n", "an entry of models has no key 'weight'"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {wieght: 1}\n", "no key 'wieght' .did you mean 'weight'"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {density: 1, t: 1}\n", "no key 'density'"),
        ("merge_method: linear\nmodels: [{model: a}]\n", "a has no weight at"),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n", "slerp needs the parameter t"),
        (f"merge_method: ties\nmodels: [{{model: a}}]\n{WEIGHT}", "ties needs a base, and there is no base_model"),
        (f"merge_method: ties\nbase_model: a\nmodels: [{{model: a}}]\n{WEIGHT}", "has no model beside the base a"),
        (f"merge_method: linear\nmodels: [{{model: a}}, {{model: a}}]\n{WEIGHT}", "lists a more than once"),
        (f"merge_method: linear\nmodels: [{{model: a}}]\ndtype: int3\n{WEIGHT}", "dtype must be one of"),
        (f"merge_method: linear\nmodels: [{{model: a}}]\ncompat: x\n{WEIGHT}", "compat must be 'mergekit' or empty"),
        (f"merge_method: linear\nmodels: []\n{WEIGHT}", "exactly one of models, slices and modules; this says none"),
        (f"merge_method: linear\nmodels: [{{model: a}}]\nslices: [1]\n{WEIGHT}", "this says models, slices"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 5]}]}]\n", "within its 4 layers"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: 3}]}]\n", "must be .first, last . 1."),
        ("merge_method: passthrough\nslices: [{sources: [], x: 1}]\n", "slices.0. has no key 'x'"),
        ("merge_method: linear\nslices: [{sources: [{model: a}], residual_weight: 1}]\n", "no key 'residual_weight'"),
        (
            "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]\n",
            "same number of layers, got 2, 3",
        ),
        (
            f"merge_method: ties\nbase_model: a\nslices: [{{sources: [{{model: b, layer_range: [0, 2]}}]}}]\n{WEIGHT}",
            "base_model a is none of its sources",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n", "passthrough merges"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {rescale: true}\n", "no key 'rescale'"),
        (f"merge_method: linear\nmodels: [{{model: nowhere}}]\n{WEIGHT}", "there is no nowhere"),
        (f"merge_method: linear\nmodels: [{{model: 3}}]\n{WEIGHT}", "a model is a name or a folder, got 3"),
        ("tokenizer: {source: base}\ntokenizer_source: base\nmerge_method: passthrough\nmodels: [{model: a}]\n", "not both"),
        ("merge_method: [\n", "is no YAML"),
        ("- a\n- b\n", "must be a mapping"),
        ("nowhere.yml", "nowhere.yml cannot be read"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(inside, text, message):
    with pytest.raises((ConfigError, MergeError), match=message):
        load(text)


def test_tokenizers_and_chat_templates(inside, place, tmp_path, monkeypatch):
    import shutil

    text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n{WEIGHT}"
    own = tmp_path / "own"
    for name in "ab":
        shutil.copytree(place / name, own / name)
        (own / name / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(own)
    merge_file(text + "tokenizer_source: union\n", tmp_path / "same")
    assert (tmp_path / "same" / "tokenizer.json").read_text() == "{}"
    merge_file(text + "chat_template: '{{ messages }}'\n", tmp_path / "chat")
    assert (tmp_path / "chat" / "chat_template.jinja").read_text() == "{{ messages }}"
    (own / "b" / "tokenizer.json").write_text("[]")
    for more, message in (
        ("tokenizer_source: base\n", "the tokenizer of a cannot be read"),
        ("tokenizer: {pad_to: 8}\n", "tokenizer has no key 'pad_to' .did you mean 'pad_to_multiple_of'"),
        ("chat_template: alpaca\n", "chat_template 'alpaca' is not known"),
    ):
        with pytest.raises((ConfigError, MergeError), match=message):
            merge_file(text + more, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_revision_is_asked_of_the_hub(inside, place, tmp_path, monkeypatch):
    asked = []

    def download(name, revision=None, allow_patterns=()):
        asked.append((name, revision))
        return str(place / name.split("/")[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    text = """
merge_method: linear
models:
  - {model: org/a@v1.0/stable, parameters: {weight: 1}}
  - {model: {model: {path: org/b, revision: "0123abc"}}, parameters: {weight: 3}}
  - {model: org/c, parameters: {weight: 0}}
"""
    found = merged(text, tmp_path)
    assert asked == [("org/a", "v1.0/stable"), ("org/b", "0123abc"), ("org/c", None)]
    same(found, {name: (value + 3 * inside["b"][name]) / 4 for name, value in inside["a"].items()})


# Modules


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two T5s."""
    folder = tmp_path_factory.mktemp("pairs")
    for seed, name in enumerate("de"):
        tiny("t5", seed=seed)[0].save_pretrained(folder / name)
    return folder


def test_modules_have_methods_settings_of_their_own(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(pairs)
    text = """
merge_method: linear
modules:
  encoder:
    models: [{model: d, parameters: {weight: 1}}, {model: e, parameters: {weight: [0, 1]}}]
  decoder:
    models: [{model: d, parameters: {weight: 0}}, {model: e, parameters: {weight: 1}}]
  shared:
    models: [{model: d}, {model: e}]
    parameters: {weight: 0.5}
dtype: float32
"""
    found, d, e = merged(text, tmp_path), tensors("d"), tensors("e")
    wanted = {}
    for name, value in d.items():
        part = name.split(".")[0]
        t = float(name.split(".")[2]) if ".block." in name else 0.0
        share = {"encoder": t / (1 + t), "shared": 0.5}.get(part, 1.0)
        wanted[name] = (1 - share) * value + share * e[name]
    same(found, wanted)
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_modules_have_slices_of_their_own(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(pairs)
    text = """
merge_method: passthrough
modules:
  encoder:
    slices:
      - sources: [{model: d, layer_range: [0, 2]}]
      - sources: [{model: e, layer_range: [1, 2]}]
  decoder: {slices: [{sources: [{model: e, layer_range: [0, 1]}]}]}
  shared: {models: [{model: d}]}
"""
    out = merge_file(text, tmp_path / "out")
    found, model = tensors(out), transformers.AutoModelForSeq2SeqLM.from_pretrained(out)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 1)
    name = "encoder.block.{}.layer.0.SelfAttention.q.weight"
    assert torch.equal(found[name.format(2)], tensors("e")[name.format(1)])
    assert torch.equal(found[name.format(1)], tensors("d")[name.format(1)])
    assert not any(".block.1." in key for key in found if key.startswith("decoder"))
    assert torch.equal(found["shared.weight"], tensors("d")["shared.weight"])
    assert model.encoder.block[2].layer[0].SelfAttention.q.weight.shape == (32, 32)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("{encoder: {models: [{model: d}]}, shared: {models: [{model: d}]}}", "no module says what becomes of decoder.block"),
        ("{encoder: {models: [{model: d}]}, vision: {models: [{model: d}]}, decoder: {models: [{model: d}]}}",
         "d has no tensors of a module 'vision'; its names begin with"),
        ("{encoder: {models: [{model: d}], slices: [1]}}", "the module encoder must say either models or slices"),
        ("{encoder: {layers: [{model: d}]}}", "the module encoder has no key 'layers'"),
        ("[encoder]", "modules must be a mapping"),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit_are_refused(pairs, modules, message, monkeypatch):
    monkeypatch.chdir(pairs)
    with pytest.raises(ConfigError, match=message):
        load(f"merge_method: passthrough\nmodules: {modules}\n")


def test_slices_need_one_stack(inside, tmp_path):
    tiny("t5")[0].save_pretrained(tmp_path / "t5")
    with pytest.raises(MergeError, match="one stack of layers; .* has decoder.block, encoder.block"):
        load(f"merge_method: passthrough\nslices: [{{sources: [{{model: {tmp_path}/t5, layer_range: [0, 1]}}]}}]\n")


def test_an_interrupted_merge_of_other_layers_is_not_gone_on_with(inside, tmp_path):
    from polytask.merge.write import Writer

    text = "merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {}}}]}}]\n"
    stopped = Writer.finish
    try:
        Writer.finish = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_file(text.format([0, 2]), tmp_path / "out")
    finally:
        Writer.finish = stopped
    with pytest.raises(MergeError, match="of other models or settings"):
        merge_file(text.format([1, 3]), tmp_path / "out", resume=True)
    assert merge_file(text.format([0, 2]), tmp_path / "out", resume=True)


def test_a_slice_s_settings_go_before_the_file_s_and_its_layers_have_t_of_their_own(inside):
    source = "{model: a, layer_range: [0, 3]}"
    text = f"""
merge_method: linear
slices:
  - sources: [{source}]
  - sources: [{source}]
    parameters: {{weight: [0, 1]}}
parameters: {{weight: 7}}
"""
    first, second = load(text).jobs
    assert first.weights == [7] and second.weights == [[0, 1]]
    name = "model.layers.{}.mlp.up_proj.weight"
    assert [second.layers.t(name.format(layer)) for layer in (3, 4, 5)] == [0, 0.5, 1]
    assert second.layers.place(name.format(4)) == (1, 3)
