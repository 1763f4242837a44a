"""Rules that drop entries, elect signs and mask, against their formulas written down plainly, and streaming selection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import Held, close, merged
from zoo import tiny

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError, MergeError
from polytask.merge import compress
from polytask.merge.engine import Job
from polytask.merge.rule import Block
from polytask.merge.rules.drop import chances_of
from polytask.merge.select import find, from_cut, kth, largest, lower, number, share, trim, trim_at, upper
from polytask.merge.source import Checkpoint, Module
from polytask.merge.unified import Unified, split

FAST = settings(max_examples=25, deadline=None)
SHAPES = {"a.weight": (5, 4), "b.weight": (3, 4, 2), "c.bias": (7,), "d.scale": ()}


def differences(seed, count, *, coarse=False):
    """Differences of each model; coarse ones have many entries of equal size, as those of bfloat16 models."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape):
        x = torch.randn(shape, generator=generator)
        return (x * 2).round() / 4 if coarse else x

    return [{name: one(shape) for name, shape in SHAPES.items()} for _ in range(count)]


def job(name, deltas, elements=10**9, base=None, weights=None, each=None, seed=0, **options):
    base = base or {key: torch.zeros_like(value) for key, value in deltas[0].items()}
    models = [Held(f"m{i}", {k: base[k] + v for k, v in delta.items()}) for i, delta in enumerate(deltas)]
    return Job(models, name, options, Held("base", base), weights, each or {}, seed, elements)


def result(name, deltas, **options):
    return merged(job(name, deltas, **options))


def rows(name, *deltas, **options):
    """Of one tensor, as a list."""
    found = result(name, [{"w": torch.tensor(d, dtype=torch.float32)} for d in deltas], **options)
    return found["w"].tolist()


def flat(tensors):
    return np.concatenate([value.numpy().reshape(-1) for value in tensors.values()])


def vote(kept, weights, normalize=True, weighted=False):
    """The formula of an election, for arrays."""
    kept, weights = np.stack(kept).astype(np.float64), np.array(weights, dtype=np.float64)
    scaled = kept * weights.reshape(-1, *[1] * (kept.ndim - 1))
    sign = np.where((scaled if weighted else kept).sum(0) >= 0, 1, -1)
    agrees = np.sign(scaled if weighted else kept) == sign
    whole = (weights.reshape(-1, *[1] * (kept.ndim - 1)) * agrees).sum(0)
    out = (scaled * agrees).sum(0)
    return out / np.where(whole == 0, 1, whole) if normalize else out


def top(x, count):
    """The largest in size, of equal ones the first."""
    order = np.argsort(-np.abs(x).reshape(-1), kind="stable")[:count]
    mask = np.zeros(x.size, dtype=bool)
    mask[order] = True
    return mask.reshape(x.shape)


weights_of = st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=3, max_size=3)

# Exact selection


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.integers(0, 59), st.booleans())
@FAST
def test_two_histograms_find_the_number_of_any_rank(numbers, rank, coarse):
    x = torch.tensor(numbers, dtype=torch.float32)
    x = x.round() if coarse else x
    rank = min(rank, len(x) - 1)
    bucket, inside = find(sum(upper(part) for part in x.split(7)), rank)
    low, place = find(sum(lower(part, bucket) for part in x.split(7)), inside)
    wanted = sorted(x.tolist())[rank]
    assert number(bucket, low) == wanted == kth(x, rank)
    before = sum(v < wanted or (v == wanted == 0 and np.signbit(v)) for v in x.tolist())
    assert wanted == 0 or place == rank - before


@given(st.integers(0, 40), st.integers(0, 10**6))
@FAST
def test_the_largest_are_exactly_as_many_and_the_first_of_equal_ones(count, seed):
    x = torch.randint(0, 6, (4, 9), generator=torch.Generator().manual_seed(seed)).float()
    mask = largest(x, count)
    assert np.array_equal(mask.numpy(), top(x.numpy(), count)) and int(mask.sum()) == min(count, 36)
    if 0 < count < 36:
        cut = kth(x, 36 - count)
        assert torch.equal(from_cut(x, cut, count - int((x > cut).sum())), mask)
        assert torch.equal(from_cut(x, cut), x >= cut)


