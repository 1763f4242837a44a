"""The fast bank of LoRAs against the plain loop over patches, for every grain and layout of the weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polytask as pt
from polytask.core.errors import MixError
from polytask.core.form import Bank, Call, Weights
from polytask.forms.lora import LoRABank

torch.set_num_threads(1)


@st.composite
def banks(draw, equal_ranks=False):
    """Bound LoRAs of one linear site, its input [B, T, i] and the base's output, in float32."""
    count, rows, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    i, o = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    base = nn.Linear(i, o)
    site = pt.Site("linear", "linear", "other", (o, i), bias=True)
    rank = draw(st.integers(1, 4))
    patches = {}
    for n in range(count):
        form = pt.LoRA(
            rank=rank if equal_ranks else draw(st.integers(1, 4)),
            alpha=draw(st.sampled_from([1.0, 3.0])),
            init="random",
        )
        patch = form.patch(site)
        patch.start(generator)
        patches[f"adapter{n}"] = patch.bound(base, site)
    x = torch.randn(rows, tokens, i, generator=generator)
    with torch.no_grad():
        return patches, x, base(x), generator


def _weights(draw, patches, shape, generator, k=0):
    """Weights of this leading shape, dense or (with ``k``) indexed, some of them exactly zero; names in any order."""
    names = tuple(draw(st.permutations(list(patches))))
    values = torch.randn(*shape, k or len(names), generator=generator)
    values = values * (torch.rand(values.shape, generator=generator) < 0.8)
    if not k:
        return Weights(names, values)
    order = torch.rand(*shape, len(names), generator=generator).argsort(-1)  # k different ones
    return Weights(names, values, order[..., :k])


def _agree(patches, x, y, weights, call=None):
    """The fast bank, in place and recording gradients, equals the loop; neither changes what it was given."""
    call = call or Call(rows=len(x))
    kept = (x.clone(), y.clone())
    with torch.no_grad():
        want = Bank(patches).apply(x, y, y.clone(), weights, call)
        fast = LoRABank(patches).apply(x, y, y.clone(), weights, call)
    recorded = LoRABank(patches).apply(x, y, y, weights, call)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])
    torch.testing.assert_close(fast, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded.detach(), want, rtol=1e-5, atol=1e-5)
    # and the loop is the equation
    dense = weights.dense()
    dense = dense.reshape(*dense.shape[:-1], *[1] * (3 - dense.dim()), dense.shape[-1])  # [., ., N]
    by_hand = y + sum(dense[..., n, None] * patches[name].contribute(x, y) for n, name in enumerate(weights.names))
    torch.testing.assert_close(want, by_hand.detach(), rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data(), banks())
def test_floats(data, bank):
    patches, x, y, generator = bank
    weights = _weights(data.draw, patches, (), generator)
    _agree(patches, x, y, Weights(weights.names, tuple(weights.values.tolist())))


@settings(max_examples=60, deadline=None)
@given(st.data(), banks())
def test_dense_weights(data, bank):
    patches, x, y, generator = bank
    shape = data.draw(st.sampled_from([(), x.shape[:1], x.shape[:2]]))
    _agree(patches, x, y, _weights(data.draw, patches, shape, generator))


@settings(max_examples=60, deadline=None)
@given(st.data(), banks())
def test_indexed_weights(data, bank):
    patches, x, y, generator = bank
    shape = data.draw(st.sampled_from([x.shape[:1], x.shape[:2]]))
    k = data.draw(st.integers(1, len(patches)))
    _agree(patches, x, y, _weights(data.draw, patches, shape, generator, k))


@settings(max_examples=40, deadline=None)
@given(st.data(), banks(), st.integers(1, 3), st.booleans())
def test_a_row_that_a_module_sees_several_times(data, bank, windows, indexed):
    """Windows of an image: x has ``windows`` neighbours for each row of the weights."""
    patches, x, y, generator = bank
    rows = len(x)
    x, y = x.repeat_interleave(windows, 0), y.repeat_interleave(windows, 0)
    weights = _weights(data.draw, patches, (rows,), generator, 1 if indexed else 0)
    spread = Weights(
        weights.names,
        weights.values.repeat_interleave(windows, 0),
        None if weights.index is None else weights.index.repeat_interleave(windows, 0),
    )
    with torch.no_grad():
        want = Bank(patches).apply(x, y, y.clone(), spread, Call())
        for bank_type in (Bank, LoRABank):
            got = bank_type(patches).apply(x, y, y.clone(), weights, Call(rows=rows))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.data(), banks(), st.integers(2, 4))
def test_an_input_that_the_rows_share(data, bank, rows):
    """A leading dimension of 1 (positions) is repeated for the rows."""
    patches, x, y, generator = bank
    x, y = x[:1], y[:1]
    weights = _weights(data.draw, patches, (rows,), generator, data.draw(st.sampled_from([0, 1])))
    with torch.no_grad():
        want = Bank(patches).apply(x.expand(rows, -1, -1), y.expand(rows, -1, -1), y.expand(rows, -1, -1), weights)
        for bank_type in (Bank, LoRABank):
            got = bank_type(patches).apply(x, y, y.clone(), weights)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data(), banks(equal_ranks=True))
def test_averaged_factors(data, bank):
    """``average`` multiplies with the averaged factors, for each row and token."""
    patches, x, y, generator = bank
    shape = data.draw(st.sampled_from([(), x.shape[:1], x.shape[:2]]))
    weights = _weights(data.draw, patches, shape, generator)
    with torch.no_grad():
        got = LoRABank(patches).average(x, y, y.clone(), weights)
        dense = weights.dense()
        dense = dense.reshape(*dense.shape[:-1], *[1] * (3 - dense.dim()), dense.shape[-1])
        A = sum(dense[..., n, None, None] * patches[name].A for n, name in enumerate(weights.names))
        B = sum(
            dense[..., n, None, None] * patches[name].B * patches[name].form.scale
            for n, name in enumerate(weights.names)
        )
        want = y + (B @ (A @ x[..., None]))[..., 0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.data(), banks(), st.booleans())
def test_gradients_agree(data, bank, indexed):
    """Of the factors, the weights and the input."""
    patches, x, y, generator = bank
    given_weights = _weights(data.draw, patches, x.shape[:1], generator, 1 if indexed else 0)
    results = []
    for bank_type in (Bank, LoRABank):
        here, values = x.clone().requires_grad_(), given_weights.values.clone().requires_grad_()
        parameters = [p.requires_grad_() for patch in patches.values() for p in patch.parameters()]
        out = bank_type(patches).apply(here, y, y, Weights(given_weights.names, values, given_weights.index))
        results.append(torch.autograd.grad(out.square().sum(), [here, values, *parameters], allow_unused=True))
    for want, got in zip(*results, strict=True):
        if want is None or got is None:  # an adapter that no row chose
            assert all(g is None or not g.any() for g in (want, got))
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_batch_that_is_no_multiple_of_the_rows_is_refused_by_name():
    site = pt.Site("encoder.dense", "linear", "other", (4, 4))
    base = nn.Linear(4, 4)
    patches = {n: pt.LoRA(rank=1, init="random").patch(site).bound(base, site) for n in "ab"}
    x = torch.randn(5, 2, 4)
    for index in (torch.tensor([[0], [1]]), None):
        values = torch.ones(2, 1 if index is not None else 2)
        for bank_type in (Bank, LoRABank):
            with pytest.raises(MixError, match=r"'encoder\.dense' got a leading dimension of 5.* 2 rows"):
                bank_type(patches).apply(x, x, x, Weights(("a", "b"), values, index))
