"""Metrics: every value against its library, every resample against the library on the same indices."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polytask.core.errors import ConfigError, DataError
from polytask.core.metrics import (
    METRICS,
    Score,
    _draw,
    _finish_resamples,
    default_metric,
    majority,
    paired_difference,
    score,
)
from polytask.core.task import KINDS, Task
from polytask.core.task import METRICS as DEFAULTS

LABELS = ("bad", "fine", "good", "never")  # the last does not occur
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "far", "from", "my", "small", "dog"]
Data = tuple[list[Any], list[Any], tuple[str, ...]]


def label_sets(random: np.random.Generator, n: int) -> list[list[str]]:
    return [[name for name in LABELS[:3] if random.random() < 0.4] for _ in range(n)]


def sample(kind: str, n: int = 40, seed: int = 0) -> Data:
    """Predictions, targets and labels that agree in part, with ties among the numbers."""
    random = np.random.default_rng(seed)

    def noisy(targets: list[Any], others: list[Any], right: float = 0.7) -> list[Any]:
        return [t if random.random() < right else o for t, o in zip(targets, others, strict=True)]

    if kind == "classify":
        targets, others = ([LABELS[i] for i in random.integers(3, size=n)] for _ in range(2))
        return noisy(targets, others), targets, LABELS
    if kind == "multilabel":
        targets = label_sets(random, n)
        return noisy(targets, label_sets(random, n)), targets, LABELS
    if kind == "regress":
        numbers = random.normal(size=n).round(1)
        return (numbers + random.normal(size=n).round(1)).tolist(), numbers.tolist(), ()
    if kind == "choose":
        targets, others = (random.integers(4, size=n).tolist() for _ in range(2))
        return noisy(targets, others), targets, ()
    if kind == "generate":
        texts = [[WORDS[i] for i in random.integers(len(WORDS), size=random.integers(1, 12))] for _ in range(n)]
        changed = [noisy(words, ["Dog!"] * len(words), 0.8) for words in texts]
        return [" ".join(words) for words in changed], [" ".join(words) for words in texts], ()
    nll, tokens, size = random.gamma(2, 9, n), random.integers(1, 99, n), random.integers(1, 99, n)
    return list(zip(nll.tolist(), tokens.tolist(), size.tolist(), strict=True)), [None] * n, ()


def library(name: str, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> float:
    """The metric as its library has it, and the documented value where the library has none."""
    from scipy import stats
    from sklearn import metrics as sk
    from sklearn.preprocessing import MultiLabelBinarizer

    if targets and isinstance(targets[0], list):
        names = list(labels) or sorted({x for row in [*predictions, *targets] for x in row})
        binarizer = MultiLabelBinarizer(classes=names).fit([])
        predictions, targets = binarizer.transform(predictions), binarizer.transform(targets)
        chosen = None
    else:
        chosen = list(labels) or None
    f1 = {"y_true": targets, "y_pred": predictions, "labels": chosen}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in ("pearson", "spearman"):
            if np.ptp(predictions) == 0 or np.ptp(targets) == 0:
                return 0.0
            return float((stats.pearsonr if name == "pearson" else stats.spearmanr)(predictions, targets).statistic)
        if name == "r2" and np.ptp(targets) == 0:  # the library's own test for it fails on [0.1, 0.1, 0.1]
            return float(list(predictions) == list(targets))
        if name in ("bleu", "chrf"):
            from sacrebleu.metrics import BLEU, CHRF

            return (BLEU() if name == "bleu" else CHRF()).corpus_score(list(predictions), [list(targets)]).score / 100
        if name == "rouge-l":
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(["rougeL"])
            return float(
                np.mean([scorer.score(t, p)["rougeL"].fmeasure for p, t in zip(predictions, targets, strict=True)])
            )
        libraries: dict[str, Callable[[], float]] = {
            "accuracy": lambda: sk.accuracy_score(targets, predictions),
            "macro-f1": lambda: sk.f1_score(**f1, average="macro", zero_division=np.nan),
            "micro-f1": lambda: sk.f1_score(**f1, average="micro", zero_division=1.0),
            "matthews": lambda: sk.matthews_corrcoef(targets, predictions),
            "mse": lambda: sk.mean_squared_error(targets, predictions),
            "mae": lambda: sk.mean_absolute_error(targets, predictions),
            "r2": lambda: sk.r2_score(targets, predictions),
            "exact-match": lambda: sk.accuracy_score(
                [" ".join(t.lower().split()) for t in targets], [" ".join(p.lower().split()) for p in predictions]
            ),
            "perplexity": lambda: math.exp(sum(r[0] for r in predictions) / sum(r[1] for r in predictions)),
            "bits-per-byte": lambda: sum(r[0] for r in predictions) / sum(r[2] for r in predictions) / math.log(2),
        }
        return float(libraries[name]())


def pairs() -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name, metric in METRICS.items() if kind in metric.kinds]


def pick(values: Sequence[Any], at: Sequence[int]) -> list[Any]:
    return [values[i] for i in at]


# --- values are the libraries'


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_the_value_is_the_librarys(kind: str, name: str) -> None:
    predictions, targets, labels = sample(kind)
    value = METRICS[name].function(predictions, targets, labels)
    assert value == pytest.approx(library(name, predictions, targets, labels), abs=1e-12)
    assert 0 != value != 1  # a sample that says nothing would agree with anything


@pytest.mark.parametrize(("kind", "name"), pairs())
@pytest.mark.parametrize("n", [3, 40])
def test_each_resample_is_the_librarys_on_the_same_rows(kind: str, name: str, n: int) -> None:
    predictions, targets, labels = sample(kind, n, seed=1)
    metric = METRICS[name]
    table = metric.table(predictions, targets, labels)
    for drawn in _draw(n, 25, seed=3):
        expected = [library(name, pick(predictions, at), pick(targets, at), labels) for at in drawn]
        found = _finish_resamples(metric, table, drawn)
        if name in ("r2", "perplexity"):  # unbounded, so relative
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_the_interval_is_the_quantiles_of_those_resamples(kind: str, name: str) -> None:
    predictions, targets, labels = sample(kind)
    result = score(kind, predictions, targets, metric=name, labels=labels, resamples=200, seed=5, confidence=0.8)
    rows = [at for drawn in _draw(len(predictions), 200, seed=5) for at in drawn]
    values = [METRICS[name].function(pick(predictions, at), pick(targets, at), labels) for at in rows]
    low, high = np.quantile(values, [0.1, 0.9])
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-9)
    assert result.n == len(predictions)


names = st.sampled_from(["a", "b", "c", "d"])
whole = st.integers(-5, 5).map(float)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=30), st.booleans())
def test_label_metrics_agree_with_sklearn(rows: list[tuple[str, str]], given_labels: bool) -> None:
    predictions, targets = (list(column) for column in zip(*rows, strict=True))
    labels = ("d", "c", "b", "a", "e") if given_labels else ()
    for name in ("accuracy", "macro-f1", "micro-f1", "matthews"):
        value = METRICS[name].function(predictions, targets, labels)
        assert value == pytest.approx(library(name, predictions, targets, labels), abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(names).map(sorted), st.sets(names).map(sorted)), min_size=1, max_size=20))
def test_label_set_metrics_agree_with_sklearn(rows: list[tuple[list[str], list[str]]]) -> None:
    predictions, targets = (list(column) for column in zip(*rows, strict=True))
    assume(any(predictions) or any(targets))
    for name in ("accuracy", "macro-f1", "micro-f1"):
        value = METRICS[name].function(predictions, targets, ("a", "b", "c", "d"))
        assert value == pytest.approx(library(name, predictions, targets, ("a", "b", "c", "d")), abs=1e-12), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(whole, whole), min_size=2, max_size=30))
def test_number_metrics_agree_with_scipy_and_sklearn(rows: list[tuple[float, float]]) -> None:
    predictions, targets = (list(column) for column in zip(*rows, strict=True))
    for name in ("pearson", "spearman", "mse", "mae", "r2"):
        value = METRICS[name].function(predictions, targets)
        assert value == pytest.approx(library(name, predictions, targets, ()), rel=1e-12, abs=1e-12), name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(max_codepoint=127), max_size=30)] * 2), min_size=1, max_size=8))
def test_text_metrics_agree_with_rouge_score_and_sacrebleu(rows: list[tuple[str, str]]) -> None:
    predictions, targets = (list(column) for column in zip(*rows, strict=True))
    for name in ("rouge-l", "bleu", "chrf"):
        value = METRICS[name].function(predictions, targets)
        assert value == pytest.approx(library(name, predictions, targets, ()), abs=1e-12), name


# --- properties that hold whatever the data


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(pairs()), st.integers(1, 12), st.integers(0, 9), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_the_interval_is_one(pair: tuple[str, str], n: int, seed: int, random: Any) -> None:
    kind, name = pair
    predictions, targets, labels = sample(kind, n, seed)
    result = score(kind, predictions, targets, metric=name, labels=labels, resamples=50)
    order = list(range(n))
    random.shuffle(order)
    shuffled = score(kind, pick(predictions, order), pick(targets, order), metric=name, labels=labels, resamples=50)
    assert shuffled.value == pytest.approx(result.value, rel=1e-12, abs=1e-12)
    assert result.low <= result.high
    assert all(math.isfinite(x) for x in (result.value, result.low, result.high, *result.others.values()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 99))
def test_the_accuracy_lies_in_its_interval(right: list[bool], seed: int) -> None:
    result = score("choose", [int(r) for r in right], [1] * len(right), seed=seed, resamples=300)
    assert result.low <= result.value == sum(right) / len(right) <= result.high


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_about_95_of_100_accuracy_intervals_hold_the_true_rate(rate: float) -> None:
    random = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        right = (random.random(80) < rate).astype(int).tolist()
        result = score("choose", right, [1] * 80, resamples=300, seed=trial)
        held += result.low <= rate <= result.high
    assert 0.90 <= held / 300 <= 0.98  # percentile intervals of 80 rows hold a little less than they say


def test_more_examples_or_less_confidence_narrow_the_interval() -> None:
    def width(n: int, confidence: float) -> float:
        predictions, targets, labels = sample("classify", n)
        result = score("classify", predictions, targets, labels=labels, confidence=confidence)
        return result.high - result.low

    assert width(400, 0.95) < 0.6 * width(40, 0.95)
    assert width(40, 0.5) < 0.6 * width(40, 0.95)


def test_a_seed_gives_one_interval_and_another_seed_another() -> None:
    predictions, targets, _ = sample("regress", 60)
    first, again, other = (score("regress", predictions, targets, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert first.value == other.value


def test_resampling_in_many_blocks_draws_whole_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, targets, _ = sample("regress", 30)
    once = score("regress", predictions, targets, metric="mae", resamples=101)
    monkeypatch.setattr(
        sys.modules[Score.__module__], "BLOCK", 65
    )  # two resamples of 30 at a time, and a last one alone
    assert [len(drawn) for drawn in _draw(30, 5, 0)] == [2, 2, 1]
    split = score("regress", predictions, targets, metric="mae", resamples=101)
    assert split.value == once.value
    assert (split.low, split.high) == pytest.approx((once.low, once.high), rel=0.2)


# --- where a metric is undefined


def test_a_label_that_does_not_occur_does_not_lower_macro_f1() -> None:
    assert score("classify", ["a", "b"], ["a", "b"], metric="macro-f1", labels=("a", "b", "c")).value == 1.0
    assert score("multilabel", [["a"]], [["a"]], metric="macro-f1", labels=("a", "b")).value == 1.0


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_no_label_predicted_and_none_true_is_perfect(labels: tuple[str, ...]) -> None:
    result = score("multilabel", [[], []], [[], []], labels=labels)
    assert (result.value, result.low, result.high) == (1.0, 1.0, 1.0)
    assert result.others == {"accuracy": 1.0, "micro-f1": 1.0}


def test_a_name_that_is_no_label_is_a_miss() -> None:
    result = score("classify", ["a", "nonsense"], ["a", "b"], metric="macro-f1", labels=("a", "b"))
    assert result.value == 0.5  # a: 1, b: 0
    assert result.others["accuracy"] == 0.5
    assert result.others["micro-f1"] == pytest.approx(2 / 3)
    predictions, targets = ["a", "nonsense", "b", "b", "nonsense"], ["a", "b", "b", "a", "a"]
    for name in ("macro-f1", "micro-f1", "matthews"):
        value = METRICS[name].function(predictions, targets, ("a", "b"))
        assert value == pytest.approx(library(name, predictions, targets, ("a", "b")), abs=1e-12), name


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlation_with_a_constant_is_zero(name: str) -> None:
    constant, varied = [0.1] * 7, [0.3, 1.0, 2.0, 5.0, 5.0, 7.0, 9.0]
    for predictions, targets in ((constant, varied), (varied, constant), (constant, constant)):
        result = score("regress", predictions, targets, metric=name)
        assert (result.value, result.low, result.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["pearson", "spearman", "r2"])
def test_a_resample_without_variation_is_seen_exactly(name: str) -> None:
    predictions, targets = [0.1, 0.1, 0.1, 1.0], [0.1, 0.1, 0.1, 1.0]
    table = METRICS[name].table(predictions, targets, ())
    drawn = np.array([[0, 1, 2], [0, 1, 3]])
    values = _finish_resamples(METRICS[name], table, drawn)
    assert values[0] == (1.0 if name == "r2" else 0.0)  # three times 0.1 has a rounded mean, which looks like a spread
    assert values[1] == pytest.approx(library(name, pick(predictions, drawn[1]), pick(targets, drawn[1]), ()))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_correlation_does_not_depend_on_the_scale(scale: float) -> None:
    predictions, targets, _ = sample("regress")
    expected = METRICS["pearson"].function(predictions, targets)
    assert METRICS["pearson"].function([scale * p for p in predictions], targets) == pytest.approx(expected, rel=1e-12)


def test_matthews_of_a_constant_is_zero() -> None:
    result = score("classify", ["a"] * 5, ["a", "a", "b", "b", "b"], metric="matthews")
    assert (result.value, result.low, result.high) == (0.0, 0.0, 0.0)


def test_r2_of_constant_targets_is_one_only_if_all_is_right() -> None:
    assert score("regress", [2.0, 2.0], [2.0, 2.0], metric="r2").value == 1.0
    assert score("regress", [2.0, 2.1], [2.0, 2.0], metric="r2").value == 0.0
    assert score("regress", [0.3, 0.1, 0.1], [0.1] * 3, metric="r2").value == 0.0  # the mean of these is not 0.1


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_one_example_has_an_interval_of_one_point(kind: str, name: str) -> None:
    predictions, targets, labels = sample(kind, 1)
    result = score(kind, predictions, targets, metric=name, labels=labels)
    assert result.low == result.high == result.value
    assert math.isfinite(result.value)


def test_a_perplexity_beyond_floats_stays_finite() -> None:
    assert score("lm", [(5000.0, 2)], None).value == pytest.approx(math.exp(700))


# --- single metrics


def test_exact_match_folds_space_and_case_and_nothing_else() -> None:
    predictions = ["  New\n York ", "New York.", "the New York", "Straße"]
    targets = ["new york", "new york", "new york", "STRASSE"]
    assert [METRICS["exact-match"].function([p], [t]) for p, t in zip(predictions, targets, strict=True)] == [
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("prediction", "target", "value"),
    [
        ("наш дом", "Наш большой дом", 0.8),  # 2 of 2 and 2 of 3 words
        ("我喜欢猫", "我喜欢狗", 0.75),  # 3 of 4 characters
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),  # vowel signs do not cut a word
        ("naïve", "na", 0.0),  # nor do accents
        ("", "yes", 0.0),
    ],
)
def test_rouge_sees_every_script(prediction: str, target: str, value: float) -> None:
    assert METRICS["rouge-l"].function([prediction], [target]) == pytest.approx(value)


def test_bleu_does_not_advise_flags_that_are_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a cat sat on a mat ."] * 120
    assert METRICS["bleu"].function(texts, texts) == pytest.approx(1.0)
    assert caplog.text == ""


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    result = score("lm", [(math.log(2) * 30, 30), (math.log(8) * 10, 10)], None)
    assert result.value == pytest.approx(2 ** ((30 + 3 * 10) / 40))
    assert not result.higher_is_better
    assert result.others == {}  # no bytes, so no bits per byte
    assert score("lm", [(math.log(2) * 30, 30, 60)], None).others == {"bits-per-byte": pytest.approx(0.5)}


def test_the_others_are_all_metrics_of_the_kind() -> None:
    for kind in KINDS:
        predictions, targets, labels = sample(kind)
        result = score(kind, predictions, targets, labels=labels, resamples=10)
        expected = {name for name, metric in METRICS.items() if kind in metric.kinds} - {result.metric}
        assert set(result.others) == expected
        for name, value in result.others.items():
            assert value == METRICS[name].function(predictions, targets, labels)


def test_every_kind_has_its_default_among_the_metrics() -> None:
    assert {kind: default_metric(kind) for kind in KINDS} == DEFAULTS
    for kind in KINDS:
        assert kind in METRICS[default_metric(kind)].kinds


def test_numpy_values_are_taken() -> None:
    assert score("choose", np.array([1, 2]), np.array([1, 3])).value == 0.5
    assert score("regress", np.array([1.0, 2.0], dtype=np.float32), np.array([2, 4])).value == pytest.approx(1.0)


# --- two systems


@pytest.mark.parametrize("kind", KINDS)
def test_a_system_does_not_differ_from_itself(kind: str) -> None:
    predictions, targets, labels = sample(kind)
    result = paired_difference(kind, predictions, predictions, targets, labels=labels, resamples=100)
    assert (result.value, result.low, result.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_the_difference_turns_round_with_the_systems(kind: str, name: str) -> None:
    a, targets, labels = sample(kind, seed=1)
    b, *_ = sample(kind, seed=2)
    forth = paired_difference(kind, a, b, targets, metric=name, labels=labels, resamples=100)
    back = paired_difference(kind, b, a, targets, metric=name, labels=labels, resamples=100)
    assert forth.value == METRICS[name].function(a, targets, labels) - METRICS[name].function(b, targets, labels)
    assert (back.value, back.low, back.high) == pytest.approx((-forth.value, -forth.high, -forth.low))
    assert forth.others["a"] - forth.others["b"] == forth.value


def test_both_systems_are_scored_on_the_same_resamples() -> None:
    a, targets, labels = sample("classify", seed=1)
    b, *_ = sample("classify", seed=2)
    found = paired_difference("classify", a, b, targets, metric="macro-f1", labels=labels, resamples=50, seed=4)
    rows = [at for drawn in _draw(len(a), 50, seed=4) for at in drawn]
    first, second = (
        np.array([METRICS["macro-f1"].function(pick(p, at), pick(targets, at), labels) for at in rows]) for p in (a, b)
    )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(first - second, [0.025, 0.975])), abs=1e-12)


def test_pairing_finds_what_two_intervals_hide() -> None:
    random = np.random.default_rng(0)
    b = (random.random(200) < 0.6).astype(int)
    a = b.copy()
    a[np.flatnonzero(b == 0)[:8]] = 1  # as b, and eight more right
    first, second = (score("choose", x.tolist(), [1] * 200) for x in (a, b))
    difference = paired_difference("choose", a.tolist(), b.tolist(), [1] * 200)
    assert first.low < second.high  # the intervals overlap
    assert difference.value == pytest.approx(0.04)
    assert difference.low > 0
    assert str(difference).startswith("accuracy difference 0.040 [0.0")


# --- the score itself


def test_a_score_reads_well() -> None:
    assert str(Score("accuracy", 0.8125, 0.7512, 0.8678, 80)) == "accuracy 0.812 [0.751, 0.868] (n=80)"
    assert str(Score("perplexity", 123456.7, 1000.0, 2e9, 3)) == "perplexity 1.235e+05 [1000, 2e+09] (n=3)"


def test_a_score_survives_json_and_leaves_predictions_out() -> None:
    predictions, targets, labels = sample("classify")
    result = score("classify", predictions, targets, labels=labels, keep=True)
    assert result.predictions == predictions
    plain = json.loads(json.dumps(result.as_dict()))
    assert "predictions" not in plain
    assert Score(**plain) == result
    assert hash(result) == hash(replace(result, predictions=None))
    assert score("classify", predictions, targets, labels=labels).predictions is None


# --- what is refused


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (ConfigError, {"kind": "clasify"}, ["'clasify'", "did you mean 'classify'", "lm"]),
        (ConfigError, {"metric": "acuracy"}, ["'acuracy'", "did you mean 'accuracy'", "macro-f1", "matthews"]),
        (ConfigError, {"metric": "bleu"}, ["'bleu' scores generate, not classify", "accuracy, macro-f1, micro-f1"]),
        (ConfigError, {"resamples": -1, "confidence": 95}, ["resamples is -1", "confidence is 95"]),
        (DataError, {"predictions": [], "targets": []}, ["no examples to score"]),
        (DataError, {"targets": ["a"]}, ["prediction has 2, target has 1"]),
        (DataError, {"targets": None}, ["cannot be scored without targets"]),
        (DataError, {"predictions": ["a", 1]}, ["Prediction 2 of 2 is 1 (int)", "label name"]),
        (DataError, {"targets": ["a", None]}, ["Target 2 of 2 is None (NoneType)"]),
        (DataError, {"labels": ["a", "bb"]}, ["Target 2 of 2", "'b' (did you mean 'bb'?)", "labels are a, bb"]),
        (DataError, {"kind": "multilabel"}, ["Prediction 1 of 2 is 'a' (str)", "a list of label names"]),
        (
            DataError,
            {"kind": "regress", "predictions": [0.0, math.nan], "targets": [0, 0]},
            ["2 of 2 is nan", "finite"],
        ),
        (DataError, {"kind": "choose", "predictions": [0, 1.0], "targets": [0, 0]}, ["2 of 2 is 1.0", "an int"]),
        (
            DataError,
            {"kind": "lm", "predictions": [(1.0, 2), (0.0, 0)]},
            ["2 of 2 is (0.0, 0)", "leave empty rows out"],
        ),
        (DataError, {"kind": "lm", "predictions": [(1, 2)], "metric": "bits-per-byte"}, ["(nll, tokens, bytes)"]),
    ],
)
def test_what_cannot_be_scored_says_why(error: type[Exception], arguments: dict[str, Any], words: list[str]) -> None:
    given_ = {"kind": "classify", "predictions": ["a", "b"], "targets": ["a", "b"], **arguments}
    with pytest.raises(error) as caught:
        score(given_.pop("kind"), given_.pop("predictions"), given_.pop("targets"), **given_)
    for word in words:
        assert word in str(caught.value)


def test_a_pair_names_the_system_at_fault() -> None:
    with pytest.raises(DataError, match="prediction of b has 1, target has 2"):
        paired_difference("classify", ["a", "b"], ["a"], ["a", "b"])
    with pytest.raises(DataError, match="Prediction of b 2 of 2 is 3"):
        paired_difference("classify", ["a", "b"], ["a", 3], ["a", "b"])
    with pytest.raises(DataError, match="no examples"):
        METRICS["accuracy"].function([], [])


# --- the majority baseline


def task(
    kind: str, train: list[Any], labels: tuple[str, ...] = (), choices: Sequence[Sequence[str]] = ((), ())
) -> Task:
    from polytask.core.task import Example

    rows = [Example((f"train {i}",), target) for i, target in enumerate(train)]
    test = [Example((f"test {i}",), None, tuple(c)) for i, c in enumerate(choices)]
    return Task("t", kind, rows, [], test, labels)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (task("classify", ["b", "a", "b"], ("a", "b")), ["b", "b"]),
        (task("classify", ["a", "b"], ("b", "a")), ["b", "b"]),  # a tie goes to the first label
        (task("multilabel", [["x", "y"], ["y"], ["x", "y"], ["z"]], ("z", "y", "x")), [["y"], ["y"]]),  # x: just half
        (task("regress", [1.0, 2.0, 6.0]), [3.0, 3.0]),
        (task("choose", [2, 2, 1, 1, 2, 0], choices=["abc", "ab"]), [2, 1]),  # the second row has no third choice
        (task("choose", [3], choices=["ab"]), [0]),
        (task("generate", ["no", "yes", "yes"]), ["yes", "yes"]),
        (task("lm", [None]), None),
    ],
)
def test_majority(made: Task, expected: list[Any] | None) -> None:
    assert majority(made) == expected


def test_no_training_examples_have_no_majority() -> None:
    with pytest.raises(DataError, match="'t' has no training examples"):
        majority(task("classify", []))


def test_the_majority_can_be_scored() -> None:
    rows = [{"text": f"text {i}", "label": "good" if i % 3 else "bad"} for i in range(90)]
    made = Task.read(rows, name="t")
    targets = [example.target for example in made.test]
    result = score(made.kind, majority(made), targets, labels=made.labels)
    assert result.value == targets.count("good") / len(targets)
    assert result.others["matthews"] == 0.0


# --- cost


def test_the_import_is_light() -> None:
    heavy = "('sklearn', 'scipy', 'sacrebleu', 'rouge_score', 'nltk', 'torch')"
    code = f"import sys, {Score.__module__}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("kind", "name"), pairs())
def test_1000_resamples_of_1000_rows_are_quick(kind: str, name: str) -> None:
    predictions, targets, labels = sample(kind, 1000)
    metric = METRICS[name]
    table = metric.table(predictions, targets, labels)
    spent = []
    for _ in range(3):  # the best of three, so that a busy machine does not fail it
        start = time.perf_counter()
        for drawn in _draw(1000, 1000, 0):
            _finish_resamples(metric, table, drawn)
        spent.append(time.perf_counter() - start)
    assert min(spent) < 1.0  # 0.01 to 0.2 s; calling a library on each resample takes 1 to 400 s
