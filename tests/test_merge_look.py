"""Cosines and conflicts of task vectors, and merges that are scored side by side."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import colours, same_state, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.core.metrics import Score
from polytask.merge.look import look, look_adapters
from polytask.merge.measure import Contest, Merges, normalised
from polytask.merge.source import Module
from polytask.merge.trials import Sweep, Trial, trials

# The task vectors


class Net(nn.Module):
    """Two layers and something outside of them; a third of the numbers of a tuned one are as they were."""

    def __init__(self, seed: int, like: Net | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.register_buffer("steps", torch.tensor(seed))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                values = torch.randn(parameter.shape, generator=draw)
                kept = torch.rand(parameter.shape, generator=draw) < 0.33
                parameter.copy_(values if like is None else like.get_parameter(name) + values * ~kept)


def vectors(nets, base, part: str = "") -> np.ndarray:
    """The differences of all parameters with ``part`` in their names, a row each, in float64."""
    start = dict(base.named_parameters())
    rows = [
        [(p.detach() - start[n].detach()).double().numpy().ravel() for n, p in net.named_parameters() if part in n]
        for net in nets
    ]
    return np.stack([np.concatenate(row) for row in rows])


def oracle(rows: np.ndarray):
    """Cosine, share of shared numbers, conflict among them, counted number by number."""
    count = len(rows)
    cosine = [[float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for b in rows] for a in rows]
    shared = conflict = 0
    for column in rows.T:
        signs = [np.sign(v) for v in column if v]
        shared += len(signs) > 1
        conflict += len(signs) > 1 and len(set(signs)) > 1
    assert len(cosine) == count
    return cosine, shared / rows.shape[1], conflict / shared


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(2, 4), elements=st.sampled_from([1, 5, 9, 1000]))
def test_cosines_and_conflicts_are_those_of_the_numbers_whatever_the_blocks(seed, count, elements):
    base = Net(seed)
    nets = [Net(1000 + 10 * seed + i, base) for i in range(count)]
    found = look([Module(net, f"n{i}") for i, net in enumerate(nets)], Module(base), elements)
    assert [part.name for part in found.layers] == ["layers.0", "layers.1", "outside the layers"]
    for part, key in zip((found.whole, *found.layers), ("", "layers.0", "layers.1", "embed"), strict=True):
        rows = vectors(nets, base, key)
        cosine, shared, conflict = oracle(rows)
        np.testing.assert_allclose(part.cosine, cosine, atol=1e-7)  # differences are taken in fp32
        np.testing.assert_allclose(part.norms, np.linalg.norm(rows, axis=1), rtol=1e-6)
        assert (part.numbers, part.shared, part.conflict) == (rows.shape[1], shared, conflict)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_chance_is_what_independent_signs_would_give():
    draw = torch.Generator().manual_seed(0)
    base, nets = nn.Linear(200, 100, bias=False), []
    for _ in range(3):
        nets.append(nn.Linear(200, 100, bias=False))
        nets[-1].weight.data = base.weight.data + torch.randn(100, 200, generator=draw)
    found = look([Module(net) for net in nets], Module(base))
    assert found.whole.chance == 0.75 and abs(found.whole.conflict - 0.75) < 0.01
    both = look([Module(nets[0]), Module(nets[0])], Module(base)).whole
    assert both.conflict == 0 and both.chance == 0.5 and both.cosine[0][1] == pytest.approx(1)


def test_a_model_that_is_the_base_has_no_direction():
    base = Net(0)
    found = look([Module(base), Module(Net(1, base))], Module(base)).whole
    assert found.cosine[0] == [None, None] and found.cosine[1][1] == 1 and found.norms[0] == 0
    assert found.shared == 0 and found.conflict is None and found.chance is None


def test_entries_that_are_no_numbers_are_named():
    base = Net(0)
    other = Net(1, base)
    other.layers[1].weight.data[0, 0] = float("nan")
    with pytest.raises(MergeError, match="layers.1.weight of Net has entries that are not finite"):
        look([Module(other), Module(Net(2, base))], Module(base))


# Adapters of a tiny base


@pytest.fixture(scope="module")
def model(minilm_tokenizer):
    return tiny_bert(minilm_tokenizer)


def swapped(name: str, start: int) -> pt.Task:
    """`colours` with the answers exchanged: what one adapter learns is wrong for the other's task."""
    task = colours(40, name, start)
    turn = {"red": "blue", "blue": "red"}
    for split in ("train", "dev", "test"):
        getattr(task, split)[:] = [dataclasses.replace(e, target=turn[e.target]) for e in getattr(task, split)]
    return task


