"""Evaluation and comparison on tiny models."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED, colours

import polytask as pt
from polytask.core.errors import ConfigError, DataError, MixError
from polytask.core.head import TextHead
from polytask.core.predict import batches, predict
from polytask.core.rows import windows
from polytask.core.task import Example
from polytask.evaluate.probe import probe

QUICK = {"epochs": 2, "batch_size": 4, "progress": False}


def test_every_sequence_is_in_one_batch_of_bounded_size():
    lengths, counts = [5, 9, 2, 7, 7, 1], [1, 3, 1, 2, 1, 4]
    made = batches(lengths, counts, 4)
    assert sorted(i for b in made for i in b) == list(range(6))
    assert all(sum(counts[i] for i in b) <= 4 for b in made)
    assert batches([3], [9], 4) == [[0]]  # a row that is larger than a batch still goes through, alone


def test_padding_and_batch_composition_do_not_change_predictions(encoder):
    task = colours(40)
    adapter = pt.learn(encoder, task, **QUICK)
    encoder.attach(adapter, "a")
    rows = adapter.head.rows(encoder, task.train, scoring=True)
    with encoder.using("a"):
        together = predict(encoder, adapter.head, rows, batch_size=16)
        alone = predict(encoder, adapter.head, rows, batch_size=1)
    assert together == alone


def test_the_bare_base_of_an_encoder_is_a_probe(encoder):
    task = colours(80)
    found = pt.evaluate(encoder, task)
    assert found.metric == "accuracy" and found.n == 20 and found.low <= found.value <= found.high
    fitted = probe(encoder, task)
    assert fitted.predict(encoder, task.train) == [
        e.target for e in task.train
    ]  # 40 points in 32 dimensions: separable


def test_an_adapter_that_does_nothing_scores_as_its_head_on_the_base(encoder, task):
    adapter = pt.learn(encoder, task, **QUICK)
    for patch in adapter.patches.values():
        torch.nn.init.zeros_(patch.B)
    encoder.attach(adapter, "a")
    with_adapter = pt.evaluate(encoder, task, "a", keep=True)
    bare = pt.evaluate(encoder, task, None, head=adapter.head, keep=True)
    assert with_adapter.predictions == bare.predictions


def test_probes_of_every_kind(encoder):
    texts = [f"item {i} is {'red' if i % 2 else 'blue'}" for i in range(40)]
    for kind, targets, labels in (
        ("multilabel", [["odd"] if i % 2 else [] for i in range(40)], ("odd",)),
        ("regress", [float(i % 2) for i in range(40)], ()),
        ("choose", [i % 2 for i in range(40)], ()),
    ):
        choices = ("blue", "red") if kind == "choose" else ()
        made = [Example((t,), y, choices=choices) for t, y in zip(texts, targets, strict=True)]
        task = pt.Task(name=kind, kind=kind, train=made[:30], dev=[], test=made[30:], labels=labels)
        assert 0 <= pt.evaluate(encoder, task).n == 10


def test_label_words_equal_the_likelihood_by_hand(decoder):
    """The chosen label is the one whose tokens are likeliest after the prompt, computed without padding or batching."""
    test = [Example(("abc",), "yes"), Example(("a much longer one",), "maybe")]
    task = pt.Task(name="t", kind="classify", train=[], dev=[], test=test,
                   labels=("maybe", "no", "yes"), instruction="say")  # fmt: skip
    found = pt.evaluate(decoder, task, keep=True).predictions
    for example, answer in zip(task.test, found, strict=True):
        values = {}
        for label in task.labels:
            left = decoder.processor(f"say\n\n{example.inputs[0]}\n", add_special_tokens=False)["input_ids"]
            right = decoder.processor(label, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = decoder.module(input_ids=torch.tensor([left + right])).logits[0].log_softmax(-1)
            values[label] = sum(float(logits[len(left) + i - 1, t]) for i, t in enumerate(right))
        assert answer == max(values, key=values.get)


def test_perplexity_scores_each_token_once(decoder):
    text = "a long text " * 40
    rows = windows(decoder, text, 50)
    ids = decoder.processor(text, add_special_tokens=False)["input_ids"]
    scored = [t for row in rows for t in row.sequences[0][row.starts[0] :]]
    assert scored == ids[1:]
    found = predict(decoder, TextHead("lm"), rows)
    assert sum(count for _, count in found) == len(ids) - 1


def test_generation_equals_one_at_a_time(decoder):
    examples = [Example(("ab",), "x"), Example(("a longer input",), "y"), Example(("c",), "z")]
    head = TextHead("generate", longest_answer=6)
    rows = head.rows(decoder, examples, scoring=True)
    assert head.write(decoder, rows) == [head.write(decoder, [row])[0] for row in rows]


def test_errors(encoder, task):
    with pytest.raises(ConfigError, match="no split 'tset'"):
        pt.evaluate(encoder, task, split="tset")
    with pytest.raises(DataError, match="'test' of the task 'colours' is empty"):
        pt.evaluate(encoder, pt.Task(**{**vars(task), "test": []}))
    with pytest.raises(MixError, match="nothing is attached"):
        pt.evaluate(encoder, task, "nobody")
    with pytest.raises(ConfigError, match="accuracy"):
        pt.evaluate(encoder, task, metric="acuracy")


@pytest.fixture
def library(encoder):
    tasks = [colours(40, "first"), colours(48, "second", start=100)]
    return tasks, pt.learn(encoder, tasks, together=True, **QUICK)


def test_compare_puts_everything_side_by_side(encoder, library, tmp_path):
    tasks, adapters = library
    encoder.attach(adapters[0], "mine")  # what is attached stays
    table = pt.compare(encoder, adapters, tasks, resamples=50)
    assert encoder.attached == ("mine",) and encoder.mix is None
    assert [m["method"] for m in table.methods] == [
        "majority",
        "base + probe",
        "adapter per task",
        "joint",
        "average of adapters",
    ]
    assert len(table.rows) == 10 and all(r["low"] <= r["value"] <= r["high"] for r in table.rows)
    encoder.attach(adapters[1], "second")
    own = pt.evaluate(encoder, tasks[1], "second")
    assert table.value("adapter per task", "second") == own.value
    assert table.cross["base"] == [table.value("base + probe", t.name) for t in tasks]
    change = table.forgetting["rows"][0]
    assert change["after"] == table.cross["values"][0][1] and change["before"] == table.cross["base"][1]
    method = table.methods[2]
    assert method["trained_parameters"] == sum(sum(p.numel() for p in a.parameters()) for a in adapters)
    json.loads(table.to_json(tmp_path / "t.json").read_text())
    page = table.to_html(tmp_path / "report.html").read_text()
    assert "adapter per task" in page


def test_compare_average_is_the_mean_of_the_changes(encoder, library):
    tasks, adapters = library
    table = pt.compare(encoder, adapters, tasks, joint=False, cross=False, resamples=10)
    for i, adapter in enumerate(adapters):
        encoder.attach(adapter, f"a{i}")
    found = pt.evaluate(encoder, tasks[0], {"a0": 0.5, "a1": 0.5}, head=adapters[0].head)
    assert table.value("average of adapters", "first") == found.value


def test_compare_reads_a_folder_and_refuses_strangers(encoder, library, tmp_path):
    tasks, adapters = library
    for adapter in adapters:
        adapter.save(tmp_path / adapter.name)
    table = pt.compare(encoder, tmp_path, tasks[:1], cross=False, resamples=10)
    assert table.tasks[0]["name"] == "first" and "joint" not in [m["method"] for m in table.methods]
    with pytest.raises(ConfigError, match="none of the adapters"):
        pt.compare(encoder, adapters, [colours(16, "third")])
    with pytest.raises(ConfigError, match="has no adapter folders"):
        pt.compare(encoder, tmp_path / "first", tasks)


def test_compare_of_a_generative_base(decoder):
    tasks = [colours(24, "first"), colours(24, "second", start=50)]
    adapters = pt.learn(decoder, tasks, together=True, **QUICK)
    table = pt.compare(decoder, adapters, tasks, joint=False, resamples=10)
    assert [m["method"] for m in table.methods][1] == "base, zero-shot"
    assert "perplexity" in table.forgetting["measure"] and table.forgetting["rows"][0]["before"] > 1


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the real collections are not here")
def test_minilm_probe_on_real_reviews_is_as_good_as_known():
    task = pt.Task.read(SHARED / "text" / "sentcls.jsonl.xz", where={"task": "trec"})
    small = pt.Task(**{**vars(task), "train": task.train[:1000], "test": task.test[:450]})
    found = pt.evaluate(pt.Model.load("minilm"), small)
    assert abs(found.value - 0.83) < 0.05  # frozen mean-pool and logistic regression
