"""Grafting: the few weights that hold a tuned model's skill."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_pool import QUICK, tasks

import polytask as pt
from polytask.core.calibration import calibration_error
from polytask.core.errors import ConfigError, DataError, MergeError
from polytask.merge.fits.graft import Graft, count_of, rounded, slope, soft_mask
from polytask.merge.grafts import Grafts, Skill, overlap
from polytask.merge.pool import Pool
from polytask.merge.source import Module


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    """A full adapter and a LoRA, each of its task."""
    model = tiny_bert(minilm_tokenizer)
    return [pt.learn(model, task, form=form, **QUICK) for task, form in zip(tasks(), ("full", "lora"), strict=True)]


@pytest.fixture
def made(learned):
    return copy.deepcopy(learned)


def everything(skill, value):
    return [torch.full_like(change, value, dtype=torch.bool) for change in skill.change.values()]


class TestCalibration:
    def test_by_hand(self):
        """Two in (0.4, 0.6]: half right, sure to 0.55; two in (0.8, 1]: half right, sure to 0.95."""
        found = calibration_error([0.5, 0.6, 0.9, 1.0], [True, False, True, False], bins=5)
        assert found == pytest.approx((2 * 0.05 + 2 * 0.45) / 4)

    def test_the_ends_of_the_bins(self):
        """A bin has its upper end: 0.2 is in the first of five, and is not evened out by what lies just above."""
        assert calibration_error([0.2, 0.2 + 1e-9], [False, True], bins=5) == pytest.approx((0.2 + 0.8) / 2)
        assert calibration_error([0.0, 1.0], [False, True]) == 0.0

    @given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 20))
    @settings(max_examples=50, deadline=None)
    def test_it_is_the_definition(self, pairs, bins):
        sure, right = zip(*pairs, strict=True)
        total = 0.0
        for b in range(bins):
            inside = [(s, r) for s, r in pairs if (b / bins < s <= (b + 1) / bins or (b == 0 and s == 0))]
            total += abs(sum(r - s for s, r in inside))
        places = {round(s * bins, 9) % 1 for s in sure}
        if 0.0 not in places - {p for p in places if p}:  # not on an edge, where rounding decides
            assert calibration_error(sure, right, bins) == pytest.approx(total / len(pairs), abs=1e-9)
        assert calibration_error(sure, right, 1) == pytest.approx(abs(sum(right) - sum(sure)) / len(pairs), abs=1e-9)

    def test_what_it_refuses(self):
        for wrong in (([], []), ([0.5], [True, False]), ([1.5], [True])):
            with pytest.raises(DataError):
                calibration_error(*wrong)


class TestMask:
    @given(st.lists(st.floats(-30, 40), min_size=1, max_size=12), st.data())
    @settings(max_examples=40, deadline=None)
    def test_rounding_keeps_the_largest(self, values, data):
        start = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))]
        count, scores = data.draw(st.integers(1, 12)), [torch.tensor(values)]
        soft, mask = soft_mask(start, scores)[0], rounded(start, scores, count)[0]
        assert int(mask.sum()) == min(count, int((soft >= 0.5).sum()))
        assert not mask.any() or soft[mask].min() >= max(0.5, *soft[~mask & (soft < 0.5)].tolist(), 0.0)
        if int(mask.sum()) == count and (~mask).any():
            assert soft[mask].min() >= soft[~mask].max()

    def test_it_starts_where_the_weights_are(self):
        start = [torch.tensor([True, False])]
        soft = soft_mask(start, [torch.zeros(2)])[0]
        torch.testing.assert_close(soft, torch.tensor([1 - 4.5398e-5, 4.5398e-5]), rtol=1e-4, atol=1e-9)
        assert rounded(start, [torch.zeros(2)], 1)[0].tolist() == [True, False]

    def test_the_slope_is_autograds(self):
        start, score = torch.tensor([True, False, True]), torch.tensor([9.0, 10.5, 12.0], dtype=torch.float64)
        score.requires_grad_()
        (found,) = torch.autograd.grad(soft_mask([start], [score])[0].sum(), score)
        torch.testing.assert_close(slope(start, score.detach()), found)

    @pytest.mark.parametrize(
        ("share", "weights", "count"), [(1e-5, 1_000_000, 10), (0.3, 10, 3), (1.0, 7, 7), (0.19, 10, 1)]
    )
    def test_counts_never_exceed_the_share(self, share, weights, count):
        assert count_of(share, weights) == count


class TestSkill:
    def test_all_is_the_tuned_model_and_nothing_the_base(self, encoder, made):
        """Bit for bit: numbers are chosen, and not added up."""
        tuned = copy.deepcopy(encoder.module)
        with torch.no_grad():
            for p in tuned.parameters():
                p.mul_(-1e-3).add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        with Pool(encoder, [Module(tuned, "tuned")], []) as pool:
            skill = Skill(pool, 0)
            whole, none = skill.grafted(everything(skill, True)), skill.grafted(everything(skill, False))
            own, base = tuned.state_dict(), encoder.module.state_dict()
            assert set(whole) == {name for name, _ in encoder.module.named_parameters()}
            for name in whole:
                assert torch.equal(whole[name], own[name]) and torch.equal(none[name], base[name])
            added = {name: base[name] + skill.change[name] for name in whole}
            assert any(not torch.equal(added[name], own[name]) for name in whole)

    @given(st.integers(1, 4000))
    @settings(max_examples=15, deadline=None)
    def test_those_that_moved_most(self, count):
        skill = object.__new__(Skill)
        generator = torch.Generator().manual_seed(count)
        skill.change = {n: torch.randn(30, 40, generator=generator) * s for n, s in (("a", 1.0), ("b", 0.1))}
        skill.change["b"][:10] = 0.0
        mask = skill.moved_most(count)
        sizes, kept = (
            torch.cat([c.abs().flatten() for c in skill.change.values()]),
            torch.cat([m.flatten() for m in mask]),
        )
        assert int(kept.sum()) == min(count, int((sizes > 0).sum()))
        assert kept.all() or sizes[kept].min() >= sizes[~kept].max()

    def test_the_step_by_hand_is_autograds(self, encoder, made):
        """d loss / dS by the chain through the network, with the mask as a part of the graph."""
        with Pool(encoder, made, tasks()) as pool:
            skill, reader = Skill(pool, 0), pool.readers[0]
            start = skill.moved_most(5000)
            scores = [torch.full(own.shape, 9.0).requires_grad_() for own in start]
            rows = [reader.rows(True)[:6], reader.rows(True)[6:]]
            mask = soft_mask(start, scores)
            with pool.acting({n: b + m * skill.change[n] for (n, b), m in zip(skill.base.items(), mask, strict=True)}):
                loss = (reader.loss(rows[0]) + reader.loss(rows[1])) / 2
            expected = torch.autograd.grad(loss, scores, allow_unused=True, materialize_grads=True)
            plain = [score.detach() for score in scores]
            gradients = Graft._gradients(skill, reader, soft_mask(start, plain), rows)
            for own, score, g, d, want in zip(start, plain, gradients, skill.change.values(), expected, strict=True):
                torch.testing.assert_close(slope(own, score) * g * d, want, rtol=1e-3, atol=1e-9)
            assert max(float(want.abs().max()) for want in expected) > 1e-6


def test_overlap_by_hand():
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([True, True])}
    b = {"x": torch.tensor([False, True, True])}
    assert overlap([a, b]) == [[1.0, 0.25], [0.5, 1.0]]
    empty = {"x": torch.zeros(3, dtype=torch.bool)}
    assert overlap([a, empty]) == [[1.0, 0.0], [0.0, 1.0]]


class TestGraft:
    def test_a_sparse_adapter_for_each_model(self, encoder, made, tmp_path):
        before = copy.deepcopy(encoder.module.state_dict())
        heads = copy.deepcopy([adapter.head.state_dict() for adapter in made])
        shares = [1e-4, 1e-3, 1e-2]
        folder = pt.merge(made, "graft", encoder, data=tasks(), sparsities=shares, steps=2, out=tmp_path / "grafts")
        assert same_state(before, encoder.module)
        assert all(same_state(head, adapter.head) for head, adapter in zip(heads, made, strict=True))
        about = json.loads((folder / "graft.json").read_text())
        weights = sum(p.numel() for p in encoder.module.parameters())
        assert about["weights"] == weights
        rows = list(csv.reader((folder / "overlap.csv").open()))
        assert rows[0][1:] == [row[0] for row in rows[1:]] == ["colours", "inverse"]
        assert [float(v) for row in rows[1:] for v in row[1:]] == [v for row in about["overlap"] for v in row]
        for i, (entry, task) in enumerate(zip(about["models"], tasks(), strict=True)):
            assert about["overlap"][i][i] == 1.0
            assert [point["sparsity"] for point in entry["points"]] == shares
            assert all(0 < p["entries"] <= p["sparsity"] * weights for p in entry["points"])
            adapter = pt.Adapter.load(folder / entry["name"])
            kept = next(p for p in entry["points"] if p["sparsity"] == entry["kept"])
            assert adapter.form.name == "lt-sft" and adapter.size == kept["entries"]
            name = encoder.attach(adapter, "graft")
            assert pt.evaluate(encoder, task, name, resamples=0).value == kept["score"]
            encoder.detach(name)
            name = encoder.attach(made[i], "tuned")
            assert pt.evaluate(encoder, task, name, resamples=0).value == entry["tuned"]["score"]
            encoder.detach(name)
            assert same_state(heads[i], adapter.head)
        again = Grafts.load(folder)
        assert again.as_dict() == about and str(again).count("calibration error") == 10

    def test_with_all_weights_it_is_the_tuned_model(self, encoder, made):
        found = pt.merge(made[:1], "graft", encoder, data=tasks()[:1], sparsities=[1.0], steps=0)
        (entry,) = found.about["models"]
        (point,) = entry["points"]
        assert point["entries"] == entry["changed"] and found.overlap == [[1.0]]
        assert (point["score"], point["ece"]) == (entry["tuned"]["score"], entry["tuned"]["ece"])
        changes = {name: patch.deltas() for name, patch in found.adapters["colours"].patches.items()}
        for name, patch in made[0].patches.items():
            for key, own in patch.deltas().items():
                there = changes[name][key] if name in changes else torch.zeros_like(own)
                torch.testing.assert_close(there, own, rtol=1e-3, atol=1e-7)

    def test_the_best_rounding_is_kept(self, encoder, made, monkeypatch):
        """By a score that falls after the first step, the first step's mask is the one that comes back."""
        with Pool(encoder, made, tasks()) as pool:
            skill, reader = Skill(pool, 0), pool.readers[0]
            seen = []

            def value(skill, reader, mask):
                seen.append([own.clone() for own in mask])
                return [1.0, 3.0, 2.0][min(len(seen) - 1, 2)]

            monkeypatch.setattr(Graft, "_value", staticmethod(value))
            mask, best, step = Graft(lr=1e12, steps=3)._localised(skill, reader, 50)
        assert len(seen) >= 3 and (best, step) == (3.0, 1)
        assert all(torch.equal(a, b) for a, b in zip(mask, seen[1], strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))

    def test_the_same_seed_gives_the_same(self, encoder, made):
        first, second = (
            pt.merge(made[1:], "graft", encoder, data=tasks()[1:], sparsities=[1e-3], steps=3, lr=1e9) for _ in range(2)
        )
        assert first.as_dict() == second.as_dict()
        assert first.adapters["inverse"].hash == second.adapters["inverse"].hash

    def test_a_whole_model_and_tied_tensors(self, decoder):
        decoder.module.lm_head.weight = decoder.module.model.embed_tokens.weight
        tuned = copy.deepcopy(decoder.module)
        with torch.no_grad():
            tuned.model.embed_tokens.weight[5:40].add_(0.1)
            tuned.model.norm.weight.mul_(1.5)
        task = colours()
        found = pt.merge([Module(tuned, "tuned")], "graft", decoder, data=task, sparsities=[1.0], steps=0)
        name = decoder.attach(found.adapters["tuned"], "graft")
        batch = {"input_ids": torch.tensor([[4, 5, 46]])}
        with decoder.using(name), torch.no_grad():
            torch.testing.assert_close(decoder.module(**batch).logits, tuned(**batch).logits, rtol=1e-4, atol=1e-5)

    def test_what_it_refuses(self, encoder, made):
        with pytest.raises(ConfigError, match="1e-12 of 9.* is less than one; the least is 1.0e-06"):
            pt.merge(made, "graft", encoder, data=tasks(), sparsities=[1e-12])
        for wrong in ([], [0.0], [2], "few"):
            with pytest.raises(ConfigError, match="sparsities must be numbers above 0"):
                Graft(sparsities=wrong)
        with pytest.raises(ConfigError, match="share must be"):
            Graft(share=0)
        assert Graft(sparsities=("1e-3", 1e-4)).sparsities == (1e-4, 1e-3)
        with pytest.raises(MergeError, match="'same' is the base itself"):
            pt.merge(
                [made[0], Module(copy.deepcopy(encoder.module), "same")], "graft", encoder, data=tasks()[:1], steps=0
            )


def test_the_command_saves_draws_and_says(run, base, data, tmp_path):
    lib = tmp_path / "lib"
    code, _, err = run("learn", data, "--base", base, "--out", lib, "--form", "lora:rank=2", "--epochs", 1)
    assert code == 0, err
    out = tmp_path / "grafts"
    code, said, err = run(
        "merge", lib / "one", lib / "two", "--base", base, "--data", data, "--out", out,
        "--method", "graft:sparsities=[1e-4, 1e-3],steps=1", "--json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(said)
    assert found["pictures"] == [str(out / "graft.png")] and (out / "graft.png").read_bytes()[1:4] == b"PNG"
    assert found["graft"] == Grafts.load(out).as_dict()
