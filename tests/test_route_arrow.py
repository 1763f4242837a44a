"""Arrow, uniform and oracle: what their definitions say."""

from __future__ import annotations

import pytest
import torch
from conftest import colours
from hypothesis import given, settings
from hypothesis import strategies as st
from test_routers import BATCH, made, run
from torch import nn

import polytask as pt
from polytask.core.errors import MixError
from polytask.core.form import NO_CALL
from polytask.core.site import Site
from polytask.forms.lora import LoRAPatch
from polytask.route.mixes.arrow import Arrow, direction


def lora(A, B, alpha=None) -> LoRAPatch:
    A, B = torch.tensor(A, dtype=torch.float32), torch.tensor(B, dtype=torch.float32)
    site = Site("x", "linear", "other", (len(B), A.shape[1]))
    patch = LoRAPatch(pt.LoRA(rank=len(A), alpha=float(len(A)) if alpha is None else alpha), site)
    patch.load({"A": A, "B": B})
    return patch


def scores_of(patches, x, **settings):
    gate = Arrow(**settings).gate(patches[0].site, tuple(f"n{i}" for i in range(len(patches))))
    gate.fill([direction(patch) for patch in patches])
    return gate, gate.scores(torch.tensor(x), NO_CALL)


def test_by_hand():
    patch = lora([[1.0, 0.0]], [[2.0]])
    assert direction(patch).abs().tolist() == [1.0, 0.0]
    _, found = scores_of([patch], [[3.0, 4.0]])
    assert found.tolist() == [[3.0]]  # not divided by the length of x


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.1, 10.0))
def test_the_direction_is_the_one_that_is_lengthened_most(seed, rank, scale):
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw)
    v = direction(lora(A.tolist(), B.tolist()))
    size = torch.linalg.matrix_norm(B @ A, 2)
    assert float(v.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float((B @ A @ v).norm()) == pytest.approx(float(size), rel=1e-4)
    again = direction(lora((scale * A).tolist(), (-B).tolist(), alpha=3.0))
    assert abs(float(v @ again)) == pytest.approx(1.0, abs=1e-4)  # whatever the scale, and up to its sign


def test_an_adapter_that_changes_nothing_has_no_direction():
    zero, other = lora([[1.0, 2.0]], [[0.0]]), lora([[0.0, 1.0]], [[1.0]])
    assert direction(zero).tolist() == [0.0, 0.0]
    _, found = scores_of([zero, other], [[5.0, 2.0]])
    assert found.tolist() == [[0.0, 2.0]]


def test_the_weights_are_the_softmax_of_the_best():
    patches = [lora([row], [[1.0]]) for row in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8])]
    gate, scores = scores_of(patches, [[3.0, 1.0]], top_k=2, temperature=2.0)
    weights = gate.weigh(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1), NO_CALL)
    assert scores[0].tolist() == pytest.approx([3.0, 1.0, 2.6])
    assert weights.index.tolist() == [[0, 2]]
    torch.testing.assert_close(weights.values, torch.tensor([[3.0, 2.6]]).div(2).softmax(-1))
    gate, _ = scores_of(patches, [[3.0, 1.0]], top_k=3, temperature=1e6)
    weights = gate.weigh(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1), NO_CALL).dense()
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3), rtol=1e-4, atol=0)
    gate, _ = scores_of(patches[:2], [[3.0, 1.0]])  # x at right angles to all: no preference
    weights = gate.weigh(torch.zeros(1, 2), torch.zeros(1, 1), NO_CALL).dense()
    assert weights.tolist() == [[0.5, 0.5]]


def test_the_output_is_the_weighted_sum_of_the_outputs(encoder):
    """Against a loop over tokens and adapters with a hook on one layer."""
    adapters = made(encoder, sites="layer==0 & role:query")
    mix = pt.route(adapters, "arrow", model=encoder, top_k=2)
    site, gate = next(iter(mix.gates.items()))
    layer = encoder.module.get_submodule(site)
    seen = []
    hook = layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    run(encoder, mix)
    run(encoder, None)
    hook.remove()
    (x, routed), (_, bare) = seen
    for row in range(x.shape[0]):
        for token in range(x.shape[1]):
            score = (gate.v @ x[row, token]).abs()
            best = score.topk(2)
            want = bare[row, token].clone()
            for weight, place in zip(best.values.softmax(0), best.indices.tolist(), strict=True):
                patch = adapters[gate.names[place]].patches[site]
                want += weight * (patch.B @ (patch.A @ x[row, token])) * patch.form.scale
            torch.testing.assert_close(routed[row, token], want, rtol=1e-4, atol=1e-5)


def test_other_forms_by_their_dense_change(encoder):
    """A dense change and a LoRA of it have the same direction; what depends on the base needs it."""
    (low,) = made(encoder, ("a",), sites="layer==0 & role:query").values()
    patch = next(iter(low.patches.values()))
    dense = pt.Adapter.new(encoder, {"name": "full", "parameters": "weight"}, "layer==0 & role:query", name="b")
    own = next(iter(dense.patches.values()))
    own.load({"weight": patch.delta().detach().clone()})
    assert abs(float(direction(patch) @ direction(own))) == pytest.approx(1.0, abs=1e-4)
    scale = pt.Adapter.new(encoder, "ia3", "layer==0 & role:key", name="c")
    for part in scale.patches.values():
        nn.init.normal_(next(part.parameters()))
    with pytest.raises(MixError, match="'c': the form 'ia3' has no dense change"):
        pt.route({"c": scale}, "arrow")
    assert len(pt.route({"c": scale}, "arrow", model=encoder).gates) == 1


class TestOracle:
    def test_rows_of_other_tasks_get_nothing(self, encoder):
        adapters = made(encoder, ("a", "b"))
        mix = pt.route(adapters, "oracle", model=encoder)
        found = run(encoder, mix, tasks=["a", "unknown", "b"])
        torch.testing.assert_close(found[0], run(encoder, "a")[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], run(encoder, None)[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2], run(encoder, "b")[2], rtol=1e-4, atol=1e-5)

    def test_it_needs_tasks_and_known_adapters(self, encoder):
        adapters = made(encoder, ("a", "b"))
        mix = pt.route(adapters, "oracle", model=encoder)
        with pytest.raises(MixError, match="needs the task of each row"), encoder.using(mix):
            encoder.module(**BATCH)
        with pytest.raises(MixError, match="z is none of the adapters"):
            pt.route(adapters, "oracle", serves={"x": "z"})
        assert pt.route(adapters, "oracle", serves={"x": "b"}).router.serves == {"x": "b"}

    def test_evaluate_names_the_task(self, encoder):
        task = colours(name="a")
        adapter = pt.learn(encoder, task, epochs=1, progress=False)
        other = made(encoder, ("b",))["b"]
        mix = pt.route({"a": adapter, "b": other}, "oracle", model=encoder)
        alone = pt.evaluate(encoder, task, "a", resamples=0).value
        assert pt.evaluate(encoder, task, mix, head=adapter.head, resamples=0).value == alone


def test_uniform_is_the_mean_of_all_also_where_some_have_no_patch(encoder):
    few, more = made(encoder, ("a",), sites="layer==0"), made(encoder, ("b", "c"))
    mix = pt.route({**few, **more}, "uniform", model=encoder)
    wanted = run(encoder, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    torch.testing.assert_close(run(encoder, mix), wanted, rtol=1e-4, atol=1e-5)
