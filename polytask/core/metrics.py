"""Metrics with confidence intervals.

A metric is a *table* of per-example statistics and a way to *finish* it. Accuracy's table is one column of rights and
wrongs and it finishes with a mean; macro-F1's counts hits, predictions and truths per label; corpus BLEU's holds n-gram
counts per sentence. A bootstrap then only sums the table's rows over again, so thousands of resamples cost one matrix
product and nothing is tokenised twice. Values equal those of scikit-learn, SciPy, rouge-score and sacrebleu, except
where those are undefined or blind, which the table below says.

What predictions and targets are, by kind of task:

========== =========================================== ====================
kind       predictions                                 targets
========== =========================================== ====================
classify   label names                                 label names
multilabel lists of label names                        lists of label names
regress    finite numbers                              finite numbers
choose     indices of choices                          indices of choices
generate   texts                                       texts
lm         (nll in nats, tokens) or (nll, tokens,      ignored
           bytes) for each row
========== =========================================== ====================

Every value is on its library's scale, except `bleu` and `chrf`, which are divided by 100 to lie in 0..1 as others do.

========================= =============================================================================================
metric                    conventions
========================= =============================================================================================
accuracy                  multilabel: the whole set must be right (subset accuracy).
macro-f1, micro-f1        over `labels` where they are given. A label that is neither predicted nor true in the
                          (re)sample has no F1 and is left out of the mean (`zero_division=nan`), so a perfect model
                          scores 1 on a small test set; if none occurs at all, the value is 1, as nothing was missed or
                          made up. A predicted name that is not in `labels` is a miss of the true one.
matthews                  0 where predictions or targets are constant, as no association can be seen then.
pearson, spearman         0 where predictions or targets are constant, for the same reason.
r2                        of constant targets: 1 if every prediction is right, else 0 (scikit-learn's `force_finite`,
                          which misses constants like 0.1 whose mean is rounded).
exact-match               after collapsing white space and folding case. Punctuation and articles stay.
rouge-l                   mean F-measure, no stemming. rouge-score sees only a-z and 0-9, so that other scripts score
                          0; here words of all scripts count (characters one by one where a script puts no spaces, as
                          Chinese or Thai). The same for ASCII text.
bleu, chrf                of the corpus, sacrebleu's defaults (13a tokens, case kept, exponential smoothing; chrF2).
perplexity, bits-per-byte exp(sum nll / sum tokens) and sum nll / (ln 2 · sum bytes); perplexity is at most exp(700).
========================= =============================================================================================
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask.core.errors import ConfigError, DataError, listing, nearest
from polytask.core.task import KINDS
from polytask.core.task import METRICS as DEFAULTS

if TYPE_CHECKING:
    from polytask.core.task import Task

Table = Any  # (n, k): a float or int array, or a sparse one of counts
BLOCK = 250_000  # numbers in one block of resamples: 2 MB stay in the cache, which is ten times faster than 16 MB
MAX_EXPONENT = 700.0  # exp of more does not fit a float64; a finite value keeps intervals and JSON valid


@dataclass(frozen=True)
class Score:
    """A metric's value on `n` examples and its bootstrap interval, from `low` to `high`.

    `others` holds the values of the other metrics for the same kind of task. `predictions` are kept on request and do
    not take part in comparisons.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    higher_is_better: bool = True
    others: dict[str, float] = field(default_factory=dict, hash=False)
    predictions: list[Any] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        value, low, high = (f"{x:.3f}" if abs(x) < 1000 else f"{x:.4g}" for x in (self.value, self.low, self.high))
        return f"{self.metric} {value} [{low}, {high}] (n={self.n})"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them, without the predictions; `Score(**d)` reads them back."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "predictions"}
        return {**plain, "others": dict(self.others)}


