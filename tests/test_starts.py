"""Starts of LoRA: exactly the base at the beginning, and the factors that the papers say."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
import time
import types
from pathlib import Path

import peft
import pytest
import torch
from conftest import colours, same_state
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.core.export import serving_problems
from polytask.core.form import forms
from polytask.core.head import head_for
from polytask.core.recipe import Stage
from polytask.forms import bayes
from polytask.forms import starts as starts_room
from polytask.forms.seen import Components, _dealt
from polytask.forms.starts import excess, leading_values, low_rank_svd, matrix_of, quantised, starts
from polytask.learn import learner

FROM_WEIGHTS = ("pissa", "pissa:4", "olora", "orthogonal", "loftq", "loftq:2")
FROM_DATA = ("corda", "corda:kpm", "eva", "eva:1", "lora-ga", "lora-ga:A2rBr", "lora-ga:ArBr")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
QUIET = ("OLoRA changes", "fan_in_fan_out is set", "lora with eva", "`is_gradient")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}") for words in QUIET]


def run(model, batch, mix=None):
    with torch.no_grad(), model.using(mix):
        return output(model.module(**batch))


def begun(model, batch, form, sites="linear", seed=0, times=3):
    """A fresh adapter, attached as ``a``, that has had its start on some batches."""
    adapter = pt.Adapter.new(model, form, sites, seed=seed, name="a")
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    model.attach(adapter, "a")

    def loss(at):
        rows = {k: v.roll(at, 0)[:2] for k, v in batch.items()}
        return (output(model.module(**rows)) - at).square().mean()

    with model.using("a"):
        form.begin(model, adapter, [lambda at=at: loss(at) for at in range(times)])
    model.rebind("a")
    return adapter


def product(patch):
    """s B0 A0: what the start takes out of the weight, [o, i]."""
    return patch.form.scale * patch.B0.flatten(1) @ patch.A0.flatten(1)


def weight_at(model, patch):
    return matrix_of(model.module.get_submodule(patch.site.path), patch.site)


def test_every_start_is_tested_here():
    assert {name.partition(":")[0] for name in FROM_WEIGHTS + FROM_DATA} == set(starts)


@pytest.mark.parametrize(
    ("init", "network"),
    [(init, "bert") for init in FROM_WEIGHTS + FROM_DATA]
    + [(init, "gpt2") for init in ("pissa", "olora", "corda", "eva", "lora-ga")]
    + [("pissa:4", "llama")],
)
def test_starts_exactly_as_the_base_and_trains(init, network):
    module, batch = tiny(network)
    model = pt.Model(module)
    before, base = run(model, batch), copy.deepcopy(module.state_dict())
    adapter = begun(model, batch, pt.LoRA(rank=4, alpha=6, init=init))
    assert torch.equal(run(model, batch, "a"), before)
    assert torch.equal(run(model, batch, ["a", None, "a"]), before)
    values = adapter.state()
    optimiser = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        with model.using("a"):
            output(module(**batch)).square().mean().backward()
        if init.partition(":")[0] != "eva" and not optimiser.state:  # unlike a zero B, both factors learn at once
            assert all(p.grad.abs().max() > 0 for p in adapter.parameters() if p.requires_grad)
        optimiser.step()
        optimiser.zero_grad()
    still = {name for name, value in adapter.state().items() if torch.equal(value, values[name])}
    assert still == {f"{site}:{n}" for site, patch in adapter.patches.items() for n in patch.frozen}
    assert same_state(base, module)
    assert adapter.size == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


@pytest.mark.parametrize("init", ["pissa", "corda", "lora-ga"])
def test_starts_exactly_as_the_base_in_bf16(init):
    module, batch = tiny("llama")
    model = pt.Model(module)
    adapter = begun(model, batch, pt.LoRA(rank=4, init=init))
    assert max(float(p.delta().detach().abs().max()) for p in adapter.patches.values()) == 0.0
    model.to(torch.bfloat16)
    assert run(model, batch).dtype == torch.bfloat16
    assert torch.equal(run(model, batch, "a"), run(model, batch))


@pytest.mark.parametrize(("network", "sites"), [("resnet", "conv"), ("bert", "token | query")])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "loftq"])
def test_convolutions_and_embeddings(init, network, sites, tmp_path):
    module, batch = tiny(network)
    model = pt.Model(module)
    before = run(model, batch)
    adapter = begun(model, batch, pt.LoRA(rank=2, init=init), sites)
    assert torch.equal(run(model, batch, "a"), before)
    move(adapter)
    attached = run(model, batch, "a")
    assert not torch.allclose(attached, before, atol=1e-4)
    assert torch.allclose(run(adapter.merge_into(model), batch), attached, **CLOSE)
    adapter.save(tmp_path / "a")
    assert pt.Adapter.load(tmp_path / "a").hash == adapter.hash


def move(adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("network", "init", "scaling"),
    [
        ("bert", "pissa", "classic"),
        ("bert", "olora", "rank-stabilised"),
        ("bert", "eva", "classic"),
        ("gpt2", "corda:kpm", "rank-stabilised"),
        ("gpt2", "eva", "rank-stabilised"),
        ("gpt2", "lora-ga", "classic"),
    ],
)
def test_files_are_bit_equal_for_us_and_plain_lora_for_peft(network, init, scaling, tmp_path):
    module, batch = tiny(network)
    model = pt.Model(module)
    adapter = begun(model, batch, pt.LoRA(rank=4, alpha=6, init=init, scaling=scaling))
    move(adapter)
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and again.form == adapter.form
    model.attach(again, "again")
    ours = run(model, batch, "a")
    assert torch.equal(ours, run(model, batch, "again"))
    assert torch.allclose(run(adapter.merge_into(model), batch), ours, **CLOSE)
    model.detach()
    wrapped = peft.PeftModel.from_pretrained(tiny(network)[0], str(tmp_path / "a")).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(wrapped(**batch)), ours, **CLOSE)
    (tmp_path / "a" / "polytask.json").unlink()
    model.attach(pt.Adapter.load(tmp_path / "a"), "plain")
    torch.testing.assert_close(run(model, batch, "plain"), ours, **CLOSE)


def test_rows_and_mixes_equal_the_plain_lora_that_is_saved(tmp_path):
    module, batch = tiny("bert")
    model = pt.Model(module)
    for i, init in enumerate(("pissa", "olora", "orthogonal")):
        adapter = pt.Adapter.new(model, pt.LoRA(rank=2 + 2 * (i % 2), init=init), seed=i)
        move(adapter.trainable(), i)
        model.attach(adapter, f"a{i}")
        adapter.save(tmp_path / "a")
        (tmp_path / "a" / "polytask.json").unlink()
        model.attach(pt.Adapter.load(tmp_path / "a"), f"p{i}")
    for mix in ({"0": 0.5, "1": 0.25, "2": 0.3}, ["0", "1", "2"], ["2", None, "0"]):
        ours, plain = (
            {f"{x}{k}": v for k, v in mix.items()} if isinstance(mix, dict) else [k and f"{x}{k}" for k in mix]
            for x in "ap"
        )
        assert torch.allclose(run(model, batch, ours), run(model, batch, plain), **CLOSE)
    kept = run(model, batch, ["a0", "a1", "a2"])
    move(model.adapters["a1"].trainable())
    assert not torch.allclose(run(model, batch, ["a0", "a1", "a2"])[1], kept[1], atol=1e-4)  # nothing stale is served


@pytest.mark.parametrize("alpha", [4, 7.5])
def test_pissa_is_the_best_product_of_its_rank(alpha):
    module, _ = tiny("gpt2")
    model = pt.Model(module)
    adapter = pt.Adapter.new(model, pt.LoRA(rank=4, alpha=alpha, init="pissa"))
    for patch in adapter.patches.values():
        weight = weight_at(model, patch)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(product(patch), best, **CLOSE)
        assert abs(excess(weight, product(patch), 4)) < 1e-4
        gram = patch.A @ patch.A.T
        torch.testing.assert_close(gram, patch.B.T @ patch.B, **CLOSE)
        torch.testing.assert_close(gram, torch.diag(S[:4] / patch.form.scale), **CLOSE)


def test_randomised_pissa_is_quick_and_close():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 1024, generator=generator)

    def seconds(work):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    make = starts["pissa"].make
    full = seconds(lambda: make(weight, 16, generator, None, 0))
    quick = min(seconds(lambda: make(weight, 16, generator, None, 4)) for _ in range(3))
    assert quick < full / 5, (quick, full)
    errors = []
    for iterations in (1, 4, 16):
        A, B = make(weight, 16, generator, None, iterations)
        errors.append(excess(weight, B @ A, 16))
    # a random matrix is the hardest case: its singular values hardly fall
    assert errors[0] > errors[1] > errors[2] >= -1e-6 and errors[1] < 5e-3 and errors[2] < 5e-4, errors
    decaying = weight * torch.arange(1, 1025).float().rsqrt()
    A, B = make(decaying, 16, generator, None, 4)
    assert excess(decaying, B @ A, 16) < 1e-3


def test_the_error_of_a_randomised_start_is_measured(encoder, task):
    options = {"epochs": 1, "batch_size": 4, "progress": False, "precision": "fp32"}
    found = {}
    for init in ("pissa:1", "pissa:8", "pissa", "zero-B"):
        adapter = pt.learn(encoder, task, form=pt.LoRA(rank=4, init=init), **options)
        found[init] = adapter.card.training.get("measured")
    assert found["pissa"] is None and found["zero-B"] is None
    few, many = (found[f"pissa:{n}"]["excess error of the randomised SVD"] for n in (1, 8))
    assert few > many >= 0 and few < 0.1
    by_site = found["pissa:1"]["excess error by site"]
    assert set(by_site) == set(adapter.patches) and max(by_site.values()) == few
    weight = encoder.module.get_submodule("encoder.layer.0.attention.self.query").weight.detach()
    first = pt.Adapter.new(encoder, pt.LoRA(rank=4, init="pissa:1"))
    patch = first.patches["encoder.layer.0.attention.self.query"]
    expected = (weight - product(patch)).norm() / torch.linalg.svdvals(weight)[4:].norm() - 1
    assert by_site["encoder.layer.0.attention.self.query"] == pytest.approx(float(expected), abs=1e-4)


def test_the_command_line_prints_the_error_of_a_randomised_start(run, base, data, tmp_path):
    code, out, err = run(
        "learn", data / "one", "--base", base, "--form", "lora:rank=2,init=pissa:2", "--epochs", 1, "--out", tmp_path
    )
    assert code == 0 and re.search(r"excess error of the randomised SVD: \d", out) and "by site" not in out, err


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_leading_values_are_those_of_the_full_svd(shape, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    S = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(leading_values(matrix, 6), S[:6])
    monkeypatch.setattr(starts_room, "EXACT", 4)  # a large one
    torch.testing.assert_close(leading_values(matrix, 6), S[:6], atol=1e-6, rtol=1e-6)


def test_subspace_iteration_finds_an_exact_low_rank_matrix():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 5, generator=generator) @ torch.randn(5, 20, generator=generator)
    U, S, Vh = low_rank_svd(matrix, 5, 2, generator)
    torch.testing.assert_close((U * S) @ Vh, matrix, **CLOSE)


def test_olora_and_orthogonal():
    module, _ = tiny("bert")
    model = pt.Model(module)
    for patch in pt.Adapter.new(model, pt.LoRA(rank=4, init="olora")).patches.values():
        weight = weight_at(model, patch)
        torch.testing.assert_close(patch.B.T @ patch.B, torch.eye(4), **CLOSE)
        assert torch.equal(patch.A.tril(-1), torch.zeros_like(patch.A))
        span = patch.B @ patch.B.T @ weight[:, :4]
        torch.testing.assert_close(span, weight[:, :4], **CLOSE)
    for patch in pt.Adapter.new(model, pt.LoRA(rank=4, init="orthogonal")).patches.values():
        assert product(patch).abs().max() < 1e-6 and patch.A.abs().max() > 0.01 and patch.B.abs().max() > 0.01


def test_hand_examples():
    make = starts["pissa"].make
    A, B = make(torch.diag(torch.tensor([3.0, 1.0])), 1, torch.Generator(), None, 0)
    torch.testing.assert_close(B @ A, torch.diag(torch.tensor([3.0, 0.0])))
    A, B = starts["olora"].make(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), 1, torch.Generator(), None, None)
    torch.testing.assert_close(B @ A, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    weight, seen = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([10.0, 1.0]))
    for mode, kept in (("ipm", [1.0, 0.0]), ("kpm", [0.0, 2.0])):
        A, B = starts["corda"].make(weight, 1, torch.Generator(), weight @ seen, mode)
        torch.testing.assert_close(B @ A, torch.diag(torch.tensor(kept)))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_corda_is_optimal_for_its_inputs_and_pissa_without_any(shape):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(shape, generator=generator), torch.randn(99, shape[1], generator=generator)
    seen = (x.T @ x / 99).double() + 0.01 * torch.eye(shape[1])
    make, product = starts["corda"].make, weight.double() @ seen
    S = torch.linalg.svdvals(product)
    A, B = make(weight, 4, generator, product, "ipm")
    error = ((weight.double() - (B @ A).double()) @ seen).norm()
    torch.testing.assert_close(error, S[4:].square().sum().sqrt(), **CLOSE)
    A2, B2 = make(weight, 4, generator, 9.0 * product, "ipm")
    torch.testing.assert_close(B2 @ A2, B @ A, **CLOSE)
    torch.testing.assert_close(B2.norm() / B.norm(), torch.tensor(3.0), **CLOSE)
    most = min(shape)
    A, B = make(weight, most, generator, product, "kpm")
    torch.testing.assert_close(B @ A, weight, **CLOSE)
    A, B = make(weight, 3, generator, product, "kpm")
    torch.testing.assert_close(
        ((B @ A).double() @ seen).norm(), S[-3:].square().sum().sqrt(), **CLOSE
    )  # what it takes from the base is what these inputs use least
    A, B = make(weight, 4, generator, weight.double(), "ipm")
    A2, B2 = starts["pissa"].make(weight, 4, generator, None, 0)
    torch.testing.assert_close(B @ A, B2 @ A2, **CLOSE)


def test_lora_ga_takes_disjoint_directions_of_the_gradient():
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(24, 16, generator=generator), torch.randn(24, 16, generator=generator)
    for direction in ("ArB2r", "A2rBr", "ArBr"):
        A, B = starts["lora-ga"].make(weight, 4, generator, gradient, direction)
        length = math.sqrt(24) / 16
        torch.testing.assert_close(A @ A.T, length * torch.eye(4), **CLOSE)
        torch.testing.assert_close(B.T @ B, length * torch.eye(4), **CLOSE)
        assert (B.T @ gradient @ A.T).abs().max() < 1e-4


def test_lora_ga_sees_the_gradient_of_the_weight():
    from polytask.forms import seen as room

    module, batch = tiny("gpt2")
    model = pt.Model(module)
    adapter = pt.Adapter.new(model, pt.LoRA(rank=4, init="lora-ga"))
    model.attach(adapter, "a")

    def loss():
        return output(module(**batch)).square().mean()

    with model.using("a"):
        found = room._gradients(model, adapter, adapter.patches, [loss, loss])
    assert all(p.grad is None for p in adapter.parameters())
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    model.detach("a")
    loss().backward()
    for name, patch in adapter.patches.items():
        torch.testing.assert_close(
            found[name].T, module.get_submodule(patch.site.path).weight.grad, atol=1e-5, rtol=1e-3
        )


def test_loftq_starts_in_the_directions_of_the_quantisation_error():
    module, _ = tiny("bert")
    model = pt.Model(module)
    for bits in (2, 4):
        for patch in pt.Adapter.new(model, pt.LoRA(rank=4, alpha=6, init=f"loftq:{bits}")).patches.values():
            weight = weight_at(model, patch)
            lost = weight - quantised(weight, bits)
            S = torch.linalg.svdvals(lost)
            left = (lost - product(patch)).norm()
            torch.testing.assert_close(left, S[4:].square().sum().sqrt(), **CLOSE)
            assert left < lost.norm()
    values = torch.randn(4, 64)
    for bits in (2, 3, 4, 8):
        assert len(quantised(values, bits)[0].unique()) <= 2**bits
        assert torch.equal(quantised(values, bits).abs().amax(1), values.abs().amax(1))
    assert torch.equal(quantised(torch.zeros(3, 5), 4), torch.zeros(3, 5))


# --- EVA


def test_components_of_batches_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) * torch.arange(1, 13).float() + 5
    components = Components(12)
    for part in x.split(37):
        components.see(part)
    whole = x[: components.count].double()  # the last few rows wait for more
    _, S, V = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
    torch.testing.assert_close(components.shares(), S.square() / S.square().sum(), atol=1e-5, rtol=1e-3)
    assert ((components.rows().double() * V).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(components.rows() @ components.rows().T, torch.eye(12), **CLOSE)
    few = Components(6)
    few.see(x[:3])
    assert few.shares().shape == (6,) and few.shares()[3:].sum() == 0
    torch.testing.assert_close(few.rows() @ few.rows().T, torch.eye(6), **CLOSE)


def test_ranks_are_dealt_out_by_share():
    shares = {"a": torch.tensor([0.6, 0.3]), "b": torch.tensor([0.2, 0.1])}
    assert _dealt(shares, {"a": 1, "b": 1}) == {"a": 2, "b": 0}


@pytest.mark.parametrize("share", [1, 2, 3])
def test_eva_keeps_the_total(share):
    module, batch = tiny("bert")
    model = pt.Model(module)
    form = pt.LoRA(rank=4, alpha=6, init=f"eva:{share}")
    sites = len(pt.Adapter.new(model, form).patches)
    adapter = begun(model, batch, form)
    ranks = [patch.form.rank for patch in adapter.patches.values()]
    assert sum(ranks) == 4 * sites and max(ranks) <= 4 * share
    assert (set(ranks) == {4} and len(ranks) == sites) if share == 1 else len(set(ranks)) > 1
    for patch in adapter.patches.values():
        torch.testing.assert_close(patch.A @ patch.A.T, torch.eye(patch.form.rank), **CLOSE)
        assert patch.form.scale == pytest.approx(1.5) and not patch.B.any()
    assert {name for name, slot in model._hub.slots.items() if "a" in slot.patches} == set(adapter.patches)


# --- PEFT's own


def peft_product(wrapped, path):
    layer = wrapped.base_model.model.get_submodule(path)
    turned = getattr(layer, "fan_in_fan_out", False)
    delta = layer.get_delta_weight("default").detach()
    return delta.T if turned else delta


# PEFT's OLoRA factors GPT-2's weights as they are stored, which is turned, so its factors do not fit them
@pytest.mark.parametrize(("init", "network"), [("pissa", "bert"), ("pissa", "gpt2"), ("olora", "bert")])
def test_products_are_those_of_peft(init, network):
    module, _ = tiny(network)
    adapter = pt.Adapter.new(pt.Model(tiny(network)[0]), pt.LoRA(rank=4, alpha=6, init=init))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=init,
        target_modules=list(adapter.patches),
        fan_in_fan_out=network == "gpt2",
    )
    wrapped = peft.get_peft_model(module, config)
    for name, patch in adapter.patches.items():
        torch.testing.assert_close(product(patch), peft_product(wrapped, name), **CLOSE)


def unmasked(batch):
    return {k: torch.ones_like(v) if k == "attention_mask" else v for k, v in batch.items()}


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_that_of_peft(mode, monkeypatch):
    # PEFT takes its dataclass decorator from a package that it does not ask for
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    module, batch = tiny("bert")
    batch = {k: v[:1] for k, v in unmasked(batch).items()}  # PEFT's hook takes one row at a time, and no mask
    model = pt.Model(tiny("bert")[0])
    form = pt.LoRA(rank=4, alpha=6, init=f"corda:{mode}")
    adapter = pt.Adapter.new(model, form)
    model.attach(adapter, "a")
    with model.using("a"):
        form.begin(model, adapter, [lambda: output(model.module(**batch)).sum()])
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="corda", target_modules=list(adapter.patches),
        corda_config=CordaConfig(corda_method=mode),
    )  # fmt: skip
    preprocess_corda(module, config, run_model=lambda: module(**batch))
    wrapped = peft.get_peft_model(module, config)
    for name, patch in adapter.patches.items():
        theirs = peft_product(wrapped, name)
        assert (product(patch) - theirs).norm() < 1e-3 * theirs.norm(), name


def test_eva_is_that_of_peft():
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    module, batch = tiny("bert")
    batch = unmasked(batch)
    model = pt.Model(tiny("bert")[0])
    form = pt.LoRA(rank=4, alpha=6, init="eva")
    adapter = pt.Adapter.new(model, form)
    names = list(adapter.patches)
    model.attach(adapter, "a")
    with model.using("a"):
        form.begin(model, adapter, [lambda: output(model.module(**batch)).sum()] * 3)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="eva", target_modules=names, eva_config=EvaConfig(rho=2.0)
    )
    wrapped = peft.get_peft_model(module, config)
    initialize_lora_eva_weights(
        wrapped, [batch], forward_fn=lambda net, inputs: net(**inputs), show_progress_bar=False,
        prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
    )  # fmt: skip
    ranks, same = {}, 0
    for name in names:
        layer = wrapped.base_model.model.get_submodule(name)
        ranks[name] = layer.r["default"] if hasattr(layer, "r") else 0
    ours = {name: adapter.patches[name].form.rank if name in adapter.patches else 0 for name in names}
    # equal shares of layers with the same inputs may go to either
    assert sorted(ours.values()) == sorted(ranks.values())
    for name in names:
        few = min(ours[name], ranks[name])
        if few:
            theirs = wrapped.base_model.model.get_submodule(name).lora_A["default"].weight[:few].detach()
            cosines = (theirs * adapter.patches[name].A[:few]).sum(1).abs()
            same += int((cosines > 0.999).sum())
    assert same >= 0.9 * sum(ranks.values())


# --- through learn, and what is said


@pytest.mark.parametrize("init", ["pissa", "corda:kpm", "eva", "lora-ga"])
def test_learning_from_a_start(init, encoder, task, tmp_path):
    form = pt.LoRA(rank=4, init=init)
    options = {"form": form, "epochs": 2, "batch_size": 4, "progress": False, "precision": "fp32"}
    before = copy.deepcopy(encoder.module.state_dict())
    adapter = pt.learn(encoder, task, out=tmp_path / "a", **options)
    assert same_state(before, encoder.module) and encoder.attached == ()
    assert pt.learn(encoder, task, **options).hash == adapter.hash
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash
    encoder.attach(again, "a")
    assert 0 <= pt.evaluate(encoder, task, "a").value <= 1
    encoder.detach()
    further = pt.learn(encoder, colours(24, "other"), start=adapter, **options)  # a start is not started again
    assert further.hash != adapter.hash and set(further.patches) == set(adapter.patches)
    if form.subtracts:
        for name, patch in further.patches.items():
            assert torch.equal(patch.A0, adapter.patches[name].A0)


OTHERS = [name for name in forms if "tasks" not in {f.name for f in dataclasses.fields(forms[name])}]


@pytest.mark.parametrize("name", OTHERS)
def test_any_form_starts_from_a_folder(name, encoder, tmp_path):
    """What was saved is bit for bit where learning goes on, with a head for the new task beside the old one's."""
    kind = forms[name]
    try:
        large = pt.Adapter.new(encoder, kind(), seed=3, name="large")
    except pt.PolytaskError:  # it acts at no site of a BERT
        return
    move(large)
    large.heads["large"] = head_for(encoder, colours(24, "large"), 0)
    large.save(tmp_path / "large")
    task, stage = colours(24), Stage.of({"form": {"name": name}})
    small, fresh = learner._fresh(encoder, [task], kind(), None, stage, "small", tmp_path / "large")
    assert set(small.parts) == set(large.parts)
    for site, part in large.parts.items():
        kept = small.parts[site].stored()
        assert all(torch.equal(kept[key], value) for key, value in part.stored().items())
    assert set(small.heads) == {"large", "colours"} and fresh == {"colours"} and small.card.parents == [large.hash]


