"""The contract of a merging rule, on every registered one, and the engine: blocks, files, interruptions, wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import tiny

import polytask as pt
from polytask.core.errors import ConfigError, MergeError, StorageError
from polytask.merge import write as writing
from polytask.merge.engine import Job, run
from polytask.merge.rule import Block, rules
from polytask.merge.source import Checkpoint, Module, Source
from polytask.merge.values import Layers, gradient, resolve
from polytask.merge.write import Writer

EVERY = list(rules)


class Held(Source):
    """Tensors in a dictionary."""

    def __init__(self, name, tensors):
        self.name, self.tensors = name, tensors

    @property
    def shapes(self):
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name, start=0, stop=None):
        tensor = self.tensors[name]
        return tensor if tensor.dim() == 0 else tensor[start:stop]


def network(seed, like=None, dtype=torch.float32):
    """A few tensors of each kind that networks have: matrices in layers, a bias, a kernel, a number, a counter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (11, 6), "layers.0.fc.weight": (6, 5), "layers.1.fc.weight": (6, 5), "layers.1.fc.bias": (6,),
              "conv.weight": (4, 3, 2, 2), "scale": ()}  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if like is not None:
        made = {name: like[name].float() + 0.3 * tensor for name, tensor in made.items()}
    return {**{name: tensor.to(dtype) for name, tensor in made.items()}, "steps": torch.tensor(7)}


def job_of(name, models, base=None, **options):
    kind = rules[name]
    sources = [Held(f"m{i}", model) for i, model in enumerate(models)]
    given = Held("base", base if base is not None else network(0)) if kind.needs_base or base is not None else None
    return Job(sources, name, base=given, **options)


def merged(job) -> dict[str, Tensor]:
    out = {name: torch.empty(shape, dtype=torch.float32) for name, shape in job.shapes.items()}

    def put(name, tensor, start):
        rows = out[name]
        (rows if rows.dim() == 0 else rows[start : start + len(tensor)]).copy_(tensor)

    run(job, put)
    return out


def models_of(name, count=None, base=None, dtype=torch.float32):
    kind = rules[name]
    count = count or max(kind.least, min(3, kind.most or 3))
    base = network(0) if base is None else base
    return [network(i + 1, base, dtype) for i in range(count)]


def check(name, what):
    reason = rules[name].exceptions.get(what)
    if reason:
        pytest.skip(f"{name}: {reason}")


def close(a, b, atol=1e-5):
    for key, value in a.items():
        assert torch.allclose(value.float(), b[key].float(), atol=atol, rtol=1e-4), key


# The contract of a rule


@pytest.mark.parametrize("name", EVERY)
def test_rows_one_at_a_time_give_what_the_whole_gives(name):
    models = models_of(name)
    whole = merged(job_of(name, models, elements=10**9, seed=3))
    close(merged(job_of(name, models, elements=1, seed=3)), whole, 1e-6)
    assert whole["steps"] == 7  # what is no weight is taken as it is


@pytest.mark.parametrize("name", EVERY)
def test_one_model_alone_is_that_model(name):
    check(name, "alone")
    if rules[name].least > 1:
        pytest.skip(f"{name} takes at least {rules[name].least} models")
    model = models_of(name, 1)[0]
    close(merged(job_of(name, [model])), model)


@pytest.mark.parametrize("name", EVERY)
def test_equal_models_give_that_model(name):
    check(name, "equal")
    count = max(2, rules[name].least)
    if rules[name].most == 1:
        pytest.skip(f"{name} takes one model")
    model = models_of(name, 1)[0]
    weights = [1.0 / count] * count if rules[name].weighted else None
    close(merged(job_of(name, [model] * count, weights=weights)), model)


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_models_does_not_matter(name):
    check(name, "order")
    if rules[name].most == 1:
        pytest.skip(f"{name} takes one model")
    models = models_of(name)
    sources = [Held(f"m{i}", model) for i, model in enumerate(models)]
    base = Held("base", network(0)) if rules[name].needs_base else None
    close(merged(Job(sources, name, base=base, seed=1)), merged(Job(sources[::-1], name, base=base, seed=1)))


