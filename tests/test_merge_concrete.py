"""Concrete masks: one relaxed mask that the models' differences share, and the rule that applies it again."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_merge_pool import tasks, two

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.merge.adapters import merge_adapters
from polytask.merge.engine import Job, run
from polytask.merge.fit import Tensors, fitted
from polytask.merge.fits.adamerging import entropy
from polytask.merge.fits.concrete import Concrete, drawn, masked
from polytask.merge.pool import Pool
from polytask.merge.rule import Block, rules
from polytask.merge.source import Checkpoint, Module

INF = float("inf")


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    return two(tiny_bert(minilm_tokenizer))


@pytest.fixture
def made(learned):
    return [adapter.copy() for adapter in learned]


def models_of(decoder):
    """Two whole models near a base."""
    made = [copy.deepcopy(decoder) for _ in range(2)]
    for i, model in enumerate(made):
        with torch.no_grad():
            for p in model.module.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


def sure(pool, tensors):
    """The mean entropy of all answers with these weights."""
    with pool.acting(tensors), torch.no_grad():
        return float(torch.stack([entropy(r.logits(r.rows(False))).mean() for r in pool.readers]).mean())


class TestMask:
    @given(st.lists(st.floats(-6, 6), min_size=1, max_size=12), st.floats(0.1, 3.0), st.integers(0, 99))
    @settings(max_examples=15, deadline=None)
    def test_it_is_torchs_relaxed_bernoulli_over_its_mean(self, x, temperature, seed):
        logits = torch.tensor(x)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            theirs = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), logits=logits).rsample()
        ours = drawn({"w": logits}, temperature, torch.Generator().manual_seed(seed))["w"]
        torch.testing.assert_close(ours, theirs / theirs.mean(), rtol=2e-3, atol=1e-4)
        assert ours.mean().item() == pytest.approx(1.0, rel=1e-4)

    def test_by_hand(self, monkeypatch):
        """At T = 0.5 x and log(u / (1 - u)) count twice: u = 1/2 leaves sigmoid(2 x)."""
        monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.full(shape, 0.5))
        found = drawn({"w": torch.tensor([0.0, 0.5, -0.5])}, 0.5, torch.Generator())["w"]
        s = torch.tensor([0.5, 0.7310586, 0.2689414])  # their mean is 1/2
        torch.testing.assert_close(found, 2 * s)

    def test_large_logits_mask_nothing(self):
        assert torch.equal(drawn({"w": torch.full((3, 5), INF)}, 0.5, torch.Generator())["w"], torch.ones(3, 5))

    def test_a_mask_of_nothing_stays_one_with_gradients_that_are_numbers(self):
        """Its mean is zero: no division by it."""
        for value in (-INF, -1e4, -60.0, -25.0):
            x = torch.full((4, 4), value, requires_grad=True)
            mask = drawn({"w": x}, 0.5, torch.Generator())["w"]
            assert mask.isfinite().all()
            (gradient,) = torch.autograd.grad((mask * torch.arange(16.0).view(4, 4)).sum(), x)
            assert gradient.isfinite().all()
            if value < -50:
                assert not mask.any()

    def test_a_gradient_reaches_the_logits_and_is_their_slope(self, made, encoder):
        with Pool(encoder, made, tasks()) as pool:
            name = next(n for n in pool.changes if n.endswith("value.weight"))
            reader, weights = pool.readers[0], torch.full((2,), 0.5)
            rows = reader.rows(False)

            def loss(x):
                mask = {n: torch.ones_like(c.base) for n, c in pool.changes.items()}
                mask |= drawn({name: x}, 0.5, torch.Generator().manual_seed(3))
                with pool.acting(masked(pool, mask).compose(weights)):
                    return entropy(reader.logits(rows)).sum()

            x = torch.zeros_like(pool.changes[name].base, requires_grad=True)
            (found,) = torch.autograd.grad(loss(x), x)
            assert found.abs().max() > 0
            with torch.no_grad():
                way = found / found.norm()
                slope = (loss(x + way) - loss(x - way)) / 2
            assert slope.item() == pytest.approx((found * way).sum().item(), rel=0.05)


class TestMaskedPool:
    def test_it_multiplies_each_models_change(self, made, encoder):
        with Pool(encoder, made, tasks()) as pool:
            generator = torch.Generator().manual_seed(0)
            mask = {n: torch.rand(c.base.shape, generator=generator) for n, c in pool.changes.items()}
            found = masked(pool, mask).compose(torch.tensor([0.7, -0.4]))
            for name, change in pool.changes.items():
                by_hand = change.base + 0.7 * mask[name] * change.of(0, 2) - 0.4 * mask[name] * change.of(1, 2)
                torch.testing.assert_close(found[name], by_hand, rtol=1e-5, atol=1e-6)
            assert all(type(c).__name__ == "Change" for c in pool.changes.values())  # the pool itself is as it was


class TestRule:
    @pytest.mark.parametrize("inner", ["task_arithmetic", "dare_linear", "magmax"])
    def test_a_mask_of_ones_is_the_inner_rule_bit_for_bit(self, inner):
        generator = torch.Generator().manual_seed(0)
        base, *tensors = (torch.randn(5, 7, generator=generator) for _ in range(4))
        ones = tuple(torch.ones(5, 7) for _ in tensors)
        block = Block("w", base, tuple(tensors), (0.3, 0.5, 1.0), shape=(5, 7))
        rule = rules.make({"name": "masked", "inner": inner})
        block = replace(block, settings={k: (getattr(rule, k),) * 3 for k in rule.each})
        assert torch.equal(rule.merge(replace(block, companions=ones)), rule.rule.merge(block))
        assert torch.equal(rule.merge(block), rule.rule.merge(block))

    def test_by_hand(self):
        base, x = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0])
        block = Block("w", base, (x, x), (1.0, 0.5), shape=(3,), companions=(torch.tensor([0.0, 0.5, 1.0]), None))
        # 1 + m 2 + 0.5 * 2
        assert rules.make("masked").merge(block).tolist() == [2.0, 3.0, 4.0]

    def test_surveys_see_masked_differences(self):
        """Global TIES through the engine, on models that were masked beforehand."""
        generator = torch.Generator().manual_seed(0)
        base = {n: torch.randn(s, generator=generator) for n, s in (("a", (4, 6)), ("b", (9,)))}
        models = [{n: t + torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)]
        mask = {n: (torch.rand(t.shape, generator=generator) > 0.5).float() for n, t in base.items()}
        before = [{n: torch.where(mask[n] == 1, m[n], base[n]) for n in base} for m in models]
        inner = {"name": "ties", "density": 0.4}
        found = self._run([Tensors(m, f"m{i}") for i, m in enumerate(models)], "masked", {"inner": inner}, base, mask)
        plain = self._run([Tensors(m, f"m{i}") for i, m in enumerate(before)], "ties", {"density": 0.4}, base, None)
        assert all(torch.equal(found[n], plain[n]) for n in base)

    def test_it_refuses_a_rule_that_reads_companions_itself(self):
        with pytest.raises(ConfigError, match="reads something beside them"):
            rules.make({"name": "masked", "inner": "masked"})

    @staticmethod
    def _run(sources, rule, options, base, mask):
        beside = None if mask is None else [Tensors(mask)] * len(sources)
        out = {n: torch.empty_like(t) for n, t in base.items()}
        run(
            Job(sources, rule, options, Tensors(base, "base"), companions=beside, elements=6),
            lambda name, rows, start: out[name][start : start + len(rows)].copy_(rows),
        )
        return out


class TestConcrete:
    def test_the_saved_mask_gives_the_adapter_again(self, made, encoder, tmp_path):
        settings = {"steps": 3, "lr": 0.5, "as_": "full"}
        folder = pt.merge(made, "concrete", encoder, data=tasks(), out=tmp_path / "m", **settings)
        found = pt.Adapter.load(folder)
        said = found.card.training["merge"]
        data = (folder / "mask.safetensors").read_bytes()
        assert said["fit"]["mask"] == {"file": "mask.safetensors", "sha256": hashlib.sha256(data).hexdigest()}
        beside = [Checkpoint(folder / "mask.safetensors")] * 2
        again = merge_adapters(made, "masked", said["weights"], companions=beside, as_="full")
        assert again.hash == found.hash
        mask = load_file(folder / "mask.safetensors")
        assert all(m.mean().item() == pytest.approx(1.0, rel=1e-4) for m in mask.values())
        for site, patch in found.patches.items():
            total = 0.3 * made[0].patches[site].delta() + 0.3 * made[1].patches[site].delta()
            torch.testing.assert_close(patch.delta(), mask[f"{site}.weight"] * total, rtol=1e-4, atol=1e-7)

    def test_the_saved_mask_gives_the_model_again(self, decoder, tmp_path):
        models = models_of(decoder)
        folder = pt.merge(models, "concrete", decoder, data=tasks(), out=tmp_path / "m", steps=2, lr=0.1)
        record = json.loads((folder / "polytask_merge.json").read_text())
        merged = load_file(folder / "model.safetensors")
        root = Module(decoder.module)
        beside = [Checkpoint(folder / "mask.safetensors")] * 2
        job = Job([Module(m.module, str(i)) for i, m in enumerate(models)], "masked", {}, root, record["weights"],
                  companions=beside)  # fmt: skip
        again = {name: torch.empty(shape) for name, shape in job.shapes.items()}
        run(job, lambda name, rows, start: again[name][start : start + len(rows)].copy_(rows))
        assert merged.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in merged.items())
        mask, name = load_file(folder / "mask.safetensors"), "model.layers.0.mlp.up_proj.weight"
        base, first, second = (m.module.state_dict()[name] for m in (decoder, *models))
        expected = base + 0.3 * mask[name] * (first + second - 2 * base)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)

    def test_entropy_falls_below_that_of_no_mask(self, made, encoder):
        state = copy.deepcopy(encoder.module.state_dict())
        heads = copy.deepcopy([adapter.head.state_dict() for adapter in made])
        plan = fitted(made, "concrete", encoder, tasks(), steps=60, lr=0.3)
        with Pool(encoder, made, tasks()) as pool:
            weights = torch.full((2,), 0.3)
            mask = plan.companions[0].tensors
            assert set(mask) == set(pool.changes)
            with_mask, without = sure(pool, masked(pool, mask).compose(weights)), sure(pool, pool.compose(weights))
        assert with_mask < without - 0.01
        assert sum(plan.about["entropy"][-5:]) < sum(plan.about["entropy"][:5])
        assert same_state(state, encoder.module)
        assert all(same_state(head, adapter.head) for head, adapter in zip(heads, made, strict=True))

    @pytest.mark.parametrize("per", ["tensor", "model"])
    def test_adamerging_inside(self, made, encoder, per):
        settings = {"inner": "adamerging", "per": per, "steps": 4, "after": 6, "lr": 0.1}
        plan = fitted(made, "concrete", encoder, tasks(), **settings)
        values = [set(w["tensors"].values()) for w in plan.weights]
        assert all((len(own) == 1) == (per == "model") for own in values)
        assert all(0 < abs(v - 0.3) < 0.02 for own in values for v in own)  # AdaMerging's own small steps, from 0.3
        again = fitted(made, "concrete", encoder, tasks(), **settings)
        assert again.files == plan.files and again.weights == plan.weights
        other = fitted(made, "concrete", encoder, tasks(), seed=1, **settings)
        assert other.files != plan.files

    def test_the_coefficients_of_a_step_are_adams_from_the_start(self, made, encoder):
        """One step of Adam with rate 1 goes by 1 against the gradient's sign; the next begins at the start again."""
        with Pool(encoder, made, tasks()) as pool:
            seen = []
            found = Concrete(inner="adamerging", per="model")._coefficients(pool)
            for target in (1.0, -1.0):

                def loss(mask, coefficients, target=target):
                    seen.append({n: c.detach().clone() for n, c in coefficients.items()})
                    return (next(iter(coefficients.values())) * target).sum()

                after = found({}, loss)
                if target > 0:
                    assert next(iter(after.values())).tolist() == pytest.approx([-0.7, -0.7], abs=1e-5)
            assert all(c.tolist() == pytest.approx([0.3, 0.3]) for step in seen for c in step.values())
            # the moments persist: 0.9 * 0.1 - 0.1 over their corrections
            assert next(iter(after.values())).tolist() == pytest.approx([0.3 + 0.01 / 0.19] * 2, abs=1e-4)

    def test_answers_are_not_looked_at(self, made, encoder):
        blind = tasks()
        for task in blind:
            task.train = [pt.Example(e.inputs, "red") for e in task.train]
        first, second = (fitted(made, "concrete", encoder, t, steps=2, lr=0.1) for t in (tasks(), blind))
        assert first.files == second.files

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inner": "ties"}, "inner must be task_arithmetic or adamerging, got 'ties'"),
            ({"per": "row"}, "per must be tensor or model"),
            ({"temperature": 0}, "temperature must be above 0"),
            ({"steps": -1}, "steps must be at least 0"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_settings_out_of_range_are_said(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Concrete(**options)
