"""CycleQD: archives of merged models that evolve, and the model that is aggregated from them."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.jobs import drawn

pytest.importorskip("ribs")

from polytask.merge.evolved import Evolved, Space, directions
from polytask.merge.fits.cycleqd import Archive, CycleQD, Individual, Run, aggregate, crossed
from polytask.merge.pool import Change, Pool
from polytask.merge.source import Module

QUICK = {"epochs": 3, "batch_size": 6, "progress": False, "lr": 1e-2}


def tasks(n=24):
    """The same texts with the colours' names swapped."""
    first, second = colours(n), colours(n, name="inverse", start=100)
    for split in ("train", "dev", "test"):
        rows = getattr(second, split)
        setattr(second, split, [pt.Example(e.inputs, {"red": "blue", "blue": "red"}[e.target]) for e in rows])
    return [first, second]


def texts(count=3):
    """Texts of different letters, scored by perplexity: numbers that all differ, as few examples' accuracies do not."""
    made = []
    for name in ("abcd", "mnop", "wxyz")[:count]:
        rows = [pt.Example((f"{name[i % 4 :]} {name} {name[: 1 + i % 3]} " * 3,), None) for i in range(6)]
        made.append(pt.Task(name=name, kind="lm", train=rows[:4], dev=rows[4:], test=rows[4:], metric="perplexity"))
    return made


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    model = tiny_bert(minilm_tokenizer)
    made = [pt.learn(model, task, form="lora", name=task.name, **QUICK) for task in tasks()]
    return [*made, pt.learn(model, tasks()[0], form="full", sites="all", name="colours", **{**QUICK, "lr": 1e-3})]


@pytest.fixture
def two(learned):
    return copy.deepcopy(learned[:2])


KEPT = []


@pytest.fixture
def writers(decoder):
    """An expert of each of the three texts; learned once."""
    if not KEPT:
        KEPT.extend(pt.learn(decoder, task, form="lora", name=task.name, **{**QUICK, "epochs": 12}) for task in texts())
    return copy.deepcopy(KEPT)


@pytest.fixture
def mixed(learned):
    """One of dense changes (norms and biases too) and one of factors."""
    return copy.deepcopy([learned[2], learned[1]])


