"""Gates that read: `mixda` each row's last token, `meteora` each token; and what holds for all over frozen adapters."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import colours
from test_routers import BATCH, made, mix_of, run
from torch.nn import functional as F
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.core.form import Call
from polytask.core.gate import Router
from polytask.core.routing import Routing
from polytask.core.site import Site
from polytask.forms.mixture import experts_of
from polytask.forms.mixtures import mixture_of, routing_of

IDS = torch.tensor([[5, 6, 7, 8, 11, 3], [9, 5, 6, 7, 12, 4]])


def llama(family="llama", names=("0", "1", "2"), sites="query | value | up"):
    """A base, and adapters named as PEFT's X-LoRA wants them."""
    model = pt.Model(tiny(family)[0])
    return model, made(model, names, sites=sites)


class TestMixDA:
    def test_it_is_the_weighted_sum(self, encoder):
        """Against the contributions one by one: ``g_0 y + sum_n g_n c_n``, from the last real token."""
        adapters = made(encoder, ("a", "b"), sites="down & layer==0")
        mix = mix_of("mixda", encoder, adapters, width=5)
        name, gate = next(iter(mix.gates.items()))
        slot, x = encoder._hub.slots[name], torch.randn(3, 5, 64)
        y = F.linear(x, torch.randn(32, 64))
        call = Call(mask=BATCH["attention_mask"], rows=3)
        last = x[torch.arange(3), torch.tensor([4, 3, 2])]
        W0, b0, W1, b1, W2, b2 = (gate.get_parameter(n) for n in ("W0", "b0", "W1", "b1", "W2", "b2"))
        g = F.linear(F.relu(F.linear(F.relu(F.linear(last, W0, b0)), W1, b1)), W2, b2).softmax(-1)[:, :, None, None]
        want = g[:, 2] * y + g[:, 0] * slot.patches["a"].contribute(x, y) + g[:, 1] * slot.patches["b"].contribute(x, y)
        with torch.no_grad():
            torch.testing.assert_close(mix.combine(slot, x, y.clone(), call), want, rtol=1e-4, atol=1e-5)
        assert gate.domains(x[1:2], Call(mask=BATCH["attention_mask"][1:2], rows=1)).shape == (1, 3)  # a batch of one

    def test_all_on_the_base_is_the_base(self, encoder):
        adapters = made(encoder)
        mix = mix_of("mixda", encoder, adapters, width=5)
        with torch.no_grad():
            for gate in mix.gates.values():
                gate.W2.zero_()
                gate.b2.copy_(torch.tensor([-99.0, -99.0, -99.0, 99.0]))
        torch.testing.assert_close(run(encoder, mix), run(encoder, None), rtol=0.0, atol=0.0)

    def test_a_fresh_gate_starts_near_the_base(self, encoder):
        adapters = made(encoder)
        mixture = mixture_of(Router.of("mixda"), adapters).trainable(False)
        mix = routing_of(mixture, adapters).attach(encoder)
        seen = []
        with mix.tracing(lambda gate, weights, call: seen.append(1.0 - weights.values.sum(-1))):
            near = run(encoder, mix)
        base = torch.cat(seen)
        assert float(base.mean()) == pytest.approx(math.exp(4) / (math.exp(4) + 3), abs=0.01)
        bare = run(encoder, None)
        far = run(encoder, pt.route(adapters, "uniform"))
        assert (near - bare).norm() < 0.2 * (far - bare).norm()

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_while_writing_the_weights_are_those_of_the_prompt(self, family):
        model, adapters = llama(family, sites=None)
        mix = mix_of("mixda", model, adapters, width=5)
        seen = {}
        see = lambda gate, weights, call: seen.setdefault(gate.site.name, []).append(weights.values)  # noqa: E731
        with torch.no_grad(), model.using(mix):
            with mix.tracing(see):
                one = model.module.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            for name, values in seen.items():
                assert all(torch.equal(v, values[0]) for v in values), name
                assert len(values) in (1, 4)
            assert any(len(values) == 4 for values in seen.values())
            first = next(iter(seen.values()))[0]
            model.module.generate(IDS.flip(0), max_new_tokens=2, do_sample=False)  # other texts, other weights
            mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 2)
            left = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
            padded = model.module.generate(
                left, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
            seen.clear()
            with mix.tracing(see):
                model.module.generate(IDS.flip(0), max_new_tokens=1, do_sample=False)
        torch.testing.assert_close(next(iter(seen.values()))[0], first.flip(0), rtol=1e-5, atol=1e-6)
        if family == "llama":
            assert torch.equal(padded[:, 2:], one)

    def test_the_first_stage_leaves_other_texts_alone(self, encoder, tmp_path):
        """A domain's adapter learns with little effect on texts of others, and the base stays as it is."""
        old = tmp_path / "old.txt"
        old.write_text("\n".join(f"green trees stand by river {i}" for i in range(20)), encoding="utf-8")
        base = {n: v.clone() for n, v in encoder.module.state_dict().items()}
        learned, task = {}, colours(48)
        task.dev = []  # the last state is kept
        for keep in (0.0, 1000.0):
            router = {"name": "mixda", "old": str(old), "keep": keep, "width": 8}
            form = {"name": "mixture", "router": router, "experts": ["red"], "forms": "lora", "train": "all"}
            adapter = pt.learn(
                encoder, task, form=form, sites="down", epochs=10, lr=2e-2, batch_size=8, progress=False,
                head_start="random", head_lr=1e-3,
            )  # fmt: skip
            learned[keep] = adapter
        text = encoder.tokenizer(["green trees stand by river 3", "green trees stand by river 7"], return_tensors="pt")
        moved = {}
        for keep, adapter in learned.items():
            name = encoder.attach(adapter, f"keep{keep}")
            with torch.no_grad():
                bare = encoder.features(text)
                with encoder.using(name):
                    moved[keep] = float((encoder.features(text) - bare).norm())
        assert moved[1000.0] < 0.5 * moved[0.0]
        assert list(experts_of(learned[1000.0])) == ["red"]
        assert all(torch.equal(v, base[n]) for n, v in encoder.module.state_dict().items())

    def test_the_gates_tell_domains_apart(self, encoder):
        """Trained towards one adapter for one kind of text and the other for another, and their weights can be read by domain."""
        adapters = made(encoder, ("a", "b"))
        router = Router.of({"name": "mixda", "width": 16, "dropout": 0.0, "lean": 0.0})
        mixture = mixture_of(router, adapters, seed=1)
        mix = routing_of(mixture, adapters).attach(encoder)
        texts = ["red cars drive by here", "blue birds sing up there"] * 2
        batch = dict(encoder.tokenizer(texts, add_special_tokens=False, return_tensors="pt"))
        with torch.no_grad(), encoder.using(["a", "b"] * 2):
            want = encoder.module(**batch).last_hidden_state
        optimiser = torch.optim.Adam([p for p in mixture.parameters() if p.requires_grad], 0.01)
        for _ in range(40):
            with encoder.using(mix):
                loss = (encoder.module(**batch).last_hidden_state - want).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        seen = []
        see = lambda gate, weights, call: seen.append(weights.values)  # noqa: E731
        with torch.no_grad(), encoder.using(mix), mix.tracing(see):
            encoder.module(**batch)
        mean = torch.stack(seen).mean(0)  # [B, N]
        assert mean[0, 0] > 1.5 * mean[0, 1] and mean[1, 1] > 1.5 * mean[1, 0]

    def test_what_it_refuses(self, encoder, tmp_path):
        with pytest.raises(ConfigError, match="width must be a whole number"):
            Router.of({"name": "mixda", "width": 0})
        for old, message in ((tmp_path / "none.txt", "cannot be read"), (tmp_path / "empty.txt", "holds no text")):
            (tmp_path / "empty.txt").write_text("\n")
            form = {"name": "mixture", "router": {"name": "mixda", "old": str(old)}, "experts": 1, "train": "all"}
            with pytest.raises(ConfigError, match=message):
                pt.learn(encoder, colours(), form=form, epochs=1, progress=False)


class TestMeteoRA:
    def gate(self, **settings):
        """Three adapters at a site of width 2, whose scores are (x_0, x_1, 0)."""
        router = Router.of({"name": "meteora", "serves": {"one": "a", "two": "b"}, **settings})
        gate = router.gate(Site("s", "linear", "up", (4, 2)), ("a", "b", "c"))
        gate.join(router.shared([gate.site], gate.names))
        with torch.no_grad():
            gate.W.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        return gate

    def test_the_best_two_of_a_token(self):
        x = torch.tensor([[[2.0, 4.0], [-1.0, -3.0]]])
        weights = self.gate(temperature=2.0).weigh(x, x, Call())
        assert weights.index.tolist() == [[[1, 0], [2, 0]]]
        torch.testing.assert_close(weights.values[0, 0], torch.tensor([2.0, 1.0]).softmax(0))
        torch.testing.assert_close(weights.values[0, 1], torch.tensor([0.0, -0.5]).softmax(0))
        one = self.gate(top_k=1).weigh(x, x, Call())
        assert one.values.tolist() == [[[1.0], [1.0]]]

    def test_the_classification_by_hand(self):
        """Three rows, of which one has padding and one a task that no adapter serves: the mean of three tokens' losses."""
        gate = self.gate(supervision=50.0)
        x = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [9.0, 9.0]], [[7.0, 7.0], [7.0, 7.0]]])
        call = Call(tasks=("one", "two", "other"), mask=torch.tensor([[1, 1], [1, 0], [1, 1]]), rows=3)
        gate.weigh(x, x, call)
        want = -(math.log(math.e**2 / (math.e**2 + 2)) + math.log(1 / 3) + math.log(math.e / (math.e + 2))) / 3
        penalty = gate.router.penalty([gate], gate.shared)
        assert float(penalty.detach()) == pytest.approx(50.0 * want, rel=1e-5)
        assert gate.router.penalty([gate], gate.shared) is None  # it is taken once
        penalty.backward()
        assert bool(gate.W.grad.any())
        with torch.no_grad():
            gate.weigh(x, x, call)
        assert gate.router.penalty([gate], gate.shared) is None

    def test_over_all_and_then_the_best_is_over_the_best(self):
        x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(0))
        gate = self.gate()
        weights = gate.weigh(x, x, Call())
        values, index = gate.scores(x, Call()).softmax(-1).topk(2, -1)
        assert torch.equal(weights.index, index)
        torch.testing.assert_close(weights.values, values / values.sum(-1, keepdim=True))

    def test_a_gate_that_is_sure_is_that_adapter(self, encoder):
        adapters = made(encoder)
        mix = mix_of("meteora", encoder, adapters)
        for gate in mix.gates.values():
            sure = lambda x, call: torch.tensor([0.0, 1e6, 0.0]).expand(*x.shape[:-1], 3)  # noqa: E731
            gate.__dict__["scores"] = sure
        torch.testing.assert_close(run(encoder, mix), run(encoder, "b"), rtol=1e-4, atol=1e-5)

    def test_the_gates_learn_which_task_a_token_is_of(self, encoder):
        """Two tasks that say other things: most tokens go to the adapter that serves their row's task."""
        tasks = [colours(32, "a"), colours(32, "b", start=1000)]
        for example in [e for split in (tasks[1].train, tasks[1].dev, tasks[1].test) for e in split]:
            object.__setattr__(example, "inputs", (f"every small dog saw one {example.target} cat last night",))
        for task in tasks:
            task.dev = []  # the last state is kept
        adapters = made(encoder)
        before = {n: a.hash for n, a in adapters.items()}
        agree = {}
        for supervision in (0.0, 50.0):
            mix = pt.route(
                adapters, "meteora", model=encoder, data=tasks, epochs=12, lr=2e-2, batch_size=8, supervision=supervision,
                deviation=0.02, max_grad_norm=0,
            )  # fmt: skip
            assert mix.router.serves["a"] == "a"
            hits = []
            for task in tasks:
                own = list(adapters).index(task.name)
                see = lambda gate, w, call, own=own: hits.append((w.index[..., 0] == own).float().mean())  # noqa: B023, E731
                with mix.tracing(see):
                    pt.evaluate(encoder, task, mix, head=mix.heads[task.name], resamples=0)
            agree[supervision] = float(torch.stack(hits).mean())
        assert agree[50.0] > 0.75 > 0.45 > agree[0.0]
        assert {n: a.hash for n, a in adapters.items()} == before

    def test_the_adapters_learn_too_when_asked(self, encoder):
        adapters = made(encoder)
        mix = pt.route(
            adapters, "meteora", model=encoder, data=[colours(name="a")], epochs=1, batch_size=4, train="all"
        )
        assert all(mix.adapters[n].hash != a.hash for n, a in adapters.items())

    def test_saved_it_knows_what_serves_what(self, encoder, tmp_path):
        adapters = made(encoder)
        mix = mix_of("meteora", encoder, adapters)
        again = Routing.load(mix.save(tmp_path / "mix"), adapters)
        assert again.router == mix.router and again.router.serves == {"a": "a", "b": "b", "c": "c"}


