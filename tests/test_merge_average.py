"""Snapshots of a run, and their plain mean with heads."""

from __future__ import annotations

import copy
import json
import os
import signal

import pytest
import torch
from conftest import colours, same_state, tiny_bert
from torch import nn

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.core.head import head_for
from polytask.learn import learner, snapshots
from polytask.learn.learner import Interrupted

QUICK = {"epochs": 2, "batch_size": 6, "progress": False, "lr": 1e-2, "form": {"name": "lora", "rank": 2}}


def changes(adapter):
    return {name: patch.delta() for name, patch in adapter.patches.items()}


def equal(one, other, rtol=1e-4, atol=1e-6):
    """Two adapters do the same: their changes and their heads."""
    assert one.patches.keys() == other.patches.keys() and one.heads.keys() == other.heads.keys()
    for name, change in changes(one).items():
        torch.testing.assert_close(change, changes(other)[name], rtol=rtol, atol=atol)
    for task, head in one.heads.items():
        for name, value in head.state_dict().items():
            torch.testing.assert_close(value, other.heads[task].state_dict()[name], rtol=rtol, atol=atol)


def kept(folder):
    return [pt.Adapter.load(path) for path in sorted((folder / "snapshots").iterdir())]


def undev(task):
    """Without dev examples, where a run ends is its last state."""
    task.dev = []
    return task


@pytest.fixture(scope="module")
def model(minilm_tokenizer):
    return tiny_bert(minilm_tokenizer)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Two runs from one start with other orders of the examples, and a third whose head starts elsewhere."""
    place = tmp_path_factory.mktemp("runs")
    start = pt.learn(model, undev(colours()), **{**QUICK, "epochs": 1})
    for seed in (1, 2):
        pt.learn(model, undev(colours()), start=start, seed=seed, snapshots=2, out=place / f"{seed}", **QUICK)
    pt.learn(model, undev(colours()), seed=3, head_start="random", snapshots=2, out=place / "3", **QUICK)
    return place


@pytest.fixture
def runs(made):
    return [kept(made / name) for name in ("1", "2", "3")]


# Snapshots


def test_steps_are_spread_up_to_the_end():
    assert snapshots.steps(10, 5) == [2, 4, 6, 8, 10] and snapshots.steps(3, 5) == [1, 2, 3]
    assert snapshots.steps(7, 1) == [7] and all(snapshots.steps(n, k)[-1] == n for n in range(1, 9) for k in (1, 3, 8))


def test_snapshots_are_the_states_on_the_way(model, tmp_path):
    """The oracle of the first is a shorter run: with a constant rate it is the beginning of the longer one."""
    more = {**QUICK, "schedule": "constant", "warmup": 0.0}
    whole = pt.learn(model, undev(colours()), snapshots=2, out=tmp_path / "a", **more)
    plain = pt.learn(model, undev(colours()), out=tmp_path / "b", **more)
    half = pt.learn(model, undev(colours()), **{**more, "epochs": 1})
    first, last = kept(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a" / "snapshots").iterdir()) == ["001", "002"]
    assert first.hash == half.hash != last.hash == whole.hash == plain.hash
    assert not (tmp_path / "b" / "snapshots").exists()
    said = first.card.training
    assert (said["snapshot"], said["of"], said["steps"]) == (1, 2, 2) and last.card.training["steps"] == 4
    assert first.card.tasks == whole.card.tasks and first.card.base == whole.card.base
    assert said["head_starts"] == whole.card.training["head_starts"] and set(said["head_starts"]) == {"colours"}
    assert said["stage"]["schedule"]["snapshots"] == 2 and (first.name, last.name) == ("colours-001", "colours-002")


class StopAt(learner.Watch):
    def step(self, step, *args, **kwargs):
        super().step(step, *args, **kwargs)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_has_the_same_snapshots(model, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    pt.learn(model, colours(), snapshots=4, out=straight, **QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(learner, "Watch", StopAt)
        with pytest.raises(Interrupted):
            pt.learn(model, colours(), snapshots=4, out=tmp_path / "cut", **QUICK)
    assert len(kept(tmp_path / "cut")) == 3
    pt.learn(model, colours(), snapshots=4, out=tmp_path / "cut", **QUICK)
    assert [a.hash for a in kept(tmp_path / "cut")] == [a.hash for a in kept(straight)]


def test_snapshots_of_another_run_do_not_stay(model, tmp_path):
    pt.learn(model, undev(colours()), snapshots=3, out=tmp_path, **QUICK)
    pt.learn(model, undev(colours()), snapshots=1, out=tmp_path, **{**QUICK, "epochs": 1})
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("form", ["full", "dora", "prefix", "hd-pissa"])
def test_snapshots_of_other_forms(model, tmp_path, form):
    more = {**QUICK, "form": form, "epochs": 1}
    whole = pt.learn(model, undev(colours()), snapshots=2, out=tmp_path / "a", **more)
    assert whole.hash == pt.learn(model, undev(colours()), **more).hash == kept(tmp_path / "a")[-1].hash
    name = model.attach(kept(tmp_path / "a")[0])
    assert 0 <= pt.evaluate(model, colours(), name, resamples=0).value <= 1
    model.detach(name)


def test_each_of_several_adapters_has_its_own(model, tmp_path):
    tasks = [undev(colours()), undev(colours(name="shades"))]
    made = pt.learn(model, tasks, together=True, snapshots=2, out=tmp_path, **{**QUICK, "epochs": 1})
    for adapter in made:
        assert kept(tmp_path / adapter.name)[-1].hash == adapter.hash


def test_snapshots_need_a_folder(model):
    with pytest.raises(ConfigError, match="snapshots are written into a folder"):
        pt.learn(model, colours(), snapshots=2, **QUICK)
    with pytest.raises(ConfigError, match="a search keeps no snapshots"):
        pt.search(model, colours(), snapshots=2)


def test_adapters_with_snapshots_can_be_compared(model, made):
    """Joint training with an adapter's settings keeps none: it has no folder."""
    adapters = [pt.Adapter.load(made / "1"), pt.Adapter.load(made / "2")]
    adapters[1].heads = {"shades": adapters[1].head}
    adapters[1].name, adapters[1].card.tasks[0]["name"] = "shades", "shades"
    table = pt.compare(model, adapters, [colours(), colours(name="shades")], resamples=0)
    assert any("joint" in row for row in str(table).splitlines())