@pytest.mark.parametrize("form", [pt.LoRA(rank=4), pt.LoRA(rank=4, init="pissa"), "full"])
def test_a_pretrained_adapter_is_a_start(form, encoder, task, tmp_path):
    """PVP (arXiv 2304.13639): modules that learned on a larger set, a fresh head, the same backbone."""
    options = {"epochs": 1, "batch_size": 4, "progress": False, "precision": "fp32"}
    large = pt.learn(encoder, colours(48, "large"), form=form, out=tmp_path / "large", **options)
    small = pt.learn(encoder, task, form=form, start=tmp_path / "large", lr=1e-30, **options)
    values = large.state()
    assert all(torch.equal(value, values[n]) for n, value in small.state().items() if not n.startswith("head/"))
    assert set(small.heads) == {"large", "colours"} and small.card.parents == [large.hash]


def test_padding_is_not_seen(encoder, monkeypatch):
    from polytask.forms import seen as room

    rows = []
    monkeypatch.setattr(room.Components, "see", lambda self, x: rows.append(len(x)) or setattr(self, "V", None))
    form = pt.LoRA(rank=2, init="eva")
    adapter = pt.Adapter.new(encoder, form, "query")
    encoder.attach(adapter, "a")
    batch = encoder.processor(["a film", "the second, much longer sentence of two"], padding=True, return_tensors="pt")
    with encoder.using("a"), pytest.raises(AssertionError):
        form.begin(encoder, adapter, [lambda: encoder.module(**batch).last_hidden_state.sum()])
    assert set(rows) == {int(batch["attention_mask"].sum())}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pisa"}, "did you mean 'pissa'"),
        ({"init": "pissa:x"}, "a whole number of at least 1"),
        ({"init": "olora:3"}, "init must be one of"),
        ({"init": "corda:both"}, "ipm, kpm are allowed"),
        ({"init": "eva:0.5"}, "a number of at least 1"),
        ({"init": "loftq:5"}, "2, 3, 4 or 8 bits"),
        ({"init": "orthogonal", "rank": 3}, "needs an even rank"),
        ({"init": "pissa", "alpha": 0}, "divides by s"),
    ],
)
def test_what_cannot_be_done_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        pt.LoRA(**settings)
    with pytest.raises(ConfigError, match="got 'pissa'; it is for lora"):
        pt.DoRA(init="pissa")


