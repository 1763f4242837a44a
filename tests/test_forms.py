"""The contract of a form, on every registered one and several kinds of network. Exceptions are named with their reason."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
from zoo import output, tiny

import polytask as pt
import polytask.core.select
from polytask.core.form import forms

NETWORKS = ("bert", "gpt2", "llama", "t5", "vit", "resnet")
# settings under which a form acts from the start, where its own start is zero
MOVED = 0.05


def sites_of(name, model):
    """The sites that a form acts at when nobody says where, convolutions too where it can."""
    form = forms[name]()
    chosen = form.default_sites + (" | kind:conv" if "conv" in form.kinds else "")
    return [site for site in model.sites if _takes(form, chosen, site)]


def _takes(form, selector, site):
    return not form.refuses(site) and pt.core.select.parse(selector)(site)


def adapter_for(name, model, seed=0, moved=False):
    """A fresh adapter of a form at every site that it can act at; ``moved`` away from its start."""
    adapter = pt.Adapter.new(model, forms[name](), sites=sites_of(name, model).__contains__, seed=seed)
    if moved:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for parameter in adapter.parameters():
                if parameter.is_floating_point():  # not the places of a sparse change
                    parameter += MOVED * torch.randn(parameter.shape, generator=generator)
    return adapter


def case(name, network, check):
    reason = forms[name].exceptions.get(check)
    if reason:
        pytest.skip(f"{name}: {reason}")
    module, batch = tiny(network)
    return pt.Model(module), batch


def run(model, batch, mix=None):
    with torch.no_grad(), model.using(mix):
        return output(model.module(**batch))


bare = {network: pt.Model(tiny(network)[0]) for network in NETWORKS}
every = [pytest.param(f, n, id=f"{f}-{n}") for f in forms for n in NETWORKS if sites_of(f, bare[n])]


@pytest.mark.parametrize(("name", "network"), every)
def test_starts_as_the_base_and_detaches_exactly(name, network):
    model, batch = case(name, network, "start")
    before = run(model, batch)
    classes = [type(m) for m in model.module.modules()]
    model.attach(adapter_for(name, model), "a")
    assert torch.equal(run(model, batch, "a"), before)
    model.detach("a")
    assert [type(m) for m in model.module.modules()] == classes and torch.equal(run(model, batch), before)


@pytest.mark.parametrize(("name", "network"), every)
def test_two_steps_move_every_parameter_and_nothing_else(name, network):
    model, batch = case(name, network, "gradient")
    adapter = adapter_for(name, model)
    model.attach(adapter, "a")
    start = adapter.state()
    base = copy.deepcopy(model.module.state_dict())
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(run(model, batch).shape, generator=generator)
    for _ in range(2):
        with model.using("a"):
            loss = ((output(model.module(**batch)) - target) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    still = {n for n, v in adapter.state().items() if torch.equal(v, start[n])}
    frozen = {f"{site}:{n}" for site, part in adapter.parts.items() for n in part.frozen}
    assert still == frozen, (still - frozen, frozen - still)
    assert all(torch.equal(v, base[k]) for k, v in model.module.state_dict().items())


@pytest.mark.parametrize(("name", "network"), every)
def test_merged_equals_attached(name, network):
    model, batch = case(name, network, "merge")
    adapter = adapter_for(name, model, moved=True)
    model.attach(adapter, "a")
    attached = run(model, batch, "a")
    assert not torch.allclose(attached, run(model, batch), atol=1e-4)
    if not forms[name].mergeable:
        with pytest.raises(pt.PolytaskError, match="no dense change"):
            adapter.merge_into(model)
        return
    merged = adapter.merge_into(model)
    assert torch.allclose(run(merged, batch), attached, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "network"), every)
def test_saved_and_loaded_bit_for_bit(name, network, tmp_path):
    model, batch = case(name, network, "files")
    adapter = adapter_for(name, model, moved=True)
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and again.form == adapter.form
    model.attach(adapter, "a")
    model.attach(again, "b")
    # the values are bit for bit the same (their hash); where a file's tensors lie in memory may change how a product rounds
    assert torch.allclose(run(model, batch, "a"), run(model, batch, "b"), atol=1e-6)


@pytest.mark.parametrize(("name", "network"), every)
def test_a_mixed_batch_equals_one_row_at_a_time(name, network):
    model, batch = case(name, network, "rows")
    for i, seed in enumerate((1, 2)):
        model.attach(adapter_for(name, model, seed, moved=True), f"a{i}")
    mixed = run(model, batch, ["a0", None, "a1"])
    for row, mix in enumerate(("a0", None, "a1")):
        alone = run(model, {k: v[row : row + 1] for k, v in batch.items()}, mix)
        assert torch.allclose(mixed[row], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_with_different_forms_equal_one_row_at_a_time(network):
    """Up to eight forms in a batch, each with its own row, until every form that has a site was there."""
    module, batch = tiny(network)
    model = pt.Model(module)
    there = [n for n in forms if sites_of(n, model) and "rows" not in forms[n].exceptions]
    for name in there:
        model.attach(adapter_for(name, model, moved=True), name)
    row = {k: v[:1] for k, v in batch.items()}
    for at in range(0, len(there), 8):
        names = there[at : at + 8]
        many = {k: v.repeat(len(names), *[1] * (v.dim() - 1)) for k, v in row.items()}
        mixed = run(model, many, names)
        for i, name in enumerate(names):
            assert torch.allclose(mixed[i], run(model, row, name)[0], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize(("name", "network"), every)
def test_two_adapters_add_up(name, network):
    """With weights 1 and 0 a mix is the one adapter; two copies at one half are the one adapter."""
    model, batch = case(name, network, "stack")
    adapter = adapter_for(name, model, moved=True)
    model.attach(adapter, "a")
    model.attach(adapter.copy(), "twin")
    model.attach(adapter_for(name, model, 7, moved=True), "other")
    alone = run(model, batch, "a")
    assert torch.allclose(run(model, batch, {"a": 1.0, "other": 0.0}), alone, atol=1e-6)
    assert torch.allclose(run(model, batch, {"a": 0.5, "twin": 0.5}), alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(run(model, batch, {"a": 1.0, "other": 1.0}), alone, atol=1e-4)


@pytest.mark.parametrize("name", [f for f in forms if sites_of(f, bare["llama"])])
def test_generates_with_a_cache_and_keeps_the_base_s_type(name):
    model, batch = case(name, "llama", "generate")
    model.attach(adapter_for(name, model, moved=True), "a")
    with model.using("a"):
        cached = model.module.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False)
        plain = model.module.generate(batch["input_ids"][:1], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    model.to(torch.bfloat16)
    assert run(model, batch, "a").dtype == torch.bfloat16
    assert run(model, batch, ["a", None, "a"]).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [f for f in forms if sites_of(f, bare["bert"])])
def test_the_seed_decides_the_start(name):
    model, _ = case(name, "bert", "seed")
    assert adapter_for(name, model, 3).hash == adapter_for(name, model, 3).hash


@pytest.mark.parametrize("name", list(forms))
def test_the_settings_describe_the_form(name):
    kind = forms[name]
    assert kind.of({"name": name, **kind().settings()}) == kind()
    assert kind.paper and kind.peft_type and (kind.__doc__ or "").strip()
    with pytest.raises(pt.PolytaskError, match="has no setting 'nonsense'"):
        kind.of({"name": name, "nonsense": 1})


def test_the_form_in_the_docs_works_as_they_say(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    (tmp_path / "scale_form.py").write_text(re.search(r"```python\n(.*?)```", text, re.S)[1])
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("scale_form")
        assert pt.Scale().start_at == 0.0
        model, batch = case("scale", "llama", "start")
        before = run(model, batch)
        for i in range(3):
            model.attach(adapter_for("scale", model, i, moved=i > 0), f"a{i}")
        assert torch.equal(run(model, batch, "a0"), before)
        mixed = run(model, batch, ["a1", "a2", None])
        assert torch.allclose(mixed[0], run(model, batch, "a1")[0], atol=1e-5)
        assert torch.allclose(mixed[2], before[2], atol=1e-5)
        model.adapters["a1"].save(tmp_path / "saved")
        assert pt.Adapter.load(tmp_path / "saved").hash == model.adapters["a1"].hash
    finally:
        forms._items.pop("scale", None)
        pt.__dict__.pop("Scale", None)
