"""Budgets of ranks: the total holds at every step, and what comes out is plain LoRA."""

from __future__ import annotations

import copy
import json
import os
import signal
import warnings

import peft
import pytest
import torch
from conftest import colours, same_state
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.learn import learner
from polytask.learn.budget import Budget, Controller, budgets
from polytask.learn.learner import Interrupted

LEARNED = ("adalora", "sample", "increlora", "triangular")  # those that decide while they learn
QUICK = {"epochs": 2, "batch_size": 4, "progress": False, "precision": "fp32", "lr": 1e-2, "head_start": "random"}
FORM = pt.LoRA(rank=4, alpha=6)


def outputs(model, batch, mix="a"):
    with torch.no_grad(), model.using(mix):
        return output(model.module(**batch))


class ByHand:
    """An adapter under a budget, trained by a loop written out here."""

    def __init__(self, budget, steps=20, network="bert", form=FORM, seed=0):
        self.budget = Budget.of(budget)
        module, self.batch = tiny(network)
        self.model = pt.Model(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.before = outputs(self.model, self.batch, None)
        self.adapter = pt.Adapter.new(self.model, self.budget.form(form), "attention", seed=seed, name="a")
        self.model.attach(self.adapter, "a")
        self.controller = self.budget.control(self.adapter, steps, seed)
        self.optimiser = torch.optim.Adam([p for p in self.adapter.parameters() if p.requires_grad], lr=1e-2)
        self.goal = torch.randn(self.before.shape, generator=torch.Generator().manual_seed(3))
        self.steps = steps

    def backward(self):
        with self.model.using("a"):
            loss = (output(self.model.module(**self.batch)) - self.goal).square().mean()
        penalty = self.adapter.form.penalty(self.adapter)
        (loss if penalty is None else loss + penalty).backward()
        return float(loss.detach())

    def step(self, number):
        loss = self.backward()
        self.optimiser.step()
        self.controller.after(number)
        self.optimiser.zero_grad()
        return loss

    def used(self):
        """How many ranks have an effect on the output, in all: those whose term of the product is not zero."""
        total = 0
        for patch in self.adapter.patches.values():
            A, B, _ = patch.factors()
            total += int(((A.abs().amax(1) > 0) & (B.abs().amax(0) > 0)).sum())
        return total


def test_every_budget_is_tested_here():
    assert set(budgets) == {*LEARNED, "eva"}
    assert all(kind.paper and (kind.__doc__ or "").strip() for kind in budgets.values())


@pytest.mark.parametrize("name", LEARNED)
def test_starts_as_the_base_and_holds_the_total_at_every_step(name):
    hand = ByHand(name)
    assert torch.equal(outputs(hand.model, hand.batch), hand.before)
    controller, sites = hand.controller, len(hand.adapter.patches)
    assert controller.total == 4 * sites
    assert sum(controller.ranks().values()) == sites * (6 if name in ("adalora", "sample") else 1)
    totals, losses = [], []
    for number in range(1, hand.steps + 1):
        before = sum(controller.ranks().values())
        allowed = controller.allowed(number) if controller.due(number) else before
        losses.append(hand.step(number))
        totals.append(sum(controller.ranks().values()))
        assert totals[-1] == allowed
        assert hand.used() <= totals[-1]
    assert totals[-1] == controller.total and hand.used() == controller.total
    falling = name in ("adalora", "sample")
    assert totals == sorted(totals, reverse=falling)
    assert losses[-1] < losses[0]
    # over before the end, and then the same ranks until it
    assert controller.settled(controller.last) and not controller.settled(controller.last - 1)
    assert totals[controller.last - 1 :] == [controller.total] * (hand.steps - controller.last + 1)
    assert [row[0] for row in controller.history] == sorted({row[0] for row in controller.history})
    assert controller.history[-1][1:] == list(controller.ranks().values())


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LEARNED)
def test_short_runs_end_at_the_total_too(name, steps):
    hand = ByHand(name, steps)
    for number in range(1, steps + 1):
        hand.step(number)
    assert sum(hand.controller.ranks().values()) == hand.controller.total


