"""AdaMix, LoRAMoE, the sparse mixture of LoRAs, SMoRA's blocks, and feed-forwards as fine experts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import colours
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from zoo import output, tiny

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.agreement import scores_apart
from polytask.core.balance import Tally, load_balance, variation
from polytask.core.errors import ConfigError, MixError, SiteError
from polytask.core.form import Weights, forms
from polytask.core.gate import Router, routers
from polytask.core.head import Seen, collate, head_for
from polytask.forms.finemoe import Experts, FineMoE
from polytask.forms.mixture import Mixture, experts_of, gates_of, router_part
from polytask.forms.mixtures import mixture_of

LORA = {"name": "lora", "rank": 4}
FAST = {"epochs": 1, "batch_size": 4, "lr": 1e-2, "progress": False}
IDS = {
    "input_ids": torch.tensor([[101, 2023, 2003, 1037, 102], [101, 7592, 2088, 102, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
}


def mixture(model, router, experts=4, form=None, **more):
    """A mixture whose experts act."""
    made = Adapter.new(model, Mixture(router, experts, form or {**LORA, "init": "random"}), seed=0, name="mixture")
    model.attach(made)
    return made


def states(model, batch=IDS):
    with model.using("mixture"):
        return model.module(**batch).last_hidden_state


def spread(adapter, seed=1):
    """Moves the experts of a mixture apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            if p.is_floating_point():
                p += 0.05 * torch.randn(p.shape, generator=generator)


