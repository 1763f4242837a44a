"""Learning: what must hold at any scale, on tiny models."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal

import pytest
import torch
from conftest import colours, same_state

import polytask as pt
from polytask.core.errors import ConfigError, DataError, LearnError, ModelError
from polytask.core.head import Head, collate, head_for
from polytask.core.task import Example
from polytask.learn import learner, plan, precision
from polytask.learn.learner import Interrupted

QUICK = {"epochs": 2, "batch_size": 4, "progress": False, "precision": "fp32"}


def state(model):
    return {k: v.clone() for k, v in model.module.state_dict().items()}


def test_learning_changes_the_adapter_and_nothing_else(encoder, task):
    before = state(encoder)
    flags = [p.requires_grad for p in encoder.module.parameters()]
    other = pt.Adapter.new(encoder, seed=5)
    encoder.attach(other, "other")
    kept = other.state()
    adapter = pt.learn(encoder, task, form=pt.LoRA(rank=4), **QUICK)
    fresh = pt.Adapter.new(encoder, pt.LoRA(rank=4), seed=0)
    assert all(not torch.equal(p.B, fresh.patches[n].B) for n, p in adapter.patches.items())
    assert same_state(before, encoder.module)
    assert [p.requires_grad for p in encoder.module.parameters()] == flags
    assert encoder.attached == ("other",) and encoder.mix is None
    assert all(torch.equal(kept[n], p) and p.requires_grad for n, p in other.named_parameters())
    assert not encoder.module.training


def test_an_adapter_learns(encoder):
    task = colours(80)
    adapter = pt.learn(
        encoder, task, form=pt.LoRA(rank=8), epochs=12, lr=1e-2, batch_size=8, head_start="random", progress=False
    )
    encoder.attach(adapter, "a")
    assert pt.evaluate(encoder, task, "a").value > 0.9
    assert adapter.head.labels == ("blue", "red")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_same_seed_gives_the_same_adapter(encoder, task, dropout):
    form = pt.LoRA(rank=4, dropout=dropout)
    first = pt.learn(encoder, task, form=form, seed=3, **QUICK)
    torch.manual_seed(99)  # what the program did before does not matter
    second = pt.learn(encoder, task, form=form, seed=3, **QUICK)
    third = pt.learn(encoder, task, form=form, seed=4, **QUICK)
    assert first.hash == second.hash != third.hash


def test_learning_leaves_the_callers_random_numbers_alone(encoder, task):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    pt.learn(encoder, task, form=pt.LoRA(rank=2, dropout=0.5), **QUICK)
    assert torch.equal(torch.rand(3), expected)


def test_together_gives_what_separate_runs_give(encoder):
    tasks = [colours(24, "a"), colours(40, "b", start=100), colours(16, "c", start=7)]
    form = pt.LoRA(rank=4)
    apart = [pt.learn(encoder, t, form=form, seed=1, **QUICK) for t in tasks]
    joined = pt.learn(encoder, tasks, form=form, together=True, seed=1, **QUICK)
    assert [a.name for a in joined] == ["a", "b", "c"]
    for one, other in zip(apart, joined, strict=True):
        assert one.card.training["steps"] == other.card.training["steps"]
        for name, value in one.state().items():
            assert torch.allclose(value, other.state()[name], atol=1e-5), name


def test_joint_shares_one_adapter_with_a_head_each(encoder):
    tasks = [colours(24, "a"), colours(40, "b", start=100)]
    adapter = pt.learn(encoder, tasks, joint=True, **QUICK)
    assert adapter.name == "joint" and list(adapter.heads) == ["a", "b"]
    encoder.attach(adapter, "joint")
    assert pt.evaluate(encoder, tasks[1], "joint").n == 10


def test_full_form_is_fine_tuning(encoder, task):
    before = state(encoder)
    adapter = pt.learn(encoder, task, form=pt.Full(), sites="linear | norm", lr=1e-3, **QUICK)
    assert same_state(before, encoder.module)
    encoder.attach(adapter, "full")
    merged = adapter.merge_into(encoder)
    batch = dict(encoder.processor(["the car is red", "a boat"], padding=True, return_tensors="pt"))
    with torch.no_grad(), encoder.using("full"):
        assert torch.allclose(encoder.features(batch), merged.features(batch), atol=1e-5)


def test_accumulated_batches_are_one_large_batch(encoder):
    task = colours(32)
    whole = pt.learn(
        encoder, task, epochs=1, batch_size=8, schedule="constant", warmup=0.0, max_grad_norm=0.0, progress=False
    )
    parts = pt.learn(
        encoder,
        task,
        epochs=1,
        batch_size=4,
        accumulate=2,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=0.0,
        progress=False,
    )
    assert whole.card.training["steps"] == parts.card.training["steps"] == 2


def test_best_state_is_kept_and_patience_stops(encoder):
    task = colours(40)
    noisy = pt.Task(**{**vars(task), "dev": [Example(e.inputs, "red") for e in task.dev]})
    adapter = pt.learn(encoder, noisy, epochs=20, batch_size=4, lr=5e-2, patience=2, progress=False)
    training = adapter.card.training
    best = max(training["dev"], key=lambda record: record["mean"])
    assert training["best_step"] == next(r["step"] for r in training["dev"] if r["mean"] == best["mean"])
    assert training["steps"] < 100
    encoder.attach(adapter, "a")
    assert pt.evaluate(encoder, noisy, "a", split="dev").value == pytest.approx(best["mean"])


class StopAt(learner.Watch):
    at = 3

    def step(self, step, *args, **kwargs):
        super().step(step, *args, **kwargs)
        if step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_goes_on_bit_for_bit(encoder, task, tmp_path, monkeypatch):
    form = pt.LoRA(rank=4, dropout=0.3)
    straight = pt.learn(encoder, task, form=form, **QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(learner, "Watch", StopAt)
        with pytest.raises(Interrupted, match="stopped at step 3 of 6 and saved .* repeat the same command"):
            pt.learn(encoder, task, form=form, out=tmp_path / "run", **QUICK)
    assert encoder.attached == () and encoder.mix is None
    with pytest.raises(LearnError, match="other data or settings"):
        pt.learn(encoder, task, form=form, out=tmp_path / "run", **{**QUICK, "epochs": 3})
    resumed = pt.learn(encoder, task, form=form, out=tmp_path / "run", **QUICK)
    assert resumed.hash == straight.hash
    assert not (tmp_path / "run" / ".learning").exists()
    steps = [
        json.loads(line).get("loss") and json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").open()
    ]
    assert [s for s in steps if s] == [1, 2, 3, 4, 5, 6]


def test_interrupted_without_a_folder_says_that_nothing_is_saved(encoder, task, monkeypatch):
    monkeypatch.setattr(learner, "Watch", StopAt)
    with pytest.raises(Interrupted, match="nothing was saved"):
        pt.learn(encoder, task, **QUICK)


def test_the_same_call_again_reads_what_it_made(encoder, task, tmp_path):
    first = pt.learn(encoder, task, out=tmp_path / "run", **QUICK)
    stamp = (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns
    again = pt.learn(encoder, task, out=tmp_path / "run", **QUICK)
    assert again.hash == first.hash
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    other = pt.learn(encoder, task, out=tmp_path / "run", seed=8, **QUICK)
    assert other.hash != first.hash


def test_a_nan_loss_stops_with_the_last_good_adapter(encoder, task, tmp_path, monkeypatch):
    from polytask.core.head import LinearHead

    real, calls = LinearHead.loss, []

    def poisoned(self, out, rows):
        values, divisors = real(self, out, rows)
        calls.append(1)
        return (values * float("nan") if len(calls) == 5 else values), divisors

    monkeypatch.setattr(LinearHead, "loss", poisoned)
    with pytest.raises(LearnError, match=r"not a number at step 5, in the batch with colours\.jsonl:\d+") as error:
        pt.learn(encoder, task, out=tmp_path / "run", **QUICK)
    assert "last good adapter is in" in str(error.value)
    saved = pt.Adapter.load(tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in saved.parameters())
    assert same_state(encoder.module.state_dict(), encoder.module) and encoder.attached == ()


def test_running_out_of_memory_gives_advice(encoder, task, monkeypatch):
    def hungry(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")

    monkeypatch.setattr(Head, "run", hungry)
    with pytest.raises(LearnError, match="lower batch_size"):
        pt.learn(encoder, task, **QUICK)


def test_start_from_a_saved_adapter(encoder, task, tmp_path):
    first = pt.learn(encoder, task, out=tmp_path / "first", **QUICK)
    onward = pt.learn(encoder, task, start=tmp_path / "first", **QUICK)
    assert onward.card.parents == [first.hash]
    assert onward.hash != first.hash


@pytest.mark.parametrize("kind", ["classify", "choose", "generate", "lm"])
def test_generative_bases_learn_every_kind_they_can(decoder, kind):
    texts = [f"item {i} is {'red' if i % 2 else 'blue'}" for i in range(12)]
    made = {
        "classify": [Example((t,), t.split()[-1]) for t in texts],
        "choose": [Example((t,), i % 2, choices=("blue", "red")) for i, t in enumerate(texts)],
        "generate": [Example((t,), t.split()[-1]) for t in texts],
        "lm": [Example((t,), None) for t in texts],
    }[kind]
    labels = ("blue", "red") if kind == "classify" else ()
    task = pt.Task(name=kind, kind=kind, train=made[:8], dev=made[8:10], test=made[10:], labels=labels)
    before = pt.evaluate(decoder, task, metric="perplexity" if kind == "lm" else None)
    adapter = pt.learn(decoder, task, epochs=3, batch_size=4, lr=1e-2, progress=False)
    decoder.attach(adapter, "a")
    after = pt.evaluate(decoder, task, "a")
    assert after.n == 2
    if kind == "lm":
        assert after.value < before.value


def test_seq2seq_learns(seq2seq, task):
    adapter = pt.learn(seq2seq, task, **QUICK)
    seq2seq.attach(adapter, "a")
    assert pt.evaluate(seq2seq, task, "a").n == 6


@pytest.mark.parametrize("kind", ["multilabel", "regress", "choose"])
def test_encoders_learn_every_kind_they_can(encoder, kind):
    texts = [f"item {i} is {'red' if i % 2 else 'blue'} and {'big' if i % 3 else 'small'}" for i in range(24)]
    targets = {
        "multilabel": [[w for w in ("red", "big") if w in t] for t in texts],
        "regress": [float(i % 2) * 10 + 5 for i in range(24)],
        "choose": [i % 2 for i in range(24)],
    }[kind]
    choices = ("blue thing", "red thing") if kind == "choose" else ()
    made = [Example((t,), y, choices=choices) for t, y in zip(texts, targets, strict=True)]
    task = pt.Task(
        name=kind,
        kind=kind,
        train=made[:12],
        dev=made[12:18],
        test=made[18:],
        labels=("big", "red") if kind == "multilabel" else (),
    )
    adapter = pt.learn(encoder, task, **QUICK)
    encoder.attach(adapter, "a")
    found = pt.evaluate(encoder, task, "a", keep=True)
    assert found.n == 6 and len(found.predictions) == 6
    if kind == "regress":
        assert adapter.head.center == pytest.approx(10.0) and all(0 < p < 20 for p in found.predictions)


def test_images(tmp_path):
    import numpy as np
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4
    )
    model = pt.Model(transformers.ViTModel(config).eval())
    generator = np.random.default_rng(0)
    labels = ["dark", "light"] * 12
    images = [(generator.integers(0, 60, (16, 16, 3)) + (0 if y == "dark" else 180)).astype("uint8") for y in labels]
    task = pt.Task.from_arrays("light", images, labels)
    adapter = pt.learn(model, task, form=pt.LoRA(rank=4), epochs=4, batch_size=4, progress=False)
    model.attach(adapter, "a")
    assert model.kind == "image" and pt.evaluate(model, task, "a").value >= 0.5


def test_what_cannot_be_done_is_said(encoder, decoder, task):
    text = pt.Task(name="t", kind="generate", train=[Example(("a",), "b")], dev=[], test=[])
    with pytest.raises(ModelError, match="of kind 'generate', which the encoder model 'tiny-bert' cannot do"):
        pt.learn(encoder, text, **QUICK)
    with pytest.raises(DataError, match="no training examples"):
        pt.learn(encoder, pt.Task(**{**vars(task), "train": []}), **QUICK)
    with pytest.raises(ConfigError, match="together=True .* joint=True"):
        pt.learn(encoder, [task, colours(name="b")], **QUICK)
    with pytest.raises(ConfigError, match="exclude each other"):
        pt.learn(encoder, [task, colours(name="b")], joint=True, together=True, **QUICK)
    with pytest.raises(ConfigError, match=r"unknown setting 'epoch' \(did you mean 'epochs'"):
        pt.learn(encoder, task, epoch=2)
    with pytest.raises(ConfigError, match="lr: input should be greater than 0, got -1"):
        pt.learn(encoder, task, lr=-1)


def test_an_epoch_sees_everything_once_and_in_another_order_each_time():
    lengths = [[3, 9, 4, 8, 5, 7, 6] * 10]
    first, second = plan.epoch(lengths, 8, 0, 0), plan.epoch(lengths, 8, 0, 1)
    for batches in (first, second):
        assert sorted(i for b in batches for _, i in b) == list(range(70))
        assert all(len(b) <= 8 for b in batches)
    assert first != second and first == plan.epoch(lengths, 8, 0, 0)
    assert plan.epoch(lengths, 8, 1, 0) != first


def test_sampling_of_joint_tasks():
    lengths = [[5] * 900, [5] * 100]
    share = {
        s: sum(t == 1 for b in plan.epoch(lengths, 10, 0, 0, s, 2.0) for t, _ in b) / 1000
        for s in ("proportional", "temperature", "equal")
    }
    assert share["proportional"] == 0.1
    assert share["temperature"] == pytest.approx(0.25, abs=0.05)
    assert share["equal"] == pytest.approx(0.5, abs=0.05)


def test_lowered_precision_gives_back_the_very_tensors(encoder):
    before = state(encoder)
    pointers = [p.data_ptr() for p in encoder.module.parameters()]
    with precision.lowered(encoder.module, torch.bfloat16):
        assert encoder.dtype == torch.bfloat16
    assert [p.data_ptr() for p in encoder.module.parameters()] == pointers and same_state(before, encoder.module)


def test_precision_is_chosen_by_the_processor_and_the_loss(encoder, monkeypatch):
    module, device = encoder.module, torch.device("cpu")
    monkeypatch.setattr(precision, "quick_in_bf16", lambda *args: True)
    assert precision.choose("auto", module, device, lambda: 1.0)[0] == "bf16"
    losses = iter([1.0, 2.0])
    assert precision.choose("auto", module, device, lambda: next(losses)) == (
        "fp32", "one batch's loss differs in bf16: 2.0000 instead of 1.0000",
    )  # fmt: skip
    assert precision.choose("fp32", module, device, lambda: 1.0) == ("fp32", "asked for")
    monkeypatch.setattr(precision, "quick_in_bf16", lambda *args: False)
    assert precision.choose("auto", module, device, lambda: 1.0)[0] == "fp32"


def test_bf16_learning_keeps_the_adapter_in_fp32(encoder, task):
    adapter = pt.learn(encoder, task, **{**QUICK, "precision": "bf16"})
    assert all(p.dtype == torch.float32 for p in adapter.parameters())
    assert adapter.card.training["precision"] == "bf16" and encoder.dtype == torch.float32


def test_the_card_says_how_it_was_made(encoder, task):
    card = pt.learn(encoder, task, **QUICK).card
    assert card.base["fingerprint"] == encoder.fingerprint
    assert card.tasks[0]["name"] == "colours" and card.tasks[0]["hash"] == task.hash
    assert {
        "precision",
        "precision_because",
        "seconds",
        "steps",
        "best_step",
        "lr",
        "stage",
        "signature",
        "peak_mb",
    } <= set(card.training)
    assert pt.Stage.of(card.training["stage"]).schedule.epochs == 2
    assert "dev/colours" in card.metrics


def test_gradients_are_clipped_for_each_adapter_alone(encoder):
    """A wild task must not shrink the steps of its neighbour: together stays what separate runs give, also when clipped."""
    tasks = [colours(16, "a"), colours(16, "b", start=3)]
    settings = {**QUICK, "max_grad_norm": 0.01, "lr": 1e-2}
    apart = [pt.learn(encoder, t, seed=1, **settings) for t in tasks]
    joined = pt.learn(encoder, tasks, together=True, seed=1, **settings)
    for one, other in zip(apart, joined, strict=True):
        assert all(torch.allclose(v, other.state()[n], atol=1e-5) for n, v in one.state().items())


def test_deepcopied_models_learn_alike(encoder, task):
    twin = pt.Model(copy.deepcopy(encoder.module), encoder.processor, name="tiny-bert", pooling="mean")
    assert pt.learn(encoder, task, **QUICK).hash == pt.learn(twin, task, **QUICK).hash


def test_learning_is_the_plain_loop_of_pytorch(encoder, task):
    """An independent oracle: the same batches through a loop written out by hand give the same adapter."""
    settings = {"epochs": 2, "batch_size": 4, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
    quiet = pt.Task(**{**vars(task), "dev": []})
    learned = pt.learn(encoder, quiet, head_start="random", lr=1e-2, precision="fp32", progress=False, **settings)
    adapter = pt.Adapter.new(encoder, "lora", seed=0)
    head = head_for(encoder, quiet, 0)
    encoder.attach(adapter, "by hand")
    rows = head.rows(encoder, quiet.train)
    optimiser = torch.optim.AdamW([*adapter.parameters(), *head.parameters()], lr=1e-2, weight_decay=0.0)
    for number in range(2):
        for batch in plan.epoch([[row.length for row in rows]], 4, 0, number):
            chosen = [rows[i] for _, i in batch]
            with encoder.using("by hand"):
                logits = head.linear(encoder.features(collate(encoder, head, chosen)))
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([row.target for row in chosen]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for name, value in adapter.named_parameters():
        assert torch.allclose(value, dict(learned.named_parameters())[name], atol=1e-5), name


def test_a_head_starts_from_the_regression_that_sklearn_finds(encoder):
    import numpy as np
    from sklearn.linear_model import LogisticRegression, Ridge

    from polytask.core.predict import embed
    from polytask.learn.warm import STRENGTH, warm

    task = colours(40)
    head = head_for(encoder, task, 0)
    rows = head.rows(encoder, task.train)
    x = embed(encoder, head, rows).numpy().astype(np.float64)
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)

    def logits(head, targets):
        changed = [dataclasses.replace(r, target=t) for r, t in zip(rows, targets, strict=True)]
        warm(encoder, head, changed)
        return torch.nn.functional.linear(torch.from_numpy(x).float(), head.linear.weight, head.linear.bias).detach()

    kind = type(head)
    three = [i % 3 for i in range(len(rows))]
    got = logits(kind("classify", x.shape[1], ("a", "b", "never", "c")), [(0, 1, 3)[t] for t in three])
    want = LogisticRegression(C=STRENGTH, max_iter=1000, tol=1e-8).fit(z, three).predict_proba(z)
    assert np.allclose(got[:, [0, 1, 3]].softmax(1), want, atol=1e-4) and not got[:, 2].any()
    marks = [[i % 2, (i // 2) % 2, 1] for i in range(len(rows))]
    got = logits(kind("multilabel", x.shape[1], ("a", "b", "always")), marks)
    for k in (0, 1):
        fit = LogisticRegression(C=STRENGTH, max_iter=1000, tol=1e-8).fit(z, [m[k] for m in marks])
        assert np.allclose(got[:, k].sigmoid(), fit.predict_proba(z)[:, 1], atol=1e-4)
    assert not got[:, 2].any()
    numbers = [float(i % 7) for i in range(len(rows))]
    got = logits(kind("regress", x.shape[1], ()), numbers)
    assert np.allclose(got[:, 0], Ridge(alpha=1 / STRENGTH).fit(z, numbers).predict(z), atol=1e-4)