@pytest.mark.parametrize(
    "budget", ["increlora", {"name": "triangular", "by": 3}, {"name": "triangular", "threshold": "constant"}]
)
def test_growing_changes_no_output(budget):
    hand = ByHand(budget)
    grown = 0
    for number in range(1, hand.steps + 1):
        hand.backward()
        hand.optimiser.step()
        before, old = outputs(hand.model, hand.batch), hand.controller.ranks()
        hand.controller.after(number)
        hand.optimiser.zero_grad()
        new = hand.controller.ranks()
        assert all(new[site] >= old[site] for site in new)
        assert torch.equal(outputs(hand.model, hand.batch), before)
        grown += new != old
    assert grown >= 3


def test_new_ranks_learn_and_the_reserve_adds_nothing():
    hand = ByHand("increlora")
    for number in range(1, hand.controller.warm + 1):
        hand.step(number)
    patch = next(iter(hand.adapter.patches.values()))
    live, reserve = patch.count, patch.form.reserve
    with torch.enable_grad():
        x = torch.randn(3, 5, 32)
        with_reserve = patch.contribute(x, x)
    with torch.no_grad():
        assert torch.equal(patch._waiting()[0][:reserve].detach(), torch.zeros(reserve, 32))
    A, B, form = patch.factors()
    torch.testing.assert_close(with_reserve, x @ (form.scale * B @ A).T, atol=1e-6, rtol=1e-4)
    with_reserve.square().sum().backward()
    # as if its gate were one: dL/dA = B^T dL/dy x
    gradient = 2 * with_reserve.detach().flatten(0, 1).T @ x.flatten(0, 1) * form.scale  # [o, i]
    part = slice(live, live + reserve)
    torch.testing.assert_close(patch.A.grad[part], patch.B[:, part].detach().T @ gradient, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(patch.B.grad[:, part], gradient @ patch.A[part].detach().T, atol=1e-5, rtol=1e-3)
    assert not patch.A.grad[live + reserve :].any() and not patch.E.grad[live:].any()
    for number in range(hand.controller.warm + 1, hand.steps):
        hand.step(number)
    hand.backward()
    for patch in hand.adapter.patches.values():  # the total is reached: nobody waits any more
        assert not patch.A.grad[patch.count :].any() and patch.A.grad[: patch.count].abs().amin(1).all()


def test_increlora_scores_the_change_and_its_gradient():
    hand = ByHand({"name": "increlora", "apart": 0})
    for number in range(1, 4):
        hand.step(number)
    patch = next(iter(hand.adapter.patches.values()))
    hand.backward()
    change, gradient = patch.__dict__["met"]["change"], patch.__dict__["met"]["gradient"]
    E = (patch.E.grad[0], torch.einsum("oi,o,i->", gradient, patch.B[:, 0], patch.A[0]) * patch.form.scale)
    torch.testing.assert_close(*E, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(change, patch.delta().detach(), atol=1e-7, rtol=1e-5)


def test_every_triangular_entry_gets_a_gradient_and_blocks_stay():
    hand = ByHand({"name": "triangular", "by": 2})
    hand.step(1)
    for number in range(2, hand.steps):
        hand.step(number)
    hand.backward()
    for patch in hand.adapter.patches.values():
        n = patch.count
        block = (torch.arange(n) + 1) // 2
        lower = block[:, None] >= block
        assert (patch.L.grad[:n, :n] != 0).equal(lower) and (patch.U.grad[:n, :n] != 0).equal(lower.T)
        assert not patch.L.grad[n:].any() and not patch.U.grad[:, n:].any()
        A, B, form = patch.factors()
        C = (patch.L * 1.0)[:n, :n] * lower + patch.U[:n, :n] * lower.T
        torch.testing.assert_close(form.scale * B @ A, 1.5 * B[:, :n] @ C @ patch.A[:n], atol=1e-6, rtol=1e-4)
        assert not B[:, n:].any() and patch.blocks == int(block[-1]) + 1


def test_thresholds_say_how_many_sites_grow():
    hand = ByHand({"name": "triangular", "threshold": "linear"}, steps=100)
    controller = hand.controller
    sites = len(controller.patches)
    middle = (controller.warm + controller.last) // 2
    assert controller.growing(controller.warm) == 1 and controller.growing(controller.last) == sites
    assert controller.growing(middle) == min(
        sites, int(3 * sites * (middle - controller.warm) / (controller.last - controller.warm))
    )
    constant = ByHand({"name": "triangular", "threshold": "constant"}, steps=100).controller
    assert len({constant.growing(step) for step in range(constant.warm + 1, constant.last + 1)}) == 1


def test_adalora_scores_as_the_paper_says():
    """Two steps by hand: smoothed sensitivity times smoothed uncertainty, of the gate and as means of the directions."""
    hand = ByHand({"name": "adalora", "apart": 0})
    expected = {site: dict.fromkeys("ABE", (0.0, 0.0)) for site in hand.adapter.patches}
    for number in (1, 2):
        hand.backward()
        hand.optimiser.step()
        for site, patch in hand.adapter.patches.items():
            for name in "ABE":
                value = getattr(patch, name)
                sensitivity = (value * value.grad).abs().detach()
                mean, doubt = expected[site][name]
                mean = 0.85 * mean + 0.15 * sensitivity
                expected[site][name] = (mean, 0.85 * doubt + 0.15 * (sensitivity - mean).abs())
        hand.controller.after(number)
        hand.optimiser.zero_grad()
    for site, scores in hand.controller.scores.items():
        parts = {name: mean * doubt for name, (mean, doubt) in expected[site].items()}
        torch.testing.assert_close(scores, parts["E"] + parts["A"].mean(1) + parts["B"].mean(0))


def test_adalora_follows_the_cubic_schedule():
    controller = ByHand({"name": "adalora", "over": 2, "warm": 0.1, "settle": 0.5}, steps=100).controller
    first, total = controller.first, controller.total
    assert (controller.warm, controller.last) == (10, 50) and first == 2 * total
    for step in (5, 10, 11, 30, 49, 50, 99):
        share = 1.0 if step <= 10 else max(0.0, 1 - (step - 10) / 40) ** 3
        assert controller.allowed(step) == total + int((first - total) * share)


def test_the_penalty_is_the_distance_from_orthonormal():
    hand = ByHand({"name": "adalora", "apart": 0.3})
    terms = [
        (rows @ rows.T - torch.eye(len(rows))).norm()
        for patch in hand.adapter.patches.values()
        for rows in (patch.A, patch.B.T)
    ]
    torch.testing.assert_close(hand.adapter.form.penalty(hand.adapter), 0.3 * torch.stack(terms).mean())
    assert ByHand({"name": "adalora", "apart": 0}).adapter.form.penalty(hand.adapter) is None


def test_sampling_exchanges_as_many_and_gives_gates_back():
    plain, drawn = ByHand("adalora"), ByHand({"name": "sample", "chance": 0.5})
    live = []
    for hand in (plain, drawn):
        for number in range(1, 8):
            hand.step(number)
        live.append(torch.cat([p.live for p in hand.adapter.patches.values()]))
    assert live[0].sum() == live[1].sum() and not torch.equal(*live)
    controller, number = drawn.controller, 8
    drawn.backward()
    drawn.optimiser.step()
    was = {site: patch.live.bool().clone() for site, patch in drawn.adapter.patches.items()}
    kept = {site: controller.memory[f"{site}:kept"].clone() for site in was}
    came = {}
    exchange = controller._exchange

    def watched(on, step):
        back = exchange(on, step)
        came.update(zip(was, back, strict=True))
        return back

    controller._exchange = watched
    controller.after(number)
    returned = {site: came[site] & ~was[site] for site in was}
    assert sum(int(r.sum()) for r in returned.values()) > 0
    for site, patch in drawn.adapter.patches.items():
        assert torch.equal(patch.E[returned[site]], kept[site][returned[site]])
        assert not patch.E[~patch.live.bool()].any()


def test_sampling_without_chance_is_adalora(encoder, task):
    one = pt.learn(encoder, task, form=FORM, budget="adalora", **QUICK)
    other = pt.learn(encoder, task, form=FORM, budget={"name": "sample", "chance": 0}, **QUICK)
    third = pt.learn(encoder, task, form=FORM, budget={"name": "sample", "chance": 0.5}, **QUICK)
    assert one.hash == other.hash != third.hash


# --- through learn


@pytest.mark.parametrize("name", [*LEARNED, "eva"])
def test_learning_leaves_plain_lora_that_peft_reads(name, encoder, task, tmp_path):
    before = copy.deepcopy(encoder.module.state_dict())
    adapter = pt.learn(encoder, task, form=FORM, budget=name, out=tmp_path / "a", **QUICK)
    sites = len(pt.Adapter.new(encoder, FORM).patches)
    assert same_state(before, encoder.module) and encoder.attached == ()
    assert type(adapter.form) is pt.LoRA and {type(p.form) for p in adapter.patches.values()} == {pt.LoRA}
    assert all(p.form.scale == pytest.approx(1.5) for p in adapter.patches.values())
    found = adapter.card.training["ranks"]
    held = {name: patch.form.rank for name, patch in adapter.patches.items()}
    assert found["total"] == sum(held.values()) == 4 * sites and len(found["sites"]) == sites
    assert {k: v for k, v in found["sites"].items() if v} == held
    assert found["budget"]["name"] == name and len(found["history"]) <= 19
    assert found["history"][-1][1:] == list(found["sites"].values())
    assert adapter.card.training["stage"]["budget"]["name"] == name
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and not any(p.requires_grad for p in adapter.parameters())
    encoder.attach(again, "a")
    batch = dict(encoder.processor(["a red car", "the blue house"], padding=True, return_tensors="pt"))
    ours = outputs(encoder, batch)
    encoder.detach()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and len(config["rank_pattern"]) == sum(r != 4 for r in held.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(encoder.module), str(tmp_path / "a")).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(wrapped(**batch)), ours, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_packing_computes_the_same(name):
    hand = ByHand(name)
    for number in range(1, hand.steps + 1):
        hand.step(number)
    learned = outputs(hand.model, hand.batch)
    done = hand.adapter.form.finish(hand.adapter)
    assert sum(p.form.rank for p in done.patches.values()) == hand.controller.total
    hand.model.attach(done, "done")
    torch.testing.assert_close(outputs(hand.model, hand.batch, "done"), learned, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(learned, hand.before, atol=1e-3)


class StopAt(learner.Watch):
    """Asks to stop after some steps."""

    at = 0

    def step(self, step, *args, **kwargs):
        super().step(step, *args, **kwargs)
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("name", "at"), [("adalora", 2), ("adalora", 6), ("sample", 4), ("increlora", 4), ("triangular", 4), ("eva", 1)]
)
def test_an_interrupted_run_goes_on_bit_for_bit(name, at, encoder, task, tmp_path, monkeypatch):
    options = {"form": pt.LoRA(rank=2, dropout=0.2), "budget": name, **QUICK, "epochs": 3}
    straight = pt.learn(encoder, task, **options)
    monkeypatch.setattr(StopAt, "at", at)
    with monkeypatch.context() as patched:
        patched.setattr(learner, "Watch", StopAt)
        with pytest.raises(Interrupted):
            pt.learn(encoder, task, out=tmp_path / "a", **options)
    resumed = pt.learn(encoder, task, out=tmp_path / "a", **options)
    assert resumed.hash == straight.hash
    assert resumed.card.training["ranks"] == straight.card.training["ranks"]


@pytest.mark.parametrize("name", ["adalora", "increlora"])
def test_together_gives_what_separate_runs_give(name, encoder):
    tasks = [colours(24, "a"), colours(16, "b", start=100)]
    apart = [pt.learn(encoder, t, form=FORM, budget=name, seed=1, **QUICK) for t in tasks]
    joined = pt.learn(encoder, tasks, form=FORM, budget=name, together=True, seed=1, **QUICK)
    for one, other in zip(apart, joined, strict=True):
        first, second = (adapter.card.training["ranks"] for adapter in (one, other))
        assert first["total"] == second["total"] == 4 * len(first["sites"])
        # rounding may turn a tie round, and no more
        differ = [site for site in first["sites"] if first["sites"][site] != second["sites"][site]]
        assert len(differ) <= len(first["sites"]) / 4
        assert one.card.metrics == pytest.approx(other.card.metrics, abs=0.2)


def test_only_states_with_the_final_ranks_are_the_best(encoder):
    adapter = pt.learn(encoder, colours(48), form=FORM, budget="adalora", evaluations=6, **QUICK)
    training = adapter.card.training
    assert training["best_step"] >= training["steps"] * 0.6
    assert min(score["step"] for score in training["dev"]) < training["steps"] * 0.3


def test_a_run_that_fails_saves_what_others_can_read(encoder, task, tmp_path, monkeypatch):
    seen = []

    def broken(self, step):
        seen.append(step)
        if step == 4:
            raise pt.core.errors.LearnError("the gradient is not a number")
        return original(self, step)

    original = Controller.after
    monkeypatch.setattr(Controller, "after", broken)
    with pytest.raises(pt.PolytaskError, match="The last good adapter is in"):
        pt.learn(encoder, task, form=FORM, budget="adalora", out=tmp_path / "a", **QUICK)
    assert type(pt.Adapter.load(tmp_path / "a").form) is pt.LoRA


def test_the_command_line_and_yaml_take_budgets(run, base, data, tmp_path):
    code, out, err = run(
        "learn", data / "one", "--base", base, "--form", "lora:rank=2", "--budget", "adalora:over=2,every=2",
        "--epochs", 1, "--out", tmp_path / "flag", "--json",
    )  # fmt: skip
    assert code == 0, err
    ranks = json.loads(out)[0]["training"]["ranks"]
    assert ranks["budget"]["over"] == 2 and ranks["budget"]["every"] == 2 and ranks["total"] == 2 * len(ranks["sites"])
    config = tmp_path / "learn.yaml"
    config.write_text("form: {name: lora, rank: 2}\nbudget: {name: increlora, rounds: 3}\nepochs: 1\n")
    code, out, err = run("inspect", tmp_path / "flag" / "one")
    assert code == 0 and f"ranks: {ranks['total']} by adalora, from" in out, err
    code, out, err = run(
        "learn", data / "one", "--base", base, "--config", config, "--out", tmp_path / "file", "--json"
    )
    assert code == 0, err
    assert json.loads(out)[0]["training"]["ranks"]["budget"] == budgets["increlora"](rounds=3).settings()
    code, _, err = run("learn", data / "one", "--base", base, "--budget", "adalora:ever=2", "--out", tmp_path)
    assert code and "did you mean 'every'" in err
    code, _, err = run("learn", data / "one", "--base", base, "--budget", "adalora:every", "--out", tmp_path)
    assert code and "--budget" in err and "write name=value" in err


@pytest.mark.parametrize(
    ("budget", "form", "message"),
    [
        ("adalor", FORM, "did you mean 'adalora'"),
        ({"every": 2}, FORM, "a budget needs a name; there are: adalora, eva"),
        ({"name": "adalora", "over": 0.5, "every": 0}, FORM, "over must be .* got 0.5; every must be"),
        ({"name": "sample", "chance": 2}, FORM, "chance must be a probability, got 2"),
        ({"name": "increlora", "by": 0}, FORM, "by must be a whole number"),
        ({"name": "triangular", "threshold": "cubic"}, FORM, "threshold must be linear, exponential, constant"),
        ({"name": "eva", "most": 0}, FORM, "most must be"),
        ("adalora", "full", "deals out the ranks of the form 'lora', and got 'full'"),
        ("adalora", pt.LoRA(init="pissa"), "has its own start; leave init='pissa' out"),
    ],
)
def test_what_cannot_be_done_is_said(budget, form, message, encoder, task):
    with pytest.raises(ConfigError, match=message):
        pt.learn(encoder, task, form=form, budget=budget, **QUICK)


def test_a_budget_needs_a_fresh_adapter(encoder, task):
    with pytest.raises(ConfigError, match="leave start or budget out"):
        pt.learn(encoder, task, form=FORM, budget="adalora", start=pt.Adapter.new(encoder, FORM), **QUICK)


# --- PEFT's own AdaLoRA


def by_peft(folder, network="bert", steps=12, alpha=6, **config):
    """An AdaLoRA that PEFT trained and pruned; what PEFT computes with it in memory, and its folder."""
    module, batch = tiny(network)
    settings = {"target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 3, "total_step": steps, "orth_reg_weight": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.AdaLoraConfig(lora_alpha=alpha, **{**settings, **config}))
        goal = torch.randn(output(module(**batch)).shape, generator=torch.Generator().manual_seed(3))
        optimiser = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
        for step in range(steps):
            (output(wrapped(**batch)) - goal).square().mean().backward()
            optimiser.step()
            wrapped.base_model.update_and_allocate(step)
            optimiser.zero_grad()
        wrapped.base_model.update_and_allocate(steps)  # no gate has moved since the last pruning
        wrapped.save_pretrained(str(folder))
        wrapped.eval()
        with torch.no_grad():
            return output(wrapped(**batch)), batch


@pytest.mark.parametrize(
    ("network", "alpha", "targets"),
    [("bert", 6, ["query", "value", "output.dense"]), ("bert", 0, ["query", "key"]), ("llama", 3, ["q_proj", "down_proj"]),
     ("gpt2", 6, ["c_attn", "c_fc"])],
)  # fmt: skip
def test_peft_s_adalora_is_read_as_the_lora_that_it_computes(network, alpha, targets, tmp_path):
    theirs, batch = by_peft(
        tmp_path / "peft", network, alpha=alpha, target_modules=targets, fan_in_fan_out=network == "gpt2"
    )
    model = pt.Model(tiny(network)[0])
    before = outputs(model, batch, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in the file is unknown
        adapter = pt.Adapter.load(tmp_path / "peft")
    model.attach(adapter, "a")
    torch.testing.assert_close(outputs(model, batch), theirs, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs, before, atol=1e-3)
    ranks = [patch.form.rank for patch in adapter.patches.values()]
    stored = [
        sum(pattern)
        for pattern in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"].values()
    ]
    assert sorted(ranks) == sorted(rank for rank in stored if rank) and len(set(stored)) > 1
    assert all(patch.form.scale == pytest.approx((alpha or 4) / (4 + 1e-5)) for patch in adapter.patches.values())
    # and on to PEFT's LoRA
    adapter.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(tiny(network)[0], str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(output(wrapped(**batch)), theirs, atol=1e-5, rtol=1e-4)


def test_a_layer_that_peft_pruned_away_has_no_patch(tmp_path):
    theirs, batch = by_peft(tmp_path / "peft", target_r=1, target_modules=["query", "key", "value", "output.dense"])
    patterns = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["rank_pattern"]
    gone = {name.removesuffix(".lora_E") for name, pattern in patterns.items() if not any(pattern)}
    adapter = pt.Adapter.load(tmp_path / "peft")
    assert gone and len(adapter.patches) == len(patterns) - len(gone) and not gone & set(adapter.patches)
    model = pt.Model(tiny("bert")[0])
    model.attach(adapter, "a")
    torch.testing.assert_close(outputs(model, batch), theirs, atol=1e-5, rtol=1e-4)
    adapter.save(tmp_path / "ours")
    again = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["target_modules"]
    assert not any(name.endswith(target) for name in gone for target in again)


def test_adalora_files_that_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    by_peft(tmp_path / "a", target_modules=["query"])
    file, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    whole, settings = load_file(file), json.loads(config.read_text())
    save_file({name: t for name, t in whole.items() if not name.endswith("lora_B")}, file)
    with pytest.raises(pt.PolytaskError, match="without lora_A and lora_B beside it"):
        pt.Adapter.load(tmp_path / "a")
    save_file({name: t * (not name.endswith("lora_E")) for name, t in whole.items()}, file)
    with pytest.raises(pt.PolytaskError, match="no layer .* has a rank left"):
        pt.Adapter.load(tmp_path / "a")
    save_file(whole, file)
    config.write_text(json.dumps({**settings, "init_r": None}))
    with pytest.raises(pt.PolytaskError, match="init_r=None; its scale is not known"):
        pt.Adapter.load(tmp_path / "a")


def test_a_comparison_reports_the_ranks(encoder, tmp_path):
    task = colours(48)
    budgeted = pt.learn(encoder, task, form=FORM, budget="adalora", name="dealt", **QUICK)
    plain = pt.learn(encoder, task, form=FORM, name="plain", **QUICK)
    table = pt.compare(encoder, [budgeted, plain], [task], joint=False, cross=False, resamples=10)
    (entry,) = table.as_dict()["ranks"]
    held = budgeted.card.training["ranks"]
    assert entry["adapter"] == "dealt" and entry["budget"] == "adalora" and entry["total"] == held["total"]
    assert entry["history"] == held["history"] and entry["sites"] == held["sites"]
    page = table.to_html(tmp_path / "report.html").read_text()
    assert f"dealt\u201d: {held['total']} ranks dealt out by adalora" in page and "plain\u201d:" not in page
