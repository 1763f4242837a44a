"""Learned weights on what frozen adapters contribute: attention over it (`adapterfusion`) and plain scales (`scalearn`)."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import colours
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers import BATCH, made, mix_of, run
from torch.nn import functional as F
from zoo import output, tiny

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError, SiteError
from polytask.core.form import NO_CALL
from polytask.core.gate import Router
from polytask.core.routing import Routing
from polytask.core.site import Site
from polytask.forms.mixture import experts_of
from polytask.forms.mixtures import mixture_of, routing_of

PFEIFFER = {"name": "bottleneck", "style": "pfeiffer", "width": 4}


def shaken(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """Adapters that all contribute something."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapters


def mixed(model, adapters, router, seed=0):
    """The mixture of a router over adapters with its gates as they start, and the mix of it, attached."""
    mixture = mixture_of(Router.of(router), adapters, seed=seed).trainable(False)
    return mixture, routing_of(mixture, adapters).attach(model)


class Given:
    """A patch that contributes a given tensor."""

    def __init__(self, part):
        self.part = part

    def contribute(self, x, y, call):
        return self.part


class Fixed:
    """Hosts whose patches contribute given tensors."""

    def __init__(self, parts):
        self.patches = {name: Given(part) for name, part in parts.items()}


class TestFusion:
    def gate(self, d=1, **settings):
        router = Router.of({"name": "adapterfusion", **settings})
        gate = router.gate(Site("s", "linear", "down", (d, 2 * d)), ("a", "b"))
        return gate.trainable(False) or gate

    def test_by_hand(self):
        """d = 1, W_q = W_k = W_v = 1, h = 1, z = (0, ln 3): a = (1/4, 3/4), and the mixture 0.75 ln 3."""
        gate = self.gate()
        with torch.no_grad():
            for W in (gate.Wq, gate.Wk, gate.Wv):
                W.fill_(1.0)
        seen = []
        gate.__dict__["trace"] = lambda gate, weights, call: seen.append(weights)
        y = torch.ones(1, 1, 1)
        out = gate.combine(Fixed({"a": 0.0 * y, "b": math.log(3) * y}), y, y, y, NO_CALL)
        torch.testing.assert_close(out, y + 0.75 * math.log(3))
        torch.testing.assert_close(seen[0].values, torch.tensor([[[0.25, 0.75]]]))
        assert seen[0].names == ("a", "b")

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 999), d=st.integers(1, 6), temperature=st.sampled_from([0.5, 1.0, 20.0]))
    def test_against_a_loop(self, seed, d, temperature):
        generator = torch.Generator().manual_seed(seed)
        gate = self.gate(d, temperature=temperature)
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.normal_(generator=generator)
        y = torch.randn(2, 3, d, generator=generator)
        z = {name: torch.randn(2, 3, d, generator=generator) for name in ("a", "b")}
        out = gate.combine(Fixed(z), y, y, y, NO_CALL)
        for row in range(2):
            for token in range(3):
                q = gate.Wq @ y[row, token] + gate.bq
                keys = [gate.Wk @ part[row, token] + gate.bk for part in z.values()]
                a = torch.stack([(q * k).sum() / temperature for k in keys]).softmax(0)
                want = y[row, token] + sum(a[n] * (gate.Wv @ part[row, token]) for n, part in enumerate(z.values()))
                torch.testing.assert_close(out[row, token], want, rtol=1e-4, atol=1e-4)

    def test_one_adapter_is_that_adapter(self, encoder):
        adapters = shaken(made(encoder, ("a",), form=PFEIFFER))
        there = run(encoder, mixed(encoder, adapters, {"name": "adapterfusion", "values": "static"})[1])
        alone = run(encoder, "a")
        torch.testing.assert_close(there, alone, rtol=1e-5, atol=1e-6)
        started = run(encoder, mixed(encoder, adapters, "adapterfusion")[1])  # W_v has 1e-6 beside its diagonal
        torch.testing.assert_close(started, alone, rtol=1e-3, atol=1e-3)
        assert not torch.equal(started, alone)

    def test_identical_adapters_are_any_of_them(self, encoder):
        adapters = made(encoder, same=True)
        mix = mix_of("adapterfusion", encoder, adapters, values="static")
        torch.testing.assert_close(run(encoder, mix), run(encoder, "b"), rtol=1e-4, atol=1e-5)

    def test_on_images_without_values(self):
        module, batch = tiny("vit")
        model = pt.Model(module)
        mix = mix_of("adapterfusion", model, made(model, ("a",)), values="static")
        with torch.no_grad(), model.using(mix):
            there = output(model.module(**batch))
        with torch.no_grad(), model.using("a"):
            torch.testing.assert_close(there, output(model.module(**batch)), rtol=1e-4, atol=1e-5)

    def test_how_many_numbers(self, encoder):
        d = 32
        for values, count in (("dynamic", 2 * (d * d + d) + d * d), ("static", 2 * (d * d + d))):
            adapters = made(encoder, form=PFEIFFER)
            _, mix = mixed(encoder, adapters, {"name": "adapterfusion", "values": values})
            assert mix.size == 2 * count  # two layers, one site each
            mix.detach(encoder)

    def test_the_attention_of_each_layer_can_be_read(self, encoder):
        mix = mix_of("adapterfusion", encoder, shaken(made(encoder, form=PFEIFFER)))
        seen = {}
        with mix.tracing(lambda gate, weights, call: seen.__setitem__(gate.site.name, weights)):
            run(encoder, mix)
        assert [name.rsplit(".", 2)[-2:] for name in seen] == [["output", "dense"]] * 2
        for weights in seen.values():
            assert weights.values.shape == (3, 5, 3)
            torch.testing.assert_close(weights.values.sum(-1), torch.ones(3, 5))

    def test_the_regulariser(self, encoder):
        """It is zero at the identity, and pulls W_v there."""
        mixture, _ = mixed(encoder, made(encoder, form=PFEIFFER), "adapterfusion")
        gate = next(iter(mixture.patches.values())).gate
        assert 0.0 <= float(mixture.form.penalty(mixture)) < 1e-8
        with torch.no_grad():
            gate.Wv[0, 1] += 2.0
        assert float(mixture.form.penalty(mixture)) == pytest.approx(0.01 * 4.0, rel=1e-4)
        static, _ = mixed(
            encoder, made(encoder, ("x", "y"), form=PFEIFFER), {"name": "adapterfusion", "values": "static"}
        )
        assert static.form.penalty(static) is None

    def test_dropout_acts_on_the_scores(self):
        """A score that is dropped is zero, and its adapter still gets a weight."""
        gate = self.gate(dropout=0.5)
        with torch.no_grad():
            for W in (gate.Wq, gate.Wk):
                W.fill_(1.0)
        y, z = torch.ones(1, 1), torch.tensor([[[0.0], [math.log(3)]]])
        assert float(gate.attention(y, z)[0, 1]) == pytest.approx(0.75)
        gate.Wq.requires_grad_()
        torch.manual_seed(0)
        found = {round(float(gate.attention(y, z)[0, 1].detach()), 3) for _ in range(40)}
        assert found == {0.5, 0.9}  # 0 dropped, or 3^2 / (1 + 3^2) where it is kept and doubled
        with torch.no_grad():
            assert float(gate.attention(y, z)[0, 1]) == pytest.approx(0.75)

    def test_the_temperature_falls_while_it_learns(self, encoder, tmp_path):
        adapters = shaken(made(encoder, ("a", "b"), form=PFEIFFER))
        mix = pt.route(
            adapters,
            "adapterfusion",
            model=encoder,
            data=[colours()],
            epochs=1,
            batch_size=4,
            temperature=2.0,
            cooling=0.25,
        )
        assert float(mix.shared.T) == 2.0 - 0.25 * 3  # three steps
        file = mix.save(tmp_path / "mix")
        assert float(Routing.load(file, adapters).shared.T) == 1.25
        mix.router.stepped((), mix.shared)
        mix.router.stepped((), mix.shared)
        assert float(mix.shared.T) == 1.0

    def test_what_it_refuses(self, encoder):
        with pytest.raises(ConfigError, match="values must be one of dynamic, static"):
            Router.of({"name": "adapterfusion", "values": "both"})
        with pytest.raises(ConfigError, match="temperature must be above 0"):
            Router.of({"name": "adapterfusion", "temperature": 0.0})
        blocks = made(encoder, ("a",), form={"name": "bottleneck", "style": "adapterplus", "width": 4})
        with pytest.raises(SiteError, match="vectors of a known width, which sites of kind 'block'"):
            mixture_of(Router.of("adapterfusion"), blocks)


