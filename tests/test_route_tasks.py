"""Routers that weigh adapters by the task: inventories of skills, task-level experts, declared skills."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import colours, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError, MixError
from polytask.core.form import Call
from polytask.core.gate import Router
from polytask.core.head import collate
from polytask.core.routing import Routing
from polytask.core.site import Site
from polytask.forms.mixture import Mixture, experts_of, gates_of, router_part
from polytask.forms.mixtures import mixture_of
from polytask.route.factors import mean_of
from polytask.route.mixes.task_moe import relative_gain, second_stage

LORA = {"name": "lora", "rank": 4, "init": "random"}
BATCH = {
    "input_ids": torch.tensor([[101, 2023, 2003, 1037, 102], [101, 7592, 2088, 102, 0], [101, 3231, 102, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
}
SMALL = {"epochs": 2, "lr": 1e-2, "batch_size": 4, "progress": False}


def states(model: pt.Model, mix, tasks) -> torch.Tensor:
    with torch.no_grad(), model.using(mix, tasks=tasks):
        return model.module(**BATCH).last_hidden_state * BATCH["attention_mask"][..., None]


def mixture(model: pt.Model, router, experts=3, form=LORA, sites="attention & linear", scatter=1.0) -> Adapter:
    """A mixture whose gates have values."""
    adapter = Adapter.new(model, Mixture(router, experts, form), sites, name="m")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in [*gates_of(adapter), router_part(adapter)]:
            for name, value in part.named_parameters() if part is not None else ():
                if name != "heat":
                    value += scatter * torch.randn(value.shape, generator=generator)
    return adapter.trainable(False)


@pytest.fixture(scope="module")
def base(minilm_tokenizer):
    return tiny_bert(minilm_tokenizer)


@pytest.fixture
def model(base):
    yield base
    base.detach()


@pytest.fixture(scope="module")
def tasks():
    return [colours(name="a"), colours(name="b", start=50)]


@pytest.fixture(scope="module")
def learned(base, tasks):
    """An inventory that two tasks have learned, once; each test gets a copy."""
    form = {
        "name": "mixture",
        "router": {"name": "mhr", "heads": 4},
        "experts": 3,
        "forms": {"name": "lora", "rank": 2},
    }
    inventory = pt.learn(base, tasks, form=form, joint=True, **SMALL)

    def get() -> Adapter:
        return copy.deepcopy(inventory)

    return get


class TestPoly:
    def test_one_head_is_poly_bit_for_bit(self, model):
        one = mixture(model, {"name": "poly", "tasks": ["a", "b"]})
        two = mixture(model, {"name": "mhr", "heads": 1, "tasks": ["a", "b"]})
        model.attach(one, "one")
        model.attach(two, "two")
        assert torch.equal(states(model, "one", ["a", "b", "c"]), states(model, "two", ["a", "b", "c"]))

    def test_equal_heads_are_poly(self, model):
        one = mixture(model, {"name": "poly", "tasks": ["a", "b"]})
        many = mixture(model, {"name": "mhr", "heads": 4, "tasks": ["a", "b"]})
        for first, second in zip(gates_of(one), gates_of(many), strict=True):
            second.Z.data = first.Z.data.expand(-1, 4, -1).clone()
        model.attach(one, "one")
        model.attach(many, "many")
        for rows in (["a", "b", "c"], ["b"] * 3):
            torch.testing.assert_close(states(model, "many", rows), states(model, "one", rows), rtol=1e-4, atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(
        heads=st.sampled_from([1, 2, 4]),
        seed=st.integers(0, 10**6),
        tasks=st.lists(st.sampled_from("abc"), min_size=3, max_size=3),
    )
    def test_the_factors_are_averaged_block_by_block(self, heads, seed, tasks):
        """Against loops over rows, heads and skills."""
        torch.manual_seed(seed)
        site = Site("layer", "linear", "other", (8, 12))
        form = Mixture({"name": "mhr", "heads": heads, "tasks": ["a", "b"]}, 3, LORA)
        patch = form.patch(site)
        for value in patch.parameters():
            torch.nn.init.normal_(value)
        x, y = torch.randn(3, 5, 12), torch.randn(3, 5, 8)
        got = patch.contribute(x, y, Call(tasks=tuple(tasks), rows=3))
        Z = patch.gate.Z.detach()
        for b, task in enumerate(tasks):
            p = torch.sigmoid(Z["ab".index(task)]) if task in "ab" else torch.full((heads, 3), 0.5)
            A, B = torch.zeros(4, 12), torch.zeros(8, 4)
            for q in range(heads):
                i, o = slice(q * 12 // heads, (q + 1) * 12 // heads), slice(q * 8 // heads, (q + 1) * 8 // heads)
                for s, own in enumerate(patch.patches.values()):
                    w = p[q, s] / p[q].sum()
                    A[:, i] += w * own.A[:, i].detach()
                    B[o] += w * own.B[o].detach()
            torch.testing.assert_close(got[b].detach(), 2.0 * x[b] @ A.T @ B.T, rtol=1e-4, atol=1e-4)

    def test_shares_sum_to_one_and_equal_logits_share_alike(self, model):
        adapter = mixture(model, {"name": "mhr", "heads": 4, "tasks": ["a", "b"]})
        gate = gates_of(adapter)[0]
        x = torch.randn(3, 5, 32)
        values = gate.values(x, Call(tasks=("a", "b", "?"), rows=3))
        torch.testing.assert_close(values.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-6)
        assert torch.equal(values[2], torch.full((4, 3), 0.5) / 1.5)  # a task that is not known
        gate.Z.data.fill_(1.7)
        torch.testing.assert_close(gate.values(x, Call(tasks=("a",), rows=3)), torch.full((4, 3), 1 / 3))

    def test_one_skill_is_plain_lora(self, model):
        adapter = mixture(model, {"name": "poly", "tasks": ["a"]}, experts=1, form={**LORA, "alpha": 1.0})
        model.attach(adapter, "m")
        model.attach(experts_of(adapter)["expert0"], "plain")
        assert experts_of(adapter)["expert0"].form.scale == 1 / 4  # the papers' 1 / r
        torch.testing.assert_close(states(model, "m", ["a"]), states(model, "plain", None), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("share", ["finegrained", "layer", "all"])
    def test_what_shares_a_row(self, model, share, tmp_path):
        adapter = mixture(model, {"name": "mhr", "heads": 2, "tasks": ["a", "b"], "share": share})
        part = router_part(adapter)
        own = [v for gate in gates_of(adapter) for v in gate.parameters()]
        assert (len(own), 0 if part is None else len(list(part.parameters()))) == {
            "finegrained": (8, 0), "layer": (0, 2), "all": (0, 1),
        }[share]  # fmt: skip
        model.attach(adapter, "m")
        there = states(model, "m", ["a", "b", "a"])
        model.attach(Adapter.load(adapter.save(tmp_path / "m")), "again")
        assert torch.equal(states(model, "again", ["a", "b", "a"]), there)

    def test_tasks_that_are_not_in_the_batch_get_no_gradient(self, model):
        adapter = mixture(model, {"name": "poly", "tasks": ["a", "b", "c"]})
        model.attach(adapter.trainable(), "m")
        with model.using("m", tasks=["a", "c", "a"]):
            model.module(**BATCH).last_hidden_state.square().sum().backward()
        for gate in gates_of(adapter):
            assert not gate.Z.grad[1].any()
        assert all(any(g.Z.grad[i].any() for g in gates_of(adapter)) for i in (0, 2))

    def test_noise_is_drawn_for_each_row_while_it_learns_only(self, model):
        adapter = mixture(model, {"name": "poly", "tasks": ["a"]}, scatter=0.0)
        gate = gates_of(adapter)[0]
        x, call = torch.randn(400, 5, 32), Call(tasks=("a",), rows=400)
        torch.manual_seed(0)
        first = gate.values(x, call, noisy=True)
        assert first.shape == (400, 1, 3) and first.unique(dim=0).shape[0] == 400
        torch.manual_seed(0)
        assert torch.equal(gate.values(x, call, noisy=True), first)
        # sigmoid(logistic noise) is uniform, so a quarter of the draws of each of three skills lies below a quarter
        u = torch.rand(100_000, generator=torch.Generator().manual_seed(1))
        assert abs(float((torch.sigmoid(u.log() - (-u).log1p()) < 0.25).float().mean()) - 0.25) < 0.01
        adapter.trainable()
        model.attach(adapter, "m")
        try:
            pt.core.attach.train_sites(model._hub, ["m"])
            outs = []
            for _ in range(2):
                with model.using("m", tasks=["a"]):
                    outs.append(model.module(**BATCH).last_hidden_state.detach())
            assert not torch.equal(*outs)
            assert torch.equal(states(model, "m", ["a"]), states(model, "m", ["a"]))
        finally:
            model.module.eval()

    def test_it_learns_and_tells_its_shares(self, learned, model, tasks):
        inventory = learned()
        assert inventory.form.router.tasks == ("a", "b")
        start = Adapter.new(model, inventory.form, seed=0)
        moved = [(g.Z - s.Z).abs().max() for g, s in zip(gates_of(inventory), gates_of(start), strict=True)]
        assert min(moved) > 0.2  # six steps at 100 times the rate of 0.01
        shares = inventory.card.training["measured"]["shares of the skills"]
        assert all(math.isclose(sum(row.values()), 1.0, abs_tol=1e-3) for row in shares.values())
        assert list(shares) == ["a", "b"]

    def test_what_it_refuses(self, model):
        with pytest.raises(ConfigError, match="share must be one of"):
            Router.of({"name": "poly", "share": "site"})
        with pytest.raises(ConfigError, match="different names"):
            Router.of({"name": "poly", "tasks": "mood"})
        with pytest.raises(pt.PolytaskError, match="5 heads .* do not divide 32 inputs"):
            Adapter.new(model, Mixture({"name": "mhr", "heads": 5}, 2, LORA))
        with pytest.raises(pt.PolytaskError, match="no meaningful average"):
            Adapter.new(model, Mixture("poly", 2, "ia3"))
        odd = {n: Adapter.new(model, {**LORA, "rank": r}, name=n).trainable(False) for n, r in (("x", 2), ("y", 4))}
        mix = Routing.over(Router.of({"name": "mhr", "heads": 2}), odd, {}).attach(model)
        with pytest.raises(MixError, match="ranks .2, 4. cannot be averaged"):
            states(model, mix, None)


class TestFromPEFT:
    @pytest.mark.parametrize("splits", [1, 4])
    def test_an_inventory_of_peft_computes_the_same(self, minilm_tokenizer, splits, tmp_path):
        peft = pytest.importorskip("peft")
        model = tiny_bert(minilm_tokenizer)
        config = peft.PolyConfig(
            target_modules=["query", "intermediate.dense"],
            r=3,
            n_tasks=3,
            n_skills=4,
            n_splits=splits,
            init_weights=False,
        )
        theirs = peft.get_peft_model(copy.deepcopy(model.module), config).eval()
        with torch.no_grad():
            for name, value in theirs.named_parameters():
                if "module_logits" in name:
                    value.normal_(0.0, 2.0)
            want = theirs.base_model(**BATCH, task_ids=torch.tensor([2, 0, 1])).last_hidden_state
        theirs.save_pretrained(tmp_path / "theirs")
        adapter = Adapter.load(tmp_path / "theirs")
        assert adapter.form.router.tasks == ("0", "1", "2") and len(adapter.form.experts) == 4
        model.attach(adapter, "m")
        bare = states(model, None, None)
        got = states(model, "m", ["2", "0", "1"])
        torch.testing.assert_close(got, want * BATCH["attention_mask"][..., None], rtol=1e-4, atol=1e-5)
        assert (got - bare).abs().max() > 1e-3
        again = Adapter.load(adapter.save(tmp_path / "ours"))
        assert again.hash == adapter.hash and again.form == adapter.form

    def test_a_router_that_nobody_knows(self):
        from polytask.forms._poly_files import settings as read

        with pytest.raises(AdapterError, match="the router 'moe', and only 'poly'"):
            read({"peft_type": "POLY", "poly_type": "moe"})


class TestNewTasks:
    def test_only_a_row_learns(self, learned, model):
        inventory = learned()
        before = inventory.hash
        mix = pt.route(inventory, "mhr-z", model=model, data=colours(name="new", start=9), **SMALL)
        assert inventory.hash == before
        assert mix.router.heads == 4 and mix.router.tasks == ("new",)
        for name, expert in experts_of(inventory).items():
            assert mix.adapters[name].hash == expert.hash
        assert {tuple(gate.Z.shape) for gate in mix.gates.values()} == {(1, 4, 3)}
        assert mix.about["training"]["trained_parameters"] == mix.size + sum(
            p.numel() for p in mix.heads["new"].parameters()
        )
        assert max(float(gate.Z.abs().max()) for gate in mix.gates.values()) > 0.01
        assert list(mix.facts["shares of the skills"]) == ["new"]

    def test_from_a_folder_and_from_a_mix(self, learned, model, tmp_path):
        new = colours(name="new", start=9)
        folder = learned().save(tmp_path / "inventory")
        one = pt.route(folder, "mhr-z", model=model, data=new, **SMALL)
        model.detach()
        two = pt.route(one, {"name": "mhr-z", "heads": 2}, model=model, data=new, **SMALL)
        assert one.router.heads == 4 and two.router.heads == 2
        assert {n: a.hash for n, a in one.adapters.items()} == {n: a.hash for n, a in two.adapters.items()}

    def test_everything_learns_with_mhr(self, learned, model):
        inventory = learned()
        mix = pt.route(inventory, "mhr", model=model, data=colours(name="new", start=9), **SMALL)
        assert mix.router.heads == 4
        assert all(mix.adapters[name].hash != expert.hash for name, expert in experts_of(inventory).items())

    def test_the_mean_is_one_adapter(self, learned, model):
        inventory = learned()
        experts = experts_of(inventory)
        mean = mean_of(experts)
        model.attach(mean, "mean")
        uniform = Routing.over(Router.of("mhr-mu"), experts, {}).attach(model)
        torch.testing.assert_close(states(model, "mean", None), states(model, uniform, None), rtol=1e-4, atol=1e-5)
        model.detach()
        mix = pt.route(inventory, "mhr-mu", model=model, data=colours(name="new", start=9), **SMALL)
        assert mix.names() == ("mean",)
        assert mix.adapters["mean"].size == experts["expert0"].size
        assert mix.adapters["mean"].hash != mean.hash
        torch.testing.assert_close(states(model, mix, None), states(model, "mean", None))

    def test_averaged_factors_are_not_averaged_changes(self, model):
        """(mean A)(mean B) has cross terms: with B zero but for one of two skills it is a quarter of it, with A's of both."""
        one, two = (Adapter.new(model, LORA, seed=s, name=str(s)).trainable(False) for s in (0, 1))
        place = next(iter(one.patches))
        two.patches[place].B.data.zero_()
        mean = mean_of({"1": one, "2": two}).patches[place]
        own = one.patches[place]
        want = 0.25 * own.form.scale * own.B @ (own.A + two.patches[place].A)
        torch.testing.assert_close(mean.delta(), want)
        assert not torch.allclose(mean.delta(), 0.5 * own.delta(), atol=1e-3)

    def test_a_mean_of_what_has_no_factors(self, model):
        odd = {"x": Adapter.new(model, "ia3", name="x")}
        with pytest.raises(MixError, match="'x' is none"):
            mean_of(odd)
        with pytest.raises(AdapterError, match="only a mixture has experts"):
            experts_of(odd["x"])