def test_sites_that_a_start_cannot_serve():
    module, _ = tiny("bert")
    model = pt.Model(module)
    with pytest.raises(pt.PolytaskError, match="takes ranks up to 32 from a weight of 32 x 32"):
        pt.Adapter.new(model, pt.LoRA(rank=33, init="pissa"), "query")
    with pytest.raises(pt.PolytaskError, match="takes ranks up to 16"):
        pt.Adapter.new(model, pt.LoRA(rank=17, init="lora-ga"), "query")
    with pytest.raises(pt.PolytaskError, match="looks at the inputs of linear layers"):
        pt.Adapter.new(model, pt.LoRA(init="eva"), "token")


def test_a_file_of_other_ranks_is_refused(tmp_path: Path):
    module, _ = tiny("bert")
    patch = next(iter(pt.Adapter.new(pt.Model(module), pt.LoRA(rank=4, init="pissa"), "query").patches.values()))
    with pytest.raises(pt.PolytaskError, match="must hold 8 ranks"):
        patch.load({"A": torch.zeros(4, 32), "B": torch.zeros(32, 4)})


def test_servers_are_told_the_rank_that_the_file_has():
    module, _ = tiny("bert")
    adapter = pt.Adapter.new(pt.Model(module), pt.LoRA(rank=20, init="pissa"), "query")
    assert any("the rank 40 is above max_lora_rank=32" in problem for problem in serving_problems(adapter, 32))