class TestScales:
    @pytest.mark.parametrize(
        "settings, count",
        [
            ({}, 2 * 3 * 32),
            ({"shape": "scalar"}, 2 * 3),
            ({"share": True}, 3 * 32),
            ({"shape": "scalar", "share": True}, 3),
        ],
    )
    def test_how_many_numbers_learn(self, encoder, settings, count):
        """Of L = 2 layers, N = 3 adapters, d = 32: L N d, L N, N d, and N."""
        adapters = shaken(made(encoder, form=PFEIFFER))
        before = {n: a.hash for n, a in adapters.items()}
        mix = pt.route(adapters, "scalearn", model=encoder, data=[colours()], epochs=1, batch_size=4, **settings)
        head = sum(p.numel() for p in mix.heads["colours"].parameters())
        assert mix.size == count
        assert mix.about["training"]["trained_parameters"] == count + head
        assert {n: a.hash for n, a in adapters.items()} == before
        if settings.get("share"):
            assert len({id(gate.owner.omega) for gate in mix.gates.values()}) == 1
            assert "omega" not in next(iter(mix.gates.values()))._parameters

    @pytest.mark.parametrize("form", [PFEIFFER, "lora", "ia3"], ids=str)
    @pytest.mark.parametrize("shape", ["vector", "scalar"])
    @pytest.mark.parametrize("share", [False, True])
    def test_scales_of_one_adapter_and_of_none(self, encoder, form, shape, share):
        where = "down" if share and shape == "vector" and form is not PFEIFFER else None
        adapters = shaken(made(encoder, form=form, sites=where))
        _, mix = mixed(encoder, adapters, {"name": "scalearn", "shape": shape, "share": share})
        owners = {id(gate.owner): gate.owner for gate in mix.gates.values()}.values()
        with torch.no_grad():
            for owner in owners:
                owner.omega.zero_()
        torch.testing.assert_close(run(encoder, mix), run(encoder, None), rtol=0.0, atol=0.0)
        with torch.no_grad():
            for owner in owners:
                owner.omega[1] = 1.0
        torch.testing.assert_close(run(encoder, mix), run(encoder, "b"), rtol=1e-5, atol=1e-6)

    def test_it_is_the_sum(self, encoder):
        """Against the contributions one by one, at the only site."""
        adapters = shaken(made(encoder, form=PFEIFFER, sites="down & layer==1"))
        _, mix = mixed(encoder, adapters, "scalearn")
        name, gate = next(iter(mix.gates.items()))
        with torch.no_grad():
            gate.omega.normal_(generator=torch.Generator().manual_seed(0))
        slot, x = encoder._hub.slots[name], torch.randn(2, 3, 64)
        y = F.linear(x, torch.randn(32, 64))
        want = y + sum(gate.omega[i] * slot.patches[n].contribute(x, y) for i, n in enumerate("abc"))
        with torch.no_grad():
            torch.testing.assert_close(mix.combine(slot, x, y), want, rtol=1e-5, atol=1e-5)

    def test_how_the_scales_start(self, encoder):
        _, mix = mixed(encoder, made(encoder), "scalearn")
        values = torch.cat([gate.omega.flatten() for gate in mix.gates.values()])
        assert float(values.mean()) == pytest.approx(2 / 3, abs=1e-4)
        assert float(values.std()) == pytest.approx(1e-3, rel=0.1)

    def test_dropout_acts_on_the_scales(self, encoder):
        _, mix = mixed(encoder, made(encoder), {"name": "scalearn", "deviation": 0.0})
        gate = next(iter(mix.gates.values()))
        assert torch.equal(gate.scales(), gate.omega)
        gate.omega.requires_grad_()
        dropped = gate.scales()
        kept = dropped[dropped != 0.0]
        assert 0.5 < len(kept) / dropped.numel() < 0.9
        torch.testing.assert_close(kept, torch.full_like(kept, (2 / 3) / 0.7))

    def test_sites_with_some_of_the_adapters_take_their_own_scales(self, encoder):
        few = made(encoder, ("a", "b"), sites="query")
        more = made(encoder, ("x", "c"), sites="query | key")
        _, mix = mixed(encoder, {**few, "c": more["c"]}, {"name": "scalearn", "shape": "scalar", "share": True})
        with torch.no_grad():
            mix.shared.omega.copy_(torch.tensor([1.0, 2.0, 3.0]))
        found = {gate.site.role: gate.weigh(torch.ones(1), torch.ones(1), NO_CALL) for gate in mix.gates.values()}
        assert found["query"].names == ("a", "b", "c") and found["query"].values.tolist() == [1.0, 2.0, 3.0]
        assert found["key"].names == ("c",) and found["key"].values.tolist() == [3.0]

    def test_scalars_act_where_a_weight_is_changed(self, encoder):
        """Forms that prefer the weight are mixed there; the values are the same as of outputs."""
        adapters = shaken(made(encoder, ("a", "b"), form={"name": "oft", "block_size": 4}))
        _, mix = mixed(encoder, adapters, {"name": "scalearn", "shape": "scalar"})
        there = run(encoder, mix)
        for gate in mix.gates.values():
            gate.omega.requires_grad_()
            gate.__dict__["router"] = Router.of({"name": "scalearn", "shape": "scalar", "dropout": 0.0})
        with encoder.using(mix):
            out = encoder.module(**BATCH).last_hidden_state * BATCH["attention_mask"][..., None]
        torch.testing.assert_close(out, there, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        assert all(gate.omega.grad is not None for gate in mix.gates.values())

    def test_what_it_refuses(self, encoder):
        with pytest.raises(ConfigError, match="shape must be one of vector, scalar"):
            Router.of({"name": "scalearn", "shape": "matrix"})
        with pytest.raises(MixError, match="sites of widths .32, 64. cannot share"):
            mixture_of(Router.of({"name": "scalearn", "share": True}), made(encoder))
        blocks = shaken(made(encoder, form={"name": "bottleneck", "style": "adapterplus", "width": 4}))
        with pytest.raises(SiteError, match="say shape='scalar'"):
            mixture_of(Router.of("scalearn"), blocks)
        _, mix = mixed(encoder, blocks, {"name": "scalearn", "shape": "scalar"})
        assert torch.isfinite(run(encoder, mix)).all()


@pytest.mark.parametrize("router", ["adapterfusion", "scalearn"])
class TestBoth:
    def test_it_learns_to_be_one_of_its_adapters(self, router, encoder):
        """Gates that are trained towards what one adapter gives come near it, and weigh it most."""
        more = {"values": "static"} if router == "adapterfusion" else {}
        adapters = shaken(made(encoder, form=PFEIFFER))
        mixture, mix = mixed(encoder, adapters, {"name": router, "dropout": 0.0, **more})
        want = run(encoder, "c")
        own = [p.requires_grad_() for p in mixture.trainable().parameters() if p.requires_grad]
        optimiser, seen, losses = torch.optim.Adam(own, 0.03), [], []
        for _ in range(60):
            with encoder.using(mix):
                out = encoder.module(**BATCH).last_hidden_state * BATCH["attention_mask"][..., None]
            losses.append((out - want).square().mean())
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < 0.1 * losses[0]
        with mix.tracing(lambda gate, weights, call: seen.append(weights.values.reshape(-1, 3).mean(0))):
            run(encoder, mix)
        assert all(int(weights.argmax()) == 2 for weights in seen)

    def test_experts_learn_too(self, router, encoder):
        tasks = [colours(name="a"), colours(name="b")]
        form = {"name": "mixture", "router": router, "experts": 2, "forms": PFEIFFER, "train": "all"}
        adapter = pt.learn(encoder, tasks, form=form, joint=True, epochs=1, batch_size=4, progress=False)
        assert all(
            any(bool(p.any()) for n, p in e.named_parameters() if n.endswith("up"))
            for e in experts_of(adapter).values()
        )

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_while_writing(self, router, family):
        model = pt.Model(tiny(family)[0])
        mix = mix_of(router, model, shaken(made(model, form=PFEIFFER)))
        ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
        with torch.no_grad(), model.using(mix):
            one = model.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
            again = model.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(one, again)