@pytest.mark.parametrize("name", EVERY)
def test_models_that_are_the_base_give_the_base(name):
    check(name, "base")
    base = network(0)
    count = max(rules[name].least, min(2, rules[name].most or 2))
    close(merged(job_of(name, [base] * count, base)), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_low_precision_is_merged_in_fp32(name, dtype):
    base = network(0, dtype=dtype)
    models = models_of(name, base=base, dtype=dtype)
    wide = [{k: v.float() if v.is_floating_point() else v for k, v in model.items()} for model in (base, *models)]
    close(merged(job_of(name, models, base)), merged(job_of(name, wide[1:], wide[0])), 1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_the_inputs_are_left_as_they_were(name):
    models, base = models_of(name), network(0)
    before = [{k: v.clone() for k, v in model.items()} for model in (base, *models)]
    merged(job_of(name, models, base))
    for model, old in zip((base, *models), before, strict=True):
        assert all(torch.equal(model[k], old[k]) for k in old)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_bytes(name):
    models = models_of(name)
    first, again = (merged(job_of(name, models, seed=5)) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("name", EVERY)
def test_a_rule_is_described(name):
    kind = rules[name]
    assert kind.__doc__ and "Args" in kind.__doc__ or not kind.knobs()
    assert rules.make({"name": name, **kind().settings()}) == kind()
    with pytest.raises(ConfigError, match="has no setting 'nonsense'"):
        job_of(name, models_of(name), settings={"nonsense": 1})


@pytest.mark.parametrize("name", EVERY)
def test_a_number_that_is_none_is_never_lost(name):
    """Not by trimming, electing, clamping or a weight of nothing: in the smallest part of any model, or of the base."""
    base = network(0)
    models = models_of(name, base=base)
    held = {f"m{i}": model for i, model in enumerate(models)} | ({"base": base} if rules[name].needs_base else {})
    weights = [1e-6] + [1.0] * (len(models) - 1) if rules[name].weighted else None
    places = [("embed.weight", (10, 0), "nan"), ("layers.1.fc.bias", (5,), "inf"), ("scale", (), "-inf")]
    for source, model in held.items():
        for tensor, place, value in places:
            kept = model[tensor]
            model[tensor] = kept.clone()
            model[tensor][place] = float(value)
            with pytest.raises(MergeError, match=f"{tensor} of {source} has entries that are not finite"):
                merged(job_of(name, models, base if rules[name].needs_base else None, weights=weights))
            model[tensor] = kept


def test_large_numbers_that_add_up_to_infinity_are_numbers():
    large = {"w": torch.full((4, 4), 3e38)}
    assert torch.equal(merged(job_of("linear", [large, large], weights=[1.0, 0.0]))["w"], large["w"])


# Random numbers


@given(rows=st.integers(1, 9), width=st.integers(1, 11), cut=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_random_numbers_are_those_of_the_place(rows, width, cut):
    cut = min(cut, rows - 1)
    whole = torch.zeros(rows, width)
    block = Block("w", None, (whole,), (1.0,), shape=(rows, width), seed=4, models=("m",))
    part = Block("w", None, (whole[cut:],), (1.0,), start=cut, shape=(rows, width), seed=4, models=("m",))
    assert torch.equal(block.uniform(0)[cut:], part.uniform(0))
    other = Block("w", None, (whole,), (1.0,), shape=(rows, width), seed=4, models=("n",))
    assert not torch.equal(block.uniform(0), other.uniform(0))
    assert float(block.uniform(0).min()) >= 0 and float(block.uniform(0).max()) < 1


@pytest.mark.parametrize("chance", [0.0, 1e-9, 0.1, 0.25, 1 / 3, 0.7, 1 - 2**-24, 1 - 2**-25, 1.0])
def test_what_is_drawn_is_where_the_number_is_below_the_chance(chance):
    block = Block("w", None, (torch.zeros(37, 5),), (1.0,), start=3, shape=(60, 5), models=("m",))
    assert torch.equal(block.drawn(0, chance), block.uniform(0) < chance)


def test_random_numbers_are_uniform():
    whole = torch.zeros(200, 500)
    found = Block("w", None, (whole,), (1.0,), shape=(200, 500), models=("m",)).uniform(0)
    assert abs(float(found.mean()) - 0.5) < 0.005 and abs(float(found.var()) - 1 / 12) < 0.001


# Settings that differ between tensors


def test_gradients_and_filters():
    names = [f"model.layers.{i}.{part}" for i in range(5) for part in ("attn.weight", "mlp.weight")] + ["embed.weight"]
    layers = Layers(names)
    assert layers.place("model.layers.3.mlp.weight") == (3, 5) and layers.place("embed.weight") is None
    assert [layers.t(f"model.layers.{i}.mlp.weight") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layers.t("embed.weight") == 0.0
    assert gradient([0.0, 1.0, 0.0], 0.75) == 0.5 and gradient([2.0], 0.3) == 2.0
    chosen = [{"filter": "attn", "value": [0.0, 1.0]}, {"value": 0.5}]
    assert resolve(chosen, "model.layers.2.attn.weight", 0.5) == 0.5
    assert resolve(chosen, "model.layers.4.attn.weight", 1.0) == 1.0
    assert resolve(chosen, "x.mlp.weight", 1.0) == 0.5
    assert resolve([{"filter": "attn", "value": 1}], "mlp", 0.0) is None
    for wrong in ({"filter": "a", "value": 1}, [True, False], [1, "a"], []):
        with pytest.raises(ConfigError):
            resolve(wrong, "a", 0.0)


def test_weights_by_layer():
    models = models_of("linear", 2)
    job = job_of("linear", models, weights=[[1.0, 0.0], [{"filter": "layers.1", "value": 1.0}, {"value": 0.0}]])
    found = merged(job)
    close({k: found[k] for k in ("embed.weight", "layers.0.fc.weight")}, models[0])
    assert torch.equal(found["layers.1.fc.weight"], models[1]["layers.1.fc.weight"])


# Files


@pytest.fixture
def folders(tmp_path):
    made = []
    for seed in range(3):
        module, _ = tiny("llama", seed=seed)
        module.save_pretrained(tmp_path / f"m{seed}")
        made.append(tmp_path / f"m{seed}")
    return made


def tensors_of(folder):
    source = Checkpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def test_a_folder_is_merged_in_shards_that_transformers_reads(folders, tmp_path):
    import transformers

    out = pt.merge(folders, "linear", weights=[1, 2, 1], out=tmp_path / "out", shard="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2 and not (out / ".merging").exists()
    module = transformers.AutoModelForCausalLM.from_pretrained(out)
    each = [tensors_of(folder) for folder in folders]
    for name, value in module.state_dict().items():
        assert torch.allclose(value, (each[0][name] + 2 * each[1][name] + each[2][name]) / 4, atol=1e-6), name
    card = json.loads((out / "polytask_merge.json").read_text())
    assert card["method"] == "linear" and card["weights"] == [1, 2, 1] and len(card["models"]) == 3
    whole = pt.merge(folders, "linear", weights=[1, 2, 1], out=tmp_path / "whole")
    assert [p.name for p in whole.glob("*.safetensors")] == ["model.safetensors"]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(out).values(), tensors_of(whole).values(), strict=True))
    again = pt.merge(folders, "linear", weights=[1, 2, 1], out=tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("rule", ["linear", "ties", "slerp"])
def test_files_in_rows_give_what_whole_files_give(folders, rule):
    """What is on disk is read in pieces: every row comes from its own place."""
    models = [Checkpoint(folder) for folder in folders[1 : 2 if rule == "slerp" else 3]]
    jobs = [Job(models, rule, base=Checkpoint(folders[0]), elements=n) if rules[rule].needs_base
            else Job(models, rule, elements=n) for n in (1, 40, 10**9)]  # fmt: skip
    one, some, whole = (merged(job) for job in jobs)
    close(one, whole, 1e-6)
    close(some, whole, 1e-6)
    held = [Held(m.name, {n: m.read(n) for n in m.shapes}) for m in (Checkpoint(folders[0]), *models)]
    close(whole, merged(Job(held[1:], rule, base=held[0] if rules[rule].needs_base else None)), 1e-6)


@given(start=st.integers(0, 98), stop=st.one_of(st.none(), st.integers(0, 120)))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_a_file_are_those_rows(folders, start, stop):
    from safetensors.torch import load_file

    name = "model.embed_tokens.weight"
    assert torch.equal(
        Checkpoint(folders[0]).read(name, start, stop), load_file(folders[0] / "model.safetensors")[name][start:stop]
    )


def test_a_line_of_the_journal_that_was_cut_short_does_not_count(tmp_path):
    """The beginning of one name may be another's: that tensor is written again."""
    layout = [("w", (2,), torch.float32), ("w2", (2,), torch.float32)]
    first = Writer(tmp_path, layout, key="k")
    first.put("w2", torch.ones(2))
    first.close()
    (tmp_path / writing.WORK / "done").write_text("w")  # of w2, without its end
    again = Writer(tmp_path, layout, key="k", resume=True)
    assert again.done == set()
    again.close()


def test_pickled_weights_are_read_safely_and_code_is_not(folders, tmp_path):
    state = tensors_of(folders[0])
    torch.save(state, tmp_path / "plain.bin")
    assert all(torch.equal(v, state[k]) for k, v in tensors_of(tmp_path / "plain.bin").items())

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"w": Trap()}, tmp_path / "trap.bin")
    with pytest.raises(MergeError, match=r"trap\.bin"):
        Checkpoint(tmp_path / "trap.bin")
    assert not (tmp_path / "trapped").exists()


def test_modules_give_a_module_and_tied_tensors_stay_tied():
    modules = [tiny("gpt2", seed=i)[0] for i in range(2)]
    assert Module(modules[0]).tied
    made = pt.merge(modules, "linear")
    assert type(made) is type(modules[0]) and made.lm_head.weight.data_ptr() == made.transformer.wte.weight.data_ptr()
    wanted = (modules[0].transformer.wte.weight + modules[1].transformer.wte.weight) / 2
    assert torch.allclose(made.lm_head.weight, wanted, atol=1e-6)
    assert not torch.equal(modules[0].lm_head.weight, made.lm_head.weight)


def test_an_adapter_among_models_is_the_base_with_it(folders, tmp_path):
    model = pt.Model(tiny("llama", seed=0)[0])
    adapter = pt.Adapter.new(model, "dora", seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    adapter.save(tmp_path / "a")
    plain = adapter.merge_into(model).module.state_dict()
    alone = pt.merge([tmp_path / "a"], "task_arithmetic", base=folders[0], out=tmp_path / "alone")
    for name, value in tensors_of(alone).items():
        assert torch.allclose(value, plain[name], atol=1e-6), name
    both = pt.merge([tmp_path / "a", folders[1]], "linear", base=folders[0], out=tmp_path / "both")
    other = tensors_of(folders[1])
    for name, value in tensors_of(both).items():
        assert torch.allclose(value, (plain[name] + other[name]) / 2, atol=1e-6), name


def test_the_result_s_dtype(folders, tmp_path):
    out = pt.merge(folders, "linear", out=tmp_path / "out", dtype="bfloat16")
    each = [tensors_of(folder) for folder in folders]
    for name, value in tensors_of(out).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (sum(e[name] / 3 for e in each)).to(torch.bfloat16)) or torch.allclose(
            value.float(), sum(e[name] for e in each) / 3, rtol=1e-2
        )


def test_an_interrupted_merge_goes_on_and_leaves_nothing_half_named(folders, tmp_path, monkeypatch):
    out, put, count = tmp_path / "out", Writer.put, [0]

    def failing(self, *args):
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        put(self, *args)

    monkeypatch.setattr(Writer, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        pt.merge(folders, "linear", out=out)
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    monkeypatch.setattr(Writer, "put", put)
    with pytest.raises(MergeError, match="interrupted merge; say resume=True"):
        pt.merge(folders, "linear", out=out)
    with pytest.raises(MergeError, match="of other models or settings"):
        pt.merge(folders, "linear", weights=[1, 2, 3], out=out, resume=True)
    done = set((out / writing.WORK / "done").read_text().split())
    written: list[str] = []
    monkeypatch.setattr(Writer, "put", lambda self, name, *rest: (written.append(name), put(self, name, *rest))[1])
    pt.merge(folders, "linear", out=out, resume=True)
    monkeypatch.setattr(Writer, "put", put)
    whole = pt.merge(folders, "linear", out=tmp_path / "whole")
    assert done and set(written) == set(tensors_of(whole)) - done
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_merge_goes_on(folders, tmp_path):
    """Killed by the system, between two tensors and in the middle of one."""
    out = tmp_path / "out"
    code = (
        "import os, sys, polytask as pt\n"
        "from polytask.merge.write import Writer\n"
        "put, n = Writer.put, [0]\n"
        "def dying(self, *args):\n"
        "    n[0] += 1\n"
        "    if n[0] == 10: os.kill(os.getpid(), 9)\n"
        "    put(self, *args)\n"
        "Writer.put = dying\n"
        f"pt.merge({[str(f) for f in folders]!r}, 'linear', out={str(out)!r})\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == -9 and not list(out.glob("*.safetensors"))
    with (out / writing.WORK / "done").open("a") as file:
        file.write("model.norm.wei")  # a line that was being written
    pt.merge(folders, "linear", out=out, resume=True)
    whole = pt.merge(folders, "linear", out=tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_too_little_space_is_said_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(StorageError, match="its disk has 0.00 GB"):
        pt.merge(folders, "linear", out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6), most=st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_what_safetensors_reads(shapes, most, tmp_path_factory):
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("w")
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16]
    tensors = {f"t{i}": (torch.randn(shape) * 3).to(dtypes[i % 5]) for i, shape in enumerate(shapes)}
    writer = Writer(folder, [(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], shard=most)
    for name, tensor in reversed(tensors.items()):
        if tensor.dim() and len(tensor) > 1:
            writer.put(name, tensor[1:], 1)
            writer.put(name, tensor[:1], 0)
        else:
            writer.put(name, tensor)
    writer.finish({})
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(tensors) and all(torch.equal(found[n], t) for n, t in tensors.items())


# Wrong inputs


def test_differences_are_listed(folders, tmp_path):
    other, _ = tiny("gpt2")
    other.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(MergeError, match="it lacks .*; it has besides"):
        pt.merge([folders[0], tmp_path / "gpt2"], "linear", out=tmp_path / "out")
    wide = tensors_of(folders[1])
    wide["model.embed_tokens.weight"] = torch.zeros(120, 32)
    torch.save(wide, tmp_path / "wide.bin")
    with pytest.raises(
        MergeError, match=r"in another shape model.embed_tokens.weight \(120, 32\) instead of \(99, 32\)"
    ):
        pt.merge([folders[0], tmp_path / "wide.bin"], "linear", out=tmp_path / "out")


def test_numbers_that_are_none_are_named(folders, tmp_path):
    bad = tensors_of(folders[1])
    bad["model.norm.weight"][3] = float("nan")
    torch.save(bad, tmp_path / "bad.bin")
    with pytest.raises(MergeError, match=r"model.norm.weight of .*bad.bin has entries that are not finite"):
        pt.merge([folders[0], tmp_path / "bad.bin"], "linear", out=tmp_path / "out")


def test_damaged_files_are_named(folders, tmp_path):
    file = folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(MergeError, match=r"model.safetensors cannot be read"):
        pt.merge(folders, "linear", out=tmp_path / "out")
    sharded = pt.merge(folders[1:], "linear", out=tmp_path / "sharded", shard="20KB")
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(MergeError, match="lacks model-00002"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: pt.merge([], "linear"), "nothing to merge"),
        (lambda m: pt.merge(m, "liner"), "did you mean 'linear'"),
        (lambda m: pt.merge(m, "task_arithmetic"), "differences to a base; say which"),
        (lambda m: pt.merge(m, "linear", weights=[1]), "1 weights for 2 models"),
        (lambda m: pt.merge(m, "linear", weights=[1, -1]), "add up to nothing"),
        (lambda m: pt.merge(m, "linear", each={"density": [1, 1]}), "no setting 'density' for single models"),
        (lambda m: pt.merge(m, "linear", dtype="int4"), "dtype must be one of"),
        (lambda m: pt.merge(["nowhere/at/all"], "linear", out="x"), "there is no nowhere"),
        (lambda m: pt.merge([3], "linear"), "int cannot be merged"),
    ],
)
def test_what_cannot_be_done_is_said(call, message):
    with pytest.raises(pt.PolytaskError, match=message):
        call([tiny("llama", seed=i)[0] for i in range(2)])


def test_an_adapter_of_another_base_or_without_a_dense_change_is_refused(folders, tmp_path):
    bert = pt.Model(tiny("bert")[0])
    with pytest.raises(MergeError, match="has no tensor for the site"):
        pt.merge([pt.Adapter.new(bert, "lora", name="mine")], "task_arithmetic", base=folders[0], out=tmp_path / "o")
    prompt = pt.Adapter.new(pt.Model(tiny("llama")[0]), "prompt", name="words")
    with pytest.raises(MergeError, match="'words' has the form 'prompt', which has no dense change"):
        pt.merge([prompt], "task_arithmetic", base=folders[0], out=tmp_path / "o")


def test_how_much_is_in_memory_at_once():
    """A few blocks, whatever the tensors' size."""
    held, most = [0], [0]

    class Counting(Held):
        def read(self, name, start=0, stop=None):
            held[0] += (stop or len(self.tensors[name])) - start
            most[0] = max(most[0], held[0])
            return super().read(name, start, stop)

    big = {"w": torch.randn(4000, 16)}
    job = Job([Counting(f"m{i}", big) for i in range(3)], "linear", elements=16 * 100)
    run(job, lambda name, tensor, start: held.__setitem__(0, held[0] - 3 * len(tensor)))
    assert most[0] <= 3 * 100 * 8  # rows of three models in eight blocks: read ahead, merged, waiting to be written
