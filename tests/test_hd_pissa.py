"""HD-PiSSA: disjoint singular groups over rows or processes, one dense change, and its rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import colours, same_state, tiny_bert
from test_processes import launch
from torch import nn
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL, Call
from polytask.forms.hd_pissa import Rank

CLOSE = {"atol": 1e-6, "rtol": 1e-4}
QUICK = {"epochs": 2, "batch_size": 6, "progress": False, "precision": "fp32", "head_start": "random"}


def of_weight(weight, form):
    """The patch of one linear layer with this weight, bound to it."""
    o, i = weight.shape
    layer = nn.Linear(i, o, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = pt.Model(nn.Sequential(layer))
    adapter = pt.Adapter.new(model, form, "linear")
    (patch,) = adapter.patches.values()
    return layer, adapter, patch.bound(layer, patch.site)


def loss_of(layer, patch, x, goal):
    y = layer(x).detach()
    return (patch.add(x, y, y, 1.0, Call(rows=len(x))) - goal).square().sum()


def by_hand(weight, x, goal, form, lr, steps):
    """The change after some steps, written out as in the paper: gradients of each worker's rows, own Adam, the sum."""
    W, r, K = weight.double(), form.rank, form.groups
    U, S, Vh = torch.linalg.svd(W)
    A = [S[i * r : (i + 1) * r].sqrt()[:, None] * Vh[i * r : (i + 1) * r] for i in range(K)]
    B = [U[:, i * r : (i + 1) * r] * S[i * r : (i + 1) * r].sqrt() for i in range(K)]
    now = W.clone()
    moments = [[torch.zeros_like(t), torch.zeros_like(t)] for i in range(K) for t in (A[i], B[i])]
    for step in range(1, steps + 1):
        change = torch.zeros_like(W)
        for i in range(K):
            rows, wanted = x[i::K].double(), goal[i::K].double()
            G = 2 * (rows @ now.T - wanted).T @ rows  # [o, i]
            moved = []
            for number, gradient in ((2 * i, B[i].T @ G), (2 * i + 1, G @ A[i].T)):
                m, v = moments[number]
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).add_(gradient.square(), alpha=0.001)
                moved.append(lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
            dA, dB = moved
            change += dB @ A[i] + B[i] @ dA - dB @ dA
        now = now - change
    return now - W


@pytest.mark.parametrize(("groups", "rank"), [(1, 3), (2, 2), (3, 1)])
def test_steps_are_those_of_the_paper(groups, rank):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 6, generator=generator), torch.randn(9, 6, generator=generator)
    goal = torch.randn(9, 7, generator=generator)
    form = pt.HDPiSSA(rank=rank, groups=groups)
    layer, adapter, patch = of_weight(weight, form)
    optimiser = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.01)
    for _ in range(5):
        loss_of(layer, patch, x, goal).backward()
        optimiser.step()
        form.stepped(adapter)
        optimiser.zero_grad()
        assert not patch.a.any() and not patch.b.any()
    torch.testing.assert_close(patch.D.double(), by_hand(weight, x, goal, form, 0.01, 5), atol=1e-5, rtol=1e-3)
    assert torch.equal(layer.weight, weight)


def test_groups_are_orthogonal_and_together_the_best_product():
    module, _ = tiny("gpt2")
    adapter = pt.Adapter.new(pt.Model(module), pt.HDPiSSA(rank=2, groups=3))
    for name, patch in adapter.patches.items():
        weight = module.get_submodule(name).weight.detach().T
        A, B = patch.A.view(3, 2, -1), patch.B.view(-1, 3, 2)
        for i in range(3):
            for j in range(3):
                if i != j:
                    assert (A[i] @ A[j].T).abs().max() < 1e-5 and (B[:, i].T @ B[:, j]).abs().max() < 1e-5
        S = torch.linalg.svdvals(weight)
        torch.testing.assert_close((patch.A @ patch.A.T).diagonal(), S[:6], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close((weight - patch.B @ patch.A).norm(), S[6:].norm(), atol=1e-4, rtol=1e-4)


def test_one_worker_takes_the_first_step_of_pissa():
    module, batch = tiny("bert")
    model = pt.Model(module)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    forms = {"pissa": pt.LoRA(rank=4, alpha=4, init="pissa"), "hd": pt.HDPiSSA(rank=4, groups=1)}
    for name, form in forms.items():
        adapter = pt.Adapter.new(model, form, "attention")
        model.attach(adapter, name)
        with model.using(name):
            output(module(**batch)).square().mean().backward()
        torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=1e-2).step()
        form.stepped(adapter)
    pissa, hd = (model.adapters[name].patches for name in forms)
    for site, patch in hd.items():
        assert patch.D.abs().max() > 1e-3
        torch.testing.assert_close(patch.delta(), pissa[site].delta(), atol=2e-6, rtol=1e-3)