def test_shares():
    assert [share(0.29, 100), share(0.01, 10), share(0, 10), share(1, 10)] == [29, 1, 0, 10]
    assert [share(0.29, 100, floor=True), share(0.01, 10, floor=True)] == [
        28,
        0,
    ]  # 0.29 * 100 is less than 29 in floats


# TIES

A, B, C = (3.0, -1.0, 0.5, 2.0), (-2.0, -3.0, 1.0, 0.1), (1.0, 2.0, -4.0, -0.2)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_by_hand(scope):
    assert rows("ties", A, B, C, density=0.5, scope=scope) == [3, -3, -4, 2]
    assert rows("ties", A, B, C, density=0.5, scope=scope, scale=0.5) == [1.5, -1.5, -2, 1]
    # official counts keep one more each: (3,-1,0,2), (-2,-3,1,0), (1,2,-4,0)
    assert rows("ties", A, B, C, density=0.75, scope=scope) == pytest.approx([2, -2, -4, 2])
    assert rows("ties", A, B, density=0.5, scope=scope, compat="mergekit", weights=[2, 1]) == [3, -3, 0, 2]


@given(
    seed=st.integers(0, 10**6), density=st.floats(0.01, 1.0), coarse=st.booleans(), elements=st.sampled_from([1, 9, 10**9]),
    weights=weights_of, normalize=st.booleans(),
)  # fmt: skip
@FAST
def test_global_ties_are_the_formula_on_the_whole_vector(seed, density, coarse, elements, weights, normalize):
    deltas = differences(seed, 3, coarse=coarse)
    found = result("ties", deltas, elements=elements, weights=weights, density=density, normalize=normalize)
    vectors = [flat(delta) for delta in deltas]
    count = max(1, round(density * len(vectors[0])))
    wanted = vote([v * top(v, count) for v in vectors], weights, normalize)
    assert np.allclose(flat(found), wanted, atol=1e-6)


@given(seed=st.integers(0, 10**6), density=st.floats(0.01, 1.0), coarse=st.booleans(), weights=weights_of)
@FAST
def test_ties_of_each_tensor_and_as_in_mergekit(seed, density, coarse, weights):
    deltas = differences(seed, 3, coarse=coarse)
    ours = result("ties", deltas, scope="tensor", density=density, weights=weights)
    theirs = result("ties", deltas, compat="mergekit", density=density, weights=weights)
    for name in SHAPES:
        arrays = [delta[name].numpy() for delta in deltas]
        counts = max(1, round(density * arrays[0].size)), max(1, int(density * arrays[0].size))
        assert np.allclose(ours[name], vote([x * top(x, counts[0]) for x in arrays], weights), atol=1e-6)
        assert np.allclose(
            theirs[name], vote([x * top(x, counts[1]) for x in arrays], weights, weighted=True), atol=1e-6
        )


@given(
    seed=st.integers(0, 10**6),
    density=st.floats(0.001, 1.0),
    elements=st.sampled_from([1, 9, 10**9]),
    coarse=st.booleans(),
)
@FAST
def test_exactly_the_stated_share_is_kept_and_never_nothing(seed, density, elements, coarse):
    (delta,) = differences(seed, 1, coarse=coarse)
    delta = {name: torch.where(value == 0, 0.25, value) for name, value in delta.items()}
    found = flat(result("ties", [delta], elements=elements, density=density))
    assert np.count_nonzero(found) == max(1, round(density * found.size))
    assert np.allclose(found[found != 0], flat(delta)[found != 0], atol=1e-6)


def test_densities_of_each_model_and_of_some_tensors():
    deltas = differences(3, 2)
    found = result("ties", deltas[:1], each={"density": [[{"filter": "bias", "value": 1.0}, {"value": 0.25}]]})
    assert torch.equal(found["c.bias"], deltas[0]["c.bias"])
    rest = flat({k: v for k, v in found.items() if k != "c.bias"})
    assert np.count_nonzero(rest) == round(0.25 * rest.size)
    both = result("ties", deltas, each={"density": [1.0, 0.0]})
    close(both, deltas[0], 1e-6)