class TestAdaMix:
    @pytest.mark.parametrize("form", [LORA, {"name": "bottleneck", "width": 4}, {"name": "ia3"}])
    def test_what_is_learned_is_one_plain_module(self, encoder, form):
        learned = pt.learn(
            encoder, [colours(name="a"), colours(name="b")], form={"name": "mixture", "router": "adamix", "forms": form},
            joint=True, **FAST,
        )  # fmt: skip
        plain = Adapter.new(encoder, form)
        assert learned.form == plain.form and learned.size == plain.size
        assert set(learned.heads) == {"a", "b"} and learned.card.training["steps"] > 0
        fresh = [p for n, p in plain.named_parameters()]
        mine = [p for n, p in learned.named_parameters() if not n.startswith("head/")]
        assert all(not torch.equal(a, b) for a, b in zip(mine, fresh, strict=True) if b.numel() > 0)

    def test_the_seed_decides(self, encoder):
        spec = {"name": "mixture", "router": {"name": "adamix", "share_last": False}, "forms": LORA}
        first, again, other = (pt.learn(encoder, colours(), form=spec, seed=s, **FAST) for s in (0, 0, 1))
        assert first.hash == again.hash != other.hash

    def test_one_copy_is_the_form_itself(self, encoder):
        spec = {"name": "mixture", "router": "adamix", "experts": 1, "forms": LORA}
        one, plain = pt.learn(encoder, colours(), form=spec, **FAST), pt.learn(encoder, colours(), form=LORA, **FAST)
        for (name, value), (_, wanted) in zip(one.state().items(), plain.state().items(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=name)

    def test_equal_copies_learn_as_they_are_merged(self, encoder):
        mixture(encoder, {"name": "adamix", "share_last": False})  # copies start alike
        drawn = states(encoder)
        with torch.no_grad():
            torch.testing.assert_close(drawn, states(encoder), rtol=1e-5, atol=1e-6)

    def test_both_factors_are_drawn_apart_and_the_others_get_no_gradient(self, encoder):
        adapter = mixture(encoder, {"name": "adamix", "share_last": False})
        spread(adapter)
        torch.manual_seed(0)
        states(encoder).square().sum().backward()
        pairs = set()
        for site, patch in adapter.patches.items():
            drawn = patch.gate._drawn
            pairs.add((drawn["A"], drawn["B"]))
            for i, expert in enumerate(experts_of(adapter).values()):
                for key in ("A", "B"):
                    grad = expert.patches[site]._parameters[key].grad
                    assert (grad is not None) == (drawn[key] == i), (site, key, i)
        assert any(a != b for a, b in pairs) and len(pairs) > 3

    def test_a_shared_factor_stays_the_same_in_all_copies(self, encoder):
        adapter = mixture(encoder, "adamix", form=LORA)
        optimiser = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            states(encoder).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        site = next(iter(adapter.patches))
        first, *others = (e.patches[site] for e in experts_of(adapter).values())
        for other in others:
            torch.testing.assert_close(other.B, first.B)
            assert not torch.equal(other.A, first.A)

    def test_the_mean_is_never_stale(self, encoder):
        adapter = mixture(encoder, "adamix")
        with torch.no_grad():
            before = states(encoder)
            spread(adapter)
            after = states(encoder)
            collapsed = adapter.form.finish(adapter)
            encoder.attach(collapsed, "one")
            with encoder.using("one"):
                alone = encoder.module(**IDS).last_hidden_state
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(after, alone, rtol=1e-4, atol=1e-5)

    def test_agreement_is_the_mean_of_both_divergences(self, encoder):
        task = colours()
        adapter = mixture(encoder, {"name": "adamix", "share_last": False, "consistency": 3.0})
        spread(adapter)
        head = adapter.heads[task.name] = head_for(encoder, task, 0)
        head.linear.weight.data.normal_()
        rows = head.rows(encoder, task.train[:4])
        torch.manual_seed(3)
        with encoder.using("mixture"):
            out = head.run(encoder, collate(encoder, head, rows))
        state = torch.get_rng_state()
        values = adapter.form.loss(Seen(encoder, "mixture", adapter, task.name, rows, out), torch.ones(4))
        torch.set_rng_state(state)
        with torch.no_grad(), encoder.using("mixture"):
            for p in (patch.gate for patch in adapter.patches.values()):
                p.__dict__.pop("_drawn")
            with torch.enable_grad():
                second = head.run(encoder, collate(encoder, head, rows))
        p, q = (head._logits(o).log_softmax(-1) for o in (out, second))
        kl = 0.5 * (
            F.kl_div(p, q, reduction="none", log_target=True) + F.kl_div(q, p, reduction="none", log_target=True)
        )
        torch.testing.assert_close(values, 1.0 + 3.0 * kl.sum(1))
        assert (values > 1.001).any()
        turned = scores_apart(head, p, q, rows) + scores_apart(head, q, p, rows)
        torch.testing.assert_close(turned, 2.0 * kl.sum(1))

    def test_texts_agree_on_every_scored_token(self, decoder):
        task = pt.Task("t", "classify", colours().train[:8], [], [], labels=("blue", "red"))
        adapter = mixture(decoder, {"name": "adamix", "share_last": False})
        spread(adapter)
        head = adapter.heads["t"] = head_for(decoder, task)
        rows = head.rows(decoder, task.train[:3])
        batch = collate(decoder, head, rows)
        with decoder.using("mixture"):
            first = head.run(decoder, batch)[0]
            router_part(adapter).__dict__["which"] = "again"
            torch.testing.assert_close(head.run(decoder, batch)[0], first)
            router_part(adapter).__dict__["which"] = "second"
            assert not torch.allclose(head.run(decoder, batch)[0], first)
            router_part(adapter).__dict__["which"] = "first"
            head.run(decoder, batch)
        values = adapter.form.loss(
            Seen(decoder, "mixture", adapter, "t", rows, head.run(decoder, batch)), torch.zeros(3)
        )
        assert (values > 0.0).all() and router_part(adapter).which == "first"
        values.sum().backward()
        assert pt.learn(
            decoder, task, form={"name": "mixture", "router": "adamix", "forms": LORA}, **FAST
        ).form == pt.LoRA(4)

    def test_what_has_no_average_is_refused(self, encoder):
        given = {n: Adapter.new(encoder, {"name": "lora", "rank": r}, name=n) for n, r in (("a", 2), ("b", 4))}
        with pytest.raises(SiteError, match="different forms"):
            pt.route(given, "adamix", model=encoder, data=colours())
        given = {n: Adapter.new(encoder, "lora-fa", seed=s, name=n) for n, s in (("a", 1), ("b", 2))}
        with pytest.raises(MixError, match="does not learn"):
            pt.route(given, "adamix", model=encoder, data=colours())
        with pytest.raises(SiteError, match="could be averaged"):
            Adapter.new(encoder, Mixture("adamix", 2, {"name": "union", "forms": ["lora", "ia3"]}), sites="linear")
        with pytest.raises(ConfigError, match="consistency"):
            Router.of({"name": "adamix", "consistency": -1})


class TestBalance:
    def test_by_hand(self):
        assert float(variation(torch.tensor([[1.0], [3.0]]))) == pytest.approx(0.5)
        assert float(variation(torch.tensor([[7.0]]))) == 0.0
        s = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]])
        assert float(load_balance(s, torch.zeros(1, 2, 1, dtype=torch.int64))) == pytest.approx(1.4)

    @given(st.integers(2, 6), st.data())
    @settings(max_examples=25, deadline=None)
    def test_a_uniform_router_costs_one_whoever_is_chosen(self, experts, data):
        k = data.draw(st.integers(1, experts))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        index = torch.rand(2, 5, experts, generator=generator).topk(k, -1).indices
        even = torch.full((2, 5, experts), 1.0 / experts)
        for by_sequence in (False, True):
            assert float(load_balance(even, index, by_sequence=by_sequence)) == pytest.approx(1.0, abs=1e-5)

    def test_padding_does_not_count(self):
        p = torch.rand(2, 4, 3).softmax(-1)
        there = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
        other = torch.where(there[..., None] > 0, p, torch.tensor([1.0, 0.0, 0.0]))
        for whole in (False, True):
            a, b = (load_balance(v, v.topk(1, -1).indices, there, by_sequence=whole) for v in (p, other))
            torch.testing.assert_close(a, b)

    def test_a_forward_computed_again_tells_nothing(self):
        tally = Tally(Router.of("uniform"))
        assert not tally.open
        tally.begin()
        assert tally.open
        with torch.no_grad():
            assert not tally.open
        tally.tell("x", torch.tensor(1.0))
        tally.tell("x", torch.tensor(3.0))
        tally.tell("y", torch.tensor(1.0))
        assert float(tally.take()) == 3.0 and not tally.open
        assert tally.take() is None
        tally.tell("x", torch.ones((), requires_grad=True) * 2.0)
        assert not copy.deepcopy(tally)._told


