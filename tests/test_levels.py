"""The best of many vectors, looked for in groups of like ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers import BATCH, made, run

import polytask as pt
from polytask.core import gates
from polytask.core.errors import ConfigError
from polytask.core.form import NO_CALL
from polytask.core.gate import Router
from polytask.core.levels import Levels
from polytask.core.site import Site
from polytask.route.mixes.arrow import Arrow
from polytask.route.mixes.phatgoose import PhatGoose


def drawn(count, width=9, seed=0, inputs=11):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw), torch.randn(inputs, width, generator=draw)


def sized(products, unsigned):
    return products.abs() if unsigned else products


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.booleans(), st.integers(0, 1000))
def test_groups_hold_every_vector_once_and_are_of_one_size(count, unsigned, seed):
    vectors, _ = drawn(count, seed=seed)
    levels = Levels(vectors, unsigned)
    held = levels.members[:-1]
    sizes = (held < count).sum(1)
    assert sorted(held[held < count].tolist()) == list(range(count))
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert count / 2 < len(levels) ** 2 <= 2 * count
    assert torch.equal(levels.stack[:-1][held < count], vectors[held[held < count]])
    assert not levels.stack[-1].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_in_all_groups_it_finds_the_best_of_all(count, k, unsigned, seed):
    vectors, x = drawn(count, seed=seed)
    k = min(k, count)
    levels = Levels(vectors, unsigned)
    top, index = levels.best(x, k, len(levels))
    wanted = sized(x @ vectors.T, unsigned).topk(k, -1)
    torch.testing.assert_close(top, wanted.values)
    torch.testing.assert_close(sized(x @ vectors.T, unsigned).gather(1, index), wanted.values)


def test_places_without_a_vector_are_never_found():
    vectors = torch.rand(33, 9, generator=torch.Generator().manual_seed(0)) + 0.1  # 33 do not fill groups of one size
    top, index = Levels(vectors).best(
        -torch.ones(3, 9), 33, 33
    )  # all products are negative: an empty place's would be more
    assert (top < 0).all()
    assert index.sort(-1).values.tolist() == [list(range(33))] * 3


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 300), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_what_it_finds_is_the_best_of_the_groups_it_looks_into(count, probe, unsigned, seed):
    vectors, x = drawn(count, seed=seed)
    levels = Levels(vectors, unsigned)
    top, index = levels.best(x.view(1, *x.shape), 2, probe)
    products = sized(x @ vectors.T, unsigned)
    where = sized(x @ levels.centres.T, unsigned).topk(min(probe, len(levels)), -1).indices
    for row in range(len(x)):
        own = [m for g in where[row].tolist() for m in levels.members[g].tolist() if m < count]
        wanted = products[row, own].topk(2)
        torch.testing.assert_close(top[0, row], wanted.values)
        assert index[0, row].tolist() == [own[i] for i in wanted.indices.tolist()]


def clusters(seed=0, turned=False):
    """64 vectors near to 8 directions, and which."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q[:8]
    kind = torch.arange(64) % 8
    vectors = centres[kind] + 0.02 * torch.randn(64, 16, generator=draw)
    return vectors * (torch.randint(0, 2, (64, 1), generator=draw) * 2 - 1) if turned else vectors, centres, kind


def test_like_vectors_are_in_one_group():
    vectors, centres, kind = clusters()
    levels = Levels(vectors)
    assert len(levels) == 8
    assert all(len(set(kind[group].tolist())) == 1 for group in levels.members[:-1])
    index = levels.best(centres, 4, 1)[1]
    assert kind[index].tolist() == [[i] * 4 for i in range(8)]


def test_groups_of_short_numbers_are_those_of_long_ones():
    vectors = drawn(100)[0].bfloat16()
    found, wanted = Levels(vectors, True), Levels(vectors.float(), True)
    assert torch.equal(found.members, wanted.members) and found.stack.dtype == found.centres.dtype == torch.bfloat16


@pytest.mark.parametrize("seed", range(5))
def test_their_signs_do_not_part_like_vectors(seed):
    """Where signs say nothing, half of the groups find nearly all; groups that are drawn would find half."""
    vectors, _, _ = clusters(seed, turned=True)
    index = Levels(vectors, unsigned=True).best(vectors, 4, 4)[1]
    wanted = (vectors @ vectors.T).abs().topk(4, -1).indices
    found = float((index.unsqueeze(-1) == wanted.unsqueeze(1)).any(1).float().mean())
    assert found > 0.9