def test_equal_differences_stay_and_all_of_one_is_the_model():
    (delta,) = differences(5, 1)
    close(result("ties", [delta] * 3, density=0.3), result("ties", [delta], density=0.3), 1e-6)
    close(result("ties", [delta], density=1.0), delta, 1e-6)


def test_ties_reads_places_only_where_equal_ones_must_be_told_apart():
    reads = []

    class Counting(Held):
        def read(self, name, start=0, stop=None):
            reads.append(name)
            return super().read(name, start, stop)

    for coarse, times in ((False, 3), (True, 4)):
        reads.clear()
        (delta,) = differences(1, 1, coarse=coarse)
        base = Held("base", {k: torch.zeros_like(v) for k, v in delta.items()})
        merged(Job([Counting("m", delta)], "ties", {"density": 0.37}, base))
        assert len(reads) == times * len(SHAPES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"density": 1.5}, "density of ties must be from 0 to 1, got 1.5"),
        ("ties", {"scope": "layer"}, "scope of ties must be one of 'global', 'tensor'"),
        ("ties", {"compat": "peft"}, "compat of ties must be one of"),
        ("della", {"epsilon": 0.4}, "chances from 0.3 to 1.1"),
        ("della", {"density": 0.1}, "lower epsilon"),
        ("breadcrumbs", {"gamma": -1}, "gamma of breadcrumbs must be from 0 to 1"),
        ("sce", {"select_topk": 2}, "select_topk of sce"),
        ("consensus", {"agree": -1}, "agree of consensus must not be negative"),
        ("pcb", {"clamp": 0.5}, "clamp of pcb must be below 0.5"),
        ("ties", {"each": {"density": [2.0, 1.0]}}, "density of ties must be from 0 to 1, got 2.0 at a.weight"),
    ],
)
def test_settings_out_of_range_are_said(name, options, message):
    with pytest.raises(ConfigError, match=message):
        result(name, differences(0, 2), **options)


# DARE and DELLA


def test_dare_keeps_the_expectation_and_divides_survivors_exactly():
    x = torch.full((300, 200), 0.5)
    found = result("dare_linear", [{"w": x}], density=0.25)["w"]
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert abs(float(found.mean()) - 0.5) < 0.02  # of 60,000: one standard deviation is 0.0035
    close(result("dare_linear", [{"w": x}], density=1.0), {"w": x})
    plain = result("dare_linear", [{"w": x}], density=0.25, rescale=False)["w"]
    assert torch.equal(plain * 4, found)


@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 1.0), weights=weights_of)
@FAST
def test_dare_is_its_formula_on_the_block_s_random_numbers(seed, density, weights):
    deltas = differences(seed, 3)
    linear = result("dare_linear", deltas, density=density, weights=weights, seed=seed, elements=5, scale=0.7)
    ties = result("dare_ties", deltas, density=density, weights=weights, seed=seed)
    mergekit = result("dare_ties", deltas, density=density, weights=weights, seed=seed, compat="mergekit")
    for name, shape in SHAPES.items():
        tensors = tuple(delta[name] for delta in deltas)
        block = Block(name, None, tensors, (1.0,) * 3, shape=shape, seed=seed, models=("m0", "m1", "m2"))
        masks = [(block.uniform(i) < density).numpy() for i in range(3)]
        kept = [x.numpy() * m / density for x, m in zip(tensors, masks, strict=True)]
        assert np.allclose(linear[name], 0.7 * sum(w * k for w, k in zip(weights, kept, strict=True)), atol=1e-5)
        assert np.allclose(ties[name], vote(kept, weights, False), atol=1e-5)
        norms = [
            abs(x.numpy()).sum() / max(abs(x.numpy() * m).sum(), 1e-30) for x, m in zip(tensors, masks, strict=True)
        ]
        normed = [x.numpy() * m * (n if m.any() else 1) for x, m, n in zip(tensors, masks, norms, strict=True)]
        assert np.allclose(mergekit[name], vote(normed, weights, False, weighted=True), atol=1e-4)