@pytest.mark.parametrize("router", ["adapterfusion", "scalearn", "mixda", "meteora", "x-lora"])
@pytest.mark.parametrize("family", ["vit", "gpt2", "bert"])
def test_bases_in_half_precision(router, family):
    """The weights are computed in the gates' own precision, and the outputs keep the base's."""
    module, batch = tiny(family)
    model = pt.Model(module)
    mix = mix_of(router, model, made(model), **({"width": 8} if router == "mixda" else {}))
    with torch.no_grad(), model.using(mix):
        whole = output(module(**batch))
        module.to(torch.bfloat16)
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
        there = output(module(**half))
        with model.using(None):
            bare = output(module(**half))
    assert there.dtype == torch.bfloat16 and torch.isfinite(there).all()
    real = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
    assert (there.float() - whole)[real].norm() < 0.5 * (bare.float() - whole)[real].norm()


@pytest.mark.parametrize("router", ["meteora", "x-lora", "mixda"])
class TestAll:
    def test_with_fresh_experts(self, router, encoder):
        tasks = [colours(name="a"), colours(name="b")]
        spec = {"name": router, **({"width": 8} if router != "meteora" else {})}
        form = {"name": "mixture", "router": spec, "experts": 4, "forms": {"name": "lora", "rank": 4}, "train": "all"}
        adapter = pt.learn(encoder, tasks, form=form, joint=True, epochs=1, lr=1e-2, batch_size=4, progress=False)
        moved = [name for name, e in experts_of(adapter).items() if any(bool(p.B.any()) for p in e.patches.values())]
        assert len(moved) == 4
        adapter.copy()  # what was on its way in the last forward is no part of it

    def test_a_causal_base_learns_it(self, router, decoder):
        adapters = made(decoder, ("a", "b"))
        spec = {"width": 8} if router != "meteora" else {}
        tasks = [colours(name="a"), colours(name="b")]
        mix = pt.route(adapters, router, model=decoder, data=tasks, epochs=1, batch_size=4, **spec)
        score = pt.evaluate(decoder, tasks[0], mix, head=mix.heads["a"], resamples=0)
        assert 0.0 <= score.value <= 1.0

    def test_other_forms(self, router, encoder):
        adapters = made(encoder, form={"name": "bottleneck", "style": "pfeiffer", "width": 4})
        with torch.no_grad():
            for adapter in adapters.values():
                for parameter in adapter.parameters():
                    parameter.add_(0.1)
        mix = mix_of(router, encoder, adapters)
        assert not torch.equal(run(encoder, mix), run(encoder, None))
