"""Adapters merged as adapters, knowledge subtracted, re-adapted models, and expressions over models."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.core.head import LinearHead
from polytask.merge.expression import parse
from polytask.merge.readapt import readapt
from polytask.merge.subtract import genknowsub

LORA = pt.LoRA(rank=3, alpha=5)


def shaken(model, form="lora", sites=None, seed=1, size=0.1, name="") -> pt.Adapter:
    """An adapter with random values everywhere."""
    adapter = pt.Adapter.new(model, form, sites, name=name or f"a{seed}", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


def state(item) -> dict[str, Tensor]:
    return (item.module if isinstance(item, pt.Model) else item).state_dict()


def apart(a, b) -> float:
    """The largest difference of two networks' weights."""
    a, b = state(a), state(b)
    assert list(a) == list(b)
    return max(float((a[k].float() - b[k].float()).abs().max()) for k in a)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(state(a).values(), state(b).values(), strict=True))


def delta(adapter, site) -> Tensor:
    return adapter.patches[site].delta().detach()


@pytest.fixture(scope="module")
def llama():
    return pt.Model(tiny("llama")[0])


@pytest.fixture(scope="module")
def different(llama):
    """LoRAs of different ranks, scales, scalings and sites."""
    return [
        shaken(llama, pt.LoRA(rank=2, alpha=3), "query | value", 1),
        shaken(llama, pt.LoRA(rank=4, alpha=4), "linear", 2),
        shaken(llama, pt.LoRA(rank=3, alpha=6, scaling="rank-stabilised"), "query", 3),
        shaken(llama, pt.LoRA(rank=1, init="pissa"), "value", 4),
    ]


# Weighted sums are exact


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("linear", {"weights": [0.5, 2, -1, 1]}),
        ("linear", {"weights": [[0.0, 1.0], 1, [{"filter": "q_proj", "value": 3}, {"value": 1}], 0.5]}),
        ("task_arithmetic", {"scale": 0.3, "weights": [1, 1, -0.5, 1]}),
        ("model_stock", {}),
        ("multislerp", {}),
        ("lines", {"beta": 0.4}),
        ("knots", {"inner": "task_arithmetic"}),
    ],
)
def test_a_weighted_sum_is_the_merge_of_the_full_checkpoints(llama, different, method, options):
    made = pt.merge(different, method, **options)
    whole = pt.merge(different, method, base=llama, **options)
    assert apart(made.merge_into(llama), whole) < 1e-5
    assert apart(whole, llama) > 0.002
    assert made.card.training["merge"]["relative_error"] == 0.0
    assert isinstance(made.form, pt.LoRA) and made.form.scale == 1.0


def test_ranks_add_up_and_what_has_no_weight_is_left_out(llama, different):
    made = pt.merge(different, "task_arithmetic")
    ranks = {site.rsplit(".", 1)[-1]: patch.form.rank for site, patch in made.patches.items()}
    assert ranks["q_proj"] == 2 + 4 + 3 and ranks["v_proj"] == 2 + 4 + 2 and ranks["k_proj"] == 4
    made = pt.merge(different, "task_arithmetic", weights=[1, 0, 0, 0])
    assert list(made.patches) == list(different[0].patches) and made.form.rank == 2


@pytest.mark.parametrize(
    ("family", "sites"),
    [("gpt2", "linear"), ("bert", "embedding | query"), ("mixtral", "experts | query"), ("resnet", "conv")],
)
def test_sites_of_every_kind(family, sites, tmp_path):
    net, batch = tiny(family)
    model = pt.Model(net)
    adapters = [shaken(model, pt.LoRA(rank=r, alpha=3), sites, r) for r in (1, 2)]
    for method, options in (("linear", {"weights": [1, 3]}), ("ties", {"density": 0.5, "scope": "tensor"})):
        whole = pt.merge(adapters, method, base=net, **options)
        with torch.no_grad():
            wanted = output(whole(**batch))
        for as_ in ("lora", "full", "sparse"):
            rank = 200 if as_ == "lora" and method == "ties" else None
            made = pt.merge(adapters, method, as_=as_, rank=rank, **options)
            made.save(tmp_path / as_)
            again = pt.Adapter.load(tmp_path / as_)
            assert again.hash == made.hash
            assert apart(again.merge_into(model, untie=True), whole) < 1e-5
            name = model.attach(again)
            with torch.no_grad(), model.using(name):
                torch.testing.assert_close(output(model.module(**batch)), wanted, atol=2e-4, rtol=1e-3)
            model.detach()