@dataclass(frozen=True)
class Metric:
    """One metric, in two steps so that resampling needs only the second.

    Args:
        name: as the field writes it.
        kinds: the kinds of task whose predictions it can score.
        table: (predictions, targets, labels) -> per-example statistics (n, k).
        finish: if it `decomposes`, (sums (R, k), n) -> values (R,); otherwise (samples (k, R, n), n) -> values (R,).
        higher_is_better: False for errors and perplexity.
        decomposes: whether sums of the table's rows are all it needs.
    """

    name: str
    kinds: tuple[str, ...]
    table: Callable[[Sequence[Any], Sequence[Any], Sequence[str]], Table]
    finish: Callable[[np.ndarray, int], np.ndarray]
    higher_is_better: bool = True
    decomposes: bool = True

    def function(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str] = ()) -> float:
        """The value on all examples. Raises DataError for none, or for lengths that differ."""
        _check_lengths(predictions, targets)
        return self.of_table(self.table(predictions, targets, labels))

    def of_table(self, table: Table) -> float:
        """The value of a table (n, k)."""
        whole = table.sum(axis=0)[None] if self.decomposes else table.T[:, None]
        return float(self.finish(whole, table.shape[0])[0])


def default_metric(kind: str) -> str:
    """The metric a task of this kind is reported with. Raises ConfigError for an unknown kind."""
    _check_kind(kind)
    return DEFAULTS[kind]


def score(
    kind: str,
    predictions: Sequence[Any],
    targets: Sequence[Any] | None,
    *,
    metric: str | None = None,
    labels: Sequence[str] = (),
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    keep: bool = False,
) -> Score:
    """The metric's value with its percentile bootstrap interval over examples; the same seed gives the same interval.

    Example: ``score("classify", ["yes", "no"], ["yes", "yes"])`` is ``accuracy 0.500 [0.000, 1.000] (n=2)``.

    A percentile interval need not contain the value where the metric is biased in small samples (macro-F1, BLEU).
    `keep` puts the predictions into the score. `labels` are all label names of a classify or multilabel task.

    Raises ConfigError for an unknown kind or metric, one that does not fit the kind, or settings out of range;
    DataError for no examples, lengths that differ, or a prediction or target that is not what the kind asks for.
    """
    chosen = choose_metric(kind, metric)
    _check_settings(resamples, confidence)
    targets = _check_data(kind, {"prediction": predictions}, targets, labels)
    table = chosen.table(predictions, targets, labels)
    n = table.shape[0]
    values = [_finish_resamples(chosen, table, drawn) for drawn in _draw(n, resamples, seed)]
    value = chosen.of_table(table)
    low, high = _interval(values, confidence) if resamples else (value, value)
    return Score(
        metric=chosen.name,
        value=value,
        low=low,
        high=high,
        n=n,
        higher_is_better=chosen.higher_is_better,
        others=_others(kind, chosen.name, predictions, targets, labels),
        predictions=list(predictions) if keep else None,
    )


