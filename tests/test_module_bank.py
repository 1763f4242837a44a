"""The form module-bank: masks that tasks assemble of modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import colours, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError
from polytask.core.form import Call
from polytask.core.site import Site
from polytask.forms.module_bank import ModuleBank, grown, similarity

SMALL = {"epochs": 2, "lr": 1e-2, "batch_size": 4, "progress": False}
BATCH = {"input_ids": torch.tensor([[101, 2023, 2003, 102], [101, 7592, 2088, 102], [101, 3231, 2003, 102]])}


@pytest.fixture(scope="module")
def base(minilm_tokenizer):
    return tiny_bert(minilm_tokenizer)


@pytest.fixture
def model(base):
    yield base
    base.detach()


@pytest.fixture(scope="module")
def learned(base):
    """A bank that two tasks have learned, once; each test gets a copy."""
    tasks = [colours(name="a"), colours(name="b", start=50)]
    bank = pt.learn(base, tasks, form={"name": "module-bank", "modules": 3}, joint=True, **SMALL)

    def get() -> Adapter:
        return copy.deepcopy(bank)

    return get


def states(model, mix, tasks=None):
    with torch.no_grad(), model.using(mix, tasks=tasks):
        return model.module(**BATCH).last_hidden_state


def one(form, o=6, i=10, seed=0):
    """A patch with values of its own, at a linear layer."""
    torch.manual_seed(seed)
    base = nn.Linear(i, o)
    site = Site("layer", "linear", "other", (o, i), bias=True)
    patch = form.patch(site).bound(base, site)
    patch.start(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for value in patch.parameters():
            value.normal_()
    return patch, base


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.0, 0.1, 0.3, 0.55, 0.9]), modules=st.integers(1, 5))
def test_each_task_keeps_its_share_of_the_weights(seed, sparsity, modules):
    """W_t against the rule written out, in a batch of three tasks, one of them not known."""
    patch, base = one(ModuleBank(("a", "b"), modules, sparsity), seed=seed)
    x = torch.randn(3, 4, 10)
    y = base(x)
    out = y + patch.contribute(x, y, Call(tasks=("b", "?", "a"), rows=3))
    for row, task in ((0, "T1"), (2, "T0"), (1, None)):
        T = torch.ones(modules) if task is None else getattr(patch, task)
        on = [k for k in range(modules) if torch.sigmoid(T[k]) > 0.5] or [int(T.argmax())]
        total = sum(patch.M[k] for k in on)
        keep = math.ceil((1.0 - sparsity) * 60)
        least = total.flatten().sort(descending=True).values[keep - 1]
        weight = torch.where(total >= least, base.weight, 0.0)
        torch.testing.assert_close(out[row], x[row] @ weight.T + base.bias)
    assert int(patch.mask("a").sum()) == int(patch.mask().sum()) == math.ceil((1.0 - sparsity) * 60)


def test_no_sparsity_is_the_base(model):
    adapter = Adapter.new(model, ModuleBank(sparsity=0.0)).trainable(False)
    model.attach(adapter, "m")
    torch.testing.assert_close(states(model, "m"), states(model, None))


def test_it_starts_with_the_smallest_weights_off(model):
    adapter = Adapter.new(model, ModuleBank(("a", "b"), sparsity=0.5))
    model.attach(adapter, "m")
    for name, patch in adapter.patches.items():
        weight = model.module.get_submodule(name).weight.abs()
        view = patch.bound(model.module.get_submodule(name), patch.site)
        kept = view.mask("a")
        assert (weight[kept].mean() > 2 * weight[~kept].mean()) and torch.equal(kept, view.mask("b"))


def test_tasks_that_select_the_same_share_their_weights():
    patch, _ = one(ModuleBank(("a", "b"), 3))
    with torch.no_grad():
        patch.T0.copy_(torch.tensor([0.4, -1.0, 2.0]))
        patch.T1.copy_(torch.tensor([3.0, -0.1, 0.01]))
    patch.requires_grad_(False)
    assert torch.equal(patch.mask("a"), patch.mask("b"))
    with torch.no_grad():
        patch.T1[1] = 0.5
    assert not torch.equal(patch.mask("a"), patch.mask("b"))


def test_gradients_pass_both_steps():
    """dL/dM_k = selected_k W dL/dW and dL/dT_k = sigmoid'(T_k) <M_k, W dL/dW>, of the batch's tasks alone."""
    patch, base = one(ModuleBank(("a", "b"), 3))
    with torch.no_grad():
        patch.T0.copy_(torch.tensor([1.0, -1.0, 0.5]))
    x, g = torch.randn(2, 10), torch.randn(2, 6)
    (patch.contribute(x, base(x), Call(tasks=("a", "a"), rows=2)) * g).sum().backward()
    inner = base.weight.detach() * (g.T @ x)
    for k, on in enumerate((1.0, 0.0, 1.0)):
        torch.testing.assert_close(patch.M.grad[k], on * inner)
        slope = torch.sigmoid(patch.T0[k]) * (1 - torch.sigmoid(patch.T0[k]))
        torch.testing.assert_close(patch.T0.grad[k], (slope * (patch.M[k] * inner).sum()).detach())
    assert patch.T1.grad is None and base.weight.grad is None


def test_it_learns_with_the_tasks_told(learned):
    bank = learned()
    assert bank.form.tasks == ("a", "b")
    table = bank.card.training["measured"]["similarity of the tasks"]
    assert table["a"][0] == pytest.approx(1.0, abs=1e-3) and table["a"][1] == table["b"][0] < 1.0
    names, matrix = similarity(bank)
    assert names == ("a", "b") and torch.allclose(matrix, matrix.T)


def test_a_new_task_is_a_row_and_the_others_stay_bit_for_bit(learned, model, tmp_path):
    bank = learned()
    model.attach(bank, "old")
    before = states(model, "old", ["a", "b", "?"])
    model.detach("old")
    start = grown(bank, "c", like="b")
    assert start.size == 3 * len(bank.patches)
    more = pt.learn(model, colours(name="c", start=99), form=start.form, start=start, **SMALL)
    head = sum(p.numel() for p in more.heads["c"].parameters())
    old_heads = sum(p.numel() for n in "ab" for p in more.heads[n].parameters())
    assert more.card.training["trained_parameters"] - head - old_heads == start.size
    moved = {n for n, v in more.state().items() if not n.startswith("head/") and not torch.equal(v, start.state()[n])}
    assert moved == {f"{site}:T2" for site in more.patches}
    assert all(torch.equal(v, bank.heads["a"].state_dict()[n]) for n, v in more.heads["a"].state_dict().items())
    model.attach(Adapter.load(more.save(tmp_path / "more")), "new")
    assert torch.equal(states(model, "new", ["a", "b", "?"]), before)
    assert not torch.equal(states(model, "new", ["c"] * 3), states(model, "new", ["a"] * 3))


def test_masks_follow_their_parameters(learned, model):
    """What is kept of a mask is dropped when a parameter changes."""
    bank = learned()
    model.attach(bank, "m")
    first = states(model, "m", ["a"] * 3)
    assert torch.equal(states(model, "m", ["a"] * 3), first)
    with torch.no_grad():
        for patch in bank.patches.values():
            patch.M.neg_()
    assert not torch.allclose(states(model, "m", ["a"] * 3), first)
    twin = copy.deepcopy(bank)
    model.attach(twin, "twin")
    assert torch.equal(states(model, "twin", ["a"] * 3), states(model, "m", ["a"] * 3))


def test_what_it_refuses(learned, model):
    for wrong, said in (
        ({"modules": 0}, "modules must"), ({"sparsity": 1.0}, "sparsity must"), ({"tasks": "mood"}, "different names"),
        ({"tasks": ["a"], "learns": ["b"]}, "learns has 'b'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            pt.Form.of({"name": "module-bank", **wrong})
    bank = learned()
    with pytest.raises(AdapterError, match="give a new one"):
        grown(bank, "a")
    with pytest.raises(AdapterError, match="no module bank"):
        grown(Adapter.new(model, "lora"), "a")
    with pytest.raises(AdapterError, match="no module bank"):
        similarity(Adapter.new(model, "lora"))
    with pytest.raises(AdapterError, match="has no task 'z'"):
        next(iter(bank.patches.values())).mask("z")
    with pytest.raises(AdapterError, match="must be attached"):
        next(iter(bank.patches.values())).delta()