def test_the_example_of_a_diagonal():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    form = pt.HDPiSSA(rank=1, groups=2)
    layer, adapter, patch = of_weight(weight, form)
    corners = {}
    for lr in (1e-3, 1e-2):
        layer, adapter, patch = of_weight(weight, form)
        optimiser = torch.optim.Adam([patch.a, patch.b], lr=lr)
        x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0], [1.0, 1.0, 2.0], [-1.0, 0.5, 1.5]])
        loss_of(layer, patch, x, torch.ones(4, 3)).backward()
        optimiser.step()
        form.stepped(adapter)
        D = patch.D
        assert D[:2].abs().min() > lr / 4 and D[2, :2].abs().min() > lr / 4  # rows and columns 0 and 1
        corners[lr] = abs(float(D[2, 2]))
    assert corners[1e-3] <= 2.1e-6 and corners[1e-2] == pytest.approx(100 * corners[1e-3], rel=1e-2)  # order lr^2


def test_only_its_own_rows_reach_a_worker():
    generator = torch.Generator().manual_seed(0)
    form = pt.HDPiSSA(rank=2, groups=3)
    layer, adapter, patch = of_weight(torch.randn(8, 8, generator=generator), form)
    x = torch.randn(6, 4, 8, generator=generator)
    y = layer(x).detach()
    for row in range(6):
        patch.add(x, y, y, 1.0, Call(rows=6))[row].square().sum().backward()
        reached = patch.a.grad.view(3, 2, 8).abs().amax((1, 2)) > 0
        assert reached.tolist() == [worker == row % 3 for worker in range(3)]
        assert (patch.b.grad.view(8, 3, 2).abs().amax((0, 2)) > 0).tolist() == reached.tolist()
        patch.a.grad = patch.b.grad = None
    # a module that sees each row twice, beside one another
    patch.add(x, y, y, 1.0, Call(rows=3))[2].square().sum().backward()
    assert (patch.a.grad.view(3, 2, 8).abs().amax((1, 2)) > 0).tolist() == [False, True, False]


