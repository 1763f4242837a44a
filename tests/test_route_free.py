"""Routers that need no training of their own: phatgoose, glider, centroid, spectral gates, nearest."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers import BATCH, made, run, task_of
from zoo import output, tiny

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError
from polytask.core.form import NO_CALL
from polytask.core.gate import Router
from polytask.core.head import head_for
from polytask.core.reading import means, packed, texts_of
from polytask.core.routing import Routing
from polytask.core.site import Site
from polytask.core.task import Example
from polytask.forms.lora import LoRA
from polytask.route.learned_gate import Gated, learned_gates, loss_of
from polytask.route.mixes.phatgoose import standard
from polytask.route.mixes.spectral import spectrum

SITE = Site("layer", "linear", "other", (1, 2))
NAMES = ("a", "b", "c")


def gate_of(router, signs, site=None):
    """A gate with values, of adapters that are called a, b, c ..."""
    site = site or Site("layer", "linear", "other", (3, signs[0].shape[-1]))
    gate = Router.of(router).gate(site, tuple("abcdefgh"[: len(signs)]))
    gate.fill(signs)
    return gate


def fruit(name: str, words: str, **more) -> pt.Task:
    """A task with texts of its own."""
    rows = [Example((f"{word} {i}",), "red" if i % 2 else "blue") for i, word in enumerate(words.split() * 2)]
    return pt.Task(name=name, kind="classify", train=rows, dev=rows[:2], test=rows[:2], labels=("blue", "red"), **more)


@pytest.fixture(scope="module")
def gated(minilm_tokenizer):
    """A base, adapters and tasks, and gates that learned for some steps."""
    model = tiny_bert(minilm_tokenizer)
    adapters, tasks = made(model), [task_of(model, name) for name in NAMES]
    how = Router.of({"name": "phatgoose", "steps": 4, "lr": 0.02, "batch_size": 6})
    signs = {n: how.sign(a, model, t) for (n, a), t in zip(adapters.items(), tasks, strict=True)}
    return adapters, tasks, signs


@pytest.fixture
def goose(gated, minilm_tokenizer):
    """The same beside a base of its own, and what makes a mix of them."""
    adapters, tasks, signs = gated
    model = tiny_bert(minilm_tokenizer)

    def make(name="phatgoose", **more):
        model.detach()
        router = Router.of({"name": name, **more}).informed(adapters, tasks)
        return Routing.over(router, adapters, signs).attach(model)

    return model, make


class TestPhatGoose:
    def test_by_hand(self):
        gate = gate_of("phatgoose", [torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 5.0])])
        assert gate.v.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
        found = gate.scores(torch.tensor([[1.0, -1.0]]), NO_CALL)
        torch.testing.assert_close(found, torch.tensor([[math.sqrt(2), -math.sqrt(2)]]), rtol=1e-5, atol=0)

    @given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), plus=st.floats(-3, 3))
    @settings(max_examples=25, deadline=None)
    def test_the_gates_length_and_mean_do_not_matter_and_scores_are_bounded(self, seed, scale, plus):
        draw = torch.Generator().manual_seed(seed)
        signs = list(torch.randn(4, 16, generator=draw))
        x = 5 * torch.randn(3, 7, 16, generator=draw)
        scores = gate_of("phatgoose", signs).scores(x, NO_CALL)
        torch.testing.assert_close(
            gate_of("phatgoose", [scale * (v + plus) for v in signs]).scores(x, NO_CALL), scores, rtol=1e-3, atol=1e-4
        )
        assert float(scores.abs().max()) <= math.sqrt(16) + 1e-5

    def test_the_weights_are_those_of_the_papers_code(self):
        """The softmax over all, the best two of it divided by their sum."""
        draw = torch.Generator().manual_seed(0)
        signs, x = list(torch.randn(5, 8, generator=draw)), torch.randn(2, 3, 8, generator=draw)
        normal = torch.nn.LayerNorm(8, eps=1e-5, elementwise_affine=False)
        scores = torch.stack([normal(v) @ normal(x).mT for v in signs], -1) / 8**0.5
        top, index = scores.softmax(-1).topk(2, -1)
        weights = gate_of("phatgoose", signs).weigh(x, x, NO_CALL)
        assert torch.equal(weights.index, index)
        torch.testing.assert_close(weights.values, top / top.sum(-1, keepdim=True), rtol=1e-4, atol=1e-4)

    def test_a_gate_scales_what_the_adapter_adds(self, encoder):
        """At one site, against a product written out; where no gate is, the adapter acts as it is."""
        adapter = made(encoder, ("a",), sites="query")["a"]
        encoder.attach(adapter)
        first, second = adapter.patches
        v = torch.randn(32, generator=torch.Generator().manual_seed(1))
        seen = {}
        hooks = [
            encoder.module.get_submodule(site).register_forward_hook(
                lambda module, args, out, site=site: seen.__setitem__(site, (args[0], out))
            )
            for site in (first, second)
        ]
        with encoder.using(Gated("a", {first: v})):
            encoder.features(BATCH)
        for hook in hooks:
            hook.remove()
        for site, scaled in ((first, True), (second, False)):
            x, out = seen[site]
            layer, change = encoder.module.get_submodule(site), adapter.patches[site].delta()
            weight = torch.sigmoid((x * v).sum(-1, keepdim=True)) if scaled else 1.0
            wanted = x @ layer.weight.T + layer.bias + weight * (x @ change.T)
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)

    def test_texts_are_cut_as_they_were_for_the_adapter(self, encoder, monkeypatch):
        task, cut = colours(), []
        adapter = made(encoder, ("a",))["a"]
        head = adapter.heads[task.name] = head_for(encoder, task, seed=3)
        real = type(head).rows
        monkeypatch.setattr(
            type(head), "rows", lambda self, *a, **more: cut.append(more["longest"]) or real(self, *a, **more)
        )
        learned_gates(adapter, encoder, task, steps=1, lr=0.05, batch_size=2)
        adapter.card.training = {"stage": {"schedule": {"longest": 5}}}
        learned_gates(adapter, encoder, task, steps=1, lr=0.05, batch_size=2)
        assert cut == [None, 5]

    def test_learning_moves_the_gates_alone_and_lowers_the_loss(self, encoder):
        task = colours()
        adapter = made(encoder, ("a",))["a"]
        adapter.heads[task.name] = head_for(encoder, task, seed=3)
        encoder.module.train()
        base = {k: v.clone() for k, v in encoder.module.state_dict().items()}
        values, state = adapter.hash, torch.get_rng_state()
        how = {"steps": 15, "lr": 0.05, "batch_size": 12}
        gates = learned_gates(adapter, encoder, task, **how)
        assert torch.equal(torch.get_rng_state(), state)
        assert adapter.hash == values and same_state(base, encoder.module)
        assert encoder.attached == () and all(m.training for m in encoder.module.modules())
        again = learned_gates(adapter, encoder, task, **how)
        assert all(torch.equal(gates[site], again[site]) for site in gates)
        encoder.module.eval()
        encoder.attach(adapter)
        head = adapter.heads[task.name]
        rows = head.rows(encoder, task.train)
        with torch.no_grad():
            losses = []
            for scale in (0.0, 1.0):
                with encoder.using(Gated("a", {site: scale * v for site, v in gates.items()})):
                    losses.append(float(loss_of(encoder, head, rows)))
        assert losses[1] < losses[0] - 1e-3

    @pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
    def test_bases_that_write(self, kind, request):
        model = request.getfixturevalue(kind)
        adapters = made(model, ("a", "b"))
        mix = pt.route(adapters, "phatgoose", model=model, data=[task_of(model, n) for n in "ab"], steps=1)
        assert all(bool(gate.v.any()) for gate in mix.gates.values())

    def test_a_further_adapter_changes_no_gate(self, goose, gated):
        model, make = goose
        adapters, tasks, signs = gated
        mix = make()
        two = Routing.over(mix.router, {n: adapters[n] for n in "ab"}, signs)
        for site, gate in two.gates.items():
            assert torch.equal(gate.v, mix.gates[site].v[:2])

    def test_what_it_refuses(self, goose, gated, encoder):
        adapters, tasks, signs = gated
        with pytest.raises(MixError, match="'b': phatgoose needs a gate that learned.*among data="):
            pt.route(adapters, "phatgoose", model=encoder, data=tasks[:1], steps=1)
        site = next(iter(signs["a"]))
        flat = {n: dict(sites) for n, sites in signs.items()}
        flat["b"][site] = torch.full((32,), 3.0)
        router = Router.of("phatgoose")
        with pytest.raises(MixError, match=f"gate of b at {site!r} is constant"):
            Routing.over(router, adapters, flat)
        own = {"a": adapters["a"]}
        with pytest.raises(MixError, match="gates of a are constant"):
            Routing.over(router, own, {"a": {site: torch.zeros(32) for site in signs["a"]}})
        with pytest.raises(MixError, match="no signature 'phatgoose'"):
            Routing.over(router, adapters, {n: signs[n] for n in "ab"})
        empty = colours(name="a")
        empty.train = []
        with pytest.raises(MixError, match="no training examples"):
            pt.route(own, "phatgoose", model=encoder, data=empty)
        with pytest.raises(MixError, match="which sites of kind 'norm' do not see"):
            pt.route(made(encoder, ("a",), form="norm"), "phatgoose", model=encoder, data=colours(name="a"))
        assert not standard(torch.full((5,), 0.1)).any()


class TestGlider:
    def test_scale_zero_is_phatgoose_exactly(self, goose):
        model, make = goose
        there = run(model, make("phatgoose"))
        assert torch.equal(run(model, make("glider", scale=0.0)), there)
        assert not torch.equal(run(model, make("glider", scale=30.0)), there)

    def test_scores_are_the_tokens_and_the_tasks_together(self, goose):
        model, make = goose
        vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [0.0, 1.0], "ask": [3.0, 4.0]}
        texts = {name: f"text {name}" for name in vectors}

        def embed(said):
            return torch.tensor([vectors[text.split()[-1]] for text in said])

        mix = make("glider", scale=2.0, embed=embed, texts=texts)
        seen = []
        with mix.tracing(lambda gate, weights, call: seen.append((gate, weights))):
            run(model, mix, tasks=["ask", "a", "c"])
        wanted = torch.tensor([[0.6, 1.0, 0.8], [1.0, 0.6, 0.0], [0.0, 0.8, 1.0]])
        torch.testing.assert_close(mix.shared.weights, wanted)
        gate = seen[0][0]
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
        local = super(type(gate), gate).scores(x, NO_CALL)
        torch.testing.assert_close(gate.scores(x, NO_CALL), local + 2.0 * wanted[:, None])
        before = gate.weigh(x, x, NO_CALL).dense()
        mix.shared.__dict__["weights"] = wanted + 7.0  # a constant added to all changes nothing
        torch.testing.assert_close(gate.weigh(x, x, NO_CALL).dense(), before, rtol=1e-4, atol=1e-5)

    def test_a_huge_scale_leaves_the_choice_to_the_texts(self, goose):
        model, make = goose
        vectors = {"a": [1.0, 0.0], "b": [0.8, 0.6], "c": [0.0, 1.0]}
        mix = make(
            "glider", scale=1e6, top_k=2, embed=lambda said: [vectors[t] for t in said], texts={n: n for n in NAMES}
        )
        seen = []
        with mix.tracing(lambda gate, weights, call: seen.append(weights)):
            run(model, mix, tasks=["a", "a", "c"])
        best = {frozenset(row.tolist()) for w in seen if w.index.dim() == 3 for row in w.index[:2].flatten(0, 1)}
        assert best == {frozenset({0, 1})}
        assert {frozenset(row.tolist()) for w in seen if w.index.dim() == 3 for row in w.index[2]} == {
            frozenset({1, 2})
        }

    def test_texts_come_from_what_is_there(self, gated, encoder):
        adapters, tasks, signs = gated
        known = fruit("b", "plum pear", instruction="Name the colour of the fruit.")
        other = fruit("other", "oak elm", description="Which tree?")
        router = Router.of({"name": "glider", "texts": {"c": "said by hand"}}).informed(adapters, [known, other])
        router = router.fitted(adapters)
        assert router.texts == {
            "a": "a", "b": "Name the colour of the fruit.", "c": "said by hand", "other": "Which tree?",
        }  # fmt: skip
        mix = Routing.over(router, adapters, signs).attach(encoder)
        run(encoder, mix, tasks=["other", "b", "b"])
        asked = mix.shared.weights
        assert float(asked[1, 1]) == pytest.approx(1.0, abs=1e-5)
        rows = means(encoder, texts_of(encoder, [("Which tree?",), ("said by hand",)]))
        assert float(asked[0, 2]) == pytest.approx(float(torch.cosine_similarity(rows[0], rows[1], dim=0)), abs=1e-5)
        # rows whose task nobody knows are read themselves
        text = texts_of(encoder, [("said by hand",)])
        with torch.no_grad(), encoder.using(mix, tasks="unheard"):
            encoder.features(text)
        assert float(mix.shared.weights[0, 2]) == pytest.approx(1.0, abs=1e-5)
        run(encoder, mix, tasks=["unheard"] * 3)
        read = mix.shared.weights
        run(encoder, mix, tasks=["other", "unheard", "b"])
        torch.testing.assert_close(mix.shared.weights, torch.stack([asked[0], read[1], asked[2]]))

    def test_an_embedder_is_not_in_the_file(self, goose, tmp_path, gated):
        model, make = goose
        said = []

        def embed(texts):
            said.extend(texts)
            return [[len(text), 1.0] for text in texts]

        mix = make("glider", embed=embed)
        there = run(model, mix)
        run(model, mix, tasks=["nobody"] * 3)
        assert said[-3:] == ["this is a", "hello world", "test"]
        run(model, mix, {**BATCH, "attention_mask": (BATCH["input_ids"] != 2088).long()}, ["nobody"] * 3)
        assert said[-2] == "hello"  # what the mask hides is not read
        file = mix.save(tmp_path / "mix.safetensors")
        mix.detach(model)
        with pytest.raises(MixError, match="give it again"):
            Routing.load(file, gated[0]).attach(model)
        assert model.attached == ()
        again = Routing.load(file, gated[0], embed=embed).attach(model)
        assert torch.equal(run(model, again), there)
        with pytest.raises(MixError, match=r"gave shape \(3,\) for 3"):
            make("glider", embed=lambda texts: [1.0] * len(texts))
        assert model.attached == ()
        with pytest.raises(ConfigError, match="embed must be"):
            Router.of({"name": "glider", "embed": "nomic"})

    def test_images_need_tasks_and_an_embedder(self):
        module, batch = tiny("vit")
        model = pt.Model(module)
        adapters = made(model, ("a", "b"))
        tasks = [task_of(model, n) for n in "ab"]
        with pytest.raises(MixError, match="glider reads texts with the base.*embed='words'"):
            pt.route(adapters, "glider", model=model, data=tasks, steps=1)
        assert model.attached == ()
        pt.route(adapters, "glider", model=model, data=tasks, steps=1, scale=0.0).detach(model)  # no text is looked at
        mix = pt.route(adapters, "glider", model=model, data=tasks, steps=1, embed="words")
        with torch.no_grad():
            with model.using(mix, tasks=["a", "b", "a"]):
                assert torch.isfinite(output(model.module(**batch))).all()
            with pytest.raises(MixError, match="finds no text in the rows"), model.using(mix):
                model.module(**batch)


class TestSpectral:
    def test_by_hand(self, encoder):
        patch = made(encoder, ("a",), sites="query")["a"]
        patch = next(iter(patch.patches.values()))
        A, B = torch.zeros(4, 32), torch.zeros(32, 4)
        A[0, 0], B[0, 0] = 1.0, 2.0 / patch.form.scale
        patch.load({"A": A, "B": B})
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1] = 3.0, 4.0
        for score, wanted in (("row-space", 3.0), ("change", 6.0), ("top", 3.0)):
            gate = gate_of({"name": "spectral", "score": score}, [spectrum(patch)], patch.site)
            torch.testing.assert_close(gate.scores(x, NO_CALL), torch.tensor([[wanted]]))

    @given(seed=st.integers(0, 999), rank=st.integers(1, 5))
    @settings(max_examples=20, deadline=None)
    def test_what_the_scores_measure(self, seed, rank):
        """|S V^T x| = |B A x|, and other factors of the same change give the same scores."""
        draw = torch.Generator().manual_seed(seed)
        patch = LoRA(rank=rank, init="random").patch(Site("layer", "linear", "other", (24, 32)))
        patch.start(draw)
        x = torch.randn(6, 32, generator=draw)
        change = {"name": "spectral", "score": "change"}
        found = gate_of(change, [spectrum(patch)], patch.site).scores(x, NO_CALL)[:, 0]
        torch.testing.assert_close(found, (x @ patch.delta().T).norm(dim=1), rtol=1e-4, atol=1e-5)
        rows = gate_of("spectral", [spectrum(patch)], patch.site).scores(x, NO_CALL)
        R = torch.eye(rank) + 0.3 * torch.randn(rank, rank, generator=draw)
        if float(torch.linalg.cond(R)) < 50:
            patch.load({"A": R @ patch.A, "B": patch.B @ torch.linalg.inv(R)})
            torch.testing.assert_close(gate_of("spectral", [spectrum(patch)], patch.site).scores(x, NO_CALL), rows)
        own = torch.linalg.qr(patch.A.T)[0]  # the space that A reads
        torch.testing.assert_close(rows[:, 0], (x @ own).norm(dim=1), rtol=1e-4, atol=1e-5)

    def test_one_direction_is_arrows(self, encoder):
        adapters = made(encoder)
        arrow = pt.route(adapters, "arrow")
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
        top = pt.route(adapters, "spectral", score="top")
        for site, gate in top.gates.items():
            here = x[:, : gate.site.d_in]
            wanted = arrow.gates[site].scores(here, NO_CALL)
            torch.testing.assert_close(gate.scores(here, NO_CALL), wanted, rtol=1e-4, atol=1e-5)
        one = {"name": "lora", "rank": 1, "init": "random"}
        thin = made(encoder, form=one)
        arrow, rows = pt.route(thin, "arrow"), pt.route(thin, "spectral")
        for site, gate in rows.gates.items():
            here = x[:, : gate.site.d_in]
            wanted = arrow.gates[site].scores(here, NO_CALL)
            torch.testing.assert_close(gate.scores(here, NO_CALL), wanted, rtol=1e-4, atol=1e-5)

    def test_the_two_rules(self, encoder):
        adapters = made(encoder, ("a", "b", "c", "d", "e"))
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
        gate = next(iter(pt.route(adapters, "spectral").gates.values()))
        weights = gate.weigh(x, x, NO_CALL)
        assert torch.equal(weights.values, torch.full((2, 3, 4), 0.25))
        assert torch.equal(weights.index, gate.scores(x, NO_CALL).topk(4, -1).indices)
        gate = next(iter(pt.route(adapters, "smile", top_k=2, gate_k=3).gates.values()))
        assert gate.M.shape == (5, 3, 32)
        top, index = gate.scores(x, NO_CALL).softmax(-1).topk(2, -1)
        weights = gate.weigh(x, x, NO_CALL)
        assert torch.equal(weights.index, index)
        torch.testing.assert_close(weights.values, top / top.sum(-1, keepdim=True))

    def test_dense_changes_and_those_that_do_nothing(self, encoder, tmp_path):
        full = made(encoder, ("a", "b"), form="full", sites="query")
        for adapter in full.values():
            for patch in adapter.patches.values():
                for value in patch.parameters():
                    value.data.add_(
                        0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(id(value) % 97))
                    )
        with pytest.raises(MixError, match="all 32 directions.*score='change'"):
            pt.route(full, "spectral", model=encoder)
        mix = pt.route(full, "spectral", model=encoder, score="change", top_k=1)
        assert torch.isfinite(run(encoder, mix)).all()
        site, gate = next(iter(mix.gates.items()))
        x = torch.randn(4, 32)
        wanted = torch.stack([(x @ a.patches[site].delta().T).norm(dim=1) for a in full.values()], 1)
        torch.testing.assert_close(gate.scores(x, NO_CALL), wanted, rtol=1e-4, atol=1e-4)
        encoder.detach()
        idle = made(encoder, form={"name": "lora", "rank": 2})  # B = 0
        mix = pt.route(idle, "spectral", model=encoder)
        there = run(encoder, mix)
        torch.testing.assert_close(there, run(encoder, None))
        again = Routing.load(mix.save(tmp_path / "mix"), idle)
        assert next(iter(again.gates.values())).M.shape == (3, 0, 32)

    def test_a_change_that_needs_the_base(self, encoder):
        """IA3 scales the base's output: its change is known with the base only."""
        adapters = made(encoder, ("a", "b"), form="ia3", sites="query")
        for adapter in adapters.values():
            for patch in adapter.patches.values():
                for value in patch.parameters():
                    value.data.add_(torch.rand(value.shape))
        mix = pt.route(adapters, "spectral", model=encoder, score="change")
        x = torch.randn(4, 32)
        for site, gate in mix.gates.items():
            W = encoder.module.get_submodule(site).weight
            for n, adapter in enumerate(adapters.values()):
                l = next(adapter.patches[site].parameters()).flatten()  # noqa: E741  # as the paper calls it
                torch.testing.assert_close(
                    gate.scores(x, NO_CALL)[:, n], ((l - 1) * (x @ W.T)).norm(dim=1), rtol=1e-4, atol=1e-4
                )
        with pytest.raises(MixError, match="'a': the form 'ia3' .* needs the base"):
            pt.route(adapters, "spectral")

    def test_what_it_refuses(self, encoder):
        with pytest.raises(MixError, match="'a': the form 'bottleneck' has no dense change"):
            pt.route(made(encoder, ("a",), form="bottleneck"), "spectral")
        with pytest.raises(ConfigError, match="score must be one of row-space, change, top"):
            Router.of({"name": "spectral", "score": "rows"})
        with pytest.raises(ConfigError, match="weights must be"):
            Router.of({"name": "smile", "weights": "top"})
        with pytest.raises(ConfigError, match="gate_k must be a whole number"):
            Router.of({"name": "smile", "gate_k": 0})