# PEFT


def peft_of(net, folders):
    peft = pytest.importorskip("peft")
    wrapped = peft.PeftModel.from_pretrained(net, folders[0], adapter_name="a0").eval()
    for i, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=f"a{i}")
    return wrapped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_real_peft_reads_the_result(family, tmp_path):
    net, batch = tiny(family)
    model = pt.Model(net)
    adapters = [
        shaken(model, pt.LoRA(rank=2, alpha=3), "query | value | up", 1),
        shaken(model, pt.LoRA(rank=4, alpha=1), "query | up", 2),
    ]
    out = pt.merge(adapters, "linear", weights=[1, 2], normalize=False, out=tmp_path / "m")
    plain = pt.Adapter.load(out).merge_into(model).module
    with torch.no_grad():
        expected = output(plain(**batch))
        found = output(peft_of(tiny(family)[0], [out])(**batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_peft_s_own_linear_merge_has_cross_terms_and_ours_has_none(tmp_path):
    """The change that its factors make against the sum of the changes, for four random adapters."""
    net, _ = tiny("llama")
    model = pt.Model(net)
    adapters = [shaken(model, pt.LoRA(rank=4, alpha=8), "query", seed) for seed in range(4)]
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.normal_()
    folders = [adapter.save(tmp_path / f"{i}") for i, adapter in enumerate(adapters)]
    wrapped = peft_of(tiny("llama")[0], folders)
    wrapped.add_weighted_adapter([f"a{i}" for i in range(4)], [0.25] * 4, "all", combination_type="linear")
    ours = pt.merge(folders, "linear")
    errors = {"peft": 0.0, "ours": 0.0}
    size = 0.0
    for site in ours.patches:
        exact = sum(delta(adapter, site) for adapter in adapters) / 4
        theirs = wrapped.base_model.model.get_submodule(site).get_delta_weight("all").detach()
        size += float(exact.square().sum())
        errors["peft"] += float((theirs - exact).square().sum())
        errors["ours"] += float((delta(ours, site) - exact).square().sum())
    relative = {who: (error / size) ** 0.5 for who, error in errors.items()}
    assert relative["peft"] == pytest.approx(3**0.5, abs=0.25)
    assert relative["ours"] < 1e-6
    print(f"relative error of the change: {relative}")


# Approximations say how far off they are


def test_a_smaller_rank_is_the_nearest_and_its_error_is_said(llama, different):
    exact = pt.merge(different, "linear")
    made = pt.merge(different, "linear", rank=3)
    assert max(patch.form.rank for patch in made.patches.values()) == 3
    lost = whole = 0.0
    for site in exact.patches:
        wanted, found = delta(exact, site).double(), delta(made, site).double()
        error, size = float((found - wanted).square().sum()), float(wanted.square().sum())
        values = torch.linalg.svdvals(wanted)
        assert error == pytest.approx(float(values[3:].square().sum()), rel=1e-3, abs=1e-9)  # no other is nearer
        own = made.card.training["merge"]["relative_error_by_site"].get(site, 0.0)
        assert own == pytest.approx((error / size) ** 0.5, rel=1e-3, abs=1e-5)
        lost, whole = lost + error, whole + size
    assert made.card.training["merge"]["relative_error"] > 0.1
    assert pt.merge(different, "linear", rank=50).card.training["merge"]["relative_error"] == 0.0


def test_another_rule_s_lora_has_the_error_that_is_said(llama, different):
    options = {"density": 0.3}
    made = pt.merge(different, "ties", **options)
    full = pt.merge(different, "ties", as_="full", **options)
    for site, own in made.card.training["merge"]["relative_error_by_site"].items():
        wanted, found = full.patches[site].deltas()["weight"], delta(made, site)
        assert own == pytest.approx(float((found - wanted).norm() / wanted.norm()), rel=1e-3, abs=1e-5)
    assert 0.1 < made.card.training["merge"]["relative_error"] < 1
    exact = pt.merge(different, "ties", rank=64, **options)
    assert apart(exact.merge_into(llama), full.merge_into(llama)) < 1e-5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.2, "scope": "tensor"}),
        ("dare_ties", {"density": 0.5, "seed": 3}),
        ("knots", {"inner": {"name": "ties", "density": 0.3, "scope": "tensor"}}),
        ("tsv", {}),
        ("della", {}),
    ],
)
def test_every_rule_on_the_changes_is_the_rule_on_the_checkpoints(llama, method, options):
    adapters = [shaken(llama, pt.LoRA(rank=r + 1), "linear", r) for r in range(3)]
    whole = pt.merge(adapters, method, base=llama, **options)
    assert apart(pt.merge(adapters, method, as_="full", **options).merge_into(llama), whole) < 2e-4
    assert apart(whole, llama) > 0.02