@pytest.mark.parametrize("router", [Arrow, PhatGoose])
class TestGates:
    def gate(self, router, count=128, **settings):
        vectors, x = drawn(count, 12, inputs=40)
        gate = router(top_k=2, **settings).gate(
            Site("x", "linear", "other", (5, 12)), tuple(f"n{i}" for i in range(count))
        )
        gate.fill(list(vectors))
        return gate, x, torch.zeros(len(x), 5)

    def test_with_all_groups_the_weights_are_those_of_all_adapters(self, router):
        plain, x, y = self.gate(router)
        wanted = plain.weigh(x, y, NO_CALL)
        for probe in (16, 100):  # there are sixteen
            found = self.gate(router, probe=probe)[0].weigh(x, y, NO_CALL)
            torch.testing.assert_close(found.values, wanted.values)
            assert torch.equal(found.index, wanted.index)

    def test_in_some_groups_it_gives_the_true_scores_of_what_it_finds(self, router):
        gate, x, y = self.gate(router, probe=3, temperature=0.5)
        found = gate.weigh(x, y, NO_CALL)
        scores = gate.scores(x, NO_CALL)
        torch.testing.assert_close(found.values, (scores.gather(1, found.index) / 0.5).softmax(-1))
        best = scores.topk(2, -1).indices
        shared = (found.index.unsqueeze(-1) == best.unsqueeze(1)).any(1).float().mean()
        assert 0.5 < float(shared) < 1.0  # it does look into some only

    def test_of_few_adapters_all_are_scored(self, router):
        gate, x, y = self.gate(router, count=gates.LEAST - 1, probe=1)
        plain = self.gate(router, count=gates.LEAST - 1)[0]
        assert torch.equal(gate.weigh(x, y, NO_CALL).index, plain.weigh(x, y, NO_CALL).index)

    def test_new_vectors_make_new_groups(self, router):
        gate, x, y = self.gate(router, probe=2)
        before = gate.weigh(x, y, NO_CALL).index
        with torch.no_grad():
            gate.v.copy_(gate.v.flip(0))
        after = gate.weigh(x, y, NO_CALL)
        torch.testing.assert_close(gate.scores(x, NO_CALL).gather(1, after.index).softmax(-1), after.values)
        assert not torch.equal(before, after.index)

    def test_settings(self, router):
        with pytest.raises(ConfigError, match="say how many with top_k"):
            router(top_k=0, probe=2)
        with pytest.raises(ConfigError, match="probe must be a whole number"):
            router(probe=1.5)


def test_a_library_of_many(encoder, tmp_path):
    """Routed in all groups it is what it is without; the setting is in the file; the trace sees the choice."""
    adapters = made(encoder, tuple(f"n{i}" for i in range(gates.LEAST)))
    plain = pt.route(adapters, "arrow", model=encoder, top_k=2)
    wanted = run(encoder, plain)
    every = pt.route(adapters, "arrow", model=encoder, top_k=2, probe=8)
    assert torch.allclose(run(encoder, every), run(encoder, plain), atol=1e-5)
    some = pt.route(adapters, {"name": "arrow", "top_k": 2, "probe": 1}, model=encoder)
    assert not torch.allclose(run(encoder, some), wanted, atol=1e-3)
    some.save(tmp_path / "mix.safetensors")
    encoder.detach()
    again = pt.Routing.load(tmp_path / "mix.safetensors", adapters).attach(encoder)
    assert again.router.probe == 1
    expected = run(encoder, pt.route(adapters, some.router, model=encoder))
    assert torch.equal(run(encoder, again), expected)
    alone = {key: value[:1] for key, value in BATCH.items()}
    padded = run(encoder, again, alone, tasks=None)
    assert torch.allclose(padded, run(encoder, again)[:1, : padded.shape[1]], atol=1e-5)


def test_texts_that_may_move_any_adapter_take_no_groups():
    with pytest.raises(ConfigError, match="leave probe out"):
        Router.of({"name": "glider", "probe": 2})
    assert Router.of({"name": "glider", "probe": 2, "scale": 0.0}).probe == 2