def random_genome(space, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(space.size, generator=generator) * 0.5


class TestGenomes:
    def test_an_experts_genome_is_the_expert(self, encoder, mixed):
        with Pool(encoder, mixed, tasks()) as pool:
            space = Space(pool)
            for i in range(2):
                alone = pool.alone(i)
                assert all(torch.equal(t, alone[name]) for name, t in space.compose(space.seed(i)).items())

    def test_additions_move_singular_values(self, encoder, mixed):
        """The oracle decomposes the dense difference itself."""
        with Pool(encoder, mixed, tasks()) as pool:
            space = Space(pool)
            name = "encoder.layer.0.attention.self.query.weight"
            for i in range(2):
                genome = space.seed(i)
                genome[space.own[i]] += 0.5
                base = pool.changes[name].base
                assert torch.allclose(space.compose(genome)[name] - base, 1.5 * (pool.alone(i)[name] - base), atol=1e-5)
                d = next(d for d in space._within[name] if d.model == i)
                genome = space.seed(i)
                genome[d.at.start] = 1.0  # twice the largest
                found = torch.linalg.svdvals(space.change(name, genome).double())
                expected = torch.linalg.svdvals((pool.alone(i)[name] - base).double())
                expected[0] *= 2
                torch.testing.assert_close(found[:4], expected[:4], rtol=1e-3, atol=1e-5)
            vectors = [n for n, change in pool.changes.items() if change.base.dim() == 1]
            assert vectors and not any(space._within[n] for n in vectors)  # only matrices are mutated

    @pytest.mark.parametrize("form", ["two", "mixed"])
    def test_an_adapter_of_a_genome_is_its_model(self, request, encoder, form):
        own = request.getfixturevalue(form)
        batch = encoder.tokenizer(["the car is red", "a blue stone"], padding=True, return_tensors="pt")
        with Pool(encoder, own, tasks()) as pool:
            space = Space(pool)
            genome = random_genome(space)
            with pool.acting(space.compose(genome)), torch.no_grad():
                ours = encoder.features(batch)
            made = pt.merge(own, "cycleqd", encoder, data=tasks(), generations=0)
            made.genomes[99] = genome
        adapter = made.individual(99, encoder, own)
        assert adapter.form.name == ("lora" if form == "two" else "full")
        assert set(adapter.heads) == {"colours", "inverse"}
        encoder.attach(adapter)
        with encoder.using(adapter.name), torch.no_grad():
            torch.testing.assert_close(encoder.features(batch), ours, rtol=1e-4, atol=1e-4)
        if form == "two":  # as thin as the experts together
            assert {p.form.rank for p in adapter.patches.values()} == {16}

    def test_directions_of_a_turned_matrix(self):
        A, B = torch.randn(3, 5), torch.randn(4, 3)
        for turned in (False, True):
            base = torch.zeros((5, 4) if turned else (4, 5))
            change = Change(base, A=A, B=B, ranks=torch.tensor([0, 0, 0]), turned=turned)
            U, V = directions(change, 0, 1)
            torch.testing.assert_close(U @ V, (B @ A).mT if turned else B @ A, rtol=1e-4, atol=1e-5)
            assert directions(change, 1, 2) is None

    @given(st.lists(st.floats(0.5, 2), min_size=1, max_size=4), st.floats(0.5, 3))
    @settings(max_examples=25, deadline=None)
    def test_crossing_is_a_weighted_mean(self, weights, factor):
        genomes = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(len(weights))]
        oracle = np.average(torch.stack(genomes).double().numpy(), axis=0, weights=weights)
        torch.testing.assert_close(crossed(genomes, weights), torch.from_numpy(oracle).float())
        torch.testing.assert_close(crossed(genomes, [w * factor for w in weights]), crossed(genomes, weights))
        torch.testing.assert_close(crossed(genomes, [factor] * len(genomes)), torch.stack(genomes).mean(0))
        assert torch.equal(crossed(genomes[:1], weights[:1]), genomes[0])


class TestArchives:
    @given(st.lists(st.tuples(*[st.floats(0, 1.2)] * 3), min_size=1, max_size=30))
    @settings(max_examples=40, deadline=None)
    def test_a_cell_keeps_the_first_of_the_best(self, scores):
        """The oracle is a plain dictionary."""
        archive, oracle = Archive(1, np.zeros(3), np.ones(3), 4), {}
        for number, row in enumerate(scores):
            taken = archive.add(Individual(number, 0, 0, (), (), None, row))
            cell = tuple(min(int(row[t] * 4 + 1e-5), 3) for t in (0, 2))
            better = cell not in oracle or row[1] > oracle[cell][0]
            assert taken == better
            if better:
                oracle[cell] = (row[1], number)
        found = {tuple(e["cell"]): (e["quality"], e["individual"]) for e in archive.as_dict("abc")["cells"]}
        assert found == oracle
        assert archive.best() == (lambda best: (best[1], best[0]))(max(oracle.values(), key=lambda v: (v[0], -v[1])))

    def test_elites_are_drawn_by_quality_and_place(self):
        """By hand: qualities .2, .6, 1 give .5, .65, .8; cells 0, 1, 3 give .5, .6, .8; the products .25, .39, .64."""
        archive = Archive(0, np.zeros(2), np.ones(2), 4)
        for number, row in enumerate([(0.2, 0.1), (0.6, 0.3), (1.0, 0.9)]):
            archive.add(Individual(number, 0, 0, (), (), None, row))
        order = np.argsort(archive.numbers)
        np.testing.assert_allclose(archive.chances(CycleQD())[order], np.array([0.25, 0.39, 0.64]) / 1.28)
        code = np.array([0.25, 0.9 * (0.5 + 0.8 / 3), 1.69])
        np.testing.assert_allclose(archive.chances(CycleQD(favour=1.3))[order], code / code.sum())
        np.testing.assert_allclose(archive.chances(CycleQD(sampler="uniform")), [1 / 3] * 3)
        alone = Archive(0, np.zeros(2), np.ones(2), 4)
        alone.add(Individual(0, 0, 0, (), (), None, (0.3, 0.3)))
        assert alone.chances(CycleQD()).tolist() == [1.0]
        rng = np.random.default_rng(0)
        assert alone.draw(rng, CycleQD()) == (0, 0)
        draws = [archive.draw(rng, CycleQD()) for _ in range(400)]
        assert all(a != b for a, b in draws)
        assert sum(a == 2 for a, _ in draws) > sum(a == 0 for a, _ in draws)

    def test_no_cell_ever_loses_quality(self, decoder, writers):
        with Pool(decoder, writers, texts()) as pool:
            method = CycleQD(bins=5)
            run = Run(pool, Space(pool), pool.readers, method)
            for i in range(3):
                run.offer(run.space.seed(i), Individual(i, -1, i, (), (), None))
            before = [{}, {}, {}]
            for generation in range(9):
                run.step(generation)
                for archive, old in zip(run.archives, before, strict=True):
                    now = {tuple(e["cell"]): e["quality"] for e in archive.as_dict("abc")["cells"]}
                    assert all(now[cell] >= quality for cell, quality in old.items())
                    old |= now
                kept = {n for archive in run.archives for n in archive.numbers}
                assert set(run.genomes) == kept  # nobody else's genome is kept
            assert [born.task for born in run.born[3:]] == [0, 1, 2] * 3
            assert len(run.born) == 12