class TestLoRAMoE:
    def test_rows_go_to_their_own_group(self, encoder):
        """The loss is zero where the row's own group has (1 + delta) / 2 of it: its name is no trap."""
        router = Router.of({"name": "loramoe", "delta": 0.2, "groups": {"a": 0, "b": 1}})
        adapter = Adapter.new(encoder, Mixture(router, 2, LORA))
        gate = gates_of(adapter)[0]
        call = pt.Call(tasks=("a", "b"), rows=2)
        own = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
        assert float(variation(router.importance(gate, 2, call) * own)) == pytest.approx(0.0, abs=1e-8)
        assert float(variation(router.importance(gate, 2, call) * own.flip(1))) > 0.1
        assert torch.equal(router.importance(gate, 2, pt.Call(tasks=("x", "y"), rows=2)), torch.ones(2, 2))
        scores = torch.zeros(2, 3, 2, requires_grad=True)
        grad = torch.autograd.grad(router.uneven(gate, scores, call), scores)[0]
        assert (grad[0, :, 0] < 0).all() and (grad[1, :, 1] < 0).all()  # more of the own group costs less

    def test_without_delta_it_is_the_coefficient_of_variation(self, encoder):
        router = Router.of({"name": "loramoe", "delta": 0.0, "groups": {"a": 0}})
        gate = gates_of(Adapter.new(encoder, Mixture(router, 4, LORA)))[0]
        scores = torch.randn(3, 5, 4)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
        Q = (scores.softmax(-1) * mask[..., None]).sum(1)
        wanted = Q.flatten().var() / Q.mean() ** 2
        torch.testing.assert_close(router.uneven(gate, scores, pt.Call(("a",) * 3, mask, 3)), wanted)
        even = router.uneven(gate, torch.zeros(3, 5, 4), pt.Call(None, None, 3))
        assert float(even) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize("router", ["loramoe", "lora-moe"])
    def test_the_penalty_is_asked_once_a_step_and_leaves_padding_out(self, encoder, router):
        adapter = mixture(encoder, router)
        states(encoder)
        once = adapter.form.penalty(adapter)
        assert float(once.detach()) > 0.0 and adapter.form.penalty(adapter) is None
        states(encoder, {k: F.pad(v, (0, 3)) for k, v in IDS.items()})
        torch.testing.assert_close(adapter.form.penalty(adapter), once, rtol=1e-4, atol=1e-6)
        once.backward()
        assert all(bool(gate.W.grad.any()) for gate in gates_of(adapter))
        with torch.no_grad():
            states(encoder)
        assert adapter.form.penalty(adapter) is None

    def test_it_learns_and_groups_take_their_tasks(self, encoder):
        """Rows of two tasks with other words: with the loss each has more of its own half of the experts than without."""
        tasks = [colours(name="a"), colours(name="b")]
        tasks[1].train = [replace(e, inputs=(f"paint {e.target} walls over there please",)) for e in tasks[1].train]
        for task in tasks:
            task.dev = []  # the last state, not the best

        def share(balance):
            router = {"name": "loramoe", "groups": {"a": 0, "b": 1}, "balance": balance, "delta": 0.5}
            form = {"name": "mixture", "router": router, "experts": 4, "forms": LORA}
            adapter = pt.learn(encoder, tasks, form=form, joint=True, **{**FAST, "epochs": 4, "lr": 5e-2})
            assert set(adapter.heads) == {"a", "b"} and (router_part(adapter) is None) == (balance == 0.0)
            encoder.attach(adapter, "m")
            own = []
            for i, task in enumerate(tasks):
                kept = []
                for gate in gates_of(adapter):
                    gate.__dict__["trace"] = lambda g, w, c, kept=kept: kept.append(w.values[..., :2].sum(-1).mean())
                ids = encoder.tokenizer(list(task.train[0].inputs), return_tensors="pt")
                with torch.no_grad(), encoder.using("m", tasks=task.name):
                    encoder.module(**ids)
                first = float(torch.stack(kept).mean())
                own.append(1.0 - first if i else first)
            encoder.detach("m")
            return sum(own) / 2

        assert share(100.0) > share(0.0) + 0.1

    def test_what_it_refuses(self, encoder):
        with pytest.raises(ConfigError, match="groups must say 0 or 1"):
            Router.of({"name": "loramoe", "groups": {"a": 2}})
        with pytest.raises(ConfigError, match="not learned"):
            Router.of({"name": "loramoe", "groups": {"mood": 0}}).told(["moods"])
        with pytest.raises(MixError, match="even number"):
            Adapter.new(encoder, Mixture({"name": "loramoe", "groups": {"a": 0}}, 3, LORA))
        with pytest.raises(ConfigError, match="delta"):
            Router.of({"name": "loramoe", "delta": 1.0})

    def test_starts(self, encoder):
        form = {**LORA, "init": "random"}
        first = gates_of(Adapter.new(encoder, Mixture("loramoe", 4, form)))[0]
        bound = first.site.d_in**-0.5
        assert float(first.W.detach().abs().max()) <= bound and float(first.W.detach().std()) == pytest.approx(
            bound / 3**0.5, rel=0.2
        )
        even = mixture(encoder, {"name": "molora", "deviation": 0.0}, form=form)
        assert router_part(even) is None
        experts = {f"e{i}": e for i, e in enumerate(experts_of(even).values())}
        for name, expert in experts.items():
            encoder.attach(expert, name)
        with torch.no_grad(), encoder.using(dict.fromkeys(experts, 0.25)):
            wanted = encoder.module(**IDS).last_hidden_state
        with torch.no_grad():
            torch.testing.assert_close(states(encoder), wanted, rtol=1e-4, atol=1e-5)


