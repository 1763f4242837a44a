"""Merging by looking at data: models composed live, and the methods that learn how."""

from __future__ import annotations

import copy
import json

import pytest
import scipy.stats
import torch
from conftest import colours, same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_adapters import shaken
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError, DataError, MergeError, ModelError
from polytask.merge.fit import fits
from polytask.merge.fits.adamerging import entropy
from polytask.merge.pool import Pool
from polytask.merge.source import Module
from polytask.merge.values import resolve

QUICK = {"epochs": 2, "batch_size": 6, "progress": False, "lr": 1e-2}


def tasks(n=24):
    """Two tasks that contradict each other."""
    first, second = colours(n), colours(n, name="inverse", start=100)
    swap = {"red": "blue", "blue": "red"}
    for split in ("train", "dev", "test"):
        setattr(second, split, [pt.Example(e.inputs, swap[e.target]) for e in getattr(second, split)])
    return [first, second]


def two(model, forms=("lora", "lora"), **more):
    """An adapter for each task."""
    return [pt.learn(model, task, form=form, **QUICK, **more) for task, form in zip(tasks(), forms, strict=True)]


def texts(model):
    return model.tokenizer(["the car is red", "a blue stone lies there today"], padding=True, return_tensors="pt")


class TestPool:
    @pytest.mark.parametrize("forms", [("lora", "lora"), ("full", "lora"), ("dora", "ia3"), ("lokr", "bitfit")])
    def test_one_model_alone_is_that_model(self, encoder, forms):
        """The oracle is the adapter, attached."""
        made = two(encoder, forms)
        with Pool(encoder, made, tasks()) as pool:
            for i, adapter in enumerate(made):
                with pool.acting(pool.alone(i)), torch.no_grad():
                    ours = encoder.features(texts(encoder))
                name = encoder.attach(adapter)
                with encoder.using(name), torch.no_grad():
                    theirs = encoder.features(texts(encoder))
                encoder.detach(name)
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
                assert not torch.allclose(ours, encoder.features(texts(encoder)), atol=1e-4)

    def test_layers_that_are_stored_turned(self):
        module, batch = tiny("gpt2")
        model = pt.Model(module)
        made = [shaken(model, pt.LoRA(rank=3), "linear", seed) for seed in (1, 2)]
        with Pool(model, made, []) as pool, pool.acting(pool.compose(torch.tensor([0.5, 2.0]))), torch.no_grad():
            ours = output(module(**batch))
        names = [model.attach(adapter) for adapter in made]
        with model.using(dict(zip(names, (0.5, 2.0), strict=True))), torch.no_grad():
            torch.testing.assert_close(ours, output(module(**batch)), rtol=1e-4, atol=1e-5)

    def test_what_acts_on_the_base_does_not_act_in_the_pool(self, encoder):
        made = two(encoder)
        with Pool(encoder, made, tasks()) as pool, pool.acting(pool.alone(0)), torch.no_grad():
            wanted = encoder.features(texts(encoder))
        encoder.use(encoder.attach(made[1], "other"))
        with Pool(encoder, made, tasks()) as pool, pool.acting(pool.alone(0)), torch.no_grad():
            assert torch.equal(encoder.features(texts(encoder)), wanted)
        with torch.no_grad():
            assert not torch.allclose(encoder.features(texts(encoder)), wanted, atol=1e-4)

    def test_composing_is_the_sum_of_the_changes(self, encoder):
        made = two(encoder, ("lora", "full"))
        with Pool(encoder, made, tasks()) as pool:
            weights = torch.tensor([0.7, -0.4])
            found = pool.compose(weights)
            state = encoder.module.state_dict()
            merged = [copy.deepcopy(encoder) for _ in made]
            for model, adapter in zip(merged, made, strict=True):
                adapter.merge_into(model, in_place=True)
            for name, tensor in found.items():
                taus = [m.module.state_dict()[name] - state[name] for m in merged]
                torch.testing.assert_close(tensor, state[name] + 0.7 * taus[0] - 0.4 * taus[1], rtol=1e-4, atol=1e-6)

    def test_the_base_comes_back_bit_for_bit(self, encoder):
        before = dict(encoder.module.named_parameters())
        values = copy.deepcopy(encoder.module.state_dict())
        made = two(encoder)
        encoder.module.train()
        with Pool(encoder, made, tasks()) as pool:
            assert not encoder.module.training
            with pytest.raises(RuntimeError, match="on purpose"), pool.acting(pool.alone(0)):
                raise RuntimeError("on purpose")
        assert encoder.module.training and all(m.training for m in encoder.module.modules())
        assert all(p is before[n] and p.requires_grad for n, p in encoder.module.named_parameters())
        assert same_state(values, encoder.module)

    def test_tied_tensors_move_together(self, decoder):
        decoder.module.lm_head.weight = decoder.module.model.embed_tokens.weight
        tuned = copy.deepcopy(decoder.module)
        with torch.no_grad():
            tuned.model.embed_tokens.weight.add_(0.1)
        batch = {"input_ids": torch.tensor([[4, 5, 6]])}
        with Pool(decoder, [Module(tuned, "tuned")], []) as pool:
            assert list(pool.changes) == ["model.embed_tokens.weight"]
            with pool.acting(pool.alone(0)), torch.no_grad():
                ours = decoder.module(**batch).logits
        torch.testing.assert_close(ours, tuned(**batch).logits)

    def test_gradients_reach_the_coefficients(self, encoder):
        made = two(encoder, ("lora", "full"))
        with Pool(encoder, made, tasks()) as pool:
            reader = pool.readers[0]
            rows = reader.rows(True)

            def loss(weights):
                with pool.acting(pool.compose(weights)):
                    return reader.loss(rows)

            weights = torch.tensor([0.5, 0.5], requires_grad=True)
            (found,) = torch.autograd.grad(loss(weights), weights)
            step = 1e-2
            for i in range(2):
                at = torch.eye(2)[i] * step
                with torch.no_grad():
                    slope = (loss(weights + at) - loss(weights - at)) / (2 * step)
                assert slope.item() == pytest.approx(found[i].item(), rel=0.05, abs=1e-3)
            assert all(p.grad is None for p in encoder.module.parameters())

    def test_each_model_finds_its_task(self, encoder):
        made = two(encoder)
        with Pool(encoder, made, tasks()[::-1]) as pool:
            assert [pool.reader_of(i).task.name for i in range(2)] == ["colours", "inverse"]
        made[0].heads, made[0].card.tasks = {}, []
        with pytest.raises(MergeError, match="no adapter brings a head"):
            Pool(encoder, made, tasks())

    def test_a_reader_draws_every_example_once_a_round(self, encoder):
        made = two(encoder)
        with Pool(encoder, made, tasks()) as pool:
            reader = pool.readers[0]
            drawn = reader.batches(5, True)
            round_ = [id(row) for _ in range(3) for row in next(drawn)]
            assert sorted(round_) == sorted(map(id, reader.rows(True)))
            again = reader.batches(5, True)
            assert [id(row) for row in next(again)] == round_[:5]

    def test_score_is_what_evaluate_says(self, encoder):
        made = two(encoder)
        with Pool(encoder, made, tasks(), split="test") as pool:
            for i, task in enumerate(tasks()):
                with pool.acting(pool.alone(i)):
                    ours = pool.readers[i].score()
                name = encoder.attach(made[i])
                assert ours == pt.evaluate(encoder, task, name, resamples=0).value
                encoder.detach(name)

    def test_what_it_refuses(self, encoder):
        made = two(encoder)
        empty = tasks()[0]
        empty.train = []
        with pytest.raises(DataError, match="'train' of the task 'colours' is empty"):
            Pool(encoder, made, [empty])
        with pytest.raises(MergeError, match="changes anything"):
            Pool(encoder, [Module(copy.deepcopy(encoder.module))], [])


