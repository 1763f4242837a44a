"""aTLAS: a coefficient for each model and tensor, learned for a task; as a merge method and as a form."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_pool import tasks, two
from torch.func import functional_call

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError, MergeError, SiteError
from polytask.core.rows import Row
from polytask.merge.fit import fits, fitted
from polytask.merge.fits._views import view
from polytask.merge.fits.atlas import SURE, Atlas, Unlabelled, trusted
from polytask.merge.pool import Pool


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    return two(tiny_bert(minilm_tokenizer), ("lora", "full"))


@pytest.fixture
def made(learned):
    return [adapter.copy() for adapter in learned]


def third(n=24):
    """A task that no adapter was tuned for: which of three nouns is it?"""
    task = colours(n, "third")
    for split in ("train", "dev", "test"):
        kept = [e for e in getattr(task, split) if e.inputs[0].split()[1] in ("car", "bird", "door", "house")]
        setattr(task, split, [pt.Example(e.inputs, e.inputs[0].split()[1]) for e in kept])
    task.labels = ("bird", "car", "door", "house")
    return task


def fit(pool, **options):
    with pool:
        return fits.make({"name": "atlas", **options}).fit(pool)


def values(plan):
    """The coefficients by tensor, [N]."""
    return {n: torch.tensor([w["tensors"][n] for w in plan.weights]) for n in plan.weights[0]["tensors"]}


class TestAtlas:
    def test_without_steps_it_is_the_base(self, decoder):
        """Bit for bit; and ones for one model are that model."""
        models = [copy.deepcopy(decoder) for _ in range(2)]
        for i, model in enumerate(models):
            with torch.no_grad():
                for p in model.module.parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        found = pt.merge(models, "atlas", decoder, data=tasks()[0], steps=0)
        assert same_state(decoder.module.state_dict(), found.module)
        ones = [{"tensors": dict.fromkeys(decoder.module.state_dict(), float(i == 1)), "else": 0.0} for i in range(2)]
        one = pt.merge(models, "task_arithmetic", decoder, ones)
        assert same_state(models[1].module.state_dict(), one.module)

    def test_there_is_one_coefficient_for_each_model_and_tensor(self, made, encoder):
        pool = Pool(encoder, made, tasks()[:1])
        plan = fit(pool, steps=2)
        assert (
            plan.about["coefficients"] == len(pool) * len(pool.changes) == sum(v.numel() for v in values(plan).values())
        )
        assert len(pool.changes) > 12  # those of the LoRA and those that only the dense adapter changes
        for name, value in values(plan).items():
            alike = [pool.changes[name].of(i, 2).any() for i in range(2)]
            assert [bool(v) for v in value] == [bool(a) for a in alike]  # nothing moves where a model changes nothing

    def test_gradients_are_those_of_plain_autograd(self, made, encoder):
        """The oracle runs the network with weights that are summed by hand, as a function of the coefficients."""
        pool = Pool(encoder, made, tasks()[:1])
        reader, names = pool.readers[0], list(pool.changes)
        generator = torch.Generator().manual_seed(0)
        start = {n: torch.randn(2, generator=generator) for n in names}
        ours = {n: v.clone().requires_grad_() for n, v in start.items()}
        with pool, pool.acting(pool.compose(ours)):
            found = torch.autograd.grad(reader.loss(reader.rows(True)), list(ours.values()), allow_unused=True)

        taus = []
        for adapter in made:
            merged = adapter.merge_into(encoder).module.state_dict()
            taus.append({n: merged[n] - t for n, t in encoder.module.state_dict().items() if n in names})
        theirs = {n: v.clone().requires_grad_() for n, v in start.items()}
        state = encoder.module.state_dict()
        weights = {n: state[n] + sum(theirs[n][i] * taus[i][n] for i in range(2)) for n in names}
        texts = encoder.tokenizer([e.inputs[0] for e in tasks()[0].train], padding=True, return_tensors="pt")
        hidden = functional_call(encoder.module, weights, kwargs=dict(texts)).last_hidden_state
        mask = texts["attention_mask"][..., None].float()
        logits = reader.head.linear((hidden * mask).sum(1) / mask.sum(1))
        wanted = torch.tensor([tasks()[0].labels.index(e.target) for e in tasks()[0].train])
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        expected = torch.autograd.grad(loss, list(theirs.values()), allow_unused=True)
        assert any(e.abs().max() > 1e-4 for e in expected if e is not None)
        for name, a, b in zip(names, found, expected, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)

    def test_a_step_is_that_of_adamw_by_hand(self, made, encoder):
        """From 0 the first goes by the rate against the sign. Then decay and the cosine of one half."""
        pool = Pool(encoder, made, tasks()[:1])
        one = values(fit(pool, steps=1, lr=0.05))
        moved = [
            abs(v) for value in one.values() for v in value.tolist() if abs(v) > 1e-5
        ]  # a key's bias has no gradient
        assert len(moved) > 20 and all(v == pytest.approx(0.05, rel=1e-2) for v in moved)
        same = {"lr": 0.05, "weight_decay": 0.0, "batch_size": 100}
        none, much = (values(fit(pool, steps=2, **{**same, "weight_decay": w})) for w in (0.0, 1.0))
        for name in one:
            # decay is multiplied by the second step's rate, half of the first
            torch.testing.assert_close(none[name] - much[name], 0.025 * one[name], rtol=2e-2, atol=1e-6)

    def test_the_loss_falls_and_only_coefficients_move(self, made, encoder):
        before, heads = copy.deepcopy(encoder.module.state_dict()), [copy.deepcopy(a.head.state_dict()) for a in made]
        found = pt.merge(made, "atlas", encoder, data=tasks()[1], steps=15, as_="full")
        loss = found.card.training["merge"]["fit"]["loss"]
        assert loss[-1] < loss[0] - 0.01
        assert same_state(before, encoder.module)
        for head, adapter in zip(heads, made, strict=True):
            assert same_state(head, adapter.head) and same_state(head, found.heads[next(iter(adapter.heads))])

    def test_the_penalty_is_its_formula(self, made, encoder):
        pool = Pool(encoder, made, tasks()[:1])
        for norm in (1, 2):
            plain, held = (fit(pool, steps=2, lr=0.1, penalty=p, norm=norm, batch_size=100) for p in (0.0, 0.5))
            after = values(fit(pool, steps=1, lr=0.1, norm=norm, batch_size=100))  # it has no slope at zero
            mean = sum(float(np.linalg.norm(v.numpy(), norm)) for v in after.values()) / len(after)
            assert mean > 0 and held.about["loss"][0] == plain.about["loss"][0]
            assert held.about["loss"][1] == pytest.approx(plain.about["loss"][1] + 0.5 * mean, rel=1e-4)

    def test_a_new_task_is_read_by_a_probe_that_the_result_keeps(self, made, encoder):
        task = third(96)
        found = pt.merge(made, "atlas", encoder, data=task, steps=10, as_="full")
        assert set(found.heads) == {"colours", "inverse", "third"} and found.heads["third"].labels == task.labels
        assert not any(p.requires_grad for p in found.parameters())
        loss = found.card.training["merge"]["fit"]["loss"]
        assert loss[-1] < loss[0] < math.log(4)  # a head that has learned nothing would say ln 4
        encoder.attach(found, "found")
        assert pt.evaluate(encoder, task, "found", split="train", resamples=0).value > 0.5
        with pytest.raises(MergeError, match="no adapter brings a head for the task 'third'"):
            pt.merge(made, "adamerging", encoder, data=task, steps=1)
        with pytest.raises(MergeError, match="no adapter brings a head for the task 'third'"):
            pt.merge(made, "atlas", encoder, data=task, steps=1, objective="unlabelled")

    def test_generative_bases_need_no_head(self, decoder):
        made = [pt.Adapter.new(decoder, seed=i) for i in range(2)]
        for i, adapter in enumerate(made):
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
        for kind in ("few-shot", "unlabelled"):
            found = pt.merge(made, "atlas", decoder, data=third(), steps=3, objective=kind, lr=0.1)
            assert found.heads["third"].labels == third().labels and not list(found.heads["third"].parameters())

    def test_what_it_refuses(self, made, encoder):
        task = tasks()[0]
        task.train = [pt.Example(e.inputs, None) for e in task.train]
        with pytest.raises(ConfigError, match="12 of 12 examples in the split 'train' of 'colours' have none"):
            pt.merge(made, "atlas", encoder, data=task)
        pt.merge(made, "atlas", encoder, data=task, objective="unlabelled", steps=1)
        with pytest.raises(ConfigError, match="looks at examples with answers; say which"):
            pt.merge(made, "atlas", encoder)
        whole = copy.deepcopy(encoder)
        with torch.no_grad():
            next(whole.module.parameters()).add_(0.1)
        with pytest.raises(MergeError, match="has no place in the result"):
            pt.merge([made[0], whole], "atlas", encoder, data=third(), steps=1)
        for options, message in (
            ({"objective": "both"}, "objective must be few-shot or unlabelled, got 'both'"),
            ({"norm": 3}, "norm must be 1 or 2"),
            ({"drop": 1.0}, "drop must be at least 0 and below 1"),
            ({"lr": -1.0}, "lr must be at least 0"),
        ):
            with pytest.raises(ConfigError, match=message):
                Atlas(**options)


class TestUnlabelled:
    def test_answers_are_not_looked_at_and_the_seed_decides(self, made, encoder):
        blind = tasks()[0]
        blind.train = [pt.Example(e.inputs, "red") for e in blind.train]
        options = {"objective": "unlabelled", "steps": 3, "lr": 0.1, "batch_size": 5}
        first, second = (fitted(made, "atlas", encoder, t, **options).weights for t in (tasks()[0], blind))
        assert first == second and any(first[0]["tensors"].values())
        assert fitted(made, "atlas", encoder, blind, seed=1, **options).weights != first

    def test_the_loss_is_the_description(self, made, encoder, monkeypatch):
        """Written out again, of a batch, with views that are the examples themselves."""
        monkeypatch.setattr("polytask.merge.fits.atlas.view", lambda row, *rest: row)
        with Pool(encoder, made, tasks()[:1]) as pool:
            one = Unlabelled(pool, pool.readers[0], 100, 0.1)
            rows = pool.readers[0].rows(False)
            with pool.acting(pool.compose(torch.tensor([3.0, 0.5]))), torch.no_grad():
                p = pool.readers[0].logits(rows).softmax(1).double()
                monkeypatch.setattr("polytask.merge.fits.atlas.SURE", float(p.max(1).values.median()))
                found = float(one())
        total = counted = 0.0
        for i, row in enumerate(p):
            if i in one.trusted:
                total -= float(row[one.trusted[i]].log())
            elif row.max() > p.max(1).values.median():
                counted += 1
                total -= float((row**2 / (row**2).sum() * row.log()).sum())
        assert counted and one.trusted and found == pytest.approx(total / len(rows), rel=1e-4)
        assert SURE == 0.99

    def test_trusted_by_hand(self):
        """n = 5: one of each class, the surest of those that are given it."""
        sure = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.95, 0.05], [0.3, 0.7], [0.45, 0.55]])
        assert trusted(sure) == {2: 0, 3: 1}
        assert trusted(torch.tensor([[0.9, 0.1], [0.6, 0.4]])) == {0: 0}  # nothing is given the other

    @given(st.integers(1, 260), st.integers(2, 4), st.integers(0, 9))
    @settings(max_examples=25, deadline=None)
    def test_trusted_counts(self, n, classes, seed):
        sure = torch.rand(n, classes, generator=torch.Generator().manual_seed(seed)).softmax(1)
        k = max(1, min(n // (10 * classes), 100))
        found = trusted(sure)
        for answer in range(classes):
            own = [i for i in range(n) if int(sure[i].argmax()) == answer]
            chosen = [i for i, a in found.items() if a == answer]
            assert len(chosen) == min(k, len(own)) and set(chosen) <= set(own)
            rest = [float(sure[i].max()) for i in own if i not in chosen]
            assert not rest or min(float(sure[i].max()) for i in chosen) >= max(rest)


class TestViews:
    @given(st.lists(st.integers(3, 30), min_size=1, max_size=20), st.floats(0, 0.95), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_texts_keep_their_ends_and_their_order(self, middle, drop, seed):
        row = Row([[1, *middle, 2]], [], "red", None, [[0] * (len(middle) + 2)])
        seen = view(row, [1, 2], drop, torch.Generator().manual_seed(seed))
        (ids,) = seen.sequences
        rest = iter(ids[1:-1])
        assert ids[0] == 1 and ids[-1] == 2 and len(ids) > 2 and seen.target == "red"
        wanted = next(rest, None)
        for token in middle:
            wanted = next(rest, None) if token == wanted else wanted
        assert wanted is None  # what is left is a part of the text in its order
        assert len(seen.segments[0]) == len(ids) and row.sequences == [[1, *middle, 2]]
        if drop == 0:
            assert ids == row.sequences[0]

    @given(st.lists(st.integers(3, 30), min_size=1, max_size=20), st.integers(0, 3), st.integers(0, 99))
    @settings(max_examples=40, deadline=None)
    def test_candidates_lose_the_same_and_answers_nothing(self, prompt, cut, seed):
        """A long answer may cost the prompt its beginning."""
        answers = [[40, 41], [50, 51, 52]]
        shorter = prompt[min(cut, len(prompt) - 1) :]
        row = Row([prompt + answers[0], shorter + answers[1]], [len(prompt), len(shorter)], 0)
        seen = view(row, [], 0.5, torch.Generator().manual_seed(seed))
        left = [ids[:start] for ids, start in zip(seen.sequences, seen.starts, strict=True)]
        assert [ids[start:] for ids, start in zip(seen.sequences, seen.starts, strict=True)] == answers
        assert left[0][-1:] == prompt[-1:] and left[0][len(left[0]) - len(left[1]) :] == left[1]

    def test_tokens_are_lost_as_often_as_is_said(self):
        row, generator = Row([list(range(100))], [], 0), torch.Generator().manual_seed(0)
        lost = [100 - len(view(row, [], 0.3, generator).sequences[0]) for _ in range(50)]
        assert 28 < sum(lost) / len(lost) < 32

    def test_images_are_flipped_and_shifted(self):
        pixels = torch.arange(3 * 16 * 16.0).view(3, 16, 16)
        generator = torch.Generator().manual_seed(0)
        seen = [view(Row(pixels=pixels), [], 0.1, generator).pixels for _ in range(64)]
        wide = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        flipped = np.pad(pixels.flip(-1).numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
        crops = {w[:, a : a + 16, b : b + 16].tobytes(): kind
                 for kind, w in enumerate((wide, flipped)) for a in range(5) for b in range(5)}  # fmt: skip
        kinds = [crops[s.contiguous().numpy().tobytes()] for s in seen]
        assert 16 < sum(kinds) < 48 and len({s.numpy().tobytes() for s in seen}) > 25


def test_images_without_answers(clip):
    """A dual model's head compares with class texts: the base answers before anything is learned."""
    images = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    rows = [pt.Example((), ("cat", "dog")[i % 2], image=image) for i, image in enumerate(images)]
    task = pt.Task("animals", "classify", rows, [], [], labels=("cat", "dog"), modality="image", metric="accuracy")
    made = [pt.Adapter.new(clip, seed=i) for i in range(2)]
    for i, adapter in enumerate(made):
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    for objective in ("unlabelled", "few-shot"):
        plan = fitted(made, "atlas", clip, task, objective=objective, steps=3, lr=0.1)
        assert plan.about["loss"][0] > 0 and any(plan.weights[1]["tensors"].values())


