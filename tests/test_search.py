"""A search over forms, sites and sizes: what it chooses from, what it finds, and that its finds run elsewhere."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import optuna
import pytest
import torch
import yaml
from conftest import colours, same_state, tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileBackend

import polytask as pt
from polytask.core.errors import ConfigError, DataError, LearnError, SiteError
from polytask.core.form import Form
from polytask.core.select import parse
from polytask.core.site import Site
from polytask.jobs import Search
from polytask.learn.learner import Interrupted
from polytask.learn.space import NOTHING, AutoPEFT, General, at_layers, space_of

module = importlib.import_module("polytask.learn.search")

QUICK = {"epochs": 1, "batch_size": 8, "head_start": "random"}
SMALL = {"forms": [{"name": "lora", "rank": [1, 2, 4], "sites": ["query", "mlp"]}, {"name": "ia3"}]}  # 7 configurations
GOALS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@pytest.fixture(scope="module")
def model(minilm_tokenizer):
    """The tiny encoder; no test changes it."""
    return tiny_bert(minilm_tokenizer)


def plain(points):
    """What has to be equal when a search is repeated: all but the seconds."""
    return [replace(p, seconds=0.0) for p in points]


@pytest.fixture
def learned(monkeypatch):
    """The configurations that are learned, as they are."""
    calls = []

    def learn(*args, **options):
        calls.append((options["form"], options["sites"]))
        return real(*args, **options)

    real = module.learn
    monkeypatch.setattr(module, "learn", learn)
    return calls


# The front and its area


def beats(a, b):
    return a[0] >= b[0] and a[1] >= b[1] and a != b


@given(GOALS)
def test_nothing_in_the_front_is_dominated_and_all_else_is(goals):
    front = [goals[i] for i in module.pareto(goals)]
    assert len(set(front)) == len(front)
    for goal in goals:
        assert any(beats(other, goal) for other in goals) != (goal in front)


@given(GOALS, st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_the_hypervolume_is_the_number_of_cells_and_never_falls(goals, reference):
    cells = [(i, j) for i in range(reference[0], 6) for j in range(reference[1], 6)]
    before = 0.0
    for n in range(len(goals) + 1):
        area = module.hypervolume(goals[:n], reference)
        assert area == sum(any(a > i and b > j for a, b in goals[:n]) for i, j in cells) and area >= before
        before = area


def found(scores, better=True, metric="accuracy"):
    points = tuple(
        module.Point(i + 1, f"trial {i + 1}", {}, {"name": "lora"}, None, size, score, 1.0)
        for i, (score, size) in enumerate(scores)
    )
    base = {"name": "b", "source": "b", "parameters": 10_000}
    return Search("t", metric, better, base, points, (0.0 if better else 9.0, 10_000), 0, {}, {})


def test_less_is_better_where_the_metric_says_so(tmp_path):
    search = found(
        [(5.0, 0), (4.0, 100), (6.0, 50), (4.5, 10), (None, 1), (4.0, 200)], better=False, metric="perplexity"
    )
    assert [p.number for p in search.front] == [1, 4, 2] and search.best.number == 2
    areas = search.hypervolume
    assert areas == sorted(areas) and areas[0] > 0 and areas[-1] > areas[0]
    assert search.to_png(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LearnError, match="no trial could be learned"):
        _ = found([(None, 1)]).best


# The spaces


def test_the_sizes_of_autopeft_are_the_paper_s():
    space = AutoPEFT(768, 12)
    assert [space.size(k) for k in range(11)] == [768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0]
    values = {**space.first, **{f"layer {i}": 1 for i in range(12)}}
    assert space.proxy({**values, "serial": 9}) == 18_432 and space.proxy(values) == 0


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("sizes", [(9, 10, 10), (10, 3, 10), (10, 10, 2), (2, 9, 10), (0, 4, 3)])
def test_the_count_is_that_of_the_parameters_up_to_biases_and_gates(model, sizes, layers):
    space = space_of("autopeft", model)
    values = {**dict(zip(space.kinds, sizes, strict=True)), **{f"layer {i}": int(i in layers) for i in range(2)}}
    form, sites = space.build(values)
    adapter = pt.Adapter.new(model, form, sites)
    serial, parallel, prefix = (space.size(k) for k in sizes)
    left_out = sum(width + 32 for width in (serial, parallel) if width) + 4 * bool(prefix)  # 4 heads
    assert adapter.size == space.proxy(values) + len(layers) * left_out
    assert {patch.site.layer for patch in adapter.patches.values()} == set(layers)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_the_selector_of_layers_picks_them(case):
    of, chosen = case
    text = at_layers(sorted(chosen), of) or "all"
    assert {i for i in range(of) if parse(text)(Site(f"layer.{i}", "block", "block", layer=i))} == chosen


def test_sizes_of_zero_are_the_base_with_a_head(model, task):
    space = space_of("autopeft", model)
    on = {f"layer {i}": 1 for i in range(2)}
    no_size, no_layer = {**space.first, **on}, {**space.first, "serial": 3, "prefix": 2}
    assert space.build(space.first) == space.build(no_size) == space.build(no_layer) == NOTHING
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    form, sites = space.build(space.first)
    adapter = pt.learn(model, task, form=form, sites=sites, **QUICK)
    assert adapter.size == 0 and same_state(before, model.module)
    head = sum(p.numel() for p in adapter.head.parameters())
    assert adapter.card.training["trained_parameters"] == head == sum(p.numel() for p in adapter.parameters()) > 0
    batch = model.processor(["a red car"], return_tensors="pt")
    bare = model.features(batch)
    model.attach(adapter, "nothing")
    try:
        with model.using("nothing"):
            assert torch.equal(model.features(batch), bare)
    finally:
        model.detach("nothing")


class Fixed:
    """Stands for an optuna trial: the lowest value, or the highest."""

    def __init__(self, high):
        self.high = high

    def suggest_int(self, name, low, high, log=False):
        return high if self.high else low

    suggest_float = suggest_int

    def suggest_categorical(self, name, choices):
        return list(choices)[-1 if self.high else 0]


def test_a_space_in_words(model):
    space = General.of(
        {"forms": ["lora", {"name": "bottleneck", "style": "parallel", "width": {"low": 2, "high": 9, "log": True}}],
         "layers": True},
        model,
    )  # fmt: skip
    assert space.conditional and space.build(space.ask(Fixed(False))) == NOTHING
    top = space.ask(Fixed(True))
    assert space.build(top) == ({"name": "bottleneck", "style": "parallel", "width": 9}, None)
    form, sites = space.build({**top, "layer 0": 0})
    assert {p.site.layer for p in pt.Adapter.new(model, form, sites).patches.values()} == {1}
    assert space.describe({**top, "layer 0": 0}) == "bottleneck style=parallel width=9, layers 1"
    only = General.of({"forms": [{"name": "lora", "rank": {"value": 3}}], "sites": ["query", "mlp"]}, model)
    assert not only.conditional and only.build(only.ask(Fixed(True))) == ({"name": "lora", "rank": 3}, "mlp")


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ("autopft", ["no space is called 'autopft'", "'autopeft'"]),
        ({}, ["needs `forms:`"]),
        ({"form": ["lora"]}, ["unknown key 'form'", "did you mean 'forms'?"]),
        ({"forms": ["lorra"]}, ["no form is called 'lorra'", "did you mean 'lora'?"]),
        ({"forms": [3]}, ["a name, or a mapping with `name:`", "got 3"]),
        ({"forms": [{"name": "lora", "rnk": 3}]}, ["'lora' has no setting 'rnk'", "did you mean 'rank'?"]),
        ({"forms": [{"name": "lora", "rank": []}]}, ["rank of 'lora' is an empty list"]),
        ({"forms": [{"name": "lora", "rank": {"low": 8, "high": 1}}]}, ["rank of 'lora' must be one value", "{low: 1"]),
        ({"forms": [{"name": "lora", "rank": {"low": 0, "high": 8, "log": True}}]}, ["must begin above 0"]),
        ({"forms": [{"name": "bottleneck", "width": {"low": 0, "high": 8}}]}, ["width must be at least 1, got 0"]),
        ({"forms": ["lora"], "layers": 3}, ["layers must be true or false, got 3"]),
        ({"forms": ["lora"], "sites": 3}, ["sites of 'lora' must be a selector"]),
    ],
)  # fmt: skip
def test_spaces_that_are_not_understood(model, task, space, words):
    with pytest.raises(ConfigError) as error:
        pt.search(model, task, space=space)
    assert all(word in str(error.value) for word in words), error.value


def test_other_refusals(model, task, monkeypatch):
    with pytest.raises(SiteError, match="'lora' acts nowhere in 'tiny-bert' at 'kind:norm'"):
        pt.search(model, task, space={"forms": ["lora"], "sites": "kind:norm"})
    with pytest.raises(ConfigError, match="trials must be a whole number of at least 1, got 0"):
        pt.search(model, task, trials=0)
    with pytest.raises(ConfigError, match="unknown setting 'epoch'"):
        pt.search(model, task, epoch=3)
    with pytest.raises(DataError, match="'colours' has no dev examples"):
        pt.search(model, replace(task, dev=[]))
    with pytest.raises(SiteError, match="'autopeft' has no place in 'Sequential'"):
        space_of("autopeft", pt.Model(torch.nn.Sequential(torch.nn.Linear(3, 3))))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package optuna, which is not installed"):
        pt.search(model, task)


# The search


def test_a_stopped_search_goes_on_as_it_would_have(model, task, tmp_path, monkeypatch, learned):
    """The model decides after the third trial; the second trial is stopped at once, the fourth at the end of a step."""
    options = {"trials": 4, "startup": 3, "seed": 3, **QUICK}
    whole = pt.search(model, task, **options)
    assert len(learned) == 4 == len(whole.trials) == len({json.dumps(p.form) + str(p.sites) for p in whole.trials})
    assert (
        whole.trials[0].parameters == 0
        and whole.front[0].number == 1
        and whole.hypervolume == sorted(whole.hypervolume)
    )
    real, reasons = module.learn, {5: KeyboardInterrupt(), 7: Interrupted("stopped at step 1")}

    def stopping(*args, **more):
        if len(learned) in reasons:
            raise reasons.pop(len(learned))
        return real(*args, **more)

    monkeypatch.setattr(module, "learn", stopping)
    with pytest.raises(Interrupted, match="stopped in trial 2 of 4"):
        pt.search(model, task, out=tmp_path, **options)
    with pytest.raises(Interrupted, match=r"stopped in trial 4 of 4; the trials before it are in .*; repeat"):
        pt.search(model, task, out=tmp_path, **options)
    tell, said = module._Run._tell, []

    def untold(self, study, trial, point):
        if point.number == 4:
            raise KeyboardInterrupt  # it is learned and recorded, and the model does not know of it
        tell(self, study, trial, point)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module._Run, "_tell", untold)
        pt.search(model, task, out=tmp_path, say=said.append, **options)
    assert len(learned) == 8 and said[0] == "3 of 4 trials are done already"
    again = pt.search(model, task, out=tmp_path, **options)
    assert plain(again.trials) == plain(whole.trials)
    assert plain(pt.search(model, task, out=tmp_path, **{**options, "trials": 3}).trials) == plain(whole.trials)[:3]
    assert len(learned) == 8
    journal = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "trials.log")))
    study = optuna.load_study(study_name="polytask", storage=journal)
    assert {t.state.name for t in study.trials if "polytask" in t.user_attrs} == {"COMPLETE"}
    with pytest.raises(ConfigError, match="has the trials of another search: seed, schedule differ"):
        pt.search(model, task, out=tmp_path, **{**options, "seed": 4, "epochs": 2})


def test_nothing_is_learned_twice_and_a_small_space_ends(model, task, learned):
    said = []
    search = pt.search(model, task, space=SMALL, trials=20, seed=1, say=said.append, **QUICK)
    assert len(search.trials) == len(learned) == 7
    assert len({json.dumps([p.form, p.sites]) for p in search.trials}) == 7
    assert "no more than these 7 configurations" in said[-1]
    same = {"forms": [{"name": "lora", "rank": [8]}, "lora", {"name": "lora", "init": "zero-B"}]}  # one, three times
    assert len(pt.search(model, task, space=same, trials=3, **QUICK).trials) == 1


def test_a_trial_that_cannot_be_learned_is_told_and_the_search_goes_on(model, task, monkeypatch):
    real = module.learn

    def failing(*args, **options):
        if options["form"]["name"] == "ia3":
            raise LearnError("the loss is not a number")
        return real(*args, **options)

    monkeypatch.setattr(module, "learn", failing)
    search = pt.search(model, task, space=SMALL, trials=7, **QUICK)
    (bad,) = [p for p in search.trials if p.score is None]
    assert bad.form == {"name": "ia3"} and bad.problem == "the loss is not a number" and bad not in search.front
    assert len(search.trials) == 7


def test_a_point_runs_on_another_task(model, task, tmp_path, run, base, data):
    """From Python, and every kind of configuration as YAML by the command line."""
    search = pt.search(str(base), data / "one", trials=3, startup=3, seed=2, **QUICK)
    point = next(p for p in search.trials if p.form["name"] == "union")
    other = pt.learn(model, colours(24, "other"), form=point.form, sites=point.sites, **QUICK)
    assert (
        other.form == Form.of(point.form) and other.size == point.parameters and other.card.tasks[0]["name"] == "other"
    )
    file = tmp_path / "point.yaml"
    file.write_text(search.recipe(point))
    for tasks in ((), (data / "two",)):
        code, _, err = run("learn", *tasks, "--config", file, "--out", tmp_path / "lib")
        assert code == 0, err
    again, elsewhere = (pt.Adapter.load(tmp_path / "lib" / name) for name in ("one", "two"))
    assert again.form == elsewhere.form == Form.of(point.form) and list(again.patches) == list(elsewhere.patches)
    assert again.card.metrics["dev/one"] == point.score  # the trial itself, learned once more


def test_the_command(run, base, data, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump(SMALL))
    out = tmp_path / "found"
    options = ("--base", base, "--space", space, "--trials", 4, "--epochs", 1, "--batch-size", 8, "--out", out)
    code, printed, err = run("search", data / "one", *options)
    assert code == 0, err
    assert printed.split("\n")[0].split() == ["trial", "accuracy", "parameters", "seconds", "what"]
    assert "trial 4 of 4" in err and (out / "pareto.png").stat().st_size > 5_000
    held = json.loads((out / "search.json").read_text())
    assert len(held["trials"]) == 4 and sorted(f"{n:03d}.yaml" for n in held["front"]) == sorted(
        p.name for p in (out / "points").iterdir()
    )
    file = tmp_path / "search.yaml"
    said = {"task": data / "one", "base": base, "out": out}
    rest = {"space": SMALL, "trials": 4, "epochs": 1, "batch_size": 8}
    file.write_text(yaml.safe_dump({name: str(value) for name, value in said.items()} | rest))
    code, printed, err = run("search", "--config", file, "--json")  # nothing is learned again
    assert code == 0 and "4 of 4 trials are done already" in err
    again = json.loads(printed)
    assert again == held and again["trials"][0]["seconds"] == held["trials"][0]["seconds"]
    for number in held["front"]:
        point = next(t for t in held["trials"] if t["number"] == number)
        code, _, err = run(
            "learn", data / "two", "--config", out / "points" / f"{number:03d}.yaml", "--out", tmp_path / "lib"
        )
        adapter = pt.Adapter.load(tmp_path / "lib" / "two")
        assert code == 0 and adapter.form == Form.of(point["form"]) and adapter.size == point["parameters"], err
        chosen = adapter.card.training["stage"]
        assert (chosen["sites"], chosen["schedule"]["epochs"]) == (point["sites"], 1.0)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["search"], 2, "the task is missing"),
        (["search", "TASKS"], 2, "holds 2 tasks (one, two)"),
        (["search", "TASKS/one", "--space", "autopft"], 2, "no space is called 'autopft'"),
        (["search", "TASKS/one", "--trials", 0], 2, "trials"),
    ],
)
def test_what_the_command_refuses(run, base, data, tmp_path, arguments, code, text):
    given = [str(a).replace("TASKS", str(data)) for a in arguments]
    got, printed, err = run(*given, "--base", base, "--out", tmp_path / "o")
    assert got == code and text in err and "Traceback" not in err and printed == ""
    assert not (tmp_path / "o" / "search.json").exists()