def test_sparse_keeps_what_is_not_zero(llama):
    adapters = [shaken(llama, LORA, "query", seed) for seed in (1, 2)]
    sparse = pt.merge(adapters, "ties", density=0.1, as_="sparse", scope="tensor")
    full = pt.merge(adapters, "ties", density=0.1, as_="full", scope="tensor")
    for site, patch in sparse.patches.items():
        dense = full.patches[site].deltas()["weight"]
        assert torch.equal(patch.deltas()["weight"], dense) and len(patch.at) == int((dense != 0).sum())
        assert len(patch.at) <= 2 * 0.1 * dense.numel() + 2
    total = sum(patch.total for patch in sparse.patches.values())
    assert sparse.form.density == pytest.approx(sparse.size / total)


# Other forms


def test_other_forms_become_what_they_are(llama):
    full = [shaken(llama, pt.Full(), "norm | query", seed) for seed in (1, 2)]
    made = pt.merge(full, "linear")
    assert isinstance(made.form, pt.Full)
    assert apart(made.merge_into(llama), pt.merge(full, "linear", base=llama)) < 1e-6
    sparse = [shaken(llama, {"name": "apet", "count": 70}, "query", seed) for seed in (1, 2)]
    made = pt.merge(sparse, "task_arithmetic")
    assert made.form.name == "lt-sft"
    assert apart(made.merge_into(llama), pt.merge(sparse, "task_arithmetic", base=llama)) < 1e-6
    mixed = [full[0], shaken(llama, LORA, "query", 3)]
    made = pt.merge(mixed, "linear")
    assert isinstance(made.form, pt.Full)
    assert apart(made.merge_into(llama), pt.merge(mixed, "linear", base=llama)) < 1e-6
    loha = shaken(llama, "loha", "query", 4)
    made = pt.merge([loha, mixed[1]], "linear", as_="lora", rank=32)
    assert apart(made.merge_into(llama), pt.merge([loha, mixed[1]], "linear", base=llama)) < 1e-5


def test_biases_and_norms():
    model = pt.Model(tiny("bert")[0])
    adapters = [shaken(model, pt.Full(parameters="bias"), "query | norm", seed) for seed in (1, 2)]
    adapters.append(shaken(model, LORA, "query", 3))
    whole = pt.merge(adapters, "linear", base=model)
    for as_ in (None, "sparse"):
        assert apart(pt.merge(adapters, "linear", as_=as_).merge_into(model), whole) < 1e-6
    with pytest.raises(MergeError, match="a LoRA cannot say what changes"):
        pt.merge(adapters, "linear", as_="lora")
    with pytest.raises(MergeError, match="the bias changes too"):
        pt.merge([shaken(model, pt.Full(), "query"), adapters[2]], "linear", as_="lora")


def test_changes_that_depend_on_the_base_need_it(llama):
    adapters = [shaken(llama, "dora", "query", 1), shaken(llama, LORA, "query", 2)]
    with pytest.raises(MergeError, match=r"'a1' \(dora\) changes depends on the base"):
        pt.merge(adapters, "linear")
    made = pt.merge(adapters, "linear", base=llama, as_="lora", rank=32)
    assert apart(made.merge_into(llama), pt.merge(adapters, "linear", base=llama)) < 1e-5


# What lies beside the patches