def test_what_flows_through_is_the_gradient_of_the_change():
    generator = torch.Generator().manual_seed(0)
    form = pt.HDPiSSA(rank=2, groups=3)
    layer, adapter, patch = of_weight(torch.randn(8, 8, generator=generator), form)
    with torch.no_grad():
        for parameter in (patch.a, patch.b, patch.D):
            parameter.normal_(generator=generator)
    x = torch.randn(5, 8, generator=generator, requires_grad=True)
    y = layer(x)
    patch.contribute(x, y, NO_CALL).square().sum().backward()
    with torch.no_grad():
        d = patch.delta()
        torch.testing.assert_close(x.grad, 2 * (x @ d.T) @ d, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(patch.contribute(x, y, NO_CALL), x @ d.T, atol=1e-4, rtol=1e-4)


# --- through learn


def learned(model, form, **more):
    return pt.learn(model, colours(48), form=form, **{**QUICK, **more})


@pytest.mark.parametrize("keep", ["dense", "low-rank"])
def test_learning_leaves_the_change_and_its_rank(keep, encoder, tmp_path):
    before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
    form = pt.HDPiSSA(rank=2, groups=2, keep=keep)
    adapter = learned(encoder, form, out=tmp_path / "a")
    assert same_state(before, encoder.module)
    measured = adapter.card.training["measured"]
    assert measured["its bound to first order"] == 8
    # more than one worker's, and not more than all have together
    assert 2 * form.rank < measured["rank of the change"] <= 8
    assert set(measured["rank by site"]) == set(adapter.patches) and measured["singular values counted above"] == 0.01
    assert type(adapter.form) is (pt.Full if keep == "dense" else pt.LoRA)
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and learned(encoder, form).hash == adapter.hash
    deltas = [patch.delta() for patch in adapter.patches.values()]
    for delta in deltas:
        beyond = Rank.of(delta, 8)
        assert 0 < beyond.rank <= 8 and beyond.beyond < (0.02 if keep == "dense" else 1e-5)
    if keep == "low-rank":
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"
        dense = learned(encoder, pt.HDPiSSA(rank=2, groups=2))
        share = measured["largest share of a change beyond the bound"]
        for name, patch in dense.patches.items():
            whole = patch.delta()
            assert (whole - adapter.patches[name].delta()).norm() <= 1.01 * share * whole.norm() + 1e-6


def test_a_union_steps_and_measures_its_parts(encoder):
    adapter = learned(encoder, pt.Union(pt.HDPiSSA(rank=2, groups=2), "bitfit"))
    assert adapter.card.training["measured"]["hd-pissa, rank of the change"] <= 8
    assert [form.name for form in adapter.form.forms] == ["full", "bitfit"]
    alone = learned(encoder, pt.HDPiSSA(rank=2, groups=2))
    assert set(alone.patches) <= set(adapter.patches)


def test_what_lies_beyond_the_rank_is_of_second_order(encoder):
    shares = [
        learned(encoder, pt.HDPiSSA(rank=2, groups=2), lr=lr).card.training["measured"][
            "largest share of a change beyond the bound"
        ]
        for lr in (1e-4, 1e-3)
    ]
    assert shares[0] < shares[1] / 5 and shares[1] < 0.02


def test_it_learns(encoder):
    adapter = pt.learn(
        encoder, colours(96), form=pt.HDPiSSA(rank=2, groups=4), **{**QUICK, "epochs": 10, "batch_size": 8, "lr": 3e-3}
    )
    assert adapter.card.metrics["dev/colours"] >= 0.9


def test_the_rank_of_a_change():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(40, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
    assert Rank.of(low, 5).rank == 5 and Rank.of(low, 5).beyond < 1e-3
    S = torch.linalg.svdvals(low)
    assert Rank.of(low, 2).beyond == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
    assert Rank.of(torch.zeros(4, 4), 2) == Rank(0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"groups": 1.5}, "groups must be a whole number"),
        ({"iterations": -1}, "iterations must be a whole number of at least 0"),
        ({"keep": "sparse"}, "keep must be one of dense, low-rank, got 'sparse'"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        pt.HDPiSSA(**settings)


def test_more_components_than_there_are_is_refused():
    model = pt.Model(tiny("bert")[0])
    with pytest.raises(pt.PolytaskError, match=r"11 groups of rank 3 need 33 singular components.*\(32 x 32\) has 32"):
        pt.Adapter.new(model, pt.HDPiSSA(rank=3, groups=11), "query")


def test_the_command_line_prints_the_rank(run, base, data, tmp_path):
    code, out, err = run(
        "learn", data / "one", "--base", base, "--form", "hd-pissa:rank=2,groups=2", "--epochs", 1, "--out", tmp_path
    )
    assert code == 0, err
    assert "rank of the change: " in out and "its bound to first order: 8" in out and "by site" not in out
    code, out, err = run("inspect", tmp_path / "one")
    assert code == 0 and "rank of the change: " in out, err


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch, transformers
import polytask as pt
from conftest import colours
from polytask.forms.hd_pissa import HDPiSSA
from accelerate import PartialState

model = pt.Model(transformers.AutoModel.from_pretrained({base!r}).eval(), transformers.AutoTokenizer.from_pretrained({base!r}),
                 name="tiny", pooling="mean")
settings = dict(epochs=2, batch_size=5, progress=False, precision="fp32", seed=1)
made = {{form: pt.learn(model, colours(40), form=form, **settings).state() for form in (
    HDPiSSA(rank=2, groups=2), pt.LoRA(rank=2, init="corda"), pt.Prompt(length=3, init="bayes"))}}
state = PartialState()
torch.save(list(made.values()), sys.argv[1] + f".{{state.process_index}}of{{state.num_processes}}")
"""


@pytest.mark.slow
def test_two_processes_are_two_workers_and_one_process_simulates_them(minilm_tokenizer, tmp_path):
    base, script = tmp_path / "base", tmp_path / "run.py"
    model = tiny_bert(minilm_tokenizer)
    model.module.save_pretrained(base)
    model.processor.save_pretrained(base)
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), base=str(base)))
    launch(2, script, str(tmp_path / "out"))
    first, second = (torch.load(tmp_path / f"out.{name}") for name in ("0of2", "1of2"))
    settings = {"epochs": 2, "batch_size": 5, "progress": False, "precision": "fp32", "seed": 1}
    forms = (pt.HDPiSSA(rank=2, groups=2), pt.LoRA(rank=2, init="corda"), pt.Prompt(length=3, init="bayes"))
    for form, mine, others in zip(forms, first, second, strict=True):
        one = pt.learn(tiny_bert(minilm_tokenizer), colours(40), form=form, **settings).state()
        assert all(torch.equal(value, others[name]) for name, value in mine.items())  # the same in both
        assert all(value.any() for name, value in one.items() if "head" not in name)
        close = 1e-5 if form is forms[0] else 1e-4  # starts that look at data see the same of it in every process
        assert all(torch.allclose(value, mine[name], atol=close) for name, value in one.items()), form
        assert not all(torch.equal(value, mine[name]) for name, value in one.items())  # summed in another order