class TestAlignment:
    def test_the_same_task_twice_pulls_in_one_direction(self, learned, model, tasks):
        inventory = learned()
        inventory.heads["twin"] = inventory.heads["a"]
        for gate in gates_of(inventory):
            gate.Z.data[1] = gate.Z.data[0]
        twin = colours(name="twin")
        flags = [p.requires_grad for p in inventory.parameters()]
        found = pt.gradient_alignment(model, inventory, [*tasks, twin])
        assert set(found["pairs"]) == {"a / b", "a / twin", "b / twin"}
        assert all(-1.0 - 1e-9 <= value <= 1.0 + 1e-9 for value in found["pairs"].values())
        assert found["mean"] == pytest.approx(sum(found["pairs"].values()) / 3)
        assert [p.requires_grad for p in inventory.parameters()] == flags and model.attached == ()
        # rows of a task that is not known weigh the skills alike: with equal logits everywhere the twins are the same
        for gate in gates_of(inventory):
            gate.Z.data.zero_()
        same = pt.gradient_alignment(model, inventory, [*tasks, twin])
        assert same["pairs"]["a / twin"] == pytest.approx(1.0)
        assert same["pairs"]["a / b"] < 0.9999

    def test_the_cosine_is_that_of_the_skills_gradients(self, learned, model, tasks):
        inventory = learned()
        found = pt.gradient_alignment(model, inventory, tasks, split="train", rows=4)
        model.attach(inventory.trainable(), "m")
        skills = [p for e in experts_of(inventory).values() for part in e.patches.values() for p in part.parameters()]
        gradients = []
        for task in tasks:
            head = inventory.heads[task.name]
            rows = head.rows(model, task.train[:4])
            with model.using("m", tasks=task.name):
                logits = head._logits(head.run(model, collate(model, head, rows)))
            loss = F.cross_entropy(logits, torch.tensor([row.target for row in rows]))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, skills)]))
        assert found["mean"] == pytest.approx(float(torch.cosine_similarity(*gradients, 0)), abs=1e-4)

    def test_what_it_refuses(self, learned, model, tasks):
        with pytest.raises(ConfigError, match="two tasks or more"):
            pt.gradient_alignment(model, learned(), tasks[:1])
        with pytest.raises(MixError, match="no head for c"):
            pt.gradient_alignment(model, learned(), [tasks[0], colours(name="c")])


