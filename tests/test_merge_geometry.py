"""Rules that look at angles, layers and singular values: hand examples, plain implementations of the formulas, properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge import Held, merged
from torch import Tensor

from polytask.core.errors import ConfigError, MergeError
from polytask.merge.engine import Job
from polytask.merge.rules import _span

SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(2, 5)
SHAPES = st.sampled_from([(1,), (5,), (3, 4), (6, 2), (2, 3, 2), ()])


def merge(rule, models, base=None, weights=None, name="w", elements=1 << 20, **options) -> Tensor:
    """One tensor of several models."""

    def held(title, tensor):
        return Held(title, {name: torch.as_tensor(tensor, dtype=torch.float32)})

    job = Job(
        [held(f"m{i}", m) for i, m in enumerate(models)], rule, options, None if base is None else held("base", base),
        weights, elements=elements,
    )  # fmt: skip
    return merged(job)[name]


def draw(seed, count, shape=(4, 5), base=True):
    """A base and models around it, in fp64."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=shape)
    models = [start + generator.normal(size=shape) for _ in range(count)]
    return (start, models) if base else models


def close(found: Tensor, wanted, atol=2e-5):
    np.testing.assert_allclose(found.numpy(), np.asarray(wanted), atol=atol, rtol=1e-4)


# Plain implementations, as the formulas stand


def slerp(t, a, b, limit=0.9995, by_sine=False):
    x, y = a.ravel(), b.ravel()
    sizes = np.linalg.norm(x), np.linalg.norm(y)
    c = 0.0 if min(sizes) == 0 else float(np.clip(x @ y / sizes[0] / sizes[1], -1, 1))
    o = math.acos(c)
    if (abs(math.sin(o)) < 1e-8) if by_sine else abs(c) > limit:
        return (1 - t) * a + t * b
    return (math.sin((1 - t) * o) * a + math.sin(t * o) * b) / math.sin(o)


def multislerp(vectors, weights, eps=1e-8):
    weights = np.array(weights) / sum(weights)
    flat = np.stack([v.ravel() for v in vectors])
    sizes = np.linalg.norm(flat, axis=1)
    u = flat / (sizes[:, None] + eps)
    m = weights @ u
    m /= np.linalg.norm(m)
    x = weights @ (u - (u @ m)[:, None] * m)
    far = np.linalg.norm(x) + eps
    return ((np.cos(far) * m + np.sin(far) * x / far) * (weights @ sizes)).reshape(vectors[0].shape)


def karcher(vectors, steps=10, tol=1e-5):
    flat = np.stack([v.ravel() for v in vectors])
    sizes = np.linalg.norm(flat, axis=1)
    units = flat / sizes[:, None]
    u = units.mean(0)
    u /= np.linalg.norm(u)
    for _ in range(steps):
        pull = np.zeros_like(u)
        for unit in units:
            c = np.clip(u @ unit, -1, 1)
            o = math.acos(c)
            if o >= tol:
                pull += o / math.sin(o) * (unit - c * u) / len(units)
        far = np.linalg.norm(pull)
        if far < tol:
            break
        u = math.cos(far) * u + math.sin(far) * pull / far
        u /= np.linalg.norm(u)
    return (u * sizes.mean()).reshape(vectors[0].shape)


def stock(base, models, mean="cosines"):
    taus = [(m - base).ravel() for m in models]
    found = []
    for i in range(len(taus)):
        for j in range(i):
            found.append(np.clip(taus[i] @ taus[j] / np.linalg.norm(taus[i]) / np.linalg.norm(taus[j]), -1, 1))
    c = np.cos(np.mean(np.arccos(found))) if mean == "angles" else np.mean(found)
    n = len(models)
    t = n * c / (1 + (n - 1) * c)
    return t * np.mean(models, 0) + (1 - t) * base


