"""The engine of routing: every way of multiplying pairs of tokens and experts gives what the plain loop over them gives."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polytask as pt
from polytask.core import pairs
from polytask.core.errors import MixError
from polytask.core.form import Bank, Call, Weights
from polytask.core.gate import chosen
from polytask.forms.lora import LoRABank

torch.set_num_threads(1)
WAYS = ("dense", "gathered", "sampled", "sorted", "grouped", "sorted and sampled")


def way(name, index, count, rank):
    """One way, whatever the shapes would pick."""
    if name == "dense":
        return pairs._Dense(index)
    if name == "gathered":
        return pairs._Gathered(index)
    pairs._samples(torch.float32)  # takes the warning that such matrices are new
    if name == "sampled":
        return pairs._Sampled(index, (index.unsqueeze(-1) * rank + torch.arange(rank)).flatten(1))
    kinds = {"sorted": pairs._Sorted, "grouped": pairs._Grouped, "sorted and sampled": pairs._SortedSampled}
    return pairs._sort(kinds[name], index, count)


def problem(tokens=7, count=5, k=2, rank=4, i=8, o=12, dtype=torch.float32, seed=0):
    """x, out, the stacks with nobody at their end, an index with different experts for each token, and weights."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    A, B = draw(count + 1, rank, i), draw(count + 1, rank, o)
    A[-1], B[-1] = 0.0, 0.0
    index = torch.rand(tokens, count, generator=generator).argsort(-1)[:, :k]
    return draw(tokens, i), draw(tokens, o), A, B, index, draw(tokens, k)


def loop(x, out, A, B, index, values, average=False):
    """The equation, one token and expert after the other."""
    rows = []
    for t in range(len(x)):
        chosen = [(int(e), w) for e, w in zip(index[t], values[t], strict=True)]
        if average:
            rows.append(out[t] + sum(w * B[e] for e, w in chosen).T @ (sum(w * A[e] for e, w in chosen) @ x[t]))
        else:
            rows.append(out[t] + sum(w * (B[e].T @ (A[e] @ x[t])) for e, w in chosen))
    return torch.stack(rows)


@pytest.fixture
def forced(monkeypatch):
    """Makes one way act for all shapes."""

    def force(name):
        monkeypatch.setattr(pairs, "_way", lambda index, x, A, *others: way(name, index, len(A) - 1, A.shape[1]))

    return force