def test_blocks_of_smora_are_a_top_k_mixture_of_loras(encoder):
    """Gates for two ranks each, two of four chosen: four LoRAs of rank two with half the gates as weights."""
    assert forms["smora"].routes and forms["finemoe"].routes and not forms["lora"].routes
    adapter = Adapter.new(encoder, pt.SMoRA(rank=8, k=4, block=2, alpha=6.0), sites="query")
    site, patch = next(iter(adapter.patches.items()))
    with torch.no_grad():
        patch.B.normal_()
    loras = {f"e{i}": Adapter.new(encoder, pt.LoRA(rank=2, alpha=6.0), sites="query") for i in range(4)}
    with torch.no_grad():
        for i, lora in enumerate(loras.values()):
            lora.patches[site].A.copy_(patch.A[2 * i : 2 * i + 2])
            lora.patches[site].B.copy_(patch.B[:, 2 * i : 2 * i + 2])
        x = torch.randn(3, 5, patch.site.d_in)
        values, index = (patch.gates(x) / 2).topk(2, -1)
        y = torch.zeros(3, 5, patch.site.d_out)
        bank = type(loras["e0"].patches[site]).bank({n: lora.patches[site] for n, lora in loras.items()})
        mixed = bank.apply(x, y, y.clone(), Weights(tuple(loras), values, index))
        torch.testing.assert_close(patch.contribute(x, y), mixed, rtol=1e-4, atol=1e-5)