def arcee(base, model):
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(model) + 1e-8, softmax(base) + 1e-8
    score = abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)
    flat = np.sort(score.ravel())
    low, middle, high = (flat[int(q * (flat.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.where(score >= middle + 1.5 * (high - low), model, base)


def polar(matrix):
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return u @ v


def tsv(base, models):
    taus = [m - base for m in models]
    keep = min(base.shape) // len(taus)
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = np.concatenate([p[0][:, :keep] for p in parts], 1)
    s = np.concatenate([p[1][:keep] for p in parts])
    v = np.concatenate([p[2][:keep] for p in parts])
    return base + polar(u) @ np.diag(s) @ polar(v)


def iso_cts(base, models, fraction):
    taus = [m - base for m in models]
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    specific = round((len(s) - int(len(s) * fraction)) / len(taus))
    common = len(s) - specific * len(taus)
    us, ss, vs = [], [], []
    for tau in taus:
        p, t, q = np.linalg.svd(tau - u[:, :common] @ u[:, :common].T @ tau, full_matrices=False)
        us.append(p[:, :specific]), ss.append(t[:specific]), vs.append(q[:specific])
    us, ss, vs = [*us, u[:, :common]], [*ss, s[:common]], [*vs, v[:common]]
    return base + np.concatenate(ss).mean() * polar(np.concatenate(us, 1)) @ polar(np.concatenate(vs))


# SLERP and NuSLERP


def test_slerp_by_hand():
    found = merge("slerp", [[0.0, 2.0]], [1.0, 0.0], t=0.5)
    close(found, [0.70711, 1.41421])
    assert float(found.norm()) == pytest.approx(1.5811, abs=1e-4)


@given(seed=SEEDS, t=st.floats(0, 1), shape=SHAPES, nearness=st.sampled_from([1.0, 0.02, 1e-3]))
@settings(max_examples=80, deadline=None)
def test_slerp_is_the_formula(seed, t, shape, nearness):
    base, (other,) = draw(seed, 1, shape)
    other = base + nearness * (other - base)
    c = abs(float(base.ravel() @ other.ravel()) / np.linalg.norm(base) / np.linalg.norm(other))
    if abs(c - 0.9995) > 1e-5:
        close(merge("slerp", [other], base, t=t), slerp(t, base, other))


@given(seed=SEEDS, t=st.floats(0.05, 0.95))
@settings(max_examples=30, deadline=None)
def test_slerp_has_exact_ends_and_keeps_the_length(seed, t):
    base, (other,) = draw(seed, 1, (7,))
    wanted = torch.tensor(other, dtype=torch.float32)
    assert torch.equal(merge("slerp", [other], base, t=1.0), wanted)
    assert torch.equal(merge("slerp", [other], base, t=0), torch.tensor(base, dtype=torch.float32))
    close(merge("slerp", [base], base, t=t), base)
    other *= np.linalg.norm(base) / np.linalg.norm(other)
    assert float(merge("slerp", [other], base, t=t).norm()) == pytest.approx(np.linalg.norm(base), rel=1e-5)


def test_slerp_from_opposite_and_zero_vectors_is_finite():
    close(merge("slerp", [[-1.0, 0.0]], [1.0, 0.0], t=0.5), [0, 0])
    close(merge("slerp", [[0.0, 0.0]], [1.0, 0.0], t=0.5), [math.sin(math.pi / 4), 0])


def test_slerp_differs_between_layers():
    shapes = [f"layers.{i}.w" for i in range(3)]
    one = Held("a", {n: torch.tensor([1.0, 0.0]) for n in shapes})
    two = Held("b", {n: torch.tensor([0.0, 1.0]) for n in shapes})
    found = merged(Job([two], "slerp", {"t": [0.0, 1.0]}, one))
    close(found["layers.0.w"], [1, 0])
    close(found["layers.1.w"], [0.70711, 0.70711])
    close(found["layers.2.w"], [0, 1])


@given(seed=SEEDS, weights=st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)), based=st.booleans())
@settings(max_examples=60, deadline=None)
def test_nuslerp_is_the_formula_along_each_axis(seed, weights, based):
    base, (a, b) = draw(seed, 2, (4, 3))
    start = base if based else np.zeros_like(base)
    given_base = base if based else None
    t = weights[1] / sum(weights)
    whole = start + slerp(t, a - start, b - start, by_sine=True)
    close(merge("nuslerp", [a, b], given_base, weights), whole)
    rows = np.stack([slerp(t, x, y, by_sine=True) for x, y in zip(a - start, b - start, strict=True)])
    for elements in (1, 1 << 20):
        close(merge("nuslerp", [a, b], given_base, weights, elements=elements, axis="last"), start + rows)
    columns = np.stack([slerp(t, x, y, by_sine=True) for x, y in zip((a - start).T, (b - start).T, strict=True)]).T
    for elements in (1, 1 << 20):
        close(merge("nuslerp", [a, b], given_base, weights, elements=elements, axis="first"), start + columns)


@pytest.mark.parametrize("axis", ["whole", "last", "first"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 2)])
def test_nuslerp_of_other_shapes(axis, shape):
    a, b = draw(3, 2, shape, base=False)
    found = merge("nuslerp", [a, b], None, [1.0, 3.0], axis=axis)
    if len(shape) < 2 or axis == "whole":
        close(found, slerp(0.75, a, b, by_sine=True))
    elif axis == "last":
        close(found[1, 2], slerp(0.75, a[1, 2], b[1, 2], by_sine=True))
    else:
        close(found[:, 2, 1], slerp(0.75, a[:, 2, 1], b[:, 2, 1], by_sine=True))


def test_nuslerp_without_weight_is_the_middle_and_of_parallel_vectors_straight():
    close(merge("nuslerp", [[1.0, 0], [0, 1.0]], None, [1.0, -1.0]), [0.70711, 0.70711])
    close(merge("nuslerp", [[1.0, 0], [3.0, 0]], None, [1.0, 1.0]), [2, 0])


# Multi-SLERP and the Karcher mean


def test_multislerp_by_hand():
    close(merge("multislerp", [[1.0, 0], [0, 2.0]]), [1.06066, 1.06066])
    close(merge("karcher", [[1.0, 0], [0, 2.0]]), [1.06066, 1.06066])


@given(seed=SEEDS, count=COUNTS, based=st.booleans(), shape=st.sampled_from([(6,), (3, 4), (2, 2, 3)]))
@settings(max_examples=60, deadline=None)
def test_multislerp_is_the_formula_and_keeps_the_length(seed, count, based, shape):
    base, models = draw(seed, count, shape)
    weights = np.random.default_rng(seed).uniform(0.2, 2, count).tolist()
    start = base if based else np.zeros_like(base)
    found = merge("multislerp", models, base if based else None, weights)
    close(found, start + multislerp([m - start for m in models], weights))
    size = sum(w * np.linalg.norm(m - start) for w, m in zip(weights, models, strict=True)) / sum(weights)
    assert np.linalg.norm(found.numpy() - start) == pytest.approx(size, rel=1e-4)


@given(seed=SEEDS, count=COUNTS)
@settings(max_examples=60, deadline=None)
def test_karcher_is_the_formula_and_one_way_between_two(seed, count):
    models = draw(seed, count, (12,), base=False)
    shifted = [m + 1.5 for m in models]  # of one half of the sphere, where the mean is unique
    close(merge("karcher", shifted), karcher(shifted))
    close(merge("karcher", shifted[::-1]), karcher(shifted), 1e-4)
    close(merge("karcher", shifted[:2]), merge("multislerp", shifted[:2]), 1e-4)
    close(merge("karcher", shifted[1:], shifted[0]), karcher(shifted))  # a base is one more model


def test_a_difference_of_zero_has_no_direction_and_costs_no_digits():
    base = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 100
    one = base + 0.01
    found = merge("multislerp", [base, one, base], base)
    close(found, base + (one - base) / 3, 1e-5)


def test_what_has_no_mean_direction_is_said_or_straight():
    with pytest.raises(MergeError, match="weighted directions at w add up to nothing"):
        merge("multislerp", [[1.0, 0], [-1.0, 0], [0.0, 0.0]])
    with pytest.raises(MergeError, match="weights .* add up to nothing"):
        merge("multislerp", [[1.0, 0], [0, 1.0]], None, [1.0, -1.0])
    close(merge("multislerp", [[1.0, 0], [-2.0, 0]]), [-0.5, 0])
    assert torch.isfinite(merge("karcher", [[1.0, 0], [-1.0, 0]])).all()
    close(merge("karcher", [[0.0, 0], [0.0, 0]]), [0, 0])
    close(merge("karcher", [[0.0, 0], [0.0, 4]]), [0, 2])  # the zero vector counts in the length


# nearswap and Arcee Fusion


@given(seed=SEEDS, t=st.floats(1e-5, 2))
@settings(max_examples=40, deadline=None)
def test_nearswap_is_a_clipped_step(seed, t):
    base, (other,) = draw(seed, 1)
    found = merge("nearswap", [other], base, t=t)
    close(found, base + np.clip(other - base, -t, t))
    w = np.clip(t / np.maximum(abs(other - base), 1e-6), 0, 1)
    close(found, w * other + (1 - w) * base)
    b, o = (torch.tensor(x, dtype=torch.float32) for x in (base, other))
    near = (o - b).abs() <= t
    assert torch.equal(found[near], o[near])


@given(seed=SEEDS, shape=st.sampled_from([(9,), (4, 5), (2, 3, 4)]))
@settings(max_examples=40, deadline=None)
def test_arcee_fusion_is_the_formula(seed, shape):
    base, (other,) = draw(seed, 1, shape)
    close(merge("arcee_fusion", [other], base), arcee(base, other))


def test_arcee_fusion_keeps_nothing_of_even_scores():
    """Scores 1..8 have the quartiles 2, 4 and 6: nothing reaches 4 + 1.5 * 4."""
    base = np.zeros(8)
    step = np.arange(1, 9) * 1e-2
    assert torch.equal(merge("arcee_fusion", [base + step], base), torch.zeros(8))
    step[7] = 1.0
    found = merge("arcee_fusion", [base + step], base)
    assert found[7] == 1.0 and not found[:7].any()


# Model Stock


def test_stock_by_hand():
    """cos 0.25 and two models: t = 0.4."""
    base = np.array([1.0, 1.0])
    one, two = np.array([1.0, 0.0]), np.array([0.25, math.sqrt(1 - 0.25**2)])
    close(merge("model_stock", [base + one, base + two], base), base + 0.4 * (one + two) / 2)


@given(seed=SEEDS, count=COUNTS, mean=st.sampled_from(["cosines", "angles"]))
@settings(max_examples=60, deadline=None)
def test_stock_is_the_formula(seed, count, mean):
    base, models = draw(seed, count, (5, 8))
    models = [m + 1.0 for m in models]
    close(merge("model_stock", models, base, mean=mean), stock(base, models, mean))
    rows = np.stack([stock(base[i], [m[i] for m in models], mean) for i in range(5)])
    close(merge("model_stock", models, base, mean=mean, filter_wise=True), rows, 1e-4)


def test_stock_of_equal_orthogonal_and_opposite_differences():
    base = np.array([0.3, -0.7, 0.1])
    close(merge("model_stock", [base + 1, base + 1, base + 1], base), base + 1)
    wide = torch.tensor([0.5, -0.25, 2.0])
    across = [wide + torch.tensor(v) for v in ([1.0, 0, 0], [0, 1.0, 0], [0, 0, 4.0])]
    assert torch.equal(merge("model_stock", across, wide), wide)
    assert torch.equal(merge("model_stock", [wide + 1, wide - 1], wide), wide)  # where the formula divides by zero
    against = [base + np.array([1.0, 0, 0]), base + np.array([-0.5, 1.0, 0])]
    assert stock(base, against)[1] < base[1]  # a negative t
    close(merge("model_stock", against, base), stock(base, against))
    close(merge("model_stock", against, base, clip=True), base)


# TSV-Merge, Iso-C, Iso-CTS


@given(seed=SEEDS, count=st.integers(2, 3), shape=st.sampled_from([(6, 6), (6, 9), (9, 6)]))
@settings(max_examples=40, deadline=None)
def test_tsv_and_iso_are_the_formulas(seed, count, shape):
    base, models = draw(seed, count, shape)
    close(merge("tsv", models, base), tsv(base, models), 2e-4)
    close(merge("iso-c", models, base), iso_cts(base, models, 1.0), 2e-4)
    for fraction in (0.0, 0.5, 0.8, 1.0):
        close(merge("iso-cts", models, base, common=fraction), iso_cts(base, models, fraction), 5e-4)
    values = torch.linalg.svdvals(merge("iso-c", models, base) - torch.tensor(base, dtype=torch.float32))
    assert float(values.max() - values.min()) < 1e-4


def test_iso_by_hand_and_of_low_rank():
    close(merge("iso-c", [np.diag([3.0, 1.0])], np.zeros((2, 2))), np.diag([2.0, 2.0]))
    low = np.outer([1.0, 2, 3], [1.0, 0, 1])
    close(merge("iso-c", [low], np.zeros((3, 3))), low)  # its one singular value is their mean
    close(merge("iso-cts", [low, low], np.zeros((3, 3)), common=0.4), 2 * low)  # what they share is no one's own


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_tsv_is_the_model_alone_and_the_exact_sum_of_what_is_orthogonal(seed):
    generator = np.random.default_rng(seed)
    base, (one,) = draw(seed, 1, (6, 8))
    close(merge("tsv", [one], base), one, 1e-4)
    u, v = (np.linalg.qr(generator.normal(size=(n, n)))[0] for n in (6, 8))
    s = generator.uniform(0.5, 2, 6)
    parts = [u[:, i : i + 2] @ np.diag(s[i : i + 2]) @ v[:, i : i + 2].T for i in (0, 2, 4)]
    close(merge("tsv", [base + p for p in parts], base), base + sum(parts), 1e-4)


def test_tsv_with_more_models_than_rows_keeps_one_component_of_each():
    base, models = draw(0, 3, (2, 8))
    found = merge("tsv", models, base) - torch.tensor(base, dtype=torch.float32)
    assert float(found.norm()) > 0.1 and torch.linalg.matrix_rank(found) == 2


@pytest.mark.parametrize("rule", ["tsv", "iso-c", "iso-cts"])
def test_what_is_no_matrix_has_the_mean(rule):
    for shape in [(), (5,), (2, 3, 2)]:
        base, models = draw(1, 3, shape)
        close(merge(rule, models, base, scale=2.0), base + 2 * (np.mean(models, 0) - base))


# KnOTS


@given(seed=SEEDS, count=COUNTS, shape=st.sampled_from([(4, 6), (6, 3), (5,), (3, 2, 2)]))
@settings(max_examples=40, deadline=None)
def test_a_linear_rule_in_the_shared_basis_is_the_rule(seed, count, shape):
    base, models = draw(seed, count, shape)
    weights = np.random.default_rng(seed).uniform(-1, 2, count).tolist()
    inner = {"name": "task_arithmetic", "scale": 0.7}
    close(
        merge("knots", models, base, weights, inner=inner), merge("task_arithmetic", models, base, weights, scale=0.7)
    )
    close(merge("knots", models[:1], base, inner="task_arithmetic"), models[0])


def test_ties_in_the_shared_basis():
    """Against the definition: TIES on S V_i, then U."""
    base, models = draw(5, 3, (4, 6))
    taus = [m - base for m in models]
    u, s, v = np.linalg.svd(np.concatenate(taus, 1), full_matrices=False)
    codes = [(s[:, None] * v)[:, i * 6 : i * 6 + 6] for i in range(3)]
    inside = merge("ties", codes, np.zeros((4, 6)), density=0.4, name="w").double().numpy()
    found = merge("knots", models, base, inner={"name": "ties", "density": 0.4})
    close(found, base + u @ inside, 1e-4)
    assert float((found - merge("ties", models, base, density=0.4)).abs().max()) > 0.05


def test_what_is_inside_decides_what_can_be_said():
    base, models = draw(0, 2)
    with pytest.raises(ConfigError, match="no merge method is called 'tie'"):
        merge("knots", models, base, inner="tie")
    with pytest.raises(ConfigError, match="has no setting 'densit'"):
        merge("lines", models, base, inner={"name": "ties", "densit": 0.1})
    with pytest.raises(ConfigError, match="slerp goes from one model to another"):
        merge("lines", models, base, inner="slerp")
    with pytest.raises(ConfigError, match="inner must be the name"):
        merge("lines", models, base, inner=3)
    with pytest.raises(MergeError, match="merges at least 2 models"):
        merge("lines", models[:1], base, inner="model_stock")
    with pytest.raises(ConfigError, match="knows no weights"):
        merge("lines", models, base, [1, 2], inner="model_stock")


# LiNeS


def layered(count, seed, layers=12):
    generator = torch.Generator().manual_seed(seed)
    names = ["embed.weight", *[f"h.{i}.w" for i in range(layers)], "norm.weight"]
    base = {name: torch.randn(3, 4, generator=generator) for name in names}
    models = [
        {name: tensor + torch.randn(3, 4, generator=generator) for name, tensor in base.items()} for _ in range(count)
    ]
    return base, models


def run_lines(base, models, weights=None, each=None, **options):
    return merged(
        Job([Held(f"m{i}", m) for i, m in enumerate(models)], "lines", options, Held("base", base), weights, each or {})
    )


def test_lines_by_hand():
    base, (model,) = layered(1, 0)
    found = run_lines(base, [model], alpha=0.1, beta=0.9)
    for name, factor in {
        "h.0.w": 0.1,
        "h.5.w": 0.1 + 0.9 * 5 / 11,
        "h.11.w": 1.0,
        "embed.weight": 0.1,
        "norm.weight": 0.1,
    }.items():
        close(found[name], base[name] + factor * (model[name] - base[name]), 1e-5)
    assert torch.equal(found["h.11.w"], model["h.11.w"])
    same = run_lines(base, [model], alpha=1.0, beta=0.0)
    assert all(torch.equal(same[n], model[n]) for n in model)
    close(run_lines(base, [model], alpha=0.1)["h.5.w"], found["h.5.w"])  # beta is 1 - alpha
    alone = run_lines(base, [model])  # one model alone is itself
    assert all(torch.allclose(alone[n], model[n], atol=1e-6) for n in model)


@pytest.mark.parametrize("inner", ["task_arithmetic", {"name": "ties", "density": 0.3}, {"name": "tsv"}])
def test_lines_on_other_rules_keeps_the_sum_of_the_sizes(inner):
    base, models = layered(3, 1, 4)
    kind, own = (
        (inner, {}) if isinstance(inner, str) else (inner["name"], {k: v for k, v in inner.items() if k != "name"})
    )
    plain = merged(Job([Held(f"m{i}", m) for i, m in enumerate(models)], kind, own, Held("base", base)))
    size = sum(float((plain[n] - base[n]).abs().sum()) for n in base)
    whole = sum(float(sum(m[n] - base[n] for m in models).abs().sum()) for n in base)
    alpha = whole / size / 3
    if inner == "task_arithmetic":
        assert alpha == pytest.approx(1 / 3)
    found = run_lines(base, models, inner=inner, beta=0.5)
    for name, layer in {"embed.weight": 0.0, "h.0.w": 0.0, "h.2.w": 2 / 3, "h.3.w": 1.0}.items():
        close(found[name], base[name] + (alpha + 0.5 * layer) * (plain[name] - base[name]), 1e-4)


def test_settings_reach_the_inner_rule():
    """Weights, settings of single models, and gradients inside."""
    base, models = layered(2, 2, 3)
    sources = [Held(f"m{i}", m) for i, m in enumerate(models)]
    weights, each = [0.5, 2.0], {"density": [0.2, 0.6]}
    plain = merged(Job(sources, "ties", {}, Held("base", base), weights, each))
    found = run_lines(base, models, weights, each, inner="ties", alpha=1.0)
    assert all(torch.equal(found[n], plain[n]) for n in base)
    steps = run_lines(base, models, inner={"name": "task_arithmetic", "scale": [0.0, 1.0]}, alpha=1.0)
    assert torch.allclose(steps["h.0.w"], base["h.0.w"])
    close(steps["h.1.w"], base["h.1.w"] + 0.5 * sum(m["h.1.w"] - base["h.1.w"] for m in models), 1e-5)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("slerp", {"t": "half"}, "t must be a number"),
        ("nearswap", {"t": -1.0}, "must not be negative"),
        ("nuslerp", {"axis": "rows"}, "axis must be one of"),
        ("karcher", {"tol": 0.0}, "tol positive"),
        ("model_stock", {"mean": "sines"}, "mean must be one of"),
        ("iso-cts", {"common": 2.0}, "common must be in"),
        ("knots", {"tolerance": 1.0}, "tolerance must be in"),
        ("lines", {"alpha": True}, "alpha must be a number or None"),
    ],
)
def test_wrong_settings_are_named(rule, options, message):
    base, models = draw(0, 1 if rule in ("slerp", "nearswap") else 2)
    with pytest.raises(ConfigError, match=message):
        merge(rule, models, base, **options)


