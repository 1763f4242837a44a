"""Twin-Merging: a shared expert, each task's own part, and a router over them."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import colours, same_state, tiny_bert

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError, MergeError
from polytask.core.head import head_for
from polytask.core.reading import means
from polytask.core.site import Site
from polytask.forms.lora import LoRAPatch
from polytask.forms.union import UnionPatch
from polytask.merge.changed import Place, places_of
from polytask.merge.fits.twin import numbers
from polytask.merge.pool import Pool
from polytask.merge.source import Module
from polytask.merge.twin import Routed, Router, Twin

QUICK = {"epochs": 2, "batch_size": 6, "progress": False, "lr": 1e-2}
ROUTER = {"epochs": 40, "lr": 5e-3}


def weather(n=24):
    """A task whose texts look unlike those of `colours`."""
    rows = []
    for i in range(n):
        sky = "sunny" if i % 2 else "raining"
        rows.append(pt.Example((f"will it be {sky} at the coast on day {i}? bring boots or a hat!",), sky))
    return pt.Task(
        name="weather", kind="classify", train=rows[: n // 2], dev=rows[n // 2 : 3 * n // 4], test=rows[3 * n // 4 :],
        labels=("raining", "sunny"), metric="accuracy",
    )  # fmt: skip


def tasks():
    return [colours(), weather()]


@pytest.fixture(scope="module")
def learned(minilm_tokenizer):
    """An adapter for each task, of two forms."""
    model = tiny_bert(minilm_tokenizer)
    first, second = tasks()
    return {
        "lora": [pt.learn(model, task, form="lora", name=task.name, **QUICK) for task in (first, second)],
        "full": [
            pt.learn(model, task, form="full", sites="all", name=task.name, **{**QUICK, "lr": 1e-3})
            for task in (first, second)
        ],
    }


@pytest.fixture
def made(learned):
    return copy.deepcopy(learned["lora"])


def texts(model):
    return model.tokenizer(["the car is red", "will it rain at the coast today"], padding=True, return_tensors="pt")


def features(model, mix, batch=None):
    with model.using(mix), torch.no_grad():
        return model.features(texts(model) if batch is None else batch)


def one_hot(router, i):
    """The router says the i-th task of every row."""
    with torch.no_grad():
        router.net[-1].weight.zero_()
        router.net[-1].bias.copy_(1e4 * torch.nn.functional.one_hot(torch.tensor(i), router.tasks))


class Silent(Router):
    """A router that gives no task any weight."""

    def weights(self, x):
        return torch.zeros(len(x), self.tasks)


@pytest.mark.parametrize("form", ["lora", "full"])
def test_at_full_rank_a_sure_router_gives_each_tasks_own_model(encoder, learned, form):
    """The oracle is the task's own adapter, attached."""
    own = copy.deepcopy(learned[form])
    twin = pt.merge(own, "twin", encoder, data=tasks(), share=1.0, epochs=1)
    assert not twin.about["left_out"]
    mix = twin.attach(encoder)
    for i, adapter in enumerate(own):
        one_hot(twin.router, i)
        name = encoder.attach(adapter)
        torch.testing.assert_close(features(encoder, mix), features(encoder, name), rtol=1e-4, atol=1e-4)
        weights = {n: float(j == i) for j, n in enumerate(twin.exclusive)}
        torch.testing.assert_close(
            features(encoder, twin.fixed(weights)), features(encoder, name), rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(features(encoder, mix), features(encoder, "twin/shared"), atol=1e-3)


@pytest.mark.parametrize("form", ["lora", "full"])
def test_without_any_weight_it_is_the_shared_expert(encoder, learned, form):
    own = copy.deepcopy(learned[form])
    twin = pt.merge(own, "twin", encoder, data=tasks(), scale=0.25, epochs=1)
    mix = twin.attach(encoder)
    with Pool(encoder, own, tasks()) as pool, pool.acting(pool.compose(torch.full((2,), 0.25))), torch.no_grad():
        oracle = encoder.features(texts(encoder))
    shared = features(encoder, "twin/shared")
    torch.testing.assert_close(shared, oracle, rtol=1e-4, atol=1e-5)
    mix.router = Silent(twin.router.width, 2)
    assert torch.equal(features(encoder, mix), shared)
    assert torch.equal(features(encoder, twin.fixed(dict.fromkeys(twin.exclusive, 0.0))), shared)
    # and where only some rows have weights, the others are still the shared expert's
    mix.router.weights = lambda x: torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    half = features(encoder, mix)
    torch.testing.assert_close(half[0], shared[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(half[1], shared[1], atol=1e-4)


def test_a_part_is_the_nearest_of_its_rank(encoder, learned):
    """The oracle cuts the difference with numpy's values."""
    own = copy.deepcopy(learned["full"])
    twin = pt.merge(own, "twin", encoder, data=tasks(), epochs=0, share=0.2)
    name = "encoder.layer.0.output.dense"
    deltas = [adapter.patches[name].deltas() for adapter in own]
    rest = deltas[1]["weight"] - 0.3 * (deltas[0]["weight"] + deltas[1]["weight"])
    patch = twin.exclusive["weather"].patches[name]
    assert isinstance(patch, UnionPatch)
    found = patch.deltas()
    u, s, v = torch.linalg.svd(rest.detach().double(), full_matrices=False)
    assert torch.linalg.matrix_rank(found["weight"].detach()) == 6 == int(0.2 * 32)
    torch.testing.assert_close(found["weight"].double(), (u[:, :6] * s[:6]) @ v[:6], rtol=1e-3, atol=1e-6)
    bias = deltas[1]["bias"] - 0.3 * (deltas[0]["bias"] + deltas[1]["bias"])
    torch.testing.assert_close(found["bias"], bias)  # whole


def test_bytes_are_those_of_the_formula(encoder, made, learned):
    twin = pt.merge(made, "twin", encoder, data=tasks(), epochs=0, fixed_rank=3)
    patches = twin.exclusive["colours"].patches.values()
    assert all(isinstance(patch, LoRAPatch) and patch.form.rank == 3 for patch in patches)
    formula = 4 * sum(3 * (patch.site.d_out + patch.site.d_in + 1) for patch in patches)
    assert twin.about["bytes"] == {"colours": formula, "weather": formula}
    assert twin.about["stored_bytes"]["colours"] == formula - 4 * 3 * len(twin.exclusive["colours"].patches)
    small, large = (
        pt.merge(made, "twin", encoder, data=tasks(), epochs=0, fixed_rank=r).about["bytes"]["colours"] for r in (1, 2)
    )
    assert small < large < formula
    by_rank = twin.about["bytes_by_rank"]
    assert (by_rank["1"], by_rank["2"]) == (small, large) and list(by_rank) == ["1", "2", "4", "8", "16", "32"]
    whole = pt.merge(copy.deepcopy(learned["full"]), "twin", encoder, data=tasks(), epochs=0, fixed_rank=3)
    vectors = [p for patch in whole.exclusive["colours"].patches.values() for p in patch.parameters() if p.dim() == 1]
    matrices = [p for patch in whole.exclusive["colours"].patches.values() for n, p in patch.named_parameters()
                if n in ("A", "B", "p0_A", "p0_B")]  # fmt: skip
    assert vectors and matrices
    ranks = sum(len(p) for patch in whole.exclusive["colours"].patches.values() for n, p in patch.named_parameters()
                if n in ("A", "p0_A"))  # fmt: skip
    count = sum(p.numel() for p in (*vectors, *matrices)) + ranks
    assert whole.about["bytes"]["colours"] == 4 * count
    assert numbers(Place(Site("a", "linear", "other", (5, 2)), {"weight": "a.weight"}), 9) == 2 * (5 + 2 + 1)


def test_the_router_tells_two_tasks_apart(encoder, made):
    twin = pt.merge(made, "twin", encoder, data=tasks(), **ROUTER)
    said = twin.about["router"]
    assert said["accuracy"] == 1.0 and said["held_out"] == 4 and said["examples"] == 20
    mix = twin.attach(encoder)
    unseen = [e.inputs[0] for task in tasks() for e in task.test]
    features(encoder, mix, encoder.tokenizer(unseen, padding=True, return_tensors="pt"))
    assert mix.weights.argmax(1).tolist() == [0] * 6 + [1] * 6
    torch.testing.assert_close(mix.weights.sum(1), torch.ones(12))


def test_the_router_reads_the_shared_expert(encoder, made):
    """Mean over the tokens, also where the model itself is pooled otherwise."""
    twin = pt.merge(made, "twin", encoder, data=tasks(), **ROUTER)
    encoder.pooling = "cls"
    mix = twin.attach(encoder)
    batch = texts(encoder)
    features(encoder, mix)

    def mean_under(acting):
        with encoder.using(acting), torch.no_grad():
            hidden = encoder.module(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    mean = mean_under("twin/shared")
    torch.testing.assert_close(
        means(encoder, batch), mean_under(None)
    )  # what the router learns from, on merged weights
    torch.testing.assert_close(mix.weights, twin.router.net(mean).softmax(1), rtol=1e-4, atol=1e-6)


def test_rows_of_several_tasks_in_a_batch_are_as_alone(encoder, made):
    twin = pt.merge(made, "twin", encoder, data=tasks(), share=0.3, **ROUTER)
    mix = twin.attach(encoder)
    unseen = [e.inputs[0] for pair in zip(*[task.test for task in tasks()], strict=True) for e in pair]
    together = features(encoder, mix, encoder.tokenizer(unseen, padding=True, return_tensors="pt"))
    for row, text in zip(together, unseen, strict=True):
        alone = features(encoder, mix, encoder.tokenizer([text], return_tensors="pt"))[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_evaluate_reads_each_task_by_its_own_head(encoder, made):
    twin = pt.merge(made, "twin", encoder, data=tasks(), share=1.0, **ROUTER)
    with torch.no_grad():  # as sure as can be, so that each row is served by its own task's model
        twin.router.net[-1].weight.mul_(1e3)
        twin.router.net[-1].bias.mul_(1e3)
    mix = twin.attach(encoder)
    for task, adapter in zip(tasks(), made, strict=True):
        name = encoder.attach(adapter)
        ours, theirs = (pt.evaluate(encoder, task, m, resamples=0, keep=True) for m in (mix, name))
        assert ours.value == theirs.value and len(mix.weights) == 6
    assert {*mix.names()} == {"twin/shared", "twin/colours", "twin/weather"}


def test_a_saved_one_comes_back_bit_for_bit(encoder, learned, tmp_path):
    for form in ("lora", "full"):
        own = copy.deepcopy(learned[form])
        folder = pt.merge(own, "twin", encoder, data=tasks(), out=tmp_path / form, **ROUTER)
        twin = pt.merge(own, "twin", encoder, data=tasks(), **ROUTER)
        back = Twin.load(folder, encoder)
        assert back.shared.hash == twin.shared.hash  # the same seed gives the same, too
        assert {n: a.hash for n, a in back.exclusive.items()} == {n: a.hash for n, a in twin.exclusive.items()}
        assert same_state(twin.router.state_dict(), back.router)
        assert back.about == twin.about
        mix = twin.attach(encoder)
        first = features(encoder, mix)
        twin.detach(encoder)
        assert not encoder.attached
        assert torch.equal(features(encoder, back.attach(encoder)), first)
        back.detach(encoder)


def test_the_base_and_the_heads_are_left_alone(encoder, made):
    before = copy.deepcopy(encoder.module.state_dict())
    heads = copy.deepcopy([adapter.head.state_dict() for adapter in made])
    twin = pt.merge(made, "twin", encoder, data=tasks(), epochs=2)
    mix = twin.attach(encoder)
    features(encoder, mix)
    twin.detach(encoder)
    assert same_state(before, encoder.module)
    for head, adapter in zip(heads, made, strict=True):
        assert same_state(head, adapter.head)
        assert same_state(head, twin.exclusive[adapter.name].head)


def test_answers_are_not_looked_at(encoder, made):
    blind = tasks()
    for task in blind:
        task.train = [pt.Example(e.inputs, task.labels[0]) for e in task.train]
    first, second = (pt.merge(made, "twin", encoder, data=t, epochs=3) for t in (tasks(), blind))
    assert same_state(first.router.state_dict(), second.router) and first.shared.hash == second.shared.hash


def writing_task(name, word):
    rows = [pt.Example((f"{word} {i}",), f"{word[::-1]}") for i in range(10)]
    return pt.Task(name=name, kind="generate", train=rows[:6], dev=rows[6:8], test=rows[8:], metric="exact-match")


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_generating_is_routed_by_the_prompt(request, kind):
    model = request.getfixturevalue(kind)
    both = [writing_task("up", "abc"), writing_task("down", "XYZ")]
    own = [pt.learn(model, task, form="lora", name=task.name, **QUICK) for task in both]
    twin = pt.merge(own, "twin", model, data=both, share=1.0, **ROUTER)
    assert twin.about["router"]["accuracy"] == 1.0
    mix = twin.attach(model)
    rows = [head_for(model, task).rows(model, task.test[:1], scoring=True)[0] for task in both]
    ids = torch.tensor([row.sequences[0][: row.starts[0]] for row in rows])
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    settings = {"max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        with model.using(mix):
            found = model.module.generate(**prompts, num_beams=beams, **settings)
            routed = mix.weights[::beams].clone()
            alone = [
                model.module.generate(p[None], attention_mask=m[None], num_beams=beams, **settings)
                for p, m in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
            ]
        assert routed.argmax(1).tolist() == [0, 1] and len(mix.weights) == beams
        for row, one in zip(found, alone, strict=True):
            assert row[: one.shape[1]].tolist() == one[0].tolist()
        # the oracle: the same weights for all rows, without the router
        for at, (row, weights) in enumerate(zip(found, routed.tolist(), strict=True)):
            with model.using(twin.fixed(dict(zip(twin.exclusive, weights, strict=True)))):
                one = model.module.generate(prompts["input_ids"][at : at + 1], num_beams=beams, **settings)
            assert row[: one.shape[1]].tolist() == one[0].tolist()
    with model.using(mix):
        assert pt.evaluate(model, both[0], mix, resamples=0).n == 2


def test_whole_models_give_one_too(decoder):
    """Norms are kept whole; tied tensors move at both their places."""
    decoder.module.lm_head.weight = decoder.module.model.embed_tokens.weight
    tuned = [copy.deepcopy(decoder.module) for _ in range(2)]
    for i, module in enumerate(tuned):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=generator))
    sources = [Module(module, name) for module, name in zip(tuned, ("a", "b"), strict=True)]
    both = [writing_task("a", "abc"), writing_task("b", "XYZ")]
    twin = pt.merge(sources, "twin", decoder, data=both, share=1.0, epochs=1)
    mix = twin.attach(decoder)
    batch = {"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]])}
    for i, module in enumerate(tuned):
        one_hot(twin.router, i)
        with decoder.using(mix), torch.no_grad():
            torch.testing.assert_close(decoder.module(**batch).logits, module(**batch).logits, rtol=1e-3, atol=1e-4)
    with Pool(decoder, sources, both) as pool:
        tied = [place.site.name for place in places_of(pool) if "model.embed_tokens.weight" in place.tensors.values()]
    assert tied == ["model.embed_tokens", "lm_head"]


def test_eight_parts_are_one_product(encoder, made):
    """Their factors lie side by side: as many products as with one part, not eight times as many."""
    more = [copy.deepcopy(made[i % 2]) for i in range(8)]
    names = []
    for i, adapter in enumerate(more):
        names.append(encoder.attach(adapter, f"part{i}"))
    shared = encoder.attach(copy.deepcopy(made[0]), "shared")

    def products(parts):
        mix = Routed(shared, parts, Router(32, len(parts)).eval())
        with torch.profiler.profile() as profile:
            features(encoder, mix)
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::addmm", "aten::mm"))

    assert products(names) == products(names[:1])


def test_what_it_refuses(encoder, made, clip, tmp_path):
    with pytest.raises(ConfigError, match="share must be above 0"):
        pt.merge(made, "twin", encoder, data=tasks(), share=0)
    with pytest.raises(ConfigError, match="dropout must be at least 0 and below 1"):
        pt.merge(made, "twin", encoder, data=tasks(), dropout=1.0)
    with pytest.raises(MergeError, match="at least 2 models"):
        pt.merge(made[:1], "twin", encoder, data=tasks())
    with pytest.raises(MergeError, match="both tuned for 'colours'"):
        pt.merge([made[0], made[0].copy("again")], "twin", encoder, data=tasks()[0])
    with pytest.raises(MergeError, match="holds no shared expert"):
        Twin.load(tmp_path)
    twin = pt.merge(made, "twin", encoder, data=tasks(), epochs=0)
    folder = twin.save(tmp_path / "twin")
    twin.attach(encoder)
    with pytest.raises(AdapterError, match="attached already"):
        twin.attach(encoder)
    assert len(encoder.attached) == 3
    with pytest.raises(AdapterError, match="was made for the base"):
        Twin.load(folder, clip)


def test_a_twin_is_scored_beside_other_merges(encoder, tmp_path):
    from test_merge_pool import tasks, two

    made = two(encoder)
    for adapter, name in zip(made, "ab", strict=True):
        adapter.name = name
    table = pt.compare_merges(
        encoder, made, tasks(), methods=["linear", {"name": "twin", "epochs": 1}], out=tmp_path / "out", resamples=0
    )
    row = next(row for row in table.rows if row["rule"] == "twin")
    assert not row["note"] and set(row["scores"]) == {"colours", "inverse"} and row["bytes"] > 0
    twin = pt.merge(made, "twin", encoder, data=tasks(), epochs=1)
    mix = twin.attach(encoder)
    expected = {t.name: pt.evaluate(encoder, t, mix, head=twin.heads[t.name], resamples=0).value for t in tasks()}
    assert row["scores"] == pytest.approx(expected)
    assert table.merged is not None and encoder.attached == tuple(f"twin/{n}" for n in ("shared", "a", "b"))
