"""Means weighed by statistics: the rules by their formulas, the statistics by other ways of computing them."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from conftest import same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_pool import QUICK, tasks

import polytask as pt
from polytask.core.errors import ConfigError, DataError, MergeError
from polytask.core.head import collate
from polytask.core.rows import Row
from polytask.merge.fit import fits
from polytask.merge.fits.regmean import even
from polytask.merge.names import renamed
from polytask.merge.pool import Pool
from polytask.merge.rule import Block, rules
from polytask.merge.source import Module

LAYER = "encoder.layer.1.attention.self.query.weight"


def block(tensors, companions=(), weights=None):
    tensors = tuple(torch.as_tensor(t, dtype=torch.float32) for t in tensors)
    companions = tuple(None if c is None else torch.as_tensor(c, dtype=torch.float32) for c in companions)
    return Block(
        "w", None, tensors, tuple(weights or [1.0] * len(tensors)), shape=tuple(tensors[0].shape), companions=companions
    )


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    """A base, and adapters of both tasks that change linear layers by low rank, and all there is."""
    model = tiny_bert(minilm_tokenizer)
    forms = {"lora": {"name": "lora", "rank": 2}, "full": {"name": "full", "parameters": "all"}}
    made = {name: [pt.learn(model, task, form=form, **QUICK) for task in tasks()] for name, form in forms.items()}
    return model, made


@pytest.fixture
def held(learned):
    """Copies: what a test does to them, no other sees."""
    return copy.deepcopy(learned[0]), {name: [a.copy() for a in made] for name, made in learned[1].items()}


def tuned(model, adapter):
    """The base with the adapter in its weights."""
    merged = copy.deepcopy(model)
    adapter.merge_into(merged, in_place=True)
    return merged


def pool_of(model, inputs, data):
    return Pool(
        model, [Module(i.module, f"m{k}") if isinstance(i, pt.Model) else i for k, i in enumerate(inputs)], data
    )


def plan(method, model, inputs, data, **more):
    with pool_of(model, inputs, data) as pool:
        return fits.make({"name": method, **more}).fit(pool)


# The rules


class TestFisherRule:
    def test_by_hand(self):
        found = rules["fisher"]().merge(block([[2.0, 2.0, 2.0], [6.0, 6.0, 6.0]], [[1, 0, 1], [3, 0, 1e9]]))
        torch.testing.assert_close(found, torch.tensor([5.0, 4.0, 6.0]))
        found = rules["fisher"]().merge(block([[2.0], [6.0]], [[1], [1]], [3.0, 1.0]))
        torch.testing.assert_close(found, torch.tensor([3.0]))

    def test_equal_statistics_give_the_mean_and_large_ones_their_model(self):
        tensors, size = [drawn(i, 5, 4) for i in range(3)], drawn(9, 5, 4).abs() + 0.1
        mean = torch.stack(tensors).mean(0)
        torch.testing.assert_close(rules["fisher"]().merge(block(tensors, [size] * 3)), mean)
        torch.testing.assert_close(rules["fisher"]().merge(block(tensors, [torch.zeros(5, 4)] * 3)), mean)
        torch.testing.assert_close(rules["fisher"](floor=0.0).merge(block(tensors, [torch.zeros(5, 4)] * 3)), mean)
        torch.testing.assert_close(rules["fisher"]().merge(block(tensors, [size, size * 1e12, size])), tensors[1])

    def test_a_model_without_statistics_has_the_floor(self):
        found = rules["fisher"](floor=1.0).merge(block([[2.0], [6.0]], [None, [3.0]]))
        torch.testing.assert_close(found, torch.tensor([5.0]))
        assert rules["fisher"]().merge(block([[2.0], [6.0]], [None, None])).item() == 4.0

    @given(
        st.lists(st.tuples(st.floats(-9, 9), st.floats(0, 9), st.floats(0.1, 3)), min_size=2, max_size=5),
        st.floats(1e-6, 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_it_is_the_formula(self, entries, floor):
        x, f, w = zip(*entries, strict=True)
        found = rules["fisher"](floor=floor).merge(block([[v] for v in x], [[v] for v in f], list(w))).item()
        sizes = [weight * max(v, floor) for v, weight in zip(f, w, strict=True)]
        expected = sum(s * v for s, v in zip(sizes, x, strict=True)) / sum(sizes)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert min(x) - 1e-4 <= found <= max(x) + 1e-4

    def test_what_it_refuses(self):
        with pytest.raises(MergeError, match=r"fisher: weights must be at least 0, got \(1.0, -1.0\)"):
            rules["fisher"]().merge(block([[2.0], [6.0]], [[1], [1]], [1.0, -1.0]))
        with pytest.raises(ConfigError, match="floor must be at least 0"):
            rules["fisher"](floor=-1.0)


class TestRegMeanRule:
    def test_by_hand(self):
        found = rules["regmean"](ridge=0.0).merge(block([[[2.0]], [[6.0]]], [[[1.0]], [[3.0]]]))
        assert found.item() == pytest.approx(5.0)

    @pytest.mark.parametrize("rank", [1, 4])
    def test_equal_inputs_give_the_mean_and_equal_weights_stay(self, rank):
        """Also where the inputs span less than there is."""
        x = drawn(5, rank, 4)
        tensors = [drawn(i, 3, 4) for i in range(2)]
        found = rules["regmean"](reduce=1.0).merge(block(tensors, [x.mT @ x] * 2))
        torch.testing.assert_close(found, (tensors[0] + tensors[1]) / 2)
        other = drawn(6, 2, 4)
        found = rules["regmean"](reduce=1.0).merge(block([tensors[0]] * 2, [x.mT @ x, other.mT @ other]))
        torch.testing.assert_close(found, tensors[0])

    def test_without_what_is_off_the_diagonal_columns_are_weighed_alone(self):
        grams = [(x := drawn(i, 9, 4)).mT @ x for i in (3, 4)]
        tensors = [drawn(i, 3, 4) for i in range(2)]
        sizes = [gram.diagonal() for gram in grams]
        expected = (2 * tensors[0] * sizes[0] + tensors[1] * sizes[1]) / (2 * sizes[0] + sizes[1])
        found = rules["regmean"](reduce=0.0).merge(block(tensors, grams, [2.0, 1.0]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_it_is_the_least_squares_solution(self, models, inputs, outputs, seed):
        """The oracle stacks all inputs, and what each model makes of its own."""
        x = [drawn(seed * 10 + i, 12, inputs) for i in range(models)]
        tensors = [drawn(seed * 10 + 5 + i, outputs, inputs) for i in range(models)]
        wanted = torch.cat([own @ tensor.mT for own, tensor in zip(x, tensors, strict=True)])
        expected = torch.linalg.lstsq(torch.cat(x).double(), wanted.double()).solution.mT.float()
        grams = [own.mT @ own for own in x]
        plain = rules["regmean"](reduce=1.0)
        torch.testing.assert_close(plain.merge(block(tensors, grams)), expected, rtol=1e-3, atol=1e-3)
        turned = rules["regmean"](reduce=1.0, turned=True).merge(block([t.mT for t in tensors], grams))
        torch.testing.assert_close(turned.mT, expected, rtol=1e-3, atol=1e-3)

    def test_inputs_that_are_always_zero_have_the_mean(self):
        gram = torch.diag(torch.tensor([1.0, 0.0]))
        found = rules["regmean"]().merge(block([[[2.0, 2.0]], [[6.0, 6.0]]], [gram, 3 * gram]))
        torch.testing.assert_close(found, torch.tensor([[5.0, 4.0]]))

    def test_without_a_gram_of_each_model_it_is_the_mean(self):
        tensors = [[[2.0]], [[6.0]]]
        assert rules["regmean"]().merge(block(tensors, [[[1.0]], None], [3.0, 1.0])).item() == pytest.approx(3.0)

    def test_what_it_refuses(self):
        with pytest.raises(MergeError, match=r"of shape \(1, 2\), stands a Gram matrix of shape \(1, 1\)"):
            rules["regmean"]().merge(block([[[2.0, 1.0]], [[6.0, 1.0]]], [[[1.0]], [[1.0]]]))
        with pytest.raises(MergeError, match="one without an inverse; raise ridge"):
            ones = torch.ones(2, 2)
            rules["regmean"](reduce=1.0, ridge=0.0).merge(block([[[2.0, 1.0]], [[6.0, 1.0]]], [ones, ones]))
        for wrong in ({"reduce": 1.5}, {"reduce": -0.1}, {"ridge": -1.0}):
            with pytest.raises(ConfigError, match="must be"):
                rules["regmean"](**wrong)


# Fisher's statistics


def jacobians(model, names, values):
    """d values_c / d tensor for each tensor, [C, ...]."""
    own = dict(model.module.named_parameters())
    rows = [torch.autograd.grad(v, [own[n] for n in names], retain_graph=True, allow_unused=True) for v in values]
    return {
        n: torch.stack([torch.zeros_like(own[n]) if row[k] is None else row[k] for row in rows])
        for k, n in enumerate(names)
    }


def expected_fisher(model, head, examples, names, label=None):
    """By the covariance of the logits' gradients: ``sum_c p_c J_c^2 - (sum_c p_c J_c)^2``, which no log is in."""
    sums = dict.fromkeys(names, 0.0)
    for example in examples:
        rows = head.rows(model, [example], scoring=True)
        logits = head.scores(head.run(model, collate(model, head, rows)), rows)[0].float()
        p = logits.detach().softmax(0)
        for n, J in jacobians(model, names, logits).items():
            shaped = p.view(-1, *[1] * (J.dim() - 1))
            mean = (shaped * J).sum(0)
            one = (shaped * J**2).sum(0) - mean**2 if label is None else (J[label(example)] - mean) ** 2
            sums[n] = sums[n] + one / len(examples)
    return sums


