"""Groups of adapters by their weights, and experts and data from a few examples."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import colours
from hypothesis import given, settings
from hypothesis import strategies as st

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import ConfigError, MixError
from polytask.core.task import Example, Task
from polytask.route.cluster import clusters, gram_of_changes, gram_of_factors
from polytask.route.kshot import diverse, likeness, near, rank, shots_of

LORA = {"name": "lora", "rank": 4, "init": "random"}
FAST = {"epochs": 1, "batch_size": 4, "lr": 1e-2}


def families(model, count=3, each=3):
    """Adapters named ``f<family>-<n>``: those of a family differ a little."""
    found = {}
    for family in range(count):
        first = Adapter.new(model, LORA, seed=family)
        for n in range(each):
            name = f"f{family}-{n}"
            adapter = found[name] = first.copy(name)
            generator = torch.Generator().manual_seed(10 * family + n)
            with torch.no_grad():
                for p in adapter.parameters():
                    p += 0.01 * torch.randn(p.shape, generator=generator)
            adapter.card.tasks = [{"name": f"task-{name}"}]
    return found


@pytest.mark.parametrize("by", ["factors", "changes"])
class TestClusters:
    def test_families_come_together_in_any_order(self, encoder, by):
        adapters = families(encoder)
        found = clusters(adapters, 3, by)
        assert found.groups == tuple(tuple(f"f{i}-{n}" for n in range(3)) for i in range(3))
        turned = clusters({n: adapters[n] for n in reversed(adapters)}, 3, by)
        assert turned.groups == found.groups and torch.equal(turned.similarity, found.similarity)
        torch.testing.assert_close(found.similarity.diagonal(), torch.ones(9))

    def test_as_many_groups_as_adapters_are_singletons(self, encoder, by):
        adapters = families(encoder, 4, 1)
        assert clusters(adapters, 4, by).groups == tuple((name,) for name in adapters)
        assert clusters(adapters, 1, by).groups == (tuple(adapters),)

    def test_identical_adapters_are_never_parted(self, encoder, by):
        adapters = families(encoder, 3, 1)
        adapters |= {f"{name}-twin": copy.deepcopy(adapter) for name, adapter in adapters.items()}
        for k in (2, 3, 6):
            for group in clusters(adapters, k, by).groups:
                assert {name.removesuffix("-twin") for name in group} == {n for n in group if not n.endswith("-twin")}
                assert len(group) % 2 == 0

    def test_what_it_refuses(self, encoder, by):
        adapters = families(encoder, 2, 1)
        with pytest.raises(MixError, match="2 adapters cannot make 3 groups"):
            clusters(adapters, 3, by)
        for wrong in ({"k": 0}, {"k": True}, {"k": 1, "sparsity": 1.0}, {"k": 1, "components": 0}):
            with pytest.raises(ConfigError, match="mbc"):
                clusters(adapters, by=by, **wrong)


def test_changes_do_not_depend_on_the_factors_that_make_them(encoder):
    adapters = families(encoder, 3, 1)
    other = {name: adapter.copy(name) for name, adapter in adapters.items()}
    with torch.no_grad():
        for seed, adapter in enumerate(other.values()):
            R = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))[0] * 3.0
            for patch in adapter.patches.values():
                patch.A.copy_(R @ patch.A)
                patch.B.copy_(patch.B @ torch.linalg.inv(R))
    torch.testing.assert_close(gram_of_changes(other), gram_of_changes(adapters), rtol=1e-4, atol=1e-6)
    apart = (gram_of_factors(other, 0.0) - gram_of_factors(adapters, 0.0)).abs().max()
    assert apart > 0.1
    dense = [torch.cat([p.delta().flatten() for p in a.patches.values()]).double() for a in adapters.values()]
    wanted = torch.stack(dense) @ torch.stack(dense).T
    torch.testing.assert_close(gram_of_changes(adapters), wanted.detach(), rtol=1e-4, atol=1e-6)


def test_changes_of_forms_without_factors_are_dense(encoder):
    adapters = {n: Adapter.new(encoder, LORA, seed=i) for i, n in enumerate("ab")}
    adapters["c"] = Adapter.new(encoder, {"name": "lokr"}, seed=2)
    with torch.no_grad():
        for p in adapters["c"].parameters():
            p.normal_()
    dense = torch.stack(
        [torch.cat([p.delta().flatten() for p in a.patches.values()]).double() for a in adapters.values()]
    )
    torch.testing.assert_close(gram_of_changes(adapters), (dense @ dense.T).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(MixError, match="different sizes"):
        clusters({"a": adapters["a"], "b": Adapter.new(encoder, {**LORA, "rank": 2})}, 2)
    with pytest.raises(MixError, match="no dense change"):
        clusters({"a": adapters["a"], "b": Adapter.new(encoder, "bottleneck", sites="attn_out")}, 2, "changes")


def test_factors_against_scikit_learn(encoder):
    """The published order: largest entries, an SVD that is not centred, lengths of one, cosines."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    adapters = families(encoder, 3, 2)
    rows = []
    for adapter in adapters.values():
        flat = torch.cat([p.detach().flatten() for p in adapter.parameters()]).double().numpy()
        rows.append(np.where(np.abs(flat) >= np.quantile(np.abs(flat), 0.8), flat, 0.0))
    for components in (2, 4):
        points = normalize(TruncatedSVD(components, algorithm="arpack", random_state=0).fit_transform(np.stack(rows)))
        found = clusters(adapters, 3, sparsity=0.8, components=components)
        np.testing.assert_allclose(found.similarity.numpy(), points @ points.T, atol=1e-4)