@pytest.mark.parametrize("average", [False, True], ids=["outputs", "parameters"])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_the_loop(name, average, forced):
    forced(name)
    step = pairs.parameters if average else pairs.outputs
    for case in (
        {}, {"k": 1}, {"k": 5}, {"tokens": 1}, {"tokens": 64, "count": 33}, {"count": 300}, {"tokens": 40, "count": 2},
    ):  # fmt: skip
        x, out, A, B, index, values = problem(**case)
        want = loop(x, out, A, B, index, values, average)
        with torch.no_grad():
            got = step(x, out.clone(), A, B, index, values)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        order = torch.arange(values.shape[1] - 1, -1, -1)  # the order of a token's pairs says nothing
        with torch.no_grad():
            again = step(x, out.clone(), A, B, index[:, order], values[:, order])
        torch.testing.assert_close(again, got, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", WAYS)
def test_all_tokens_to_one_expert_and_nobody_to_the_others(name, forced):
    forced(name)
    x, out, A, B, _, values = problem(tokens=9, count=4, k=1)
    index = torch.full((9, 1), 2)
    A[[0, 1, 3]], B[[0, 1, 3]] = (float("nan"),) * 2 if name != "dense" else (1.0, 1.0)  # never read
    with torch.no_grad():
        got = pairs.outputs(x, out.clone(), A, B, index, values)
    torch.testing.assert_close(got, out + values * (x @ A[2].T @ B[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
def test_a_weight_of_zero_and_nobody_add_nothing(name, forced):
    """Also where the token holds no numbers: padding."""
    forced(name)
    x, out, A, B, index, values = problem(tokens=6, count=3)
    values[1] = 0.0
    index[4, 0] = 3  # nobody
    x[1] = float("nan")
    clean = x.nan_to_num(0.0)
    want = loop(clean, out, A, B, index, values)
    with torch.no_grad():
        got = pairs.outputs(x, out.clone(), A, B, index, values)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got[1], out[1])
        nothing = pairs.outputs(x, out.clone(), A, B, index, torch.zeros_like(values))
    assert torch.equal(nothing, out)


@pytest.mark.parametrize("name", ["gathered", "sorted", "grouped"])
def test_a_token_of_weight_zero_gets_no_gradient_and_gives_none(name, forced):
    forced(name)
    x, out, A, B, index, values = problem(tokens=6, count=3)
    values[1] = 0.0
    x[1] = float("inf")
    x.requires_grad_(), A.requires_grad_(), B.requires_grad_()
    pairs.outputs(x, out, A, B, index, values).square().sum().backward()
    assert not x.grad[1].any()
    assert A.grad[:-1].isfinite().all() and B.grad[:-1].isfinite().all()


@pytest.mark.parametrize("average", [False, True], ids=["outputs", "parameters"])
@pytest.mark.parametrize("name", ["dense", "gathered", "sorted", "grouped"])
def test_gradients_are_those_of_the_loop(name, average, forced):
    forced(name)
    tensors = problem(tokens=10, count=4, dtype=torch.float32)
    step = pairs.parameters if average else pairs.outputs
    found = []
    for run in (lambda *given: loop(*given, average=average), step):
        x, out, A, B, index, values = (t.clone() for t in tensors)
        needs = [t.requires_grad_() for t in (x, out, A, B, values)]
        found.append(torch.autograd.grad(run(x, out, A, B, index, values).square().sum(), needs))
    for mine, theirs in zip(found[1], found[0], strict=True):
        scale = theirs.abs().max()
        assert ((mine - theirs).abs().max() / scale) < 1e-5


@pytest.mark.parametrize("name", ["dense", "gathered", "sorted"])
def test_gradients_by_differences(name, forced):
    forced(name)
    x, out, A, B, index, values = problem(tokens=4, count=3, rank=2, i=3, o=3, dtype=torch.float64)
    needs = [t.requires_grad_() for t in (x, A, B, values)]
    assert torch.autograd.gradcheck(lambda x, A, B, w: pairs.outputs(x, out, A, B, index, w), needs)
    assert torch.autograd.gradcheck(lambda x, A, B, w: pairs.parameters(x, out, A, B, index, w), needs)


@pytest.mark.parametrize("graph", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_the_shapes_pick_is_the_loop(dtype, graph):
    """Around each of the limits, without a warning, and in place only where no gradients are recorded."""
    cases = [(40, 3, 16), (40, 8, 16), (200, 9, 8), (200, 200, 8), (700, 6, 16), (3, 400, 3), (400, 7, 3)]
    seen = set()
    for tokens, count, rank in cases:
        rank = pairs.aligned(rank, dtype)
        x, out, A, B, index, values = problem(tokens, count, 2, rank, dtype=dtype)
        x.requires_grad_(graph)
        seen.add(type(pairs._way(index, x, A, B, out, values)).__name__)
        want = loop(*(t.double() if t.is_floating_point() else t for t in (x, out, A, B, index, values)))
        kept = out.clone()
        with torch.set_grad_enabled(graph), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = pairs.outputs(x, out, A, B, index, values)
        assert got.dtype == dtype and (torch.equal(out, kept) or not graph)
        error = float((got.detach().double() - want.detach()).abs().max() / want.detach().abs().max())
        assert error < {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype], (tokens, count, error)
    if dtype == torch.float32:
        assert seen == (
            {"_Dense", "_Gathered", "_Grouped"} if graph else {"_Dense", "_Sampled", "_SortedSampled", "_Grouped"}
        )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80), st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9),
    st.integers(0, 2**16), st.booleans(),
)  # fmt: skip
def test_any_shape(tokens, count, k, rank, i, o, seed, average):
    x, out, A, B, index, values = problem(tokens, count, min(k, count), rank, i, o, seed=seed)
    values = values * (torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.8)
    step = pairs.parameters if average else pairs.outputs
    want = loop(x, out, A, B, index, values, average)
    torch.testing.assert_close(step(x, out, A, B, index, values), want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(step(x, out.clone(), A, B, index, values), want, rtol=1e-4, atol=1e-4)


def test_the_softmax_of_the_largest_scores():
    scores = torch.tensor([[0.1, 3.0, -1.0], [2.0, 0.0, 5.0]])
    values, index = chosen(scores, 2, 0.5)
    assert index.tolist() == [[1, 0], [2, 0]]
    torch.testing.assert_close(values, (scores.gather(1, index) / 0.5).softmax(-1))
    values, index = chosen(scores, 3)
    assert index is None
    torch.testing.assert_close(values, scores.softmax(-1))


@pytest.mark.parametrize("step", [pairs.outputs, pairs.parameters])
def test_a_compiled_graph_has_no_breaks(step):
    for count in (3, 40):
        tensors = problem(tokens=300, count=count)
        got = torch.compile(step, backend="eager", fullgraph=True)(*tensors)
        torch.testing.assert_close(got, step(*tensors), rtol=1e-5, atol=1e-5)


# The bank of LoRAs


def bank(ranks=(4, 4, 4), alphas=None, i=8, o=12, dropout=0.0):
    """Bound patches by name at one linear site."""
    generator, base = torch.Generator().manual_seed(0), nn.Linear(i, o)
    site = pt.Site("block.dense", "linear", "other", (o, i), bias=True)
    patches = {}
    for n, rank in enumerate(ranks):
        patch = pt.LoRA(rank=rank, alpha=None if alphas is None else alphas[n], init="random", dropout=dropout).patch(
            site
        )
        patch.start(generator)
        patches[f"a{n}"] = patch.requires_grad_(False).bound(base, site)
    return patches


def routed(names, lead, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(*lead, len(names), generator=generator).argsort(-1)[..., :k]
    return Weights(tuple(names), torch.randn(*lead, k, generator=generator), index)


@pytest.mark.parametrize("lead", [(5,), (2, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_tokens_of_any_leading_shape(lead, uneven):
    patches = bank((1, 4, 3, 16, 2), (1.0, 6.0, 2.0, 4.0, 3.0)) if uneven else bank((16,) * 6)
    x, y = torch.randn(*lead, 8), torch.randn(*lead, 12)
    weights = routed(patches, lead)
    dense = Weights(weights.names, weights.dense())
    with torch.no_grad():
        want = Bank(patches).apply(x, y, y, weights)
        for given_weights in (weights, dense):
            got = LoRABank(patches).apply(x, y, y.clone(), given_weights)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weights_of_another_leading_shape_are_refused_by_name():
    patches = bank()
    x = torch.randn(2, 5, 8)
    for weights in (routed(patches, (2, 4)), Weights(tuple(patches), torch.ones(2, 4, 3))):
        with pytest.raises(MixError, match=r"'block\.dense' got an input of shape \(2, 5, 8\).*shape \(2, 4\)"):
            LoRABank(patches).apply(x, torch.zeros(2, 5, 12), torch.zeros(2, 5, 12), weights)


@pytest.mark.parametrize("average", [False, True], ids=["outputs", "parameters"])
def test_adapters_of_other_banks_contribute_nothing(average):
    patches = bank((4,) * 3)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    names = ("other", "a1", "a0", "another", "a2")
    weights = routed(names, (2, 5), 3)
    ours = weights.dense()[..., [2, 1, 4]]
    plain = Weights(tuple(patches), ours)
    for given_weights in (weights, Weights(names, weights.dense())):
        fast, slow = LoRABank(patches), LoRABank(patches)
        step, want = (fast.average, slow.average) if average else (fast.apply, Bank(patches).apply)
        with torch.no_grad():
            torch.testing.assert_close(
                step(x, y, y.clone(), given_weights), want(x, y, y.clone(), plain), rtol=1e-5, atol=1e-5
            )


def by_hand(patches, x, y, dense):
    """Averaged factors for each token: [T, N] weights."""
    rows = []
    for t in range(len(x)):
        A = sum(w * p.A for w, p in zip(dense[t], patches.values(), strict=True))
        B = sum(w * p.form.scale * p.B for w, p in zip(dense[t], patches.values(), strict=True))
        rows.append(y[t] + B @ (A @ x[t]))
    return torch.stack(rows)


@pytest.mark.parametrize("grain", ["floats", "batch", "rows", "rows by index", "tokens", "tokens by index"])
def test_averaged_factors_at_every_grain(grain):
    patches = bank((3,) * 4, (1.0, 2.0, 3.0, 4.0))
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    names = tuple(reversed(patches))
    lead = {"floats": (), "batch": ()}.get(grain, (2, 5) if grain.startswith("tokens") else (2,))
    weights = routed(names, lead)
    dense = weights.dense()
    if not grain.endswith("index"):
        weights = Weights(names, tuple(dense.tolist()) if grain == "floats" else dense)
    spread = dense.flip(-1).reshape(*lead, *[1] * (2 - len(lead)), 4).expand(2, 5, 4)
    want = by_hand(patches, x.flatten(0, 1), y.flatten(0, 1), spread.reshape(-1, 4)).view(2, 5, 12)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            got = LoRABank(patches).average(x, y, y.clone(), weights, Call())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [None, (2,), (2, 5)], ids=["floats", "rows", "tokens"])
def test_averaged_factors_draw_one_mask_while_they_learn(lead):
    patches = bank((4,) * 3, dropout=0.5)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    dense = torch.tensor([0.5, -1.0, 2.0]) if lead is None else torch.randn(*lead, 3)
    weights = Weights(tuple(patches), tuple(dense.tolist()) if lead is None else dense)
    spread = dense.reshape(*(lead or ()), *[1] * (2 - len(lead or ())), 3).expand(2, 5, 3).reshape(-1, 3)
    for training in (True, False):
        next(iter(patches.values())).base.train(training)
        torch.manual_seed(7)
        with torch.no_grad():
            got = LoRABank(patches).average(x, y, y.clone(), weights)
        torch.manual_seed(7)
        seen = nn.functional.dropout(x, 0.5, training)
        want = by_hand(patches, seen.flatten(0, 1), y.flatten(0, 1), spread).view(2, 5, 12)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_averaged_factors_by_token():
    patches = bank((3,) * 4)
    parameters = [p.requires_grad_() for patch in patches.values() for p in patch.parameters()]
    x, y = torch.randn(6, 8), torch.randn(6, 12)
    weights = routed(patches, (6,))
    found = []
    for fast in (False, True):
        values = weights.values.clone().requires_grad_()
        given_weights = Weights(weights.names, values, weights.index)
        mine = LoRABank(patches).average
        out = mine(x, y, y, given_weights) if fast else by_hand(patches, x, y, given_weights.dense())
        found.append(torch.autograd.grad(out.square().sum(), [values, *parameters]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_uneven_ranks_are_not_averaged():
    patches = bank((4, 2, 4))
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    with pytest.raises(
        MixError, match=r"different rank .* a0 \(4\), a1 \(2\), a2 \(4\); use a mix that combines outputs"
    ):
        LoRABank(patches).average(x, y, y, routed(patches, (2, 5)))


def test_stacks_are_kept_until_an_adapter_changes():
    patches = bank((16,) * 6)
    made = LoRABank(patches)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    weights = routed(patches, (2, 5), 6)
    with torch.no_grad():
        before = made.apply(x, y, y.clone(), weights)
        stacks = made._kept["stacks"][1]
        made.apply(x, y, y.clone(), weights)
        assert made._kept["stacks"][1] is stacks
        patches["a3"].A.mul_(2.0)
        after = made.apply(x, y, y.clone(), weights)
        assert made._kept["stacks"][1] is not stacks and not torch.allclose(before, after)
        torch.testing.assert_close(after, Bank(patches).apply(x, y, y, weights), rtol=1e-5, atol=1e-5)
    patches["a0"].A.requires_grad_()
    kept = made._kept["stacks"]
    made.apply(x, y, y, weights)
    assert made._kept["stacks"] is kept  # a graph serves one backward: nothing of it is kept