class TestNearest:
    TASKS = (fruit("a", "plum pear fig lime"), fruit("b", "oak elm ash fir"), fruit("c", "iron tin zinc lead"))

    @pytest.mark.parametrize("to", ["centroid", "examples"])
    def test_rows_go_where_their_words_are(self, encoder, to):
        adapters = made(encoder)
        mix = pt.route(adapters, "nearest", model=encoder, data=self.TASKS, to=to)
        texts = [("plum 0",), ("zinc 2",), ("ash 2",)]
        batch = texts_of(encoder, texts)
        with torch.no_grad(), encoder.using(mix):
            there = encoder.module(**batch).last_hidden_state
        rows = means(encoder, batch)
        wanted = []
        for task in self.TASKS:
            own = means(encoder, texts_of(encoder, [e.inputs for e in task.train]))
            own = own.mean(0, keepdim=True) if to == "centroid" else own
            wanted.append(torch.cosine_similarity(rows[:, None], own[None], dim=-1).amax(1))
        torch.testing.assert_close(mix.shared.scores, torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)
        best = mix.shared.scores.argmax(1)
        assert torch.equal(mix.shared.weights, torch.nn.functional.one_hot(best, 3).float())
        if to == "examples":
            assert best.tolist() == [0, 2, 1]
        with torch.no_grad(), encoder.using([NAMES[i] for i in best]):
            torch.testing.assert_close(there, encoder.module(**batch).last_hidden_state, rtol=1e-4, atol=1e-5)

    def test_the_weights_of_the_chosen(self, encoder):
        adapters = made(encoder)
        for weights in ("uniform", "softmax"):
            mix = pt.route(
                adapters, "nearest", model=encoder, data=self.TASKS, top_k=2, weights=weights, temperature=0.5
            )
            run(encoder, mix)
            top, index = mix.shared.scores.topk(2, 1)
            wanted = torch.full((3, 2), 0.5) if weights == "uniform" else (top / 0.5).softmax(1)
            torch.testing.assert_close(mix.shared.weights.gather(1, index), wanted)
            torch.testing.assert_close(mix.shared.weights.sum(1), torch.ones(3))
            encoder.detach()

    def test_turning_the_library_turns_the_weights(self, encoder):
        adapters = made(encoder)
        run(encoder, mix := pt.route(adapters, "nearest", model=encoder, data=self.TASKS, top_k=2, weights="softmax"))
        turned = {n: adapters[n] for n in "cab"}
        encoder.detach()
        run(encoder, again := pt.route(turned, "nearest", model=encoder, data=self.TASKS, top_k=2, weights="softmax"))
        torch.testing.assert_close(again.shared.weights, mix.shared.weights[:, [2, 0, 1]])

    def test_padding_on_the_left_reads_the_same(self, decoder):
        task = [task_of(decoder, n) for n in "ab"]
        mix = pt.route(made(decoder, ("a", "b")), "nearest", model=decoder, data=task, weights="softmax", top_k=0)
        left = {"input_ids": torch.tensor([[0, 0, 7, 8, 9]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
        with torch.no_grad(), decoder.using(mix):
            decoder.module(**left)
            there = mix.shared.scores
            decoder.module(input_ids=left["input_ids"][:, 2:])
        torch.testing.assert_close(there, mix.shared.scores)
        assert packed(left)["input_ids"].tolist() == [[7, 8, 9, 0, 0]]

    def test_by_text(self, encoder):
        adapters = made(encoder)
        texts = {"a": "is the fruit ripe", "b": "which tree is it", "c": "melt the metal"}
        mix = pt.route(adapters, "nearest", model=encoder, by="text", texts=texts, embed="words")
        with torch.no_grad(), encoder.using(mix):
            encoder.features(texts_of(encoder, [("the tree, which is it?",), ("a fruit that is ripe",), ("metal",)]))
        assert mix.shared.weights.argmax(1).tolist() == [1, 0, 2]
        run(encoder, mix, tasks=["c", "a", "b"])  # the tasks' own texts
        assert mix.shared.weights.argmax(1).tolist() == [2, 0, 1]
        assert not hasattr(mix.shared, "v")

    def test_what_it_refuses(self, encoder, decoder):
        adapters = made(encoder)
        with pytest.raises(MixError, match="'a': nearest compares rows with the adapter's own data"):
            pt.route(adapters, "nearest", model=encoder)
        with pytest.raises(ConfigError, match="by must be one of data, text"):
            Router.of({"name": "nearest", "by": "words"})
        mix = pt.route(adapters, "nearest", model=encoder, data=self.TASKS)
        with pytest.raises(MixError, match="a part of the model was called alone"), encoder.using(mix):
            encoder.module.encoder(torch.randn(1, 3, 32))
        with pytest.raises(MixError, match="width 8.*have 32"):
            mix.shared.near(torch.zeros(1, 8))
        uneven = {n: {"": torch.ones(1, 32 if n == "a" else 16)} for n in NAMES}
        with pytest.raises(MixError, match="widths"):
            Routing.over(mix.router, adapters, uneven)


class TestCentroid:
    def written(self, model, mix, ids, new=6, **more):
        """The text, and the weights that each step had."""
        seen = []

        def see(gate, weights, call):
            if gate is next(iter(mix.gates.values())):
                seen.append(weights.values)

        with torch.no_grad(), model.using(mix), mix.tracing(see):
            text = model.module.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **more)
        return text, seen

    def make(self, model, **settings):
        tasks = [task_of(model, n) for n in NAMES]
        return pt.route(made(model), "centroid", model=model, data=tasks, temperature=0.02, **settings)

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_weights_follow_the_text(self, decoder, every):
        """They change at multiples of k only, and are those of the text so far."""
        mix = self.make(decoder, every=every)
        ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
        text, seen = self.written(decoder, mix, ids)
        assert len(seen) == 6
        for step, weights in enumerate(seen):
            rows = means(decoder, {"input_ids": text[:, : 4 + step - step % every]})
            wanted = (mix.shared.near(rows) / 0.02).softmax(1)
            torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)
        changed = [i for i in range(1, 6) if not torch.equal(seen[i], seen[i - 1])]
        assert changed == [i for i in range(1, 6) if i % every == 0]
        assert not any(p.requires_grad for _, p in mix.named_parameters())

    def test_a_large_k_keeps_the_prompts(self, decoder):
        ids = torch.tensor([[5, 6, 7, 8]])
        mix = self.make(decoder, every=100)
        text, seen = self.written(decoder, mix, ids)
        with torch.no_grad(), decoder.using(mix):
            decoder.module(input_ids=ids)
        assert all(torch.equal(weights, mix.shared.weights) for weights in seen)
        _, beams = self.written(decoder, mix, ids, num_beams=2)
        assert all(torch.allclose(weights, seen[0].expand(2, -1)) for weights in beams)

    def test_beams_have_the_weights_of_their_own_prompt(self, decoder):
        mix = self.make(decoder, every=100)
        ids = torch.tensor([[5, 6, 7, 8], [9, 9, 5, 9]])
        _, seen = self.written(decoder, mix, ids)
        assert (seen[0][0] - seen[0][1]).abs().max() > 0.01
        _, beams = self.written(decoder, mix, ids, num_beams=2)
        assert all(torch.allclose(weights, seen[0].repeat_interleave(2, 0), atol=1e-6) for weights in beams)

    def test_padding_and_no_cache(self, decoder):
        ids, longer = torch.tensor([[7, 8, 9]]), torch.tensor([[0, 0, 7, 8, 9]])
        mix = self.make(decoder)
        text, seen = self.written(decoder, mix, ids)
        mask = (longer > 0).long()
        padded, other = self.written(decoder, mix, longer, attention_mask=mask)
        assert torch.equal(padded[:, 2:], text)
        torch.testing.assert_close(torch.stack(other), torch.stack(seen), rtol=1e-3, atol=1e-4)
        _, plain = self.written(decoder, mix, ids, new=3, use_cache=False)
        torch.testing.assert_close(torch.stack(plain), torch.stack(seen[:3]), rtol=1e-3, atol=1e-4)

    def test_an_encoder_decoder_reads_both(self, seq2seq):
        mix = self.make(seq2seq, every=2)
        ids = torch.tensor([[5, 6, 7, 2], [9, 2, 0, 0]])
        mask = (ids > 0).long()
        decoded = [g for g in mix.gates if g.startswith("decoder.")]
        mix.gates = {name: mix.gates[name] for name in [*decoded, *set(mix.gates).difference(decoded)]}
        text, seen = self.written(seq2seq, mix, ids, new=5, attention_mask=mask)
        for step, weights in enumerate(seen):
            upto = step - step % 2
            for row, real in enumerate((4, 2)):
                own = torch.cat([ids[row, :real], text[row, 1 : 1 + upto]])[None]
                wanted = (mix.shared.near(means(seq2seq, {"input_ids": own})) / 0.02).softmax(1)
                torch.testing.assert_close(weights[row], wanted[0], rtol=1e-3, atol=1e-4)

    def test_the_average_of_the_parameters(self, encoder):
        """At every site of each row, against factors averaged by hand."""
        adapters = made(encoder, sites="query")
        mix = pt.route(adapters, "centroid", model=encoder, data=TestNearest.TASKS)
        run(encoder, mix)
        weights = mix.shared.weights[1]
        form = adapters["a"].form
        mean = Adapter.new(encoder, form, "query", name="mean")
        for site, patch in mean.patches.items():
            own = [a.patches[site] for a in adapters.values()]
            pairs = zip(weights, own, strict=True)
            parts = [(w * p.A, w * p.B) for w, p in pairs]
            patch.load({"A": sum(A for A, _ in parts), "B": sum(B for _, B in parts)})
        encoder.attach(mean)
        torch.testing.assert_close(run(encoder, mix)[1], run(encoder, "mean")[1], rtol=1e-4, atol=1e-5)

    def test_equal_centroids_are_uniform(self, encoder):
        same = [fruit(n, "plum pear") for n in NAMES]
        run(encoder, mix := pt.route(made(encoder), "centroid", model=encoder, data=same))
        torch.testing.assert_close(mix.shared.weights, torch.full((3, 3), 1 / 3))
        with pytest.raises(ConfigError, match="every must be a whole number of at least 1"):
            Router.of({"name": "centroid", "every": 0})
        with pytest.raises(ConfigError, match="temperature must be above 0"):
            Router.of({"name": "centroid", "temperature": 0.0})


class TestLibrary:
    def test_signatures_are_kept_and_shared(self, encoder, tmp_path):
        lib = pt.Library(tmp_path / "lib", encoder)
        adapters, tasks = made(encoder, ("a", "b")), TestNearest.TASKS[:2]
        for adapter in adapters.values():
            lib.add(adapter)
        with pytest.raises(MixError, match="'a': phatgoose needs"):
            pt.route(lib, "phatgoose")
        mix = pt.route(lib, "phatgoose", data=tasks, steps=2)
        mix.detach(encoder)
        again = pt.route(lib, "glider", scale=0.0)  # the gates are there
        for site, gate in mix.gates.items():
            assert torch.equal(again.gates[site].v, gate.v)
        again.detach(encoder)
        more = pt.route(lib, "phatgoose", data=tasks, steps=3)  # another way to learn them: they are learned anew
        assert not any(torch.equal(more.gates[site].v, gate.v) for site, gate in mix.gates.items())
        more.detach(encoder)
        pt.route(lib, "nearest", data=tasks).detach(encoder)
        row = pt.route(lib, "centroid")  # and the centroids
        assert row.shared.v.shape == (2, 1, 32)

    def test_a_data_signature_made_when_it_was_added(self, encoder, tmp_path):
        lib = pt.Library(tmp_path / "lib", encoder)
        for name, adapter in made(encoder, ("a", "b")).items():
            lib.add(adapter, data=[t for t in TestNearest.TASKS if t.name == name])
        mix = pt.route(lib, "nearest")
        with torch.no_grad(), encoder.using(mix):
            encoder.module(**texts_of(encoder, [("oak 0",)]))
        own = [means(encoder, texts_of(encoder, [e.inputs for e in t.train])).mean(0) for t in TestNearest.TASKS[:2]]
        wanted = torch.nn.functional.normalize(torch.stack(own), dim=1)[:, None]
        torch.testing.assert_close(mix.shared.v, wanted, rtol=1e-4, atol=1e-5)


def test_one_task_is_that_of_all_rows(goose):
    model, make = goose
    mix = make("glider", scale=10.0)
    there = run(model, mix, tasks=["b"] * 3)
    torch.testing.assert_close(run(model, mix, tasks="b"), there)