def test_chances_of_della_by_hand():
    found = chances_of(torch.tensor([[4.0, -1.0, 3.0, -2.0]]), 0.5, 0.2)
    assert torch.allclose(found, torch.tensor([[0.7, 0.3, 0.5667, 0.4333]]), atol=1e-4)
    assert chances_of(torch.tensor([[4.0], [1.0]]), 0.5, 0.2).tolist() == [[0.5], [0.5]]
    assert float(chances_of(torch.tensor(2.0), 0.5, 0.2)) == 0.5


@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.3, 0.7), st.floats(0.0, 0.29))
@FAST
def test_chances_of_della_have_the_density_as_their_mean(seed, width, density, epsilon):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    found = chances_of(x, density, epsilon)
    assert torch.allclose(found.mean(-1), torch.full((3,), density), atol=1e-5)
    order = x.abs().argsort(-1)
    assert (found.gather(-1, order).diff(dim=-1) >= 0).all()


def test_della_keeps_the_expectation_and_large_entries_more_often():
    x = torch.linspace(0.5, 1.5, 100).expand(800, 100).contiguous()
    found = result("della_linear", [{"w": x}], density=0.5, epsilon=0.3)["w"]
    assert torch.allclose(found.mean(0), x[0], atol=0.25)  # three standard deviations of the rarest are 0.16
    assert abs(float(found.mean()) - 1.0) < 0.02
    kept = (found != 0).float().mean(0)
    assert kept[:10].mean() < 0.28 and kept[-10:].mean() > 0.72
    norm = result("della_linear", [{"w": x}], density=0.5, epsilon=0.3, compat="mergekit")["w"]
    assert abs(float(norm.abs().sum() / x.abs().sum()) - 1) < 1e-5
    one = result("della", [{"w": x}], density=0.5, epsilon=0.3)["w"]  # one model agrees with itself
    assert torch.allclose(one, found)


# Breadcrumbs


@given(
    seed=st.integers(0, 10**6), density=st.floats(0.01, 1.0), gamma=st.floats(0.0, 0.5), weights=weights_of,
    scope=st.sampled_from(["tensor", "row", "mergekit"]),
)  # fmt: skip
@FAST
def test_breadcrumbs_are_their_formula(seed, density, gamma, weights, scope):
    deltas = differences(seed, 3)
    chosen = {"compat": scope} if scope == "mergekit" else {"scope": scope}
    found, voted = (
        result(name, deltas, density=density, gamma=gamma, weights=weights, **chosen)
        for name in ("breadcrumbs", "breadcrumbs_ties")
    )

    def kept(x):
        n = x.size
        k = int(density * n) if scope == "mergekit" else max(1, round(density * n))
        g = min(int(gamma * n) if scope == "mergekit" else round(gamma * n), n - k)
        return x * (top(x, g + k) & ~top(x, g))

    for name, shape in SHAPES.items():
        arrays = [delta[name].numpy() for delta in deltas]
        by_row = scope == "row" and len(shape) > 1
        sparse = [np.apply_along_axis(kept, -1, x) if by_row else kept(x) for x in arrays]
        assert np.allclose(found[name], sum(w * s for w, s in zip(weights, sparse, strict=True)), atol=1e-5)
        assert np.allclose(voted[name], vote(sparse, weights, False, weighted=scope == "mergekit"), atol=1e-5)


def test_breadcrumbs_by_hand():
    x = [9.0, -8.0, 7.0, -6.0, 5.0, -4.0, 3.0, -2.0, 1.0, 0.5]
    assert rows("breadcrumbs", x, density=0.3, gamma=0.2) == [0, 0, 7, -6, 5, 0, 0, 0, 0, 0]
    assert rows("breadcrumbs", x, density=0.3, gamma=0.0) == [9, -8, 7, 0, 0, 0, 0, 0, 0, 0]  # as pruning by size
    assert rows("breadcrumbs", x, density=0.9, gamma=0.5) == [0, *x[1:]]  # the density goes first
    assert rows("breadcrumbs", x, density=1.0, gamma=0.1) == x
    assert rows("breadcrumbs", x[:4], density=0.05, gamma=0.01) == [9, 0, 0, 0]  # small tensors lose not everything