class TestScores:
    def test_the_best_score_is_the_prediction(self, encoder, decoder):
        for model in (encoder, decoder):
            for kind in ("classify", "choose"):
                task = tasks()[0]
                if kind == "choose":
                    rows = [
                        pt.Example(("a",), i % 3, choices=("x", "yy", "zzz")[: 3 if i % 3 == 2 else 2 + i % 2])
                        for i in range(6)
                    ]
                    rows = [r if r.target < len(r.choices) else pt.Example(("a",), 0, choices=r.choices) for r in rows]
                    task = pt.Task(name="choices", kind="choose", train=rows, dev=[], test=rows)
                from polytask.core.head import collate, head_for

                head = head_for(model, task)
                ready = head.rows(model, task.train, scoring=True)
                with torch.no_grad():
                    out = head.run(model, collate(model, head, ready))
                    found = head.scores(out, ready).argmax(1).tolist()
                best = head.predict(out, ready)
                assert best == (found if kind == "choose" else [head.labels[i] for i in found])

    def test_tasks_without_classes_say_so(self, decoder):
        from polytask.core.head import TextHead

        with pytest.raises(ModelError, match="no classes"):
            TextHead("generate").scores(torch.zeros(1), [])


@given(st.lists(st.lists(st.floats(-8, 8), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_entropy_is_scipys(values):
    logits = torch.tensor(values, dtype=torch.float64)
    expected = scipy.stats.entropy(logits.softmax(1).numpy(), axis=1)
    torch.testing.assert_close(entropy(logits), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    wider = torch.cat([logits, torch.full((len(logits), 1), -torch.inf, dtype=torch.float64)], 1).requires_grad_()
    torch.testing.assert_close(entropy(wider), torch.tensor(expected), rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(entropy(wider).sum(), wider)
    assert bool(gradient.isfinite().all())


def test_values_by_tensor():
    value = {"tensors": {"a": 0.25}, "else": 0.0}
    assert (resolve(value, "a", 0.5), resolve(value, "b", 0.5)) == (0.25, 0.0)


class TestAdaMerging:
    def test_without_steps_it_is_task_arithmetic(self, encoder):
        made = two(encoder)
        found = pt.merge(made, "adamerging", encoder, data=tasks(), steps=0)
        plain = pt.merge(made, "task_arithmetic", weights=[0.3, 0.3])
        for name, patch in found.patches.items():
            torch.testing.assert_close(patch.delta(), plain.patches[name].delta(), rtol=1e-5, atol=1e-7)
        assert set(found.heads) == {"colours", "inverse"}

    @pytest.mark.parametrize("per", ["tensor", "model"])
    def test_entropy_falls_and_only_coefficients_move(self, encoder, per):
        made = two(encoder, ("full", "lora"))
        before = copy.deepcopy(encoder.module.state_dict())
        heads = copy.deepcopy([adapter.head.state_dict() for adapter in made])
        found = pt.merge(made, "adamerging", encoder, data=tasks(), split="test", steps=20, lr=0.05, per=per)
        assert same_state(before, encoder.module)
        for head, adapter in zip(heads, made, strict=True):
            assert same_state(head, adapter.head)
            assert same_state(head, found.heads[next(iter(adapter.heads))])
        fit = found.card.training["merge"]["fit"]
        assert fit["entropy"][-1] < fit["entropy"][0]
        weights = found.card.training["merge"]["weights"]
        values = [set(w["tensors"].values()) for w in weights]
        assert all(0 <= v <= 1 for own in values for v in own)
        assert all((len(own) == 1) == (per == "model") for own in values)

    def test_the_same_seed_gives_the_same_adapter(self, encoder):
        made = two(encoder)
        first, second = (pt.merge(made, "adamerging", encoder, data=tasks(), steps=3, lr=0.05) for _ in range(2))
        assert first.hash == second.hash
        other = pt.merge(made, "adamerging", encoder, data=tasks(), steps=3, lr=0.05, batch_size=4, seed=1)
        assert other.hash != first.hash

    def test_answers_are_not_looked_at(self, encoder):
        made = two(encoder)
        blind = tasks()
        for task in blind:
            task.train = [pt.Example(e.inputs, "red") for e in task.train]
        first, second = (pt.merge(made, "adamerging", encoder, data=t, steps=3, lr=0.05) for t in (tasks(), blind))
        assert first.hash == second.hash

    def test_models_give_a_model(self, decoder, tmp_path):
        """The weights that were found are what the whole models are merged with."""
        made = [copy.deepcopy(decoder) for _ in range(2)]
        for i, model in enumerate(made):
            with torch.no_grad():
                for p in model.module.parameters():
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        found = pt.merge(made, "adamerging", decoder, data=tasks(), steps=2, lr=0.1)
        assert isinstance(found, pt.Model)
        folder = pt.merge(made, "adamerging", decoder, data=tasks(), steps=2, lr=0.1, out=tmp_path / "m")
        record = json.loads((folder / "polytask_merge.json").read_text())
        weights = [w["tensors"] for w in record["weights"]]
        name = "model.layers.0.mlp.up_proj.weight"
        base, *tuned = (m.module.state_dict()[name] for m in (decoder, *made))
        expected = base + sum(w[name] * (t - base) for w, t in zip(weights, tuned, strict=True))
        torch.testing.assert_close(found.module.state_dict()[name], expected)
        assert record["fit"]["method"]["name"] == "adamerging"

    def test_a_folder_may_hold_more_tasks(self, encoder, tmp_path):
        made, said = two(encoder), []
        for task in (*tasks(), colours(name="other")):
            lines = [json.dumps({"input": e.inputs[0], "target": e.target}) for e in task.train]
            (tmp_path / f"{task.name}.jsonl").write_text("\n".join(lines))
        found = pt.merge(made, "adamerging", encoder, data=tmp_path, steps=1, say=said.append)
        assert found.card.training["merge"]["fit"]["method"]["tasks"] == ["colours", "inverse"]
        assert [line for line in said if "head for other, so it is not looked at" in line]

    def test_what_it_refuses(self, encoder, decoder):
        made = two(encoder)
        with pytest.raises(ConfigError, match="looks at examples, without answers; say which"):
            pt.merge(made, "adamerging", encoder)
        with pytest.raises(ConfigError, match="say the base"):
            pt.merge(made, "adamerging", data=tasks())
        with pytest.raises(ConfigError, match="needs its tokenizer"):
            pt.merge(made, "adamerging", encoder.module, data=tasks())
        with pytest.raises(ConfigError, match="has no setting 'stepps'"):
            pt.merge(made, "adamerging", encoder, data=tasks(), stepps=3)
        with pytest.raises(ConfigError, match="finds the weights itself"):
            pt.merge(made, "adamerging", encoder, [1, 1], data=tasks())
        with pytest.raises(ConfigError, match="linear looks at no data"):
            pt.merge(made, "linear", data=tasks())
        with pytest.raises(ConfigError, match="lorahub says itself what it makes"):
            pt.merge(made, "lorahub", encoder, data=tasks(), as_="full")
        with pytest.raises(ConfigError, match="per must be tensor or model"):
            pt.merge(made, "adamerging", encoder, data=tasks(), per="row")


def test_every_method_says_what_it_is():
    for kind in fits.values():
        assert kind.gives in ("model", "adapter", "parts")
        assert kind.paper and kind.__doc__ and len(kind.__doc__) > 200, kind
        kind()  # its defaults are allowed