class TestTaskMoE:
    def test_each_block_takes_one_expert_by_the_task(self, model):
        adapter = mixture(model, {"name": "task-moe", "tasks": ["a", "b"]})
        z = router_part(adapter).z.data
        z.mul_(20.0)
        z[1] = -z[0]
        model.attach(adapter, "m")
        mixed = states(model, "m", ["a", "b", "a"])
        taken = {}
        for task in ("a", "b"):
            by_block = {}
            for gate in gates_of(adapter):
                (own,) = gate.shares([task])
                assert list(own.values()) == [1.0]
                by_block.setdefault(gate.site.layer, set()).add(*own)
            assert all(len(names) == 1 for names in by_block.values())  # one for all sites of a block
            taken[task] = {layer: next(iter(names)) for layer, names in by_block.items()}
        assert taken["a"] != taken["b"]
        experts = experts_of(adapter)
        for row, task in ((0, "a"), (1, "b")):
            patches = {s: experts[taken[task][p.site.layer]].patches[s] for s, p in adapter.patches.items()}
            model.attach(Adapter(adapter.form.forms[0], patches, name=task), task)
            torch.testing.assert_close(mixed[row], states(model, task, None)[row], rtol=1e-4, atol=1e-5)

    def test_a_hot_softmax_is_the_mean(self, model):
        router = {"name": "task-moe", "tasks": ["a"], "select": "softmax", "temperature": 1e6}
        adapter = mixture(model, router)
        for gate in gates_of(adapter):
            assert list(gate.shares(["a"])[0].values()) == pytest.approx([1 / 3] * 3, abs=1e-4)

    def test_gumbel_noise_is_common_to_a_block_and_new_in_each_forward(self, model):
        adapter = mixture(model, {"name": "task-moe", "tasks": ["a"]}, scatter=0.0).trainable()
        model.attach(adapter, "m")
        seen: list[dict] = []

        def forward():
            found = {}
            for gate in gates_of(adapter):
                gate.__dict__["trace"] = lambda g, w, c: found.__setitem__(g.site.name, w.dense().detach())
            with model.using("m", tasks=["a"]):
                out = model.module(**BATCH).last_hidden_state
            seen.append(found)
            return out

        torch.manual_seed(0)
        for _ in range(12):
            forward()
        for found in seen:
            for layer in (0, 1):
                own = [v for n, v in found.items() if f"layer.{layer}." in n]
                assert len(own) == 4 and all(torch.equal(v, own[0]) for v in own)
                assert torch.equal(own[0].round(), own[0]) and torch.equal(own[0].sum(-1), torch.ones(3))
        assert len({str(found) for found in seen}) > 1
        torch.manual_seed(0)
        forward()
        assert all(torch.equal(seen[0][n], v) for n, v in seen[-1].items())
        forward().square().sum().backward()
        shared = router_part(adapter)
        assert shared.z.grad.any() and shared.heat.grad is None

    def test_the_temperature_falls_by_steps(self):
        router = Router.of({"name": "task-moe", "temperature": 2.0, "least": 1.9, "decay": 0.01})
        shared = router.shared([Site("x.0.q", "linear", "query", (4, 4), 0)], ("a", "b"))
        shared.start(torch.Generator())
        heats = []
        for _ in range(8):
            router.stepped([], shared)
            heats.append(float(shared.heat))
        assert heats[:5] == pytest.approx([2.0 * math.exp(-0.01 * i) for i in range(1, 6)]) and heats[
            -1
        ] == pytest.approx(1.9)

    def test_unseen_tasks_by_their_text(self, model):
        texts = {"a": "is this film review good or bad", "b": "translate the sentence into French"}
        adapter = mixture(model, {"name": "task-moe", "tasks": ["a", "b"], "vectors": "text", "texts": texts})
        shared = router_part(adapter)
        assert "z" in shared.frozen and tuple(shared.z.shape) == (2, 256)
        gate = gates_of(adapter)[0]
        exact, _ = gate.scores(["a"])
        text, known = gate.scores(["is this film review good or bad"])
        fresh = Adapter.new(model, adapter.form, "attention & linear")
        vector = router_part(fresh)
        torch.testing.assert_close(vector.vector("is this film review good or bad"), vector.z[0].detach())
        assert known.all() and exact.shape == text.shape
        close = F.cosine_similarity(vector.vector("is the film review positive"), vector.z, -1)
        assert close[0] > close[1] + 0.1
        learned = mixture(model, {"name": "task-moe", "tasks": ["a"]})
        assert gates_of(learned)[0].shares(["?"])[0] == pytest.approx(dict.fromkeys(learned.form.experts, 1 / 3))

    def test_two_stages(self, model, tasks):
        form = {"name": "mixture", "router": "task-moe", "experts": 4, "forms": {"name": "lora", "rank": 2}}
        first = pt.learn(model, tasks, form=form, joint=True, **SMALL)
        shares = first.card.training["measured"]["share of the experts by task"]
        assert set(shares) == {"a", "b"} and all(
            sum(row.values()) == pytest.approx(1.0, abs=1e-3) for row in shares.values()
        )
        start = second_stage(model, first)
        kept = {n: v.detach().clone() for n, v in router_part(first).named_parameters() if n != "heat"}
        assert all(torch.equal(v, dict(router_part(start).named_parameters())[n]) for n, v in kept.items())
        assert gates_of(start)[0].shares(["a"])[0]["expert0"] == pytest.approx(
            0.25, abs=0.01
        )  # nearly the mean at first
        second = pt.learn(model, tasks, form=start.form, start=start, joint=True, **SMALL)
        now = dict(router_part(second).named_parameters())
        assert all(torch.equal(v, now[n]) for n, v in kept.items())
        assert float(now["heat"]) < 300.0
        assert experts_of(second)["expert0"].hash != experts_of(start)["expert0"].hash
        with pytest.raises(MixError, match="no mixture that task-moe"):
            second_stage(model, Adapter.new(model, "lora"))

    def test_through_route_with_texts(self, model, tasks):
        adapters = {n: Adapter.new(model, LORA, seed=i, name=n).trainable(False) for i, n in enumerate("xy")}
        told = [copy.copy(task) for task in tasks]
        told[0].instruction = "Which colour is it?"
        mix = pt.route(adapters, "task-moe", vectors="text", model=model, data=told, **SMALL)
        assert mix.router.texts["a"] == "Which colour is it?" and mix.router.tasks == ("a", "b")
        assert set(mix.facts["share of the experts by task"]) == {"a", "b"}

    def test_relative_gain(self):
        assert relative_gain({"a": 0.6, "b": 0.9}, {"a": 0.5, "b": 1.0}) == pytest.approx(0.05)
        with pytest.raises(ConfigError, match="the same tasks"):
            relative_gain({"a": 1.0}, {"b": 1.0})

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [({"select": "hard"}, "select must be"), ({"least": 3.0}, "least must be"), ({"width": 0}, "width must")],
    )
    def test_what_it_refuses(self, wrong, said):
        with pytest.raises(ConfigError, match=said):
            Router.of({"name": "task-moe", **wrong})