# SCE, MagMax, consensus, EMR


def test_sce_by_hand_and_for_small_differences():
    t = (1.0, -2.0, 0.0), (3.0, 1.0, 0.0)
    assert rows("sce", *t) == pytest.approx([(5 + 30) / 15, -2, 0])  # c = (1/3, 2/3) from means 5/3 and 10/3
    small = [[v * 1e-4 for v in x] for x in t]
    assert rows("sce", *small) == pytest.approx([7e-4 / 3, -2e-4, 0])
    assert rows("sce", *small, compat="mergekit") == pytest.approx([2e-4, -2e-4, 0])  # weighs them alike


@given(seed=st.integers(0, 10**6), share_=st.floats(0.05, 1.0), compat=st.sampled_from(["", "mergekit"]))
@FAST
def test_sce_is_its_formula(seed, share_, compat):
    deltas = differences(seed, 3)
    found = result("sce", deltas, select_topk=share_, compat=compat)
    for name in SHAPES:
        x = np.stack([delta[name].numpy().astype(np.float64) for delta in deltas])
        if share_ < 1:
            spread = x.var(0)
            count = np.count_nonzero(spread) * share_
            x = x * top(spread, int(count) if compat else max(1, round(count)))
        squares = (x**2).mean(axis=tuple(range(1, x.ndim)))
        c = squares / squares.sum() if squares.sum() > 1e-6 else np.full(3, 1 / 3)
        assert np.allclose(found[name], vote(list(x), c), atol=1e-4)


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 2), coarse=st.booleans())
@FAST
def test_magmax_and_emr_are_their_formulas(seed, scale, coarse):
    deltas = differences(seed, 3, coarse=coarse)
    largest_, unified = (result(name, deltas, scale=scale, elements=3) for name in ("magmax", "emr"))
    for name in SHAPES:
        x = np.stack([delta[name].numpy() for delta in deltas])
        assert np.allclose(abs(largest_[name].numpy()), scale * abs(x).max(0), atol=1e-6)
        last = 2 - abs(x[::-1]).argmax(0)
        assert np.allclose(largest_[name], scale * np.take_along_axis(x, last[None], 0)[0], atol=1e-6)
        sign = np.where(x.sum(0) > 0, 1, -1)
        assert np.allclose(unified[name], scale * sign * np.maximum(x * sign, 0).max(0), atol=1e-6)


def test_consensus_by_hand():
    t = (1.0, -0.5), (-1.0, 2.0)
    assert rows("consensus", *t, agree=1, threshold=0.4) == [0, 1.5]  # the sum is (0, 1.5), the masks (1, 0), (1, 1)
    assert rows("consensus", *t, agree=2, threshold=0.4) == [0, 0]
    x = (1.0, 2.0, 0.0), (1.0, 0.0, 3.0)
    assert rows("consensus", *x, agree=2) == [2, 0, 0]  # what one task alone uses goes
    assert rows("consensus", *x, agree=1, scale=0.5) == [1, 1, 1.5]
    assert rows("consensus", *x, agree=0) == [2, 2, 3]  # task arithmetic
    assert rows("consensus", *x, agree=3) == [0, 0, 0]
    assert rows("consensus", *x, agree=1, each={"threshold": [0.6, 100.0]}) == [2, 2, 3]


@given(seed=st.integers(0, 10**6), agree=st.integers(0, 4), threshold=st.floats(0.1, 2), weights=weights_of)
@FAST
def test_consensus_is_its_formula(seed, agree, threshold, weights):
    deltas = differences(seed, 3)
    found = result("consensus", deltas, agree=agree, threshold=threshold, weights=weights, elements=4)
    for name in SHAPES:
        x = np.stack([w * delta[name].numpy() for w, delta in zip(weights, deltas, strict=True)])
        whole = x.sum(0)
        votes = (abs(x) > threshold * abs(whole - x)).sum(0)
        assert np.allclose(found[name], whole * (votes >= agree), atol=1e-5)


# PCB


def test_pcb_by_hand():
    assert rows("pcb", (1.0, -2.0, 0.5, 3.0), (2.0, 1.0, -1.0, 0.0), density=0.5, clamp=0.0) == pytest.approx(
        [2, 0, 0, 3]
    )