class TestFisher:
    @pytest.mark.parametrize("form", ["lora", "full"])
    def test_the_statistics_are_the_information(self, held, form):
        model, made = held
        data = tasks()
        found = plan("fisher", model, made[form], data, normalize=False)
        for i, adapter in enumerate(made[form]):
            merged = tuned(model, adapter)
            names = list(found.companions[i].tensors)
            expected = expected_fisher(merged, adapter.head, data[i].train, names)
            for n in names:
                torch.testing.assert_close(found.companions[i].tensors[n], expected[n], rtol=2e-3, atol=1e-9, msg=n)
            norm = torch.sqrt(sum(e.square().sum() for e in expected.values()))
            assert found.about["norms"][i] == pytest.approx(norm.item(), rel=1e-3)
        assert found.about["norms"][0] > 1e-6

    def test_with_the_true_answers(self, held):
        """And not with those that the model would give."""
        model, made = held
        data = tasks()
        data[1].train = [pt.Example(e.inputs, "red") for e in data[1].train]
        found = plan("fisher", model, made["lora"], data, normalize=False, empirical=True)
        head = made["lora"][1].head
        expected = expected_fisher(
            tuned(model, made["lora"][1]), head, data[1].train, [LAYER], lambda e: head.labels.index(e.target)
        )
        torch.testing.assert_close(found.companions[1].tensors[LAYER], expected[LAYER], rtol=2e-3, atol=1e-9)

    def test_normalised_they_have_the_size_one(self, held):
        model, made = held
        plain = plan("fisher", model, made["lora"], tasks(), normalize=False)
        found = plan("fisher", model, made["lora"], tasks())
        for one, other in zip(plain.companions, found.companions, strict=True):
            values = torch.cat([t.flatten() for t in other.tensors.values()])
            assert values.square().mean().item() == pytest.approx(1.0, rel=1e-4)
            share = other.tensors[LAYER] / one.tensors[LAYER]
            torch.testing.assert_close(share, torch.full_like(share, share.flatten()[0].item()), rtol=1e-4, atol=0)

    def test_candidates_of_a_generative_base(self, decoder):
        choices = [pt.Example((f"pick {i}",), i % 2, choices=("x", "yy", "zzz")[: 2 + i % 2]) for i in range(4)]
        data = [tasks(8)[0], pt.Task(name="choices", kind="choose", train=choices, dev=[], test=[])]
        made = [copy.deepcopy(decoder) for _ in data]
        for i, model in enumerate(made):
            with torch.no_grad():
                model.module.lm_head.weight.add_(0.1 * drawn(i, *model.module.lm_head.weight.shape))
        found = plan("fisher", decoder, made, data, normalize=False)
        for i, task in enumerate(data):
            head = pool_of(decoder, made, data).readers[i].head
            for p in made[i].module.parameters():
                p.requires_grad_(True)
            expected = expected_fisher(made[i], head, task.train, ["lm_head.weight"])
            own = found.companions[i].tensors
            assert list(own) == ["lm_head.weight"]
            torch.testing.assert_close(own["lm_head.weight"], expected["lm_head.weight"], rtol=5e-3, atol=1e-6)

    def test_tasks_without_classes_need_answers(self, held):
        model, _ = held
        rows = [pt.Example((f"number {i}",), float(i)) for i in range(4)]
        task = pt.Task(name="size", kind="regress", train=rows, dev=[], test=[])
        made = [pt.learn(model, task, seed=seed, name=f"s{seed}", **QUICK) for seed in range(2)]
        made[1].heads = {}
        with pytest.raises(MergeError, match="of kind 'regress', whose answers cannot be gone through; say empirical"):
            plan("fisher", model, made, [task])
        found = plan("fisher", model, made, [task], empirical=True, normalize=False)
        merged, expected = tuned(model, made[0]), 0.0
        for example in task.train:
            ready = made[0].head.rows(merged, [example])
            loss = made[0].head.loss(made[0].head.run(merged, collate(merged, made[0].head, ready)), ready)[0]
            expected = expected + jacobians(merged, [LAYER], loss)[LAYER][0] ** 2 / 4
        torch.testing.assert_close(found.companions[0].tensors[LAYER], expected, rtol=2e-3, atol=1e-9)

    def test_the_merge_is_the_rule_on_the_statistics(self, held):
        model, made = held
        before = copy.deepcopy(model.module.state_dict())
        found = pt.merge(made["full"], "fisher", model, data=tasks(), coefficients=[2.0, 1.0], floor=1e-3)
        assert same_state(before, model.module)
        stats = plan("fisher", model, made["full"], tasks()).companions
        states = [tuned(model, adapter).module.state_dict() for adapter in made["full"]]
        ours = tuned(model, found).module.state_dict()
        moved = 0.0
        for name in stats[0].tensors:
            sizes = [c * s.tensors[name].clamp(min=1e-3) for c, s in zip((2.0, 1.0), stats, strict=True)]
            expected = sum(s * state[name] for s, state in zip(sizes, states, strict=True)) / sum(sizes)
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5)
            moved = max(moved, float((expected - (2 * states[0][name] + states[1][name]) / 3).abs().max()))
        assert moved > 1e-3  # it is another than the mean
        for adapter in made["full"]:
            assert same_state(adapter.head.state_dict(), found.heads[next(iter(adapter.heads))])
        said = found.card.training["merge"]
        assert said["weights"] == [2.0, 1.0] and said["fit"]["tasks"] == ["colours", "inverse"]
        again = pt.merge(made["full"], "fisher", model, data=tasks(), coefficients=[2.0, 1.0], floor=1e-3)
        assert again.hash == found.hash

    def test_answers_are_looked_at_only_where_that_is_asked_for(self, held):
        model, made = held
        blind = tasks()
        for task in blind:
            task.train = [pt.Example(e.inputs, "red") for e in task.train]
        same = [pt.merge(made["lora"], "fisher", model, data=d).hash for d in (tasks(), blind)]
        other = [pt.merge(made["lora"], "fisher", model, data=d, empirical=True).hash for d in (tasks(), blind)]
        assert same[0] == same[1] and other[0] != other[1] and other[0] != same[0]
        for task in blind:
            task.train = [pt.Example(e.inputs, None) for e in task.train]
        with pytest.raises(DataError, match="'colours' has no answer that is one of its classes"):
            pt.merge(made["lora"], "fisher", model, data=blind, empirical=True)

    def test_some_examples_stand_for_all(self, held):
        model, made = held
        few, again, all_ = (
            plan("fisher", model, made["lora"], tasks(), examples=n).companions[0].tensors[LAYER] for n in (2, 2, 999)
        )
        assert torch.equal(few, again) and not torch.allclose(few, all_)

    def test_one_model_with_a_coefficient_is_that_model(self, held):
        model, made = held
        for method in ("fisher", "regmean"):
            found = pt.merge(made["full"], method, model, data=tasks(), coefficients=[0.0, 1.0], examples=2)
            for name, patch in found.patches.items():
                assert torch.equal(patch.delta(), made["full"][1].patches[name].delta())

    @pytest.mark.parametrize("method", ["fisher", "regmean"])
    def test_what_it_refuses(self, held, method):
        model, made = held
        for wrong in ([1.0], [1.0, -1.0], [0.0, 0.0]):
            with pytest.raises(ConfigError, match=f"{method}: coefficients must be 2 numbers"):
                pt.merge(made["lora"], method, model, data=tasks(), coefficients=wrong)
        with pytest.raises(ConfigError, match="examples must be at least 1"):
            pt.merge(made["lora"], method, model, data=tasks(), examples=0)


