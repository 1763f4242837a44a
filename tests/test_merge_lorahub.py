"""LoraHub: factors added up with weights that were found without gradients."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_pool import QUICK, tasks

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.core.mix import Fixed
from polytask.merge.fits.lorahub import LoraHub, mixed
from polytask.merge.pool import Pool
from polytask.merge.source import Module


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    """Two LoRAs of rank 2, an adapter of each task."""
    model = tiny_bert(minilm_tokenizer)
    form = pt.LoRA(rank=2)
    return [pt.learn(model, task, form=form, **QUICK) for task in tasks()]


@pytest.fixture
def made(learned):
    return copy.deepcopy(learned)


def scalars(**values):
    """LoRAs of rank 1 and scale 1 on one weight, by their A and B."""
    model = pt.Model(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)))
    made = []
    for name, (a, b) in values.items():
        adapter = pt.Adapter.new(model, pt.LoRA(rank=1, alpha=1.0), name=name)
        adapter.patches["0"].load({"A": torch.tensor([[float(a)]]), "B": torch.tensor([[float(b)]])})
        made.append(adapter)
    return model, made


class TestMixed:
    def test_the_hand_example(self):
        """Half of A = 1, 3 and of B = 2, 4 is 2 and 3; the mean of the changes would be 7."""
        _, made = scalars(one=(1, 2), two=(3, 4))
        assert mixed(made, (0.5, 0.5)).patches["0"].delta().item() == 6.0

    @given(st.floats(-1.5, 1.5, width=32))
    @settings(max_examples=30, deadline=None)
    def test_the_change_of_one_is_quadratic(self, weight):
        _, made = scalars(one=(1.25, -2.5))
        found = mixed(made, (weight,)).patches["0"].delta().item()
        assert found == pytest.approx(weight**2 * -3.125, rel=1e-5)
        assert found == mixed(made, (-weight,)).patches["0"].delta().item()

    def test_with_weight_one_it_is_the_adapter(self, made):
        for name, patch in mixed(made, (0.0, 1.0)).patches.items():
            assert torch.equal(patch.A, made[1].patches[name].A) and torch.equal(patch.B, made[1].patches[name].B)
            assert patch.form.rank == 2 and patch.form.scale == made[1].form.scale

    def test_the_live_mix_is_what_is_saved(self, encoder, made, tmp_path):
        weights = (0.8, -0.6)
        batch = encoder.tokenizer(["the car is red", "a blue stone"], padding=True, return_tensors="pt")
        bare = encoder.features(batch)
        for i, adapter in enumerate(made):
            encoder.attach(adapter, f"a{i}")
        with encoder.using(Fixed({"a0": weights[0], "a1": weights[1]}, combines="parameters")), torch.no_grad():
            live = encoder.features(batch)
        encoder.detach()
        mixed(made, weights).save(tmp_path / "one")
        name = encoder.attach(pt.Adapter.load(tmp_path / "one"), "one")
        with encoder.using(name), torch.no_grad():
            torch.testing.assert_close(encoder.features(batch), live, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(live, bare, atol=1e-3)

    def test_what_it_refuses(self, encoder, made):
        def like(**form):
            return pt.Adapter.new(encoder, pt.LoRA(**form), name="other")

        with pytest.raises(MergeError, match="of one rank: at .* 'colours' has 2, and 'other' 3"):
            mixed([made[0], like(rank=3, alpha=6.0)], (1, 1))
        with pytest.raises(MergeError, match=r"of one scale: at .* 'colours' has 2\.0, and 'other' 4\.0"):
            mixed([made[0], like(rank=2, alpha=8.0)], (1, 1))
        narrow = pt.Adapter.new(encoder, pt.LoRA(rank=2), sites="query", name="narrow")
        with pytest.raises(MergeError, match="same sites: 'colours' and 'narrow' differ at"):
            mixed([made[0], narrow], (1, 1))
        with pytest.raises(MergeError, match="'full' is a full; leave it out"):
            mixed([made[0], pt.Adapter.new(encoder, "full", name="full")], (1, 1))
        with pytest.raises(MergeError, match="'tuned' is a whole model"):
            mixed([made[0], Module(encoder.module, "tuned")], (1, 1))
        with pytest.raises(MergeError, match="with the start 'pissa'; leave that adapter out"):
            mixed([like(rank=2, init="pissa")], (1,))


class TestSearch:
    def test_it_finds_a_known_lowest_point(self):
        goal = (0.7, -0.4, 1.1)
        tried = LoraHub(budget=200).search(lambda w: sum((a - b) ** 2 for a, b in zip(w, goal, strict=True)), 3, seed=0)
        assert len(tried) == 200 and tried[0][1] == (0.0, 0.0, 0.0)
        assert min(tried)[0] < 1e-3

    @pytest.mark.parametrize("count", [1, 4])
    @pytest.mark.parametrize("budget", [1, 7, 40])
    def test_budget_and_bounds_hold(self, count, budget):
        tried = LoraHub(budget=budget, bound=0.6, spread=5.0).search(lambda w: -sum(w), count, seed=3)
        assert len(tried) == budget and all(len(w) == count for _, w in tried)
        assert all(-0.6 <= v <= 0.6 for _, w in tried for v in w)
        again = LoraHub(budget=budget, bound=0.6, spread=5.0).search(lambda w: -sum(w), count, seed=3)
        assert again == tried

    def test_losses_that_are_no_numbers_are_never_best(self):
        tried = LoraHub(budget=30).search(lambda w: float("nan") if w[0] > 0 else abs(w[0] + 0.2), 2, seed=0)
        assert min(tried)[1][0] <= 0

    def test_without_the_package_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cmaes", None)
        with pytest.raises(ConfigError, match=r"pip install 'polytask\[merge\]'"):
            LoraHub().search(lambda w: 0.0, 2, seed=0)


class TestLoraHub:
    def test_the_objective_is_the_formula(self, encoder, made, monkeypatch):
        """Cross-entropy meaned over the five examples, once, and a twentieth of the mean size of the weights."""
        weights = (0.8, -0.4)
        monkeypatch.setattr(LoraHub, "search", lambda self, value, *rest: [(value(weights), weights)])
        found = pt.merge(made, "lorahub", encoder, data=tasks()[0], seed=4)
        merged = found.card.training["merge"]
        assert merged["weights"] == list(weights)
        with Pool(encoder, made, tasks()[:1], seed=4) as pool:
            rows = next(pool.readers[0].batches(5, True))
            assert len(rows) == 5
            answers = torch.tensor([row.target for row in rows])
            name = encoder.attach(found, "found")
            with torch.no_grad(), encoder.using(name):
                loss = torch.nn.functional.cross_entropy(pool.readers[0].logits(rows), answers)
            encoder.detach(name)
        assert merged["fit"]["best"] == pytest.approx(loss.item() + 0.05 * (0.8 + 0.4) / 2, rel=1e-5)

    def test_it_is_better_than_the_base_and_changes_nothing(self, encoder, made, tmp_path):
        before = copy.deepcopy(encoder.module.state_dict())
        heads = copy.deepcopy([adapter.head.state_dict() for adapter in made])
        folder = pt.merge(made, "lorahub", encoder, data=tasks()[1], penalty=0.0, out=tmp_path / "hub")
        assert same_state(before, encoder.module) and not encoder.attached
        assert all(same_state(head, adapter.head) for head, adapter in zip(heads, made, strict=True))
        assert all(p.grad is None for a in made for p in a.parameters())
        found = pt.Adapter.load(folder)
        assert found.form.name == "lora" and found.form.rank == 2 and found.size == made[0].size
        fit = found.card.training["merge"]["fit"]
        assert len(fit["objective"]) == 40 and fit["best"] < fit["objective"][0]
        assert list(found.heads) == ["inverse"] and found.card.parents == [a.hash for a in made]
        assert same_state(heads[1], found.head)

    def test_nothing_is_recorded_for_a_backward_pass(self, encoder, made, monkeypatch):
        from polytask.merge.pool import Reader

        seen, plain = [], Reader.loss

        def watched(self, rows):
            loss = plain(self, rows)
            seen.append((torch.is_inference_mode_enabled(), loss.grad_fn, loss.requires_grad))
            return loss

        monkeypatch.setattr(Reader, "loss", watched)
        pt.merge([a.trainable() for a in made], "lorahub", encoder, data=tasks()[0], budget=5)
        assert seen == [(True, None, False)] * 5

    def test_the_same_seed_gives_the_same_adapter(self, encoder, made):
        first, second, third = (
            pt.merge(made, "lorahub", encoder, data=tasks()[0], budget=8, penalty=0.0, seed=seed) for seed in (0, 0, 1)
        )
        assert first.hash == second.hash != third.hash

    def test_a_task_that_is_new_needs_a_head_where_bases_have_none(self, encoder, decoder, made):
        new = colours(name="new")
        with pytest.raises(MergeError, match="no adapter brings a head for the task 'new'"):
            pt.merge(made, "lorahub", encoder, data=new)
        own = [pt.learn(decoder, task, form=pt.LoRA(rank=2), **QUICK) for task in tasks()]
        found = pt.merge(own, "lorahub", decoder, data=new, budget=5)
        assert list(found.heads) == ["new"] and [t["name"] for t in found.card.tasks] == ["new"]

    def test_wrong_settings(self):
        for wrong in ({"examples": 0}, {"budget": 0}, {"penalty": -1}, {"bound": 0}, {"spread": -1}):
            with pytest.raises(ConfigError, match=f"lorahub: {next(iter(wrong))} must be"):
                LoraHub(**wrong)