def pcb(vectors, density, clamp, weights):
    """The released code's formula, in float64."""
    x = np.stack(vectors).astype(np.float64)
    n, d = x.shape

    def clamped(values, low, high):
        ranked = np.sort(values, axis=1)
        return np.clip(values, ranked[:, [int(d * low)]], ranked[:, [int(d * (1 - high) - 1)]])

    def unit(values):
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        return (values - low) / (high - low)

    sizes = clamped(abs(x), clamp, clamp)
    score = np.exp(n * unit(sizes) ** 2) * np.tanh(x * x.sum(0))
    scale = unit(clamped(score, 1 - density, 0))
    return (np.array(weights)[:, None] * np.sign(x) * sizes * scale).sum(0) / np.maximum(scale.sum(0), 1e-12)


@given(
    seed=st.integers(0, 10**6), density=st.floats(0.1, 0.9), clamp=st.sampled_from([0.0, 0.0001, 0.05]),
    elements=st.sampled_from([1, 11, 10**9]), weights=weights_of,
)  # fmt: skip
@FAST
def test_pcb_is_the_formula_on_the_whole_vector(seed, density, clamp, elements, weights):
    deltas = differences(seed, 3)
    found = result("pcb", deltas, density=density, clamp=clamp, elements=elements, weights=weights, scale=1.2)
    wanted = 1.2 * pcb([flat(delta) for delta in deltas], density, clamp, weights)
    assert np.allclose(flat(found), wanted, atol=2e-3)
    order = [2, 0, 1]
    other = result(
        "pcb", [deltas[i] for i in order], density=density, clamp=clamp, weights=[weights[i] for i in order], scale=1.2
    )
    assert np.allclose(flat(other), wanted, atol=2e-3)


def test_pcb_of_one_number_and_where_none_survives():
    assert rows("pcb", [3.0], [1.0]) == [2.0]
    found = rows("pcb", (1.0, 2.0, 3.0, 0.1), (1.0, 2.0, 3.0, 0.1), density=0.3, clamp=0.0)
    assert found[0] == found[1] == found[3] == 0.0 and found[2] > 2.9