@pytest.mark.parametrize(
    "rule", ["tsv", "iso-cts", "knots", "karcher", "model_stock", "slerp", "nearswap", "arcee_fusion"]
)
def test_numbers_that_are_none_are_named(rule):
    base, models = draw(0, 1 if rule in ("slerp", "nearswap", "arcee_fusion") else 2, (3, 3))
    models[-1][0, 0] = np.nan
    with pytest.raises(MergeError, match="not finite"):
        merge(rule, models, base)


@pytest.mark.parametrize("axis", ["whole", "last", "first"])
@pytest.mark.parametrize("shape", [(7, 5), (11,)])
def test_inner_products_are_those_of_whole_vectors_in_fp64(axis, shape, monkeypatch):
    """Also where a tensor is longer than a piece, and the last piece is shorter."""
    monkeypatch.setattr(_span, "PIECE", 4)
    draw = torch.Generator().manual_seed(0)
    points, origin = [torch.randn(shape, generator=draw) for _ in range(3)], torch.randn(shape, generator=draw)
    for start in (None, origin):
        vectors = torch.stack([(p if start is None else p - start).double() for p in points])
        said = {"whole": "n{0},m{0}->nm", "last": "n{1}i,m{1}i->{1}nm", "first": "ni{2},mi{2}->{2}nm"}[axis]
        letters = "ab"[: len(shape)]
        wanted = torch.einsum(said.format(letters, letters[:-1], letters[1:]), vectors, vectors)
        torch.testing.assert_close(_span.products(points, axis, start), wanted, rtol=1e-12, atol=1e-12)