@pytest.mark.slow
@pytest.mark.parametrize("init", ["corda", "eva"])
def test_starts_from_data_are_quick_on_minilm(init):
    model = pt.Model.load("minilm")
    texts = [f"sentence number {i} of some that a film review might have, {'good ' * (i % 9)}" for i in range(256)]
    form = pt.LoRA(rank=8, init=init)
    adapter = pt.Adapter.new(model, form)
    model.attach(adapter, "a")

    def loss(at):
        batch = model.processor(texts[at : at + 16], padding=True, return_tensors="pt")
        return model.module(**batch).last_hidden_state.sum()

    began, busy = time.perf_counter(), time.process_time()
    with model.using("a"):
        form.begin(model, adapter, [lambda at=at: loss(at) for at in range(0, 256, 16)])
    # on a busy machine the time that it waits does not count, on many cores that of the others
    assert min(time.perf_counter() - began, time.process_time() - busy) < 10


# --- BayesPrompt, a start of prompts


def gaussian(mean, deviation=1.0):
    d = len(mean)
    return bayes.Mixture(torch.ones(1), torch.tensor(mean)[None], torch.eye(d)[None] / deviation)


def test_particles_tend_to_the_mean_and_keep_apart():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 0.2 - 2.0
    mu = [1.0, -1.0, 3.0]
    moved = bayes.steer(x, gaussian(mu), steps=1500, size=0.02)
    torch.testing.assert_close(moved.mean(0), torch.tensor(mu), atol=0.1, rtol=0.0)
    assert moved.std(0).min() > 0.4 > 2 * float(x.std(0).max()) - 0.1  # spread out, not all at the mode