def evolved(model, own, **more):
    data = tasks() if model.kind == "encoder" else texts(len(own))
    return pt.merge(own, "cycleqd", model, data=data, **{"generations": 6, "bins": 5, **more})


class TestCycleQD:
    def test_every_cells_model_scores_what_is_stored(self, decoder, writers):
        found = evolved(decoder, writers)
        assert {e["individual"] for archive in found.archives for e in archive["cells"]} == set(found.genomes)
        assert any(number >= 3 for number in found.genomes)
        with Pool(decoder, writers, texts()) as pool:
            space = Space(pool)
            for archive in found.archives:
                for entry in archive["cells"]:
                    number = entry["individual"]
                    with pool.acting(space.compose(found.genomes[number])):
                        scores = {r.task.name: -r.score() for r in pool.readers}
                    assert scores == found.lineage[number]["scores"]
                    assert scores[archive["task"]] == entry["quality"]

    def test_the_lineage_gives_the_genomes(self, decoder, writers):
        """Without mutation a genome is what its parents and weights say."""
        found = evolved(decoder, writers[:2], mutation=0, spread=0.3)
        genomes = []
        for born in found.lineage:
            if born["generation"] < 0:
                genomes.append(torch.nn.functional.one_hot(torch.tensor(born["number"]), len(found.genome)).float())
                continue
            assert born["mutation"] is None
            genomes.append(crossed([genomes[p] for p in born["parents"]], born["weights"]))
        for number, genome in found.genomes.items():
            assert torch.equal(genome, genomes[number]) and not bool(genome[2:].any())
            assert float(genome[:2].sum()) == pytest.approx(1)

    def test_without_spread_a_child_is_its_parents_mean(self, decoder, writers):
        found = evolved(decoder, writers[:2], generations=1, mutation=0, spread=0, examples=4)
        child = found.lineage[2]
        assert child["weights"] == [1.0, 1.0] and len(found.lineage) == 3
        oracle = pt.merge(writers[:2], "linear")
        with Pool(decoder, writers[:2], texts(2)) as pool:
            mean = pool.compose(torch.full((2,), 0.5))
            genome = crossed([Space(pool).seed(i) for i in child["parents"]], child["weights"])
            found = Space(pool).compose(genome)
            if set(child["parents"]) == {0, 1}:
                assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in mean.items())
                for name, patch in oracle.patches.items():
                    change = found[f"{name}.weight"] - pool.changes[f"{name}.weight"].base
                    torch.testing.assert_close(change, patch.delta(), rtol=1e-4, atol=1e-5)

    def test_mutation_is_along_the_wanted_tasks_expert(self, decoder, writers):
        with Pool(decoder, writers[:2], texts(2)) as pool:
            method = CycleQD(mutation=0.2, bins=5)
            run = Run(pool, Space(pool), pool.readers, method)
            for i in range(2):
                run.offer(run.space.seed(i), Individual(i, -1, i, (), (), None))
            given = []
            run.offer = lambda genome, individual: given.append((genome, individual))
            for generation in range(2):
                run.step(generation)
            for (genome, individual), task in zip(given, (0, 1), strict=True):
                own, other = run.space.own[task], run.space.own[1 - task]
                assert individual.mutation == individual.task == task
                assert 0 <= float(genome[own].min()) < float(genome[own].max()) < 0.2
                assert float(genome[own].mean()) == pytest.approx(0.1, abs=0.02) and not bool(genome[other].any())

    def test_the_same_seed_gives_the_same_lineage(self, decoder, writers):
        first, second = (evolved(decoder, writers[:2]) for _ in range(2))
        assert first.as_dict() == second.as_dict() and first.adapter.hash == second.adapter.hash
        assert evolved(decoder, writers[:2], seed=1).lineage != first.lineage
        short = evolved(decoder, writers[:2], generations=4)
        assert first.lineage[:6] == short.lineage  # a short one is the beginning of a longer one

    def test_the_last_one_is_the_softmax_of_the_best(self, decoder, writers):
        found = evolved(decoder, writers[:2], temperature=0.1)
        final = found.about["final"]
        qualities = [max(e["quality"] for e in archive["cells"]) for archive in found.archives]
        shares = torch.tensor(qualities).div(0.1).softmax(0).tolist()
        assert list(final["weights"].values()) == pytest.approx(shares)
        oracle = sum(w * found.genomes[n] for w, n in zip(shares, final["elites"].values(), strict=True))
        torch.testing.assert_close(found.genome, oracle)
        name = decoder.attach(found.adapter)
        for task in texts(2):
            assert -pt.evaluate(decoder, task, name, split="train", resamples=0).value == pytest.approx(
                final["scores"][task.name]
            )

    def test_the_aggregate_of_one_elite_is_that_elite(self):
        genome = torch.randn(9)
        for count in (1, 2, 3):
            found, shares = aggregate([genome] * count, [0.1, 0.9, 0.4][:count], 1.0)
            torch.testing.assert_close(found, genome, rtol=1e-6, atol=1e-7)
            assert sum(shares) == pytest.approx(1)
        assert torch.equal(aggregate([genome], [0.3], 1.0)[0], genome)

    def test_only_some_examples_are_scored(self, encoder, two):
        found = evolved(encoder, two, generations=1, examples=4)
        assert all((s * 4).is_integer() for born in found.lineage for s in born["scores"].values())
        whole = evolved(encoder, two, generations=1)
        assert all((s * 12).is_integer() for born in whole.lineage for s in born["scores"].values())

    def test_less_is_better_where_a_metric_says_so(self, decoder, writers):
        found = evolved(decoder, writers)
        experts = [born["scores"] for born in found.lineage[:3]]
        for i, task in enumerate(texts()):
            scores = [scores[task.name] for scores in experts]
            assert max(range(3), key=scores.__getitem__) == i and max(scores) < 0
            archive = found.archives[i]
            assert max(e["quality"] for e in archive["cells"]) >= scores[i]
            for j, other in enumerate(archive["axes"]):
                assert archive["high"][j] == max(scores[other] for scores in experts)
                assert archive["low"][j] == min(scores[other] for scores in experts)

    def test_whole_models_evolve_too(self, decoder):
        own = []
        for i in range(2):
            module = copy.deepcopy(decoder.module)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
            own.append(Module(module, f"m{i}"))
        found = evolved(decoder, own, generations=2)
        assert found.adapter.form.name == "full" and not found.adapter.heads
        decoder.attach(found.adapter)
        batch = {"input_ids": torch.tensor([[4, 5, 6]])}
        with Pool(decoder, own, texts(2)) as pool, pool.acting(Space(pool).compose(found.genome)), torch.no_grad():
            ours = decoder.module(**batch).logits
        with decoder.using(found.adapter.name), torch.no_grad():
            torch.testing.assert_close(decoder.module(**batch).logits, ours, rtol=1e-4, atol=1e-4)

    def test_the_base_and_the_heads_are_left_alone(self, encoder, mixed):
        before = copy.deepcopy(encoder.module.state_dict())
        heads = copy.deepcopy([adapter.head.state_dict() for adapter in mixed])
        found = evolved(encoder, mixed, generations=2)
        assert same_state(before, encoder.module)
        for head, adapter in zip(heads, mixed, strict=True):
            assert same_state(head, adapter.head)
            assert same_state(head, found.adapter.heads[next(iter(adapter.heads))])