# Their mean


def test_it_is_the_mean_of_changes_and_heads(runs):
    found = pt.merge(runs[0], "average")
    for name, change in changes(found).items():
        expected = (changes(runs[0][0])[name] + changes(runs[0][1])[name]) / 2
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)
    first, second, ours = (a.head.state_dict() for a in (*runs[0], found))
    for name, value in ours.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
        assert not torch.equal(first[name], second[name])
    assert found.card.training["head_starts"] == runs[0][0].card.training["head_starts"]
    assert found.form.rank == 4  # exact: the ranks together


def test_the_mean_of_runs_is_the_mean_of_all(runs):
    means = [pt.merge(run, "average") for run in runs[:2]]
    equal(pt.merge(means, "average"), pt.merge([*runs[0], *runs[1]], "average"))
    equal(pt.merge(runs[0][::-1], "average"), pt.merge(runs[0], "average"))


def test_one_alone_and_equal_ones_stay(runs):
    one = runs[0][0]
    equal(pt.merge([one], "average"), one)
    same = pt.merge([one] * 3, "average")
    equal(same, one)
    assert same_state(one.head.state_dict(), same.head)  # the same values have no mean to round


def test_the_parents_stay_as_they_were(runs):
    before = [adapter.hash for adapter in runs[0]]
    pt.merge(runs[0], "average").head.linear.weight.data.zero_()
    assert [adapter.hash for adapter in runs[0]] == before


def test_heads_that_started_elsewhere_are_refused(runs):
    with pytest.raises(MergeError, match="'colours-001' and 'colours-001' for 'colours' started from different values"):
        pt.merge([runs[0][0], runs[2][0]], "average")
    silent = runs[1][0].copy("silent")
    del silent.card.training["head_starts"]
    with pytest.raises(
        MergeError, match="card of silent does not say from which values the head for 'colours' started"
    ):
        pt.merge([runs[0][0], silent], "average")