def test_a_single_particle_rises_to_the_mode():
    towards = bayes.direction(torch.zeros(1, 1), gaussian([3.0]).score(torch.zeros(1, 1)))
    assert float(towards) == 3.0  # N(3, 1) at 0; no kernel pushes one particle
    risen = bayes.steer(torch.zeros(1, 1), gaussian([3.0]), steps=1000, size=0.02)
    assert float(risen) == pytest.approx(3.0, abs=0.05)
    equal = bayes.direction(torch.zeros(5, 2), gaussian([1.0, 0.0]).score(torch.zeros(5, 2)))
    torch.testing.assert_close(equal, torch.tensor([[1.0, 0.0]]).expand(5, 2))  # the median of their distances is zero


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_score_is_the_gradient_of_the_log_density(diagonal):
    generator = torch.Generator().manual_seed(0)
    roots = torch.rand(3, 4, generator=generator) + 0.5
    if not diagonal:
        roots = torch.diag_embed(roots) + torch.randn(3, 4, 4, generator=generator).triu(1) * 0.3
    mixture = bayes.Mixture(torch.tensor([0.2, 0.5, 0.3]), torch.randn(3, 4, generator=generator), roots)
    x = torch.randn(6, 4, generator=generator).requires_grad_()
    whole = torch.diag_embed(roots) if diagonal else roots
    parts = [
        torch.distributions.MultivariateNormal(mean, precision_matrix=root @ root.T).log_prob(x) + weight.log()
        for weight, mean, root in zip(mixture.weights, mixture.means, whole, strict=True)
    ]
    torch.stack(parts).logsumexp(0).sum().backward()
    torch.testing.assert_close(mixture.score(x.detach()), x.grad, atol=1e-4, rtol=1e-4)
    assert mixture.score(1e4 * x.detach()).isfinite().all()  # densities of zero