# RegMean's Gram matrices


def seen(model, head, examples, path):
    """The inputs of a layer, one sequence at a time: nothing is padded."""
    found = []
    handle = model.module.get_submodule(path).register_forward_pre_hook(
        lambda module, args: found.append(args[0].detach().reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for example in examples:
            for row in head.rows(model, [example], scoring=True):
                for i, ids in enumerate(row.sequences):
                    one = Row([ids], row.starts[i : i + 1], row.target, None, row.segments[i : i + 1])
                    head.run(model, collate(model, head, [one]))
    handle.remove()
    x = torch.cat(found).double()
    return x.mT @ x / len(x)


def gpt2(tokenizer):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_inner=16, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pt.Model(transformers.GPT2LMHeadModel(config).eval(), tokenizer, name="tiny-gpt2")


def shaken(model, seed):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for k, p in enumerate(other.module.parameters()):
            p.add_(0.1 * drawn(100 * seed + k, *p.shape))
    return other


class TestRegMean:
    @pytest.mark.parametrize("batch_size", [1, 32])
    def test_gram_matrices_are_of_the_tokens(self, held, batch_size):
        model, made = held
        data = tasks()
        data[1].train = [pt.Example((" ".join(e.inputs * (1 + i)),), e.target) for i, e in enumerate(data[1].train[:5])]
        found = plan("regmean", model, made["full"], data, batch_size=batch_size)
        for i, adapter in enumerate(made["full"]):
            merged = tuned(model, adapter)
            for path in ("encoder.layer.0.attention.self.key", "encoder.layer.1.output.dense"):
                expected = seen(merged, adapter.head, data[i].train, path)
                torch.testing.assert_close(
                    found.companions[i].tensors[f"{path}.weight"], expected, rtol=1e-4, atol=1e-6
                )
        assert found.about["regressed"] == len(found.companions[0].tensors) >= 12 and not found.about["averaged"]

    def test_layers_that_are_stored_turned(self, byte_tokenizer):
        """And a weight that an embedding shares is averaged."""
        model = gpt2(byte_tokenizer)
        data, made = tasks(8), [shaken(gpt2(byte_tokenizer), i) for i in (1, 2)]
        with pool_of(model, made, data) as pool:
            heads = [reader.head for reader in pool.readers]
            found = fits.make({"name": "regmean"}).fit(pool)
        for path in ("transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"):  # square, and [16, 16] either way
            for i in range(2):
                expected = seen(made[i], heads[i], data[i].train, path)
                torch.testing.assert_close(
                    found.companions[i].tensors[f"{path}.weight"], expected, rtol=1e-4, atol=1e-6
                )
            assert found.settings["turned"]["tensors"][f"{path}.weight"]
        assert "transformer.wte.weight" in found.about["averaged"]
        merged = pt.merge(made, "regmean", model, data=data, reduce=1.0, ridge=1e-9).module.state_dict()
        name = "transformer.h.0.mlp.c_fc.weight"
        grams = [own.tensors[name] for own in found.companions]
        states = [m.module.state_dict() for m in made]
        left = sum(g @ merged[name].double() for g in grams)
        right = sum(g @ s[name].double() for g, s in zip(grams, states, strict=True))
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
        for other in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias"):
            torch.testing.assert_close(merged[other], (states[0][other] + states[1][other]) / 2)

    def test_both_halves_of_an_encoder_and_decoder(self, seq2seq):
        data, made = tasks(8), [shaken(seq2seq, i) for i in (1, 2)]
        with pool_of(seq2seq, made, data) as pool:
            heads = [reader.head for reader in pool.readers]
            found = fits.make({"name": "regmean"}).fit(pool)
        for path in ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v",
                     "decoder.block.0.layer.0.SelfAttention.o"):  # fmt: skip
            expected = seen(made[1], heads[1], data[1].train, path)
            torch.testing.assert_close(found.companions[1].tensors[f"{path}.weight"], expected, rtol=1e-4, atol=1e-6)

    def test_the_merge_answers_most_like_the_models(self, held, tmp_path):
        """Nearer than the mean to what each layer's own gives, in the squares over the inputs, and on no other way nearer."""
        model, made = held
        before = copy.deepcopy(model.module.state_dict())
        found = pt.merge(made["full"], "regmean", model, data=tasks(), reduce=1.0, out=tmp_path / "m")
        assert same_state(before, model.module)
        merged = tuned(model, pt.Adapter.load(found)).module.state_dict()
        stats = plan("regmean", model, made["full"], tasks()).companions
        states = [tuned(model, adapter).module.state_dict() for adapter in made["full"]]

        def error(weight):
            gaps = [((weight - s[LAYER]).double(), own.tensors[LAYER]) for s, own in zip(states, stats, strict=True)]
            return sum(torch.trace(gap @ gram @ gap.mT).item() for gap, gram in gaps)

        least = error(merged[LAYER])
        assert least < error((states[0][LAYER] + states[1][LAYER]) / 2)
        for seed in range(5):
            assert least <= error(merged[LAYER] + 1e-2 * drawn(seed, 32, 32)) + 1e-9
        said = json.loads((tmp_path / "m" / "polytask.json").read_text())["card"]["training"]["merge"]
        assert said["fit"]["method"]["name"] == "regmean" and said["settings"]["reduce"] == 1.0

    def test_answers_are_not_looked_at(self, held):
        model, made = held
        blind = tasks()
        for task in blind:
            task.train = [pt.Example(e.inputs, "red") for e in task.train]
        first, second = (pt.merge(made["lora"], "regmean", model, data=d) for d in (tasks(), blind))
        assert first.hash == second.hash

    @given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=9), st.integers(1, 4))
    @settings(max_examples=50, deadline=None)
    def test_batches_need_no_padding(self, lengths, size):
        count = itertools.count()
        rows = [Row([[next(count)] * n for n in own], [n // 2 for n in own]) for own in lengths]
        found = [row for batch in even(rows, size) for row in batch]
        assert all(
            len({(r.length, *r.starts) for r in batch}) == 1 and len(batch) <= size for batch in even(rows, size)
        )
        assert sorted(r.sequences[0] for r in found) == sorted(s for row in rows for s in row.sequences)
        assert all(r.starts == [r.length // 2] for r in found)

    def test_images(self):
        rows = [Row(pixels=torch.zeros(3, 2 + i % 2, 2)) for i in range(5)]
        assert [len(batch) for batch in even(rows, 2)] == [2, 1, 2]


@pytest.mark.parametrize(
    ("method", "more"), [("fisher", {"examples": 2}), ("regmean", {"examples": 2}), ("adamerging", {"steps": 1})]
)
def test_a_base_may_have_longer_names_than_its_adapters(held, method, more):
    """What was found out by the base's names arrives at the adapters' own."""
    import transformers

    model, made = held
    inside = transformers.BertForSequenceClassification(model.module.config).eval()
    inside.bert.load_state_dict(model.module.state_dict(), strict=False)
    longer = pt.Model(inside, model.processor, name="longer", pooling="mean")
    expected, found = (pt.merge(made["lora"], method, base, data=tasks(), **more) for base in (model, longer))
    mean = pt.merge(made["lora"])
    for name, patch in found.patches.items():
        torch.testing.assert_close(patch.delta(), expected.patches[name].delta(), rtol=1e-3, atol=1e-6)
        assert not torch.allclose(patch.delta(), mean.patches[name].delta(), atol=1e-6)


@given(
    st.dictionaries(st.sampled_from("abc"), st.floats(0, 1)),
    st.dictionaries(st.sampled_from("xyz"), st.sampled_from("abc")),
)
@settings(max_examples=60, deadline=None)
def test_settings_by_tensor_are_renamed(own, place):
    found = renamed({"tensors": own, "else": 0.5}, place)
    assert found["else"] == 0.5
    for ours, there in place.items():
        assert found["tensors"].get(ours) == own.get(there)
    assert all(found["tensors"].get(k) == v for k, v in own.items() if k not in place.values())
    assert renamed([1.0], place) == [1.0] and renamed({"name": "ties"}, place) == {"name": "ties"}


def test_on_the_command_line(held, tmp_path, run, monkeypatch):
    """The settings arrive; what a user sees says where the weights come from."""
    model, made = held
    monkeypatch.setattr(pt.Model, "load", staticmethod(lambda name: model))
    for adapter in made["lora"]:
        adapter.save(tmp_path / adapter.name)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in tasks():
        lines = [json.dumps({"text": e.inputs[0], "label": e.target}) for e in task.train]
        (folder / f"{task.name}.jsonl").write_text("\n".join(lines) + "\n")
    names = [str(tmp_path / a.name) for a in made["lora"]]
    options = ["--base", "tiny", "--data", str(folder), "--out", str(tmp_path / "out")]
    code, _, err = run("merge", *names, "--method", "fisher:examples=3,coefficients=[1, 2]", *options)
    assert code == 0, err
    said = pt.Adapter.load(tmp_path / "out").card.training["merge"]
    assert said["weights"] == [1, 2] and said["fit"]["method"]["examples"] == 3