def test_one_adapter_for_each_group(encoder, tmp_path):
    adapters = families(encoder, 2, 2)
    tasks = [colours(name=f"task-{name}") for name in adapters]
    found = pt.mbc(adapters, 2, model=encoder, data=tasks, form={"name": "lora", "rank": 2}, out=tmp_path, **FAST)
    assert [sorted(a.heads) for a in found.adapters.values()] == [[f"task-{n}" for n in g] for g in found.groups]
    assert {a.form for a in found.adapters.values()} == {pt.LoRA(2)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["group0", "group1"] == sorted(found.adapters)
    assert pt.mbc(list(adapters.values()), 2).adapters == {}
    with pytest.raises(MixError, match="no task is given for the adapter 'f1-0'"):
        pt.mbc(adapters, 2, model=encoder, data=tasks[:2], **FAST)
    with pytest.raises(ConfigError, match="give the base"):
        pt.mbc(adapters, 2, data=tasks)
    with pytest.raises(ConfigError, match="no setting epochs where nothing is learned"):
        pt.mbc(adapters, 2, epochs=3)


class TestShots:
    @pytest.fixture
    def task(self):
        whole = colours(24)
        return Task("shots", "classify", whole.train[:4], [], whole.test, labels=("blue", "red"))

    @pytest.fixture
    def adapters(self, decoder):
        found = {name: Adapter.new(decoder, LORA, seed=i, name=name) for i, name in enumerate("abcdef")}
        for adapter in found.values():
            adapter.trainable(False)
        return found

    def test_the_ranking_is_that_of_accuracy_and_perplexity(self, decoder, task, adapters):
        rows = rank(decoder, adapters, task, task.train)
        assert rows == rank(decoder, {n: adapters[n] for n in "fdbeca"}, task, task.train)
        assert decoder.attached == () and {row.name for row in rows} == set(adapters)
        assert [row.place for row in rows] == sorted(row.place for row in rows)
        for row in rows[:2]:
            adapter = decoder.attach(adapters[row.name])
            score = pt.evaluate(
                decoder, Task("t", "classify", [], [], task.train, labels=task.labels), adapter, resamples=0
            )
            assert score.value == pytest.approx(row.score)
            nll = count = 0.0
            for shot in task.train:
                prompt = decoder.tokenizer(f"{shot.inputs[0]}\n")["input_ids"]
                answer = decoder.tokenizer(shot.target, add_special_tokens=False)["input_ids"]
                with torch.no_grad(), decoder.using(adapter):
                    said = decoder.module(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                nll -= sum(float(said[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
                count += len(answer)
            assert row.loss == pytest.approx(nll / count, rel=0.05)
            decoder.detach(adapter)
        best = rank(decoder, adapters, task, task.train, weight=0.0)
        assert [row.loss for row in best] == sorted(row.loss for row in rows)

    def test_the_least_alike_of_all_subsets(self, adapters):
        pairs = likeness(adapters, list(adapters))
        names, alike = diverse(adapters, list(adapters), 3)
        sums = {s: sum(pairs[p] for p in itertools.combinations(s, 2)) for s in itertools.combinations("abcdef", 3)}
        assert sums[names] == pytest.approx(min(sums.values())) == pytest.approx(alike)
        assert diverse(adapters, "fedcba", 3)[0] == names
        assert diverse(adapters, "ab", 3)[0] == ("a", "b")

    def test_twins_are_as_alike_as_can_be(self, adapters):
        adapters["twin"] = copy.deepcopy(adapters["a"])
        with torch.no_grad():
            for p in adapters["twin"].parameters():
                p *= -2.0  # neither sign nor size matters
        pairs = likeness(adapters, list(adapters))
        tensors = len(list(adapters["a"].parameters()))
        assert pairs["a", "twin"] == pytest.approx(tensors) == pytest.approx(max(pairs.values()))
        assert not {"a", "twin"} <= set(diverse(adapters, list(adapters), 4)[0])

    def test_data_near_to_the_shots(self):
        angles = {"shot": 0.0, "near": 0.3, "copy": 0.31, "far": 1.5, "farther": 3.0, "same": 0.01}

        def embed(texts):
            found = torch.tensor([angles[text.split("\n")[1]] for text in texts])
            return torch.stack([found.cos(), found.sin()], 1)

        def rows(*names):
            return [Example((name,), "x") for name in names]

        task = Task("t", "generate", [], [], [])
        pool = rows("far", "copy", "near", "farther", "same", "shot", "near")

        def chosen(count, apart, some=pool):
            return [e.inputs[0] for e in near(rows("shot"), some, count, task, embed=embed, apart=apart)]

        assert chosen(9, 0.0) == ["same", "near", "copy", "far", "farther"]
        assert chosen(9, 0.001) == ["near", "far", "farther"]  # one is close to the shot, one to what was nearer
        assert chosen(2, 0.0) == ["same", "near"] and chosen(0, 0.0) == []
        assert chosen(3, 0.0, pool[::-1]) == chosen(3, 0.0)

    @given(st.lists(st.text("abc ", min_size=1, max_size=8), max_size=12), st.integers(0, 8), st.randoms())
    @settings(max_examples=25, deadline=None)
    def test_no_shot_and_nothing_twice_in_any_order(self, texts, count, random):
        task, shots = Task("t", "generate", [], [], []), [Example(("a b",), "y")]
        pool = [Example((text,), "y") for text in texts]
        found = near(shots, pool, count, task, apart=0.0)
        assert len(found) <= count and len({e.inputs for e in found}) == len(found)
        assert all(e.inputs != ("a b",) for e in found)
        random.shuffle(pool)
        assert near(shots, pool, count, task, apart=0.0) == found

    def test_from_end_to_end(self, decoder, task, adapters, tmp_path):
        values = {n: a.hash for n, a in adapters.items()}
        pool = colours(12, name="pool", start=40)
        found = pt.kshot_experts(
            decoder, adapters, task, pool, k=3, experts=3, shortlist=4, examples=8, apart=0.0, **FAST
        )
        assert len(found.names) == 3 and set(found.names) <= {row.name for row in found.ranking[:4]}
        assert found.examples[:3] == task.train[:3] and 3 < len(found.examples) <= 8
        assert all(example in pool.train for example in found.examples[3:])
        assert found.mix.router.name == "molora" and found.mix.router.top_k == 2
        assert {n: a.hash for n, a in adapters.items()} == values
        assert all(found.mix.adapters[n].hash != values[n] for n in found.names)
        with torch.no_grad(), decoder.using(found.mix, tasks="shots"):
            assert torch.isfinite(decoder.module(input_ids=torch.tensor([[1, 5, 6]])).logits).all()
        found.mix.save(tmp_path / "mix.safetensors")

    def test_what_it_refuses(self, decoder, encoder, task, adapters):
        for k in (0, -1):
            with pytest.raises(ConfigError, match="at least one training example"):
                pt.kshot_experts(decoder, adapters, task, k=k)
        with pytest.raises(ConfigError, match="gives none"):
            shots_of(Task("empty", "classify", [], [], [], labels=("a", "b")))
        with pytest.raises(ConfigError, match="shortlist from experts to 16"):
            pt.kshot_experts(decoder, adapters, task, experts=9)
        with pytest.raises(ConfigError, match="weight must be"):
            pt.kshot_experts(decoder, adapters, task, weight=2.0)
        with pytest.raises(MixError, match="no head that answers 'shots'"):
            pt.kshot_experts(encoder, {"a": Adapter.new(encoder, LORA)}, task)