def test_a_model_without_finite_scores_is_not_kept(decoder, writers, monkeypatch):
    scores = Run.scores

    def broken(self, genome):
        found = scores(self, genome)
        return (float("inf"), *found[1:]) if len(self.born) == 2 else found

    monkeypatch.setattr(Run, "scores", broken)
    found = evolved(decoder, writers[:2], generations=2)
    assert len(found.lineage) == 4 and 2 not in found.genomes and 2 not in found.lineage[3]["parents"]
    monkeypatch.setattr(Run, "scores", lambda self, genome: (float("nan"), 0.0))
    with pytest.raises(MergeError, match="no finite number"):
        evolved(decoder, writers[:2])


def test_what_is_saved_comes_back(decoder, writers, tmp_path):
    found = evolved(decoder, writers, generations=4)
    folder = evolved(decoder, writers, generations=4, out=tmp_path / "e")
    back = Evolved.load(folder)
    assert back.as_dict() == json.loads(json.dumps(found.as_dict())) and back.adapter.hash == found.adapter.hash
    assert torch.equal(back.genome, found.genome) and back.genomes.keys() == found.genomes.keys()
    assert all(torch.equal(g, found.genomes[n]) for n, g in back.genomes.items())
    assert pt.Adapter.load(folder).hash == found.adapter.hash
    number = max(back.genomes)
    first, second = (e.individual(number, decoder, writers) for e in (found, back))
    assert first.hash == second.hash
    assert drawn(folder) == [folder / "archives.png"]
    assert (folder / "archives.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_best_of_each_cell():
    from polytask.report.archives import best, figure

    archive = {"task": "a", "axes": ["b", "c", "d"], "bins": 3, "low": [0.0] * 3, "high": [1.0] * 3, "cells": []}
    archive["cells"] = [
        {"cell": cell, "quality": quality, "individual": 0}
        for cell, quality in (([0, 1, 0], 0.2), ([0, 1, 2], 0.5), ([2, 2, 2], 0.1))
    ]
    assert best(archive) == {(0, 1): 0.5, (2, 2): 0.1}
    strip = {**archive, "axes": ["b"], "cells": [{"cell": [2], "quality": 0.3, "individual": 0}]}
    assert best(strip) == {(2, 0): 0.3}
    drawn = figure([archive, strip])
    filled = [[p for p in axes.patches if p.get_facecolor()[:3] != (0xFE / 255,) * 3] for axes in drawn.axes]
    assert [len(patches) for patches in filled] == [2, 1]
    assert [axes.get_title().split("\n") for axes in drawn.axes] == [["a", "0.100 to 0.500"], ["a", "0.300 to 0.300"]]


def test_what_it_refuses(encoder, two, monkeypatch, tmp_path):
    for wrong, said in (
        ({"sampler": "best"}, "sampler must be elite or uniform"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"mutation": -0.1}, "mutation must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            evolved(encoder, two, **wrong)
    with pytest.raises(MergeError, match="more than 1,000,000 cells"):
        evolved(encoder, two, bins=2_000_000)
    with pytest.raises(MergeError, match="holds no archives"):
        Evolved.load(tmp_path)
    found = evolved(encoder, two, generations=0)
    with pytest.raises(MergeError, match="individual 7 is no elite; these are: 0"):
        found.individual(7, encoder, two)
    with pytest.raises(MergeError, match="the genomes have"):
        found.individual(0, encoder, two[:1])
    monkeypatch.setitem(sys.modules, "ribs.archives", None)
    with pytest.raises(ConfigError, match=r"pip install 'polytask\[merge\]'"):
        evolved(encoder, two)