FINE = [(4, 2, 2, 1), (4, 3, 2, 0), (2, 1, 4, 3), (3, 2, 4, 2), (4, 4, 4, 1), (1, 1, 2, 1)]  # N, K, m, shared


class TestFineMoE:
    @pytest.mark.parametrize("network", ["bert", "gpt2", "llama", "t5", "vit"])
    @pytest.mark.parametrize("how", FINE[:4])
    def test_it_starts_as_the_dense_model(self, network, how):
        module, batch = tiny(network)
        model = pt.Model(module)
        model.attach(Adapter.new(model, FineMoE(*how)), "a")
        with torch.no_grad():
            bare = output(model.module(**batch))
            with model.using("a"):
                torch.testing.assert_close(output(model.module(**batch)), bare, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("how", FINE)
    def test_it_has_the_numbers_of_n_dense_ones_and_uses_those_of_k(self, encoder, how):
        n, k, m, shared = how
        adapter = Adapter.new(encoder, FineMoE(*how))
        dense, d, f, blocks = 32 * 64 + 64 + 64 * 32, 32, 64, 2
        form = adapter.form
        assert adapter.size == blocks * (n * dense + form.routed * d)
        used = []
        patches = [p for p in adapter.patches.values() if isinstance(p, Experts)]
        assert len(patches) == blocks
        for patch in patches:
            patch.trainable()
            patch.network(torch.randn(1, 1, d)).sum().backward()
            for name in ("up", "up_bias", "down"):
                grad = getattr(patch, name).grad
                used.append(sum(e.numel() for e in grad if bool(e.any())))
        inner = sum(used)  # hidden units that a ReLU-like activation shuts are still used: GELU shuts none
        assert inner == blocks * k * dense
        assert form.chosen + shared == m * k and form.routed + shared == m * n and f % m == 0

    def test_against_the_sum_written_out(self, encoder):
        adapter = Adapter.new(encoder, FineMoE(3, 2, 2, 1))
        spread(adapter)
        patch = next(p for p in adapter.patches.values() if isinstance(p, Experts))
        h = torch.randn(7, 32)

        def expert(i, x):
            return F.gelu(x @ patch.up[i].T + patch.up_bias[i]) @ patch.down[i].T

        with torch.no_grad():
            for x, got in zip(h, patch.network(h), strict=True):
                s = (patch.router @ x).softmax(-1)
                top = s.topk(3).indices.tolist()
                total = sum(s[i] for i in top)
                wanted = expert(0, x) + sum(s[i] / total * expert(1 + i, x) for i in top)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

    def test_the_loss_of_each_row(self, encoder):
        adapter = Adapter.new(encoder, FineMoE(balance=0.5))
        encoder.attach(adapter, "mixture")
        states(encoder)
        once = adapter.form.penalty(adapter)
        assert adapter.form.penalty(adapter) is None
        patches = [p for p in adapter.patches.values() if isinstance(p, Experts)]
        heard, found = [], 0.0
        with torch.no_grad(), encoder.using("mixture"):
            handles = [
                encoder.module.get_submodule(p.shared.first[p.own]).register_forward_pre_hook(
                    lambda m, a: heard.append(a[0])
                )
                for p in patches
            ]
            encoder.module(**IDS)
            for handle in handles:
                handle.remove()
            for patch, h in zip(patches, heard, strict=True):
                rows = []
                for x, mask in zip(h, IDS["attention_mask"], strict=True):
                    s = (x[mask > 0] @ patch.router.T).softmax(-1)
                    chosen = torch.zeros_like(s).scatter(1, s.topk(3, -1).indices, 1.0)
                    rows.append(float((chosen.mean(0) * 7 / 3 * s.mean(0)).sum()))
                found += sum(rows) / len(rows)
        assert float(once.detach()) == pytest.approx(0.5 * found, rel=1e-4)
        assert once.requires_grad

    def test_it_learns(self, encoder, decoder):
        task = colours(48)
        learned = pt.learn(encoder, task, form="finemoe", **{**FAST, "epochs": 4, "lr": 3e-3})
        assert learned.form.activation == "gelu" and learned.form.bias and not learned.form.gated
        encoder.attach(learned, "learned")
        score = pt.evaluate(encoder, task, "learned", head=learned.head, resamples=0)
        assert score.value >= 0.9
        text = pt.learn(decoder, colours(16), form="finemoe", **FAST)
        assert text.form.activation == "silu" and text.form.gated and not text.form.bias

    def test_what_it_refuses(self, encoder):
        with pytest.raises(ConfigError, match=r"shared_experts must be one of \[0, 2, 3\]"):
            FineMoE(3, 2, 4, 1)
        with pytest.raises(ConfigError, match="shared_experts must be one of"):
            FineMoE(4, 2, 2, 2)
        with pytest.raises(ConfigError, match="k must be at most"):
            FineMoE(2, 3)
        with pytest.raises(SiteError, match="all layers of a feed-forward"):
            Adapter.new(encoder, "finemoe", sites="down")
        with pytest.raises(SiteError, match="into 3 segments"):
            Adapter.new(encoder, FineMoE(4, 1, 3, 2), sites="down")
        with pytest.raises(SiteError, match="is none's"):
            Adapter.new(encoder, "finemoe", sites="query")


def test_lora_moe_is_molora_with_a_loss(encoder):
    assert issubclass(routers["lora-moe"], routers["molora"])
    own = Router.of("lora-moe")
    assert (own.top_k, own.balance) == (2, 0.01) and Router.of("molora").balance == 0.0
    adapter = mixture_of(own, {n: Adapter.new(encoder, LORA, name=n, seed=i) for i, n in enumerate("abc")})
    assert isinstance(router_part(adapter), Tally)
    learned = pt.learn(
        encoder, [colours(name="a"), colours(name="b")], joint=True,
        form={"name": "mixture", "router": "lora-moe", "experts": 4, "forms": LORA}, **FAST,
    )  # fmt: skip
    assert learned.card.training["steps"] > 0