@pytest.fixture(scope="module")
def tasks():
    return [colours(40, "one"), swapped("two", 100)]


@pytest.fixture(scope="module")
def adapters(model, tasks):
    return [pt.learn(model, t, epochs=6, lr=1e-2, progress=False, seed=i) for i, t in enumerate(tasks)]


def test_adapters_are_looked_at_as_what_they_change(model, adapters):
    found = look_adapters(adapters)
    sites = list(adapters[0].patches)
    rows = np.stack([
        np.concatenate([a.patches[s].delta().detach().double().numpy().ravel() for s in sites]) for a in adapters
    ])  # fmt: skip
    cosine, _, conflict = oracle(rows)
    np.testing.assert_allclose(found.whole.cosine, cosine, atol=1e-6)
    assert found.whole.conflict == pytest.approx(conflict) and found.names == ["one", "two"]
    assert [p.name for p in found.layers] == ["encoder.layer.0", "encoder.layer.1"]
    with_base = look_adapters(adapters, Module(model.module), elements=64)
    np.testing.assert_allclose(with_base.whole.cosine, found.whole.cosine, atol=1e-9)


# What is tried


def test_a_sweep_is_read_as_it_is_written():
    assert Sweep.of("lambda=0.1..1.0") == Sweep("lambda", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
    assert Sweep.of("density=1..0:3").values == (1.0, 0.5, 0.0)
    assert Sweep.of("t=-.5..1e0:2").values == (-0.5, 1.0)
    assert Sweep.of({"density": [0.2]}) == Sweep("density", (0.2,))
    assert Sweep.of(None) is None
    for wrong in ("lambda", "lambda=0.1", "lambda=0.1..", "lambda=a..b", "x=1..2:1", "x=1..1", {"a": []}):
        with pytest.raises(ConfigError, match="sweep"):
            Sweep.of(wrong)


def test_what_is_tried():
    made = trials(["ties", "linear", "task_arithmetic"], Sweep.of("lambda=0.5..1:2"))
    assert [t.name for t in made] == [
        "ties scale=0.5", "ties scale=1", "linear", "task_arithmetic scale=0.5", "task_arithmetic scale=1",
    ]  # fmt: skip
    assert [t.at for t in made] == [0.5, 1.0, None, 0.5, 1.0]
    (whole, _) = trials(["consensus"], Sweep.of("agree=1..2:2"))
    assert whole.settings == {"agree": 1} and isinstance(whole.settings["agree"], int)
    assert trials(["ties", "ties"]) == trials(["ties"]) == [Trial("ties", {})]
    assert trials([{"name": "ties", "lambda": 0.3}])[0].settings == {"scale": 0.3}


@pytest.mark.parametrize(
    ("methods", "sweep", "said"),
    [
        (["tyes"], None, "did you mean 'ties'"),
        ([{"name": "ties", "densty": 0.1}], None, "no setting 'densty' .did you mean 'density'"),
        (["linear"], "densty=0.1..0.3", "no method that is tried has the setting 'densty'"),
        (["ties"], "density=0.5..1.5", "density"),  # out of range, before anything is merged
        ([{"name": "ties", "density": 0.1}], "density=0.1..0.3", "leave one of the two out"),
    ],
)
def test_what_cannot_be_tried_is_said_at_once(methods, sweep, said):
    with pytest.raises(ConfigError, match=said):
        trials(methods, Sweep.of(sweep))


# Scores as shares


@given(value=st.floats(0.01, 100), own=st.floats(0.01, 100))
def test_a_share_is_a_ratio_that_grows_with_quality(value, own):
    assert normalised(value, own) == pytest.approx(value / own)
    assert normalised(value, own, higher_is_better=False) == pytest.approx(own / value)


def test_a_share_of_nothing_is_left_out():
    assert normalised(0.5, 0.0) is None and normalised(0.5, -0.2) is None and normalised(float("nan"), 0.5) is None
    assert normalised(0.0, 0.0) == 1 and normalised(0.0, 0.5) == 0 and normalised(0.5, float("inf"), False) is None


def contest(adapters, tasks, value, higher=True, **options) -> Contest:
    """One whose scores are ``value(task, size)``, of how far the base's weights are moved where an adapter acts."""

    def score(model, task, mix, head, split):
        size = 0.0
        if mix is not None:
            adapter = model.adapters[mix]
            size = float(sum(p.delta().double().square().sum() for p in adapter.patches.values()) ** 0.5)
        found = value(task.name, size, split)
        return Score("accuracy", found, found, found, 10, higher)

    given = {a.name: a for a in adapters}
    return Contest(given, options.pop("base"), tasks, {t.name: t.name for t in tasks}, score, **options)


def test_the_sweep_finds_the_best_by_the_dev_split(model, adapters, tasks):
    """The dev split's optimum is at 0.6 and the test split's at 0.2; the choice must not see the test."""
    size = contest(adapters, tasks, lambda task, size, split: size, base=model)
    whole = size._scored(model, size.made(Trial("task_arithmetic", {"scale": 1.0})), "test")["one"].value

    def value(task, size, split):
        return 1 - abs(size / whole - {"dev": 0.6, "test": 0.2}[split]) * (2 if task == "two" else 1)

    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    run = contest(adapters, tasks, value, base=model)
    table = run.run(trials(["task_arithmetic"], Sweep.of("lambda=0.2..1.0:5")))
    assert table.best == "task_arithmetic scale=0.6" and table.settings["chosen_on"] == "dev"
    row, own = table.row(table.best), table.row("own model")
    assert [own["normalised"][t] for t in ("one", "two")] == [1, 1]
    expected = {t: row["scores"][t] / own["scores"][t] for t in ("one", "two")}
    assert row["normalised"] == expected and row["average"] == pytest.approx(sum(expected.values()) / 2)
    assert row["worst"] == min(expected.values()) and row["worst_task"] == "two"
    assert row["scores"]["one"] == pytest.approx(0.6, abs=1e-4) and row["scores"]["two"] == pytest.approx(0.2, abs=1e-4)
    assert row["bytes"] == sum(p.numel() * p.element_size() for p in table.merged.parameters())
    assert table.row("base")["scores"] == pytest.approx({"one": 0.8, "two": 0.6}) and row["seconds"] > 0
    assert same_state(before, model.module) and not model.attached


def test_where_lower_is_better_the_smallest_wins(model, adapters, tasks):
    table = contest(adapters, tasks, lambda task, size, split: 1 + size, higher=False, base=model).run(
        trials(["task_arithmetic"], Sweep.of("scale=0.5..1.5:3"))
    )
    assert table.best == "task_arithmetic scale=0.5"
    row, own = table.row(table.best), table.row("own model")
    assert row["normalised"]["one"] == own["scores"]["one"] / row["scores"]["one"]


def test_a_method_that_cannot_be_used_is_a_note_and_not_the_end(model, adapters, tasks):
    one = contest(adapters, tasks, lambda task, size, split: 0.5, base=model)
    table = one.run(trials(["slerp", "nearswap", "linear"]))  # slerp goes from the first to the second
    assert table.row("slerp")["scores"] and not table.row("slerp")["note"]
    three = [*adapters, adapters[0].copy("three")]
    three[2].heads.clear()
    table = contest(three, tasks, lambda task, size, split: 0.5, base=model).run(trials(["slerp", "linear"]))
    assert "merges 1 models beside the base" in table.row("slerp")["note"] and table.best == "linear"
    with pytest.raises(MergeError, match="merges 1 models"):
        contest(three, tasks, lambda task, size, split: 0.5, base=model).run(trials(["slerp"]))


# From end to end


def test_adapters_are_merged_scored_and_the_best_is_kept(model, adapters, tasks, tmp_path):
    table = pt.compare_merges(
        model, adapters, tasks, methods=["ties", "linear"], sweep="density=0.3..0.7:2", out=tmp_path, resamples=20
    )
    assert [row["method"] for row in table.rows] == [
        "own model", "base", "ties density=0.3", "ties density=0.7", "linear",
    ]  # fmt: skip
    for row in table.rows[2:]:
        made = pt.merge(adapters, row["rule"], **row["settings"])
        model.attach(made, "again")
        for task in tasks:
            again = pt.evaluate(model, task, "again", head=made.heads[task.name], resamples=0).value
            assert row["scores"][task.name] == again
        model.detach("again")
    best = pt.Adapter.load(tmp_path)
    assert best.hash == table.merged.hash and set(best.heads) == {"one", "two"}
    said = json.loads((tmp_path / "merge.json").read_text())
    assert said == json.loads(json.dumps(table.as_dict())) and "merged" not in said
    assert said["sweep"] == {"name": "density", "values": [0.3, 0.7]}
    assert not (tmp_path / ".tries").exists()
    for name in ("shares", "curve", "cosines", "layers"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    links = re.findall(r"""(?:href|src)=["']([^"'#]+)|url\((?!#)([^)]+)\)|@import""", page)
    assert not links and "<script" not in page and page.count("<svg") == 4
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert f"{table.row('linear')['average']:.3f}" in page and "ties density=0.7" in str(table)


def test_what_the_base_can_do_in_general(model, adapters, tasks):
    general = colours(20, "general")
    table = pt.compare_merges(model, adapters, tasks, general=general, resamples=0)
    model.attach(table.merged, "again")
    assert table.row("linear")["ability"] == pt.evaluate(model, general, "again", resamples=0).value
    model.detach("again")
    assert table.row("base")["ability"] == pt.evaluate(model, general, resamples=0).value
    assert table.settings["chosen_on"] == "test" and not table.sweep  # nothing was chosen


def test_methods_that_look_at_data_see_the_tasks(model, adapters, tasks):
    method = {"name": "adamerging", "steps": 2}
    table = pt.compare_merges(model, adapters, tasks, methods=["linear", method], resamples=0)
    row = table.row("adamerging steps=2")
    made = pt.merge(adapters, "adamerging", model, data=tasks, steps=2)
    model.attach(made, "again")
    for task in tasks:
        again = pt.evaluate(model, task, "again", head=adapters[tasks.index(task)].heads[task.name], resamples=0).value
        assert row["scores"][task.name] == again and row["note"] == ""
    model.detach("again")


def test_forms_that_depend_on_the_base_become_dense_changes(model, tasks):
    dora = [pt.Adapter.new(model, "dora", seed=i, name=t.name) for i, t in enumerate(tasks)]
    for adapter in dora:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.1)
    given, own = {a.name: a for a in dora}, {t.name: t.name for t in tasks}
    one = Contest(given, model, tasks, own, lambda *asked: Score("accuracy", 0.5, 0.5, 0.5, 10))
    table = one.run(trials(["ties"]))
    assert table.merged.form.name == "full" and table.look["whole"]["cosine"][0][1] is not None


def test_models_are_measured_by_the_best_of_them(decoder, byte_tokenizer, tmp_path):
    """Generative models answer themselves; a folder as input is merged tensor by tensor."""
    folders = []
    for seed in range(2):
        other = pt.Model(type(decoder.module)(decoder.module.config), byte_tokenizer, name=f"m{seed}")
        with torch.no_grad():
            for i, (p, q) in enumerate(zip(other.module.parameters(), decoder.module.parameters(), strict=True)):
                draw = torch.Generator().manual_seed(100 * seed + i)
                p.copy_(q + 0.05 * torch.randn(p.shape, generator=draw))
        folders.append(tmp_path / f"m{seed}")
        other.module.save_pretrained(folders[-1])
        byte_tokenizer.save_pretrained(folders[-1])
    texts = [pt.Example((f"text {i} of no use",), None, where=f"t:{i}") for i in range(4)]
    task = pt.Task(name="text", kind="lm", train=[], dev=[], test=texts)
    table = pt.compare_merges(None, folders, [task], methods=["linear", "slerp"], out=tmp_path / "best", resamples=0)
    own = [pt.evaluate(pt.Model.load(str(f)), task, resamples=0).value for f in folders]
    assert table.row("own model")["scores"]["text"] == min(own)  # perplexity
    row = table.row(table.best)
    assert row["normalised"]["text"] == min(own) / row["scores"]["text"]
    assert row["average"] == max(r["average"] for r in table.rows if r["rule"])
    again = pt.evaluate(pt.Model.load(str(tmp_path / "best")), task, resamples=0).value
    assert again == row["scores"]["text"] and not table.look and table.settings["chosen_on"] == "test"
    assert (tmp_path / "best" / "polytask_merge.json").is_file() and not (tmp_path / "best" / ".tries").exists()


def test_what_cannot_be_compared_is_refused(model, adapters, tasks):
    with pytest.raises(ConfigError, match="scored on their base"):
        pt.compare_merges(None, adapters, tasks)
    with pytest.raises(ConfigError, match="adapters, or models"):
        pt.compare_merges(model, [adapters[0], model], tasks)
    with pytest.raises(ConfigError, match="two of what is merged are called 'one'"):
        pt.compare_merges(model, [adapters[0], adapters[0]], tasks)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        Merges(rows=[{"method": "linear"}]).row("liner")


# Commands


@pytest.fixture(scope="module")
def library(saved_base, tmp_path_factory):
    """Two adapters and their tasks in folders, as the commands want them."""
    folder = tmp_path_factory.mktemp("library")
    base = pt.Model.load(str(saved_base))
    for i, name in enumerate(("one", "two")):
        task = colours(40, name, 100 * i)
        (folder / "tasks" / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            rows = [json.dumps({"text": e.inputs[0], "label": e.target}) for e in getattr(task, split)]
            (folder / "tasks" / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        pt.learn(base, task, epochs=2, lr=1e-2, progress=False, out=folder / "lib" / name)
    return folder


def test_the_command_scores_methods_and_keeps_the_best(run, library, saved_base, tmp_path):
    inputs = [library / "lib" / "one", library / "lib" / "two"]
    code, out, err = run(
        "merge", *inputs, "--base", saved_base, "--method", "ties:density=0.4", "--method", "task_arithmetic", "--sweep",
        "lambda=0.5..1:2", "--evaluate", library / "tasks", "--out", tmp_path / "best", "--json",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    assert [row["method"] for row in said["rows"][2:]] == [
        "ties density=0.4 scale=0.5", "ties density=0.4 scale=1", "task_arithmetic scale=0.5", "task_arithmetic scale=1",
    ]  # fmt: skip
    assert said["best"] in {row["method"] for row in said["rows"]}
    assert (tmp_path / "best" / "adapter_config.json").is_file() and (tmp_path / "best" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a", "b", "--method", "ties", "--method", "linear"), "--evaluate"),
        (("a", "b", "--sweep", "lambda=0.1..1.0"), "--evaluate"),
        (("a.yml", "--evaluate", "tasks"), "a mergekit file"),
        (("polytask_merge.json", "--evaluate", "tasks"), "a record"),
        (("0.5*a + 0.5*b", "--model", "a=x", "--model", "b=y", "--evaluate", "tasks"), "an expression"),
        (("a", "b", "--evaluate", "tasks", "--resume"), "--resume"),
    ],
)
def test_the_command_says_what_does_not_go_together(run, arguments, said, tmp_path):
    code, _, err = run("merge", *arguments, "--out", tmp_path / "out")
    assert code == 2 and said in err


def test_compare_has_a_row_for_each_merge(run, library, saved_base, tmp_path):
    code, out, err = run(
        "compare", library / "lib", library / "tasks", "--base", saved_base, "--no-joint", "--no-cross", "--merge", "linear",
        "--merge", "ties:density=0.5", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, err
    table = json.loads(out)
    rows = {row["method"]: row for row in table["methods"]}
    assert {"merged: linear", "merged: ties density=0.5"} <= set(rows)
    scores = {(r["method"], r["task"]): r["value"] for r in table["rows"]}
    for task in ("one", "two"):  # the mean of the changes, whether it acts as a mix or was merged
        assert scores["merged: linear", task] == scores["average of adapters", task]
    assert rows["merged: linear"]["trained_parameters"] == 0 and rows["merged: linear"]["bytes"] > 0