def paired_difference(
    kind: str,
    a: Sequence[Any],
    b: Sequence[Any],
    targets: Sequence[Any] | None,
    *,
    metric: str | None = None,
    labels: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Score:
    """metric(a) - metric(b) on the same examples, with the interval of a paired bootstrap.

    Both are scored on the same resamples, so what makes an example hard for both cancels. The two values are in
    `others` as ``a`` and ``b``. An interval without 0 is a difference that resampling the test set does not explain;
    whether it is a gain depends on `higher_is_better`.

    Raises what `score` raises.
    """
    chosen = choose_metric(kind, metric)
    _check_settings(resamples, confidence)
    targets = _check_data(kind, {"prediction of a": a, "prediction of b": b}, targets, labels)
    first, second = (chosen.table(predictions, targets, labels) for predictions in (a, b))
    n = first.shape[0]
    values = [
        _finish_resamples(chosen, first, drawn) - _finish_resamples(chosen, second, drawn)
        for drawn in _draw(n, resamples, seed)
    ]
    low, high = _interval(values, confidence)
    both = {"a": chosen.of_table(first), "b": chosen.of_table(second)}
    name = f"{chosen.name} difference"
    return Score(name, both["a"] - both["b"], low, high, n, chosen.higher_is_better, both)


def majority(task: Task) -> list[Any] | None:
    """What a model that never looks at its input would predict on the test split; None for lm, which has no such thing.

    Learnt from the train split: the most frequent label (classify), choice (choose, among those the row has) or answer
    (generate), the labels that more than half of the rows have (multilabel), or the mean (regress). Ties go to the
    label that comes first in `task.labels`, and else to the smallest. Raises DataError for an empty train split.
    """
    if task.kind == "lm":
        return None
    if not task.train:
        raise DataError(
            f"Task {task.name!r} has no training examples to take the majority of. Give it a train split, "
            f"or leave the majority baseline out."
        )
    targets = [example.target for example in task.train]
    if task.kind == "regress":
        return [math.fsum(targets) / len(targets)] * len(task.test)
    order = {label: position for position, label in enumerate(task.labels)}
    if task.kind == "multilabel":
        counts = Counter(label for target in targets for label in set(target))
        common = [label for label, count in counts.items() if 2 * count > len(targets)]
        common.sort(key=lambda label: (order.get(label, len(order)), label))
        return [list(common) for _ in task.test]
    counts = Counter(targets)
    ranked = sorted(counts, key=lambda value: (-counts[value], order.get(value, len(order)), value))
    if task.kind == "choose":
        return [next((index for index in ranked if index < len(e.choices)), 0) for e in task.test]
    return [ranked[0]] * len(task.test)


# --- resampling. R resamples of n examples, k statistics each.


def _draw(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of resampled indices (R, n). Depends on nothing but the arguments, so systems share their resamples."""
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // n)
    for start in range(0, resamples, step):
        yield rng.integers(n, size=(min(step, resamples - start), n))


def _finish_resamples(metric: Metric, table: Table, drawn: np.ndarray) -> np.ndarray:
    """The metric on each resample: table (n, k), drawn (R, n) -> (R,)."""
    n = drawn.shape[1]
    if metric.decomposes:
        return metric.finish(_count(drawn, n) @ table, n)  # (R, n) @ (n, k) -> (R, k)
    # Column by column: indexing the whole table would leave its columns interleaved, and every later sum slow.
    return metric.finish(np.stack([np.ascontiguousarray(column)[drawn] for column in table.T]), n)  # (k, R, n)


def _count(codes: np.ndarray, size: int) -> np.ndarray:
    """How often each code occurs in each row: (R, n) of 0..size-1 -> (R, size), as floats."""
    rows = len(codes)
    shifted = codes + size * np.arange(rows)[:, None]
    return np.bincount(shifted.ravel(), minlength=rows * size).reshape(rows, size).astype(float)


def _interval(values: list[np.ndarray], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


# --- tables: (predictions, targets, labels) -> (n, k)


def _equal(predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """(n, 1): 1 where prediction and target are equal."""
    return np.array([[p == t] for p, t in zip(predictions, targets, strict=True)], dtype=float)


def _same_labels(predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """(n, 1): 1 where label, index or set of labels is the right one."""
    if isinstance(targets[0], (list, tuple, set, frozenset)):
        predictions, targets = [frozenset(p) for p in predictions], [frozenset(t) for t in targets]
    return _equal(predictions, targets, labels)


def _same_text(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, 1): 1 where the texts are equal up to white space and case."""

    def normal(text: str) -> str:
        return " ".join(text.split()).casefold()

    return _equal([normal(p) for p in predictions], [normal(t) for t in targets], labels)


def _label_counts(predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> Table:
    """(n, 3 L) sparse: hits, predictions and truths of each of the L labels; all that occur where none are given."""
    from scipy.sparse import csr_array, hstack  # type: ignore[import-untyped]

    def sets(values: Sequence[Any]) -> list[set[str]]:
        return [{v} if isinstance(v, str) else set(v) for v in values]

    predicted, true = sets(predictions), sets(targets)
    names = list(dict.fromkeys(labels)) or sorted(set().union(*predicted, *true))
    column = {name: position for position, name in enumerate(names)}

    def indicator(rows: list[set[str]]) -> Any:
        cells = [(row, column[name]) for row, found in enumerate(rows) for name in found if name in column]
        at = np.array(cells, dtype=int).reshape(-1, 2).T  # (2, cells)
        return csr_array((np.ones(len(cells)), (at[0], at[1])), shape=(len(rows), len(names)))

    has, wants = indicator(predicted), indicator(true)  # (n, L)
    return hstack([has * wants, has, wants], format="csr")  # (n, 3 L)


def _all_label_counts(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> Table:
    """As _label_counts, of every label that occurs: Matthews needs each row to be in one column."""
    return _label_counts(predictions, targets, ())


def _numbers(predictions: Sequence[float], targets: Sequence[float], labels: Sequence[str]) -> np.ndarray:
    """(n, 2): prediction and target."""
    return np.column_stack([np.asarray(predictions, dtype=float), np.asarray(targets, dtype=float)])


def _scaled(predictions: Sequence[float], targets: Sequence[float], labels: Sequence[str]) -> np.ndarray:
    """(n, 2): prediction and target, divided by the largest of each, so that squares neither overflow nor vanish."""
    table = _numbers(predictions, targets, labels)
    largest = np.abs(table).max(axis=0)
    return table / np.where(largest > 0, largest, 1.0)


def _order_codes(predictions: Sequence[float], targets: Sequence[float], labels: Sequence[str]) -> np.ndarray:
    """(n, 2) integers: the place of each number among the distinct ones, from 0."""
    table = _numbers(predictions, targets, labels)
    return np.column_stack([np.unique(table[:, i], return_inverse=True)[1] for i in range(2)])


def _errors(
    power: Callable[[np.ndarray], np.ndarray],
    predictions: Sequence[float],
    targets: Sequence[float],
    labels: Sequence[str],
) -> np.ndarray:
    """(n, 1): the error of each prediction, squared or absolute."""
    table = _numbers(predictions, targets, labels)
    return power(table[:, :1] - table[:, 1:])


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


class _Words:
    """Lower-case words of every script, in the interface of rouge-score."""

    def __init__(self) -> None:
        # Vowel signs and accents on their own belong to the word they stand in, and Python's \w leaves them out.
        marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M")
        self.token = re.compile(rf"[{SPACELESS}]|[^\W_{SPACELESS}](?:[^\W_{SPACELESS}]|[{marks}])*")

    def tokenize(self, text: str) -> list[str]:
        return self.token.findall(text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _rouge(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, 1): the ROUGE-L F-measure of each text."""
    scorer = _rouge_scorer()
    pairs = zip(predictions, targets, strict=True)
    return np.array([[scorer.score(target, prediction)["rougeL"].fmeasure] for prediction, target in pairs])


@cache
def _sacrebleu(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # `force` only silences the advice about text that looks tokenised, which names a flag we do not have.
    return BLEU(force=True) if name == "bleu" else CHRF()


# Two methods of sacrebleu that its own bootstrap uses are private; the tests hold them against `corpus_score`.


def _ngrams(name: str, predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, k) integers: n-gram counts and lengths of each text, as sacrebleu keeps them."""
    return np.array(_sacrebleu(name)._extract_corpus_statistics(list(predictions), [list(targets)]))


def _surprisal(
    unit: int, predictions: Sequence[Sequence[float]], targets: Sequence[Any], labels: Sequence[str]
) -> np.ndarray:
    """(n, 2): nll in nats and the number of tokens (unit 1) or bytes (unit 2). Raises DataError without bytes."""
    for number, row in enumerate(predictions, 1):
        if len(row) <= unit:
            raise DataError(f"Prediction {number} is {row!r}; bits-per-byte needs (nll, tokens, bytes) for each row.")
    return np.array([(row[0], row[unit]) for row in predictions], dtype=float)


# --- finishes: sums (R, k), n -> (R,), or samples (2, R, n), n -> (R,) where a metric does not decompose


def _mean(sums: np.ndarray, n: int) -> np.ndarray:
    return sums[:, 0] / n


def _split(sums: np.ndarray) -> np.ndarray:
    """(R, 3 L) -> hits, predictions and truths, (3, R, L)."""
    return np.moveaxis(sums.reshape(len(sums), 3, sums.shape[1] // 3), 1, 0)


def _ratio(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    """above / below, and `otherwise` where below is 0."""
    return np.asarray(np.divide(above, below, out=np.full(below.shape, otherwise), where=below > 0))


def _macro_f1(sums: np.ndarray, n: int) -> np.ndarray:
    hits, predicted, true = _split(sums)
    f1 = _ratio(2 * hits, predicted + true, 0.0)  # (R, L)
    return _ratio(f1.sum(axis=1), (predicted + true > 0).sum(axis=1).astype(float), 1.0)


def _micro_f1(sums: np.ndarray, n: int) -> np.ndarray:
    hits, predicted, true = _split(sums).sum(axis=2)  # (R,) each
    return _ratio(2 * hits, predicted + true, 1.0)


def _matthews(sums: np.ndarray, n: int) -> np.ndarray:
    """The multiclass coefficient: a correlation of one-hot predictions and truths. All counts are exact integers."""
    hits, predicted, true = _split(sums)
    together = n * hits.sum(axis=1) - (predicted * true).sum(axis=1)
    apart = np.sqrt(n * n - (predicted**2).sum(axis=1)) * np.sqrt(n * n - (true**2).sum(axis=1))
    return _ratio(together, apart, 0.0)


def _pearson(samples: np.ndarray, n: int) -> np.ndarray:
    varies = (np.ptp(samples, axis=2) > 0).all(axis=0)  # exact, where a sum of squares would leave rounding noise
    x, y = samples - samples.mean(axis=2, keepdims=True)  # (R, n) each
    spread = np.sqrt((x * x).sum(axis=1)) * np.sqrt((y * y).sum(axis=1))
    return np.where(varies, np.clip(_ratio((x * y).sum(axis=1), spread, 0.0), -1.0, 1.0), 0.0)


def _spearman(samples: np.ndarray, n: int) -> np.ndarray:
    """Pearson of the ranks within each resample. Samples are places among the distinct values, so counting sorts."""
    ranks = np.empty(samples.shape)
    for codes, ranked in zip(samples, ranks, strict=True):  # (R, n) each
        counts = _count(codes, int(codes.max()) + 1)
        rank = np.cumsum(counts, axis=1) - (counts - 1) / 2  # the mean rank of tied values, (R, distinct)
        ranked[:] = np.take_along_axis(rank, codes, axis=1)
    return _pearson(ranks, n)


def _r2(samples: np.ndarray, n: int) -> np.ndarray:
    predicted, true = samples  # (R, n) each
    residual = ((true - predicted) ** 2).sum(axis=1)
    total = ((true - true.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    total = np.where(np.ptp(true, axis=1) > 0, total, 0.0)
    return np.where(total > 0, 1 - _ratio(residual, total, 0.0), (residual == 0).astype(float))


def _of_ngrams(name: str, sums: np.ndarray, n: int) -> np.ndarray:
    scorer = _sacrebleu(name)
    rows = np.rint(sums).astype(int).tolist()
    return np.array([scorer._compute_score_from_stats(row).score / 100 for row in rows])


def _perplexity(sums: np.ndarray, n: int) -> np.ndarray:
    return np.asarray(np.exp(np.minimum(sums[:, 0] / sums[:, 1], MAX_EXPONENT)))


def _bits(sums: np.ndarray, n: int) -> np.ndarray:
    return sums[:, 0] / (math.log(2) * sums[:, 1])


LABELLED = ("classify", "multilabel")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("classify", "multilabel", "choose"), _same_labels, _mean),
        Metric("macro-f1", LABELLED, _label_counts, _macro_f1),
        Metric("micro-f1", LABELLED, _label_counts, _micro_f1),
        Metric("matthews", ("classify",), _all_label_counts, _matthews),
        Metric("pearson", ("regress",), _scaled, _pearson, decomposes=False),
        Metric("spearman", ("regress",), _order_codes, _spearman, decomposes=False),
        Metric("mse", ("regress",), partial(_errors, np.square), _mean, higher_is_better=False),
        Metric("mae", ("regress",), partial(_errors, np.abs), _mean, higher_is_better=False),
        Metric("r2", ("regress",), _numbers, _r2, decomposes=False),
        Metric("exact-match", ("generate",), _same_text, _mean),
        Metric("rouge-l", ("generate",), _rouge, _mean),
        Metric("bleu", ("generate",), partial(_ngrams, "bleu"), partial(_of_ngrams, "bleu")),
        Metric("chrf", ("generate",), partial(_ngrams, "chrf"), partial(_of_ngrams, "chrf")),
        Metric("perplexity", ("lm",), partial(_surprisal, 1), _perplexity, higher_is_better=False),
        Metric("bits-per-byte", ("lm",), partial(_surprisal, 2), _bits, higher_is_better=False),
    )
}


def _others(
    kind: str, chosen: str, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]
) -> dict[str, float]:
    """The values of the other metrics of the kind that can be had of these predictions."""
    found = {}
    for name, metric in METRICS.items():
        if kind not in metric.kinds or name == chosen:
            continue
        if name == "bits-per-byte" and any(len(row) < 3 for row in predictions):
            continue  # the rows came without their bytes
        found[name] = metric.function(predictions, targets, labels)
    return found


# --- checks


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"There is no kind of task {kind!r}{nearest(kind, KINDS)}; the kinds are {listing(KINDS)}.")


def choose_metric(kind: str, name: str | None) -> Metric:
    """The metric, or the kind's default. Raises ConfigError for an unknown one or one that does not fit."""
    _check_kind(kind)
    name = name or DEFAULTS[kind]
    fitting = [metric.name for metric in METRICS.values() if kind in metric.kinds]
    if name not in METRICS:
        raise ConfigError(
            f"There is no metric {name!r}{nearest(name, METRICS)}; the metrics for {kind} are {listing(fitting)}."
        )
    if name not in fitting:
        raise ConfigError(
            f"The metric {name!r} scores {listing(METRICS[name].kinds)}, not {kind}; "
            f"the metrics for {kind} are {listing(fitting)}."
        )
    return METRICS[name]


def _check_settings(resamples: int, confidence: float) -> None:
    problems = []
    if resamples < 0:
        problems.append(f"resamples is {resamples}, and must be 0 (no interval) or more (1000 is usual)")
    if not 0 < confidence < 1:
        problems.append(f"confidence is {confidence}, and must lie between 0 and 1 (0.95 is usual)")
    if problems:
        raise ConfigError("Bootstrap interval: " + "; ".join(problems) + ".")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_label_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(item, str) for item in value)


def _is_surprisal(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) not in (2, 3) or not all(map(_is_finite, value)):
        return False
    return all(size > 0 for size in value[1:])


# What a prediction or a target must be, and how a message says it.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "classify": (lambda v: isinstance(v, str), "a label name (a text; not its index)"),
    "multilabel": (_is_label_list, "a list of label names"),
    "regress": (_is_finite, "a finite number"),
    "choose": (lambda v: isinstance(v, Integral) and not isinstance(v, bool), "the index of a choice, an int"),
    "generate": (lambda v: isinstance(v, str), "a text"),
    "lm": (
        _is_surprisal,
        "(nll in nats, tokens) or (nll, tokens, bytes), finite and with at least one token; leave empty rows out",
    ),
}


def _check_lengths(predictions: Sequence[Any], targets: Sequence[Any], what: str = "prediction") -> None:
    if len(predictions) != len(targets):
        raise DataError(
            f"The numbers of rows differ: {what} has {len(predictions)}, target has {len(targets)}. "
            f"Give one of each for every example."
        )
    if len(predictions) == 0:
        raise DataError("There are no examples to score. Give at least one prediction and its target.")


def _check_data(
    kind: str, predictions: dict[str, Sequence[Any]], targets: Sequence[Any] | None, labels: Sequence[str]
) -> Sequence[Any]:
    """The targets. Raises DataError for the first value that is not what the kind asks for; rows count from 1."""
    if kind == "lm":
        targets = [None] * len(next(iter(predictions.values())))
    elif targets is None:
        raise DataError(f"A {kind} task cannot be scored without targets. Give one for each prediction.")
    fits, expected = VALUES[kind]
    for what, values in predictions.items():
        _check_lengths(values, targets, what)
    for what, values in {**predictions, **({} if kind == "lm" else {"target": targets})}.items():
        for number, value in enumerate(values, 1):
            if not fits(value):
                came = repr(value)
                came = came if len(came) <= 60 else came[:57] + "..."
                raise DataError(
                    f"{what.capitalize()} {number} of {len(values)} is {came} ({type(value).__name__}); "
                    f"for a {kind} task it must be {expected}."
                )
    if kind in LABELLED and labels:
        for number, value in enumerate(targets, 1):
            unknown = sorted(({value} if isinstance(value, str) else set(value)) - set(labels))
            if unknown:
                raise DataError(
                    f"Target {number} of {len(targets)} has the label {unknown[0]!r}{nearest(unknown[0], labels)}; "
                    f"the labels are {listing(labels)}. Add it to the task's labels, or correct the row."
                )
    return targets