def test_heads_cards_and_folders(llama, tmp_path):
    adapters = [shaken(llama, LORA, "query", seed) for seed in (1, 2)]
    for adapter, task in zip(adapters, ("x", "y"), strict=True):
        adapter.heads[task] = LinearHead(task, 32, ("no", "yes"))
        adapter.card.tasks = [{"name": task}]
        adapter.card.licence = "mit"
    folders = [adapter.save(tmp_path / adapter.name) for adapter in adapters]
    out = pt.merge(folders, "ties", density=0.5, out=tmp_path / "m", rank=2)
    made = pt.Adapter.load(out)
    assert set(made.heads) == {"x", "y"}
    assert torch.equal(made.heads["x"].linear.weight, adapters[0].heads["x"].linear.weight)
    card = made.card
    assert card.parents == [a.hash for a in adapters] and [t["name"] for t in card.tasks] == ["x", "y"]
    assert card.licence == "mit" and card.base["fingerprint"] == llama.fingerprint
    said = card.training["merge"]
    assert said["method"] == "ties" and said["settings"] == {"density": 0.5} and said["adapters"] == ["a1", "a2"]
    assert 0 < said["relative_error"] < 1 and said["as"] == "lora" and said["rank"] == 2
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    adapters[1].heads["x"] = LinearHead("x", 32, ("no", "yes"))
    nn.init.ones_(adapters[1].heads["x"].linear.weight)
    with pytest.raises(MergeError, match="different heads for the task 'x'"):
        pt.merge(adapters, "linear")


def test_dtype_and_one_adapter_alone(llama):
    adapter = shaken(llama, LORA, "query")
    made = pt.merge([adapter], "linear", dtype="bfloat16")
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    alone = pt.merge([adapter], "linear")
    assert all(torch.allclose(delta(alone, s), delta(adapter, s), atol=1e-7) for s in adapter.patches)


def test_from_one_adapter_to_another(llama):
    one, two = (shaken(llama, LORA, "query", seed) for seed in (1, 2))
    with pytest.raises(MergeError, match="give the first one as base="):
        pt.merge([one, two], "slerp")
    for t, wanted in ((0.0, one), (1.0, two)):
        made = pt.merge([two], "slerp", base=one, t=t, rank=6)
        assert all(torch.allclose(delta(made, s), delta(wanted, s), atol=1e-6) for s in one.patches)
    away = pt.merge([two], "task_arithmetic", base=one, scale=0.25)  # differences to an adapter
    for site in one.patches:
        wanted = 0.75 * delta(one, site) + 0.25 * delta(two, site)
        torch.testing.assert_close(delta(away, site), wanted, atol=1e-6, rtol=1e-5)


def test_what_does_not_fit_is_said(llama):
    one = shaken(llama, LORA, "query")
    other = shaken(pt.Model(tiny("llama", seed=1)[0]), LORA, "query", 2)
    with pytest.raises(MergeError, match="different bases"):
        pt.merge([one, other], "linear")
    other.card.base.pop("fingerprint")
    with pytest.raises(MergeError, match="which has no dense change"):
        pt.merge([one, shaken(llama, "prompt", name="words")], "linear")
    with pytest.raises(MergeError, match="leaves no change"):
        pt.merge([one], "task_arithmetic", scale=0.0)
    with pytest.raises(ConfigError, match="as_ must be one of"):
        pt.merge([one], "linear", as_="dora")
    with pytest.raises(ConfigError, match="rank must be"):
        pt.merge([one], "linear", rank=0)
    with pytest.raises(ConfigError, match="say as_='lora'"):
        pt.merge([one], "linear", rank=2, as_="full")
    with pytest.raises(ConfigError, match="are for adapters"):
        pt.merge([tiny("llama")[0]], "linear", as_="lora")
    with pytest.raises(MergeError, match="is for a linear of shape"):
        patch = other.patches[next(iter(other.patches))]
        patch.site = type(patch.site)(**{**patch.site.as_dict(), "shape": (3, 32)})
        pt.merge([one, other], "linear")


# GenKnowSub


def scalar(a, b, name):
    model = pt.Model(nn.Sequential(nn.Linear(1, 1, bias=False)))
    adapter = pt.Adapter.new(model, pt.LoRA(rank=1, alpha=1), "kind:linear", name=name)
    adapter.card.base.pop("fingerprint")
    with torch.no_grad():
        patch = adapter.patches["0"]
        patch.A.fill_(a), patch.B.fill_(b)
    return adapter