OURS = [
    "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "magmax",
    "consensus", "emr", "pcb",
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_dropped_in_silence(name, which, value):
    deltas = differences(1, 2)
    deltas[which]["c.bias"][3] = value
    with pytest.raises(MergeError, match=rf"c.bias of m{which} has entries that are not finite"):
        result(name, deltas)


# One difference with masks


@pytest.fixture
def tuned():
    base = tiny("llama", seed=0)[0]
    models = []
    for seed in (1, 2, 3):
        model = tiny("llama", seed=0)[0]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        models.append(model)
    return base, models


def state(module):
    source = Module(module)
    return {name: source.read(name) for name in source.shapes}


def test_emr_of_one_task_is_that_model_and_sizes_are_kept(tuned, tmp_path):
    base, models = tuned
    one = Unified(split(models[:1], base, tmp_path / "one", names=["x"]), base)
    close(one.state("x"), state(models[0]), 1e-6)
    many = Unified(split(models, base, tmp_path / "many", names=["x", "y", "z"]), base)
    old = state(base)
    for task, model in zip("xyz", models, strict=True):
        size = [sum(float((s[k] - old[k]).abs().sum()) for k in old) for s in (many.state(task), state(model))]
        assert size[0] == pytest.approx(size[1], rel=1e-4)
        signs = [(s["model.norm.weight"] - old["model.norm.weight"]).sign() for s in (many.state(task), state(model))]
        assert bool(((signs[0] == signs[1]) | (signs[0] == 0)).all())
    with pytest.raises(MergeError, match="no task 'w'"):
        many.model("w")
    with pytest.raises(MergeError, match="does not fit"):
        Unified(tmp_path / "many", tiny("gpt2")[0])
    with pytest.raises(MergeError, match="no difference with masks"):
        Unified(tmp_path, base)
    assert pt.merge([many.model("x")], "linear", out=tmp_path / "whole") == tmp_path / "whole"
    close(many.state("x"), {n: Checkpoint(tmp_path / "whole").read(n) for n in old}, 1e-6)


def test_emr_by_hand_in_both_ways_of_rescaling(tmp_path):
    base = Held("base", {"w": torch.zeros(3), "steps": torch.tensor(3)})
    models = [
        Held(n, {"w": torch.tensor(t), "steps": torch.tensor(4)}) for n, t in (("x", [1, -2, 0.5]), ("y", [3.0, 1, -1]))
    ]
    for rescale in ("whole", "means"):
        found = Unified(split(models, base, tmp_path / rescale, rescale=rescale), base)
        assert found.held.read("w").tolist() == [3, -2, -1]
        assert [found.mask(task, "w").tolist() for task in "xy"] == [[True, True, False], [True, False, True]]
        assert list(found.tasks.values()) == pytest.approx([0.7, 1.25])
        assert found.model("y").read("w", 1, 3).tolist() == pytest.approx([0, -1.25])
        assert found.state("x")["steps"] == 3


def test_tall_masks_bring_tasks_back_where_they_do_not_meet(tuned, tmp_path):
    base, models = tuned
    old = state(base)
    for place_, model in enumerate(models):
        with torch.no_grad():
            for name, value in Module(model)._tensors.items():
                place = torch.arange(value.numel()).view(value.shape) % 3 == place_
                value.copy_(torch.where(place, value, old[name]))
    found = Unified(split(models, base, tmp_path / "t", "tall", names=["x", "y", "z"], threshold=[0.2, 0.4, 0.6]), base)
    for task, model in zip("xyz", models, strict=True):
        close(found.state(task), state(model), 1e-6)
    with pytest.raises(ConfigError, match="method of split must be one of 'emr', 'tall'"):
        split(models, base, tmp_path / "u", "none")
    with pytest.raises(ConfigError, match="needs a name of its own"):
        split(models, base, tmp_path / "u", names=["x", "x", "y"])


# ComPEFT


@given(seed=st.integers(0, 10**6), density=st.floats(0.0, 1.0), alpha=st.floats(0.5, 3), coarse=st.booleans())
@FAST
def test_compression_is_its_formula(seed, density, alpha, coarse):
    (delta,) = differences(seed, 1, coarse=coarse)
    found = dict(compress.ternary(delta.items, density, alpha))
    whole = flat(delta)
    count = max(1, round(density * whole.size)) if density else 0
    wanted = alpha * whole.std(ddof=1) * np.sign(whole) * top(whole, count)
    got = flat({name: compress.decode(packed) for name, packed in found.items()})
    assert np.allclose(got, wanted, atol=1e-5)
    for name, packed in found.items():
        kept = int(np.unpackbits(packed.kept.numpy()).sum())
        size = delta[name].numel()
        assert packed.bytes == -(-size // 8) + -(-kept // 8) + 4


@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 1.0]), max_size=40), scale=st.sampled_from([0.5, 1e-7, 3e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@FAST
def test_packing_loses_nothing(values, scale, dtype, tmp_path_factory):
    tensor = torch.tensor(values).to(dtype) * torch.tensor(scale).to(dtype)
    path = tmp_path_factory.mktemp("c") / "x.safetensors"
    compress.write(path, {"w": compress.packed(tensor), "other": torch.arange(3)}, {"said": "so"})
    found, metadata = compress.read(path)
    back = found["w"] if isinstance(found["w"], torch.Tensor) else compress.decode(found["w"])
    assert torch.equal(back, tensor) and back.dtype == dtype and metadata["said"] == "so"
    assert torch.equal(found["other"], torch.arange(3))


def test_a_compressed_difference_is_small_and_is_merged_like_a_model(tuned, tmp_path):
    base, models = tuned
    old = state(base)
    path = compress.compress(Module(models[0]), Module(base), tmp_path / "x.safetensors", density=0.2, alpha=1.0)
    found, _ = compress.read(path)
    numbers = sum(value.numel() for value in old.values())
    assert sum(packed.bytes for packed in found.values()) * 8 < numbers * 2  # against two bytes for each
    source = compress.Compressed(path, Module(base))
    whole = pt.merge([path], "task_arithmetic", base=base)
    with pytest.raises(MergeError, match="is a difference and needs its base"):
        pt.merge([path], "linear", out=tmp_path / "o")
    sizes = {round(float(v), 5) for k in old for v in (state(whole)[k] - old[k]).abs().unique()}
    assert max(sizes) - min(size for size in sizes if size > 0.01) < 1e-4
    pruned = sum(int(((state(whole)[k] - old[k]).abs() > 0.01).sum()) for k in old)
    assert pruned == round(0.2 * numbers)
    assert torch.equal(source.read("model.norm.weight", 3, 9), source.read("model.norm.weight")[3:9])
    with pytest.raises(MergeError, match="does not fit"):
        compress.Compressed(path, Module(tiny("gpt2")[0]))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(MergeError, match="damaged or holds no compressed"):
        compress.Compressed(path, Module(base))


@pytest.mark.parametrize("form", ["lora", "ia3"])
def test_a_compressed_adapter_is_an_adapter(form, tmp_path):
    model = pt.Model(tiny("llama")[0])
    adapter = pt.Adapter.new(model, form, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    made = compress.compress_adapter(adapter, density=0.3)
    folder = compress.save_adapter(adapter, tmp_path / "small", density=0.3)
    back = pt.Adapter.load(folder)
    assert back.hash == made.hash and back.form == adapter.form
    assert not (folder / "adapter_model.safetensors").exists()
    values = torch.cat([p.detach().reshape(-1) for p in back.parameters()])
    assert int((values != 0).sum()) == round(0.3 * values.numel()) and len(values.abs().unique()) == 2
    merged_ = pt.merge([folder], "task_arithmetic", base=model.module)
    close(state(merged_), state(back.merge_into(model).module), 1e-6)
    held = folder / "compressed.safetensors"
    whole = held.read_bytes()
    held.write_bytes(whole[:-9])
    with pytest.raises(AdapterError, match="damaged or holds no compressed"):
        pt.Adapter.load(folder)
    held.write_bytes(whole)
    adapter.save(folder)  # over the compressed one
    assert pt.Adapter.load(folder).hash == adapter.hash and not held.exists()


def test_rescalers_of_the_whole_vector_and_of_means_differ_where_tensors_differ_in_size(tmp_path):
    base = Held("base", {"v": torch.zeros(4), "w": torch.zeros(1)})
    models = [
        Held("x", {"v": torch.tensor([1.0, 1, 1, 1]), "w": torch.tensor([2.0])}),
        Held("y", {"v": torch.tensor([2.0, 2, 2, 2]), "w": torch.tensor([2.0])}),
    ]
    scales = [
        Unified(split(models, base, tmp_path / rescale, rescale=rescale), base).tasks["x"]
        for rescale in ("whole", "means")
    ]
    assert scales == pytest.approx([6 / 10, 3 / 4])  # (4 + 2) / (8 + 2), and (1 + 2) / (2 + 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.sampled_from([0, 1, 2, 7]), st.floats(0.0, 1.0))
def test_trimming_is_a_product_with_the_mask_of_the_largest(seed, size, levels, density):
    """Also among equal sizes, of which the first stay, and where there are fewer entries than are kept."""
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    if levels:
        x = (x * levels).round() / levels
    count = round(density * x.numel())
    mask = largest(x.abs(), count)
    assert torch.equal(trim(x.clone(), count), x * mask)
    assert torch.equal(trim(x.t().clone().t(), count), x * mask)
    sizes = x.abs()
    cut = float(sizes.view(-1)[seed % x.numel()])
    assert torch.equal(trim_at(x.clone(), cut), x * from_cut(sizes, cut))
    for equal in (0, 1, int((sizes == cut).sum())):
        assert torch.equal(trim_at(x.clone(), cut, equal), x * from_cut(sizes, cut, equal))


def test_trimming_looks_through_more_than_one_piece():
    x = torch.ones(200_000)
    x[5] = 2.0
    kept = trim(x.clone(), 70_000)
    assert int(kept.count_nonzero()) == 70_000 and torch.equal(kept[:70_000], x[:70_000])