class TestSkillNet:
    ROUTER = {"name": "skillnet", "skills": {"a": ["expert1"], "b": ["expert1", "expert2"]}}

    @pytest.mark.parametrize("given", [["a"], ["b"], ["a", "b", "a"]])
    def test_what_is_not_declared_gets_no_gradient(self, model, given):
        adapter = Adapter.new(model, Mixture(self.ROUTER, 4, LORA), "attention & linear").trainable()
        model.attach(adapter, "m")
        with model.using("m", tasks=given):
            model.module(**BATCH).last_hidden_state.square().sum().backward()
        used = {"expert1"} if given == ["a"] else {"expert1", "expert2"}
        for name, expert in experts_of(adapter).items():
            grads = [p.grad for patch in expert.patches.values() for p in patch.parameters()]
            assert all((g is not None) == (name in used) for g in grads), name

    @pytest.mark.parametrize("given", [["a"], ["a", "b", "a"]])
    def test_zero_calls_of_any_form(self, model, given, monkeypatch):
        from polytask.forms.ia3 import IA3Patch

        adapter = Adapter.new(model, Mixture(self.ROUTER, 4, "ia3")).trainable(False)
        model.attach(adapter, "m")
        seen = set()
        for method in ("contribute", "add"):
            whole = getattr(IA3Patch, method)

            def spy(self, *args, whole=whole, **kwargs):
                seen.add(next(n for n, e in experts.items() if any(self.l is p.l for p in e)))
                return whole(self, *args, **kwargs)

            monkeypatch.setattr(IA3Patch, method, spy)
        experts = {n: list(e.patches.values()) for n, e in experts_of(adapter).items()}
        states(model, "m", given)
        assert seen == ({"expert1"} if given == ["a"] else {"expert1", "expert2"})

    def test_weights(self, model):
        adapter = Adapter.new(model, Mixture({**self.ROUTER, "general": "expert0"}, 4, LORA)).trainable(False)
        for name, expert in experts_of(adapter).items():
            model.attach(expert, name)
        model.attach(adapter, "m")
        for task, used in (("a", (0, 1)), ("b", (0, 1, 2)), ("other", (0, 1, 2, 3))):
            want = states(model, {f"expert{i}": 1 / len(used) for i in used}, None)
            torch.testing.assert_close(states(model, "m", [task]), want, rtol=1e-4, atol=1e-5)

    def test_one_skill_is_that_patch_in_a_mixed_batch(self, model):
        adapter = Adapter.new(model, Mixture(self.ROUTER, 4, LORA)).trainable(False)
        model.attach(adapter, "m")
        model.attach(experts_of(adapter)["expert1"], "own")
        torch.testing.assert_close(
            states(model, "m", ["b", "a", "b"])[1], states(model, "own", None)[1], rtol=1e-4, atol=1e-5
        )

    def test_counts(self, model, tasks):
        form = {"name": "mixture", "router": self.ROUTER, "experts": 4, "forms": {"name": "lora", "rank": 2}}
        learned = pt.learn(model, tasks, form=form, joint=True, **SMALL)
        facts = learned.card.training["measured"]
        each = experts_of(learned)["expert0"].size
        assert facts["parameters of the skills"] == 4 * each
        assert facts["activated by task"]["a"] == {"skills": ["expert1"], "activated": each}
        assert facts["activated by task"]["b"]["activated"] == 2 * each
        fresh = experts_of(Adapter.new(model, learned.form, seed=0))
        unused = {n for n, e in experts_of(learned).items() if e.hash == fresh[n].hash}
        assert unused == {"expert0", "expert3"}

    def test_what_it_refuses(self, model):
        with pytest.raises(ConfigError, match="names for each task"):
            Router.of({"name": "skillnet", "skills": {"a": "expert1"}})
        adapters = {n: Adapter.new(model, LORA, name=n) for n in ("words", "tone")}
        with pytest.raises(MixError, match="'wrods' is none of the skills.*'words'"):
            mixture_of(Router.of({"name": "skillnet", "skills": {"a": ["wrods"]}}), adapters)
        with pytest.raises(MixError, match="'all' is none"):
            mixture_of(Router.of({"name": "skillnet", "general": "all"}), adapters)