def test_general_knowledge_by_hand():
    task, general = scalar(1.0, 2.0, "task"), scalar(3.0, 4.0, "general")
    factor, exact = genknowsub(task, general), genknowsub(task, general, "delta")
    assert delta(factor, "0").item() == 4.0 and factor.form.rank == 1
    assert delta(exact, "0").item() == -10.0 and exact.form.rank == 2
    three = [scalar(float(a), float(a), f"g{a}") for a in (1, 2, 6)]
    assert delta(genknowsub(task, three), "0").item() == (1 - 3) * (2 - 3)
    assert delta(genknowsub(task, three, "delta"), "0").item() == pytest.approx(2 - (1 + 4 + 36) / 3)
    assert delta(task, "0").item() == 2.0  # and the task's own is as it was


def test_general_knowledge_subtracted(llama, tmp_path):
    task = shaken(llama, LORA, "query", 1, name="task")
    task.heads["x"] = LinearHead("x", 32, ("no", "yes"))
    for mode in ("factor", "delta"):
        none = genknowsub(task, _zeroed(task), mode)
        assert all(torch.allclose(delta(none, s), delta(task, s), atol=1e-7) for s in task.patches)
        itself = genknowsub(task, task.copy("general"), mode)
        assert all(float(delta(itself, s).abs().max()) < 1e-6 for s in task.patches)
        assert set(itself.heads) == {"x"} and len(itself.card.parents) == 2
        again = pt.Adapter.load(itself.save(tmp_path / mode))
        with pytest.raises(MergeError, match="subtracted from 'task' already"):
            genknowsub(again, task, mode)
    other = shaken(llama, pt.LoRA(rank=2), "query", 2)
    with pytest.raises(MergeError, match="say mode='delta'"):
        genknowsub(task, other)
    made = genknowsub(task, other, "delta")
    for site in task.patches:
        torch.testing.assert_close(delta(made, site), delta(task, site) - delta(other, site), atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="mode must be one of"):
        genknowsub(task, other, "product")


def _zeroed(adapter):
    zero = adapter.copy("zero")
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
    return zero


# RE-Adapt


def test_readapt(llama):
    tuned = tiny("llama", seed=4)[0]
    domain = shaken(llama, LORA, "linear")
    only = domain.merge_into(llama)
    assert same(readapt(llama, tuned, domain, 0.0), tuned)
    assert same(readapt(llama, tuned, domain, 0.0, 0.0), llama)
    assert apart(readapt(llama, tuned, domain, 1.0, 0.0), only) < 1e-6
    both = state(readapt(llama, tuned, domain, 0.5, 0.25))
    for name, base in state(llama).items():
        wanted = base + 0.5 * (state(only)[name] - base) + 0.25 * (state(tuned)[name] - base)
        torch.testing.assert_close(both[name], wanted, atol=1e-5, rtol=1e-5)
    retriever = shaken(llama, LORA, "query", 9)  # the tuned model may be an adapter itself
    found = readapt(llama, retriever, domain)
    assert apart(found, pt.merge([domain, retriever], "task_arithmetic").merge_into(llama)) < 1e-5