def test_random_heads_of_one_seed_may_be_averaged_and_of_two_not(model):
    more = {**QUICK, "epochs": 1, "head_start": "random"}
    first = pt.learn(model, colours(), **more)
    same, other = pt.learn(model, colours(), **more, weight_decay=0.1), pt.learn(model, colours(), **more, seed=1)
    starts = [adapter.card.training["head_starts"]["colours"] for adapter in (first, same, other)]
    assert starts[0] == starts[1] != starts[2]
    pt.merge([first, same], "average")
    with pytest.raises(MergeError, match="started from different values"):
        pt.merge([first, other], "average")


def test_what_else_it_refuses(runs):
    other = runs[0][1].copy("other")
    other.heads = {"mood": other.head}
    with pytest.raises(MergeError, match="'colours-001' has heads for colours, and 'other' for mood"):
        pt.merge([runs[0][0], other], "average")
    turned = runs[0][1].copy("turned")
    turned.head.labels = turned.head.labels[::-1]
    with pytest.raises(MergeError, match="heads for 'colours' that read it differently"):
        pt.merge([runs[0][0], turned], "average")
    with pytest.raises(ConfigError, match="'average' knows no weights"):
        pt.merge(runs[0], "average", weights=[1, 2])
    with pytest.raises(MergeError, match="different heads for the task 'colours'"):
        pt.merge(runs[0], "linear")


def test_heads_without_values_need_no_start(decoder):
    pair = [pt.Adapter.new(decoder, "lora", seed=seed, name=f"a{seed}") for seed in range(2)]
    for adapter in pair:
        adapter.heads["colours"] = head_for(decoder, colours())
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
    assert set(pt.merge(pair, "average").heads) == {"colours"}


class Counted(nn.Module):
    def __init__(self, value, count):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), value))
        self.register_buffer("steps", torch.tensor([count, count]))


@pytest.mark.parametrize("method", ["average", "linear"])
def test_whole_numbers_come_from_the_first(method, runs, tmp_path):
    from safetensors.torch import load_file, save_file

    made = pt.merge([Counted(1.0, 7), Counted(4.0, 9)], method)
    assert made.steps.tolist() == [7, 7] and bool((made.weight == 2.5).all())
    for name, module in (("a", Counted(1.0, 7)), ("b", Counted(4.0, 9))):
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
    folder = pt.merge([str(tmp_path / name) for name in "ab"], method, out=tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    assert state["steps"].tolist() == [7, 7] and bool((state["weight"] == 2.5).all())
    pair = [copy.deepcopy(adapter) for adapter in runs[0]]
    for i, adapter in enumerate(pair):
        adapter.head.register_buffer("seen", torch.tensor(3 + 6 * i))
    if method == "average":
        assert pt.merge(pair, method).head.seen.item() == 3


def test_on_the_command_line(model, tmp_path, run, monkeypatch):
    monkeypatch.setattr(pt.Model, "load", staticmethod(lambda name: model))
    lines = [json.dumps({"text": e.inputs[0], "label": e.target}) for e in colours().train]
    (tmp_path / "colours.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--base", "tiny", "--out", str(tmp_path / "lib"), "--epochs", "1", "--lr", "0.01", "--batch-size", "2"]
    code, _, err = run("learn", str(tmp_path / "colours.jsonl"), *options, "--snapshots", "3")
    assert code == 0, err
    folder = tmp_path / "lib" / "colours"
    names = sorted(str(path) for path in (folder / "snapshots").iterdir())
    assert len(names) == 3
    code, _, err = run("merge", *names, "--method", "average", "--out", str(tmp_path / "mean"))
    assert code == 0, err
    equal(pt.Adapter.load(tmp_path / "mean"), pt.merge(kept(folder), "average"))
    code, _, err = run("merge", str(tmp_path / "mean" / "polytask.json"), str(tmp_path / "again"))
    assert code == 0, err
    assert pt.Adapter.load(tmp_path / "again").hash == pt.Adapter.load(tmp_path / "mean").hash