def test_the_mixture_finds_what_the_examples_were_drawn_from():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, 3, generator=generator) * 0.5 + mean for mean in (-4.0, 4.0)])
    mixture = bayes.Mixture.fit(x, 2, seed=0)
    assert sorted(mixture.means.mean(1).tolist()) == pytest.approx([-4.0, 4.0], abs=0.15)
    variances = torch.linalg.inv(mixture.roots @ mixture.roots.mT).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(variances, torch.full((2, 3), 0.25 + 0.1), atol=0.1, rtol=0.0)
    prompts = bayes.drawn(x, 10, 2, seed=3)
    assert torch.equal(prompts, bayes.drawn(x, 10, 2, seed=3)) and not torch.equal(
        prompts, bayes.drawn(x, 10, 2, seed=4)
    )
    near = (prompts.mean(1).abs() - 4).abs()
    assert near.max() < 2 and (prompts.mean(1) > 0).any() and (prompts.mean(1) < 0).any()
    assert bayes.drawn(x, 100, 2, seed=3).unique(dim=0).shape[0] == 100
    assert bayes.drawn(x[:3], 5, 2, seed=3).shape == (5, 3)


@pytest.mark.parametrize("network", ["encoder", "decoder", "seq2seq"])
def test_a_prompt_starts_from_the_task_s_examples(network, request, task, monkeypatch):
    model = request.getfixturevalue(network)
    seen = []
    drawn = bayes.drawn
    monkeypatch.setattr(bayes, "drawn", lambda x, *rest: seen.append((x, rest)) or drawn(x, *rest))
    options = {
        "epochs": 1,
        "batch_size": 4,
        "progress": False,
        "precision": "fp32",
        "lr": 1e-30,
        "schedule": "constant",
    }
    first = pt.learn(model, task, form=pt.Prompt(length=3, init="bayes"), **options)
    (features, (length, components, seed)) = seen[0]
    assert features.shape == (len(task.train), 32) and (length, components) == (3, 2)
    P = next(iter(first.patches.values())).P
    torch.testing.assert_close(P, drawn(features, length, components, seed))
    again = pt.learn(model, task, form=pt.Prompt(length=3, init="bayes"), **options)
    other = pt.learn(model, task, form=pt.Prompt(length=3, init="bayes"), seed=1, **options)
    assert again.hash == first.hash and not torch.equal(P, next(iter(other.patches.values())).P)
    if network == "encoder":  # the mean of the words' own vectors, without padding
        table = model.module.get_input_embeddings()
        rows = {tuple(model.processor(e.inputs[0])["input_ids"]) for e in task.train}
        means = torch.stack([table(torch.tensor(ids)).mean(0) for ids in rows])
        assert torch.cdist(features, means).amin(1).max() < 1e-5


def test_bayes_settings_that_are_refused():
    with pytest.raises(ConfigError, match="components must be a whole number of at least 1, got 0"):
        pt.Prompt(init="bayes", components=0)