class TestForm:
    """The contract suite of the forms has it with random directions; here with vectors."""

    @pytest.fixture
    def lib(self, encoder, tmp_path):
        """Three adapters of different forms, of which the last depends on the base's weights."""
        for i, form in enumerate(("lora", {"name": "full", "parameters": "bias"}, {"name": "dora", "rank": 2})):
            adapter = pt.Adapter.new(encoder, form, sites="query | value" if i < 2 else "query", seed=i)
            for parameter in adapter.parameters():
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
            adapter.save(tmp_path / f"v{i}")
        return [str(tmp_path / f"v{i}") for i in range(3)]

    @staticmethod
    def features(encoder, name=None):
        batch = encoder.tokenizer(["the car is red", "a blue stone"], padding=True, return_tensors="pt")
        with encoder.using(name), torch.no_grad():
            return encoder.features(batch)

    def test_one_of_a_vector_is_that_adapter(self, encoder, lib):
        for i, path in enumerate(lib):
            made = pt.Adapter.new(encoder, pt.Atlas(lib))
            for parameter in made.parameters():
                parameter.data[i] = 1.0
            for name, adapter in (("ours", made), ("theirs", pt.Adapter.load(path))):
                encoder.attach(adapter, name)
            ours, theirs = self.features(encoder, "ours"), self.features(encoder, "theirs")
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(ours, self.features(encoder), atol=1e-4)
            encoder.detach("ours")
            encoder.detach("theirs")

    def test_it_has_the_coefficients_that_are_needed_and_no_more(self, encoder, lib, tmp_path):
        """Weights of both and biases of the second: two layers, each a query and a value."""
        for blocks in (1, 4):
            made = pt.Adapter.new(encoder, pt.Atlas(lib, blocks=blocks))
            assert set(made.patches) == {s.name for s in encoder.sites if s.role in ("query", "value")}
            assert made.size == 4 * 3 * blocks + 4 * 3  # a bias is no matrix
        made.save(tmp_path / "a")
        assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_size < 3000
        assert pt.Adapter.new(encoder, {"name": "atlas", "vectors": lib[1:2]}).size == 4

    def test_groups_are_a_partition_into_equal_sizes(self, encoder, lib):
        """The changes of groups, each alone, have no place in common and add up to the vector's."""
        made = pt.Adapter.new(encoder, pt.Atlas(lib[:1], blocks=3))
        patch = next(iter(made.patches.values()))
        vector = pt.Adapter.load(lib[0]).patches[patch.site.name].delta()
        parts = []
        for group in range(3):
            patch.weight.data.zero_()
            patch.weight.data[0, group] = 1.0
            parts.append(patch.delta().detach().clone())
        counts = [int((part != 0).sum()) for part in parts]
        assert sum(counts) == vector.numel() and max(counts) - min(counts) <= 1
        assert torch.equal(sum(parts), vector)
        first, second = (pt.Adapter.new(encoder, pt.Atlas(lib[:1], blocks=3, seed=s)).patches for s in (0, 1))
        groups = [p[patch.site.name]._changes()["weight"][1] for p in (first, second)]
        assert not torch.equal(*groups) and torch.equal(groups[0], patch._changes()["weight"][1])
        others = {name: p._changes()["weight"][1] for name, p in first.items()}
        assert any(not torch.equal(other, groups[0]) for other in others.values())  # each tensor has groups of its own

    def test_learning_moves_the_coefficients_alone(self, encoder, lib):
        hashes = [pt.Adapter.load(path).hash for path in lib]
        before = copy.deepcopy(encoder.module.state_dict())
        options = {"epochs": 2, "batch_size": 6, "progress": False}
        found = pt.learn(encoder, colours(), form=pt.Atlas(lib, blocks=2), **options)
        assert same_state(before, encoder.module) and [pt.Adapter.load(path).hash for path in lib] == hashes
        assert found.form.hashes == tuple(hashes)
        assert any(p.detach().abs().max() > 0.05 for patch in found.patches.values() for p in patch.parameters())

    def test_it_is_merged_like_any_other(self, encoder, lib):
        made = pt.Adapter.new(encoder, pt.Atlas(lib, blocks=2), name="mine")
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        encoder.attach(made, "mine")
        attached = self.features(encoder, "mine")
        merged = made.merge_into(encoder)
        torch.testing.assert_close(self.features(merged), attached, rtol=1e-4, atol=1e-5)
        half = pt.merge([made, made.copy("twin")], "task_arithmetic", encoder, [0.25, 0.25], as_="full")
        for site, patch in half.patches.items():
            bound = made.patches[site].bound(encoder.module.get_submodule(patch.site.path), patch.site)
            torch.testing.assert_close(patch.delta(), 0.5 * bound.deltas()["weight"].detach(), rtol=1e-4, atol=1e-6)

    def test_a_file_needs_its_vectors_as_they_were(self, encoder, lib, tmp_path):
        made = pt.Adapter.new(encoder, pt.Atlas(lib, blocks=2))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        made.save(tmp_path / "a")
        again = pt.Adapter.load(tmp_path / "a")
        assert again.hash == made.hash and again.form == made.form
        for name, adapter in (("made", made), ("again", again), ("copy", made.copy())):
            encoder.attach(adapter, name)
        assert torch.equal(self.features(encoder, "made"), self.features(encoder, "again"))
        assert torch.equal(self.features(encoder, "made"), self.features(encoder, "copy"))
        changed = pt.Adapter.load(lib[0])
        next(iter(changed.parameters())).data.add_(1e-3)
        changed.save(lib[0])
        with pytest.raises(AdapterError, match="the vector '.*v0' was changed: its hash is"):
            pt.Adapter.load(tmp_path / "a")
        shutil.rmtree(lib[0])
        with pytest.raises(AdapterError, match="the vector '.*v0' cannot be read, and an adapter"):
            pt.Adapter.load(tmp_path / "a")

    def test_what_it_refuses(self, encoder, decoder, lib, tmp_path):
        with pytest.raises(AdapterError, match="was made for the base"):
            pt.Adapter.new(decoder, pt.Atlas(lib))
        with pytest.raises(SiteError, match="none of the vectors .* changes 'embeddings.word_embeddings'"):
            pt.Adapter.new(encoder, pt.Atlas(lib), sites="embeddings.word_embeddings")
        pt.Adapter.new(encoder, "prefix").save(tmp_path / "p")
        with pytest.raises(AdapterError, match="has the form 'prefix', which has no dense change"):
            pt.Adapter.new(encoder, pt.Atlas([tmp_path / "p"]))
        for options, message in (
            ({"vectors": "lib/a"}, "vectors must be a list of folders"),
            ({"blocks": 0}, "blocks must be a whole number of at least 1"),
            ({"count": True}, "count must be a whole number"),
            ({"vectors": ["a", "b"], "hashes": ["x"]}, "there are 1 hashes of 2 vectors"),
        ):
            with pytest.raises(ConfigError, match=message):
                pt.Atlas(**options)