# Expressions


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a", {"a": 1}),
        ("base + 0.8*(a - base) - 0.3 * (toxic - base)", {"base": "0.5", "a": "0.8", "toxic": "-0.3"}),
        ("base + (a - base)", {"a": 1}),
        ("(a + b + c) / 3", {"a": "1/3", "b": "1/3", "c": "1/3"}),
        ("-(a - 2 * +b) * 1e-1", {"a": "-1/10", "b": "1/5"}),
        ("0.1*a + 0.2*a - 0.3*a + b", {"b": 1}),
        ("2 * (1 - 0.5) * a / (4 / 2)", {"a": "0.5"}),
        ("\n a \t+ b\n", {"a": 1, "b": 1}),
        ("1_0 * a + 0x10 * b + 2. * c + .5 * d", {"a": 10, "b": 16, "c": 2, "d": "0.5"}),
    ],
)
def test_what_an_expression_says(text, wanted):
    assert parse(text) == {name: Fraction(value) for name, value in wanted.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a + ", "is no expression"),
        ("", "is no expression"),
        ("a; b", "is no expression"),
        ("a ** 2", r"'a \*\* 2' \(at character 1"),
        ("a + abs(b)", r"'abs\(b\)' \(at character 5 of .* cannot stand"),
        ("__import__('os').system('x')", "cannot stand in an expression"),
        ("base.weight", "cannot stand"),
        ("a[0]", "cannot stand"),
        ("a if b else a", "cannot stand"),
        ("a + 'b'", "cannot stand"),
        ("a + True", "cannot stand"),
        ("a + 2j*b", "cannot stand"),
        ("a + (lambda: 1)", "cannot stand"),
        ("ä + b.c", r"'b.c' \(at character 5 "),
        ("a * b", "multiplies models with each other"),
        ("(a - base) * (b - base)", "multiplies models"),
        ("1 / a", "divides by a model"),
        ("a / (1 - 1)", "divides by zero"),
        ("a + 1", "adds the number 1.0 to models"),
        ("a - a", "everything cancels"),
        ("2 - 2", "everything cancels"),
        ("1e999999999 * a", "is no factor of a model"),
        ("1e20 * 1e20 * a", "the factor of a is above"),
        ("a - 0 * b - a + 1e-999999999 * b", "everything cancels"),
        ("(" * 500 + "a" + ")" * 500, "is no expression|too deeply"),
        ("+".join(["a"] * 5000), "too deeply|is no expression"),
    ],
)
def test_what_no_expression_is(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


LEAF = st.sampled_from(["a", "b", "c"]).map(lambda n: (n, {n: Fraction(1)}))


def _join(children):
    def number(pair, value):
        text, factors = pair
        return f"{value} * ({text})", {n: f * Fraction(str(value)) for n, f in factors.items()}

    def plus(left, right, sign):
        factors = {n: left[1].get(n, 0) + sign * right[1].get(n, 0) for n in {*left[1], *right[1]}}
        return f"({left[0]}) {'+' if sign > 0 else '-'} ({right[0]})", factors

    return st.one_of(
        st.builds(number, children, st.sampled_from([0.1, 2, 0.25, 3, 1.5])),
        st.builds(plus, children, children, st.sampled_from([1, -1])),
    )


@given(said=st.recursive(LEAF, _join, max_leaves=12))
@settings(max_examples=100, deadline=None)
def test_expressions_are_exact(said):
    text, factors = said
    factors = {n: f for n, f in factors.items() if f}
    if factors:
        assert parse(text) == factors
    else:
        with pytest.raises(ConfigError, match="everything cancels"):
            parse(text)


def test_models_by_expression(tmp_path):
    base, a, toxic = (tiny("llama", seed=i)[0] for i in range(3))
    found = state(pt.merge("base + 0.8*(a - base) - 0.3*(toxic - base)", base=base, a=a, toxic=toxic))
    for name, tensor in state(base).items():
        wanted = tensor + 0.8 * (state(a)[name] - tensor) - 0.3 * (state(toxic)[name] - tensor)
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-5)
    exact = pt.merge("base + (a - base)", base=base, a=a)
    assert same(exact, a)
    for i, net in enumerate((base, a)):
        net.save_pretrained(tmp_path / f"{i}")
    out = pt.merge("(x + y) / 2", x=tmp_path / "0", y=tmp_path / "1", out=tmp_path / "out")
    again = state(type(base).from_pretrained(out))
    assert all(torch.allclose(again[n], (state(base)[n] + state(a)[n]) / 2, atol=1e-6) for n in again)


def test_adapters_by_expression(llama, different):
    one, two = different[:2]
    made = pt.merge("one - 0.5 * two", one=one, two=two)
    wanted = pt.merge([one, two], "task_arithmetic", weights=[1, -0.5])
    assert made.hash == wanted.hash and made.form.rank == 6
    mixed = pt.merge("base + 2 * (one - base)", base=llama, one=one)
    assert apart(mixed, one.merge_into(llama, 2.0)) < 1e-5
    assert apart(pt.merge("one", base=llama, one=one), one.merge_into(llama)) < 1e-6


def test_names_of_an_expression():
    nets = {"base": tiny("llama")[0], "tuned": tiny("llama", seed=1)[0]}
    with pytest.raises(ConfigError, match="'tunde', which is not given .did you mean 'tuned'"):
        pt.merge("base + tunde", **nets)
    with pytest.raises(ConfigError, match="'tuned' is given and the expression does not name it"):
        pt.merge("base * 0.5", **nets)
    with pytest.raises(ConfigError, match="leave method, weights and each out"):
        pt.merge("base + tuned", "ties", **nets)
