"""Groups of tasks: learned together or apart, merged within their group."""

from __future__ import annotations

import json

import pytest
from conftest import colours, same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_pool import QUICK, tasks

import polytask as pt
from polytask.core.errors import ConfigError, DataError, MergeError
from polytask.merge.groups import ALONE, JOINT, Groups, by_direction, by_gain, groups_of, stored

PLANS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.sampled_from([JOINT, ALONE]), min_size=1, max_size=9
)


class TestPlan:
    def test_who_gains_shares(self):
        assert by_gain({"a": 0.02, "b": 0.0, "c": -1e-9}) == {"a": JOINT, "b": JOINT, "c": ALONE}

    def test_into_the_pivot_apart_and_out_of_it_together(self):
        said = {"a": "de-en", "b": "en-de", "c": "XX -> En", "d": "en\u2192xx"}
        assert by_direction(said) == {"a": ALONE, "b": JOINT, "c": ALONE, "d": JOINT}
        assert by_direction({"a": "de-en", "b": "en-de"}, pivot="de") == {"a": JOINT, "b": ALONE}

    @pytest.mark.parametrize("wrong", ["", "de", "de-fr", "en-en", "de-en-fr", "-en"])
    def test_what_is_no_direction(self, wrong):
        with pytest.raises(ConfigError, match="'a' has the direction"):
            by_direction({"a": wrong})

    @given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.sampled_from(["de-en", "en-de"]), min_size=1))
    def test_a_tasks_plan_is_its_directions_alone(self, directions):
        whole = by_direction(directions)
        assert all(by_direction({task: said}) == {task: whole[task]} for task, said in directions.items())

    @given(st.integers(1, 4), st.integers(2, 5))
    def test_a_group_ends_with_two_adapters(self, groups, languages):
        """Stored are groups and groups; without merging groups and languages."""
        names = {f"g{g}": [f"{way}{g}x{i}" for way in ("in", "out") for i in range(languages)] for g in range(groups)}
        every = [task for own in names.values() for task in own]
        plan = by_direction({task: "xx-en" if task.startswith("in") else "en-xx" for task in every})
        merged, apart = stored(plan, names), stored(plan, names, merging=False)
        assert [e["kind"] for e in merged] == [JOINT, "merged"] * groups
        assert len(apart) == groups + groups * languages and {e["kind"] for e in apart} == {JOINT, ALONE}

    @given(PLANS, st.booleans(), st.integers(1, 3))
    @settings(max_examples=60)
    def test_every_task_is_served_once(self, plan, merging, count):
        groups = {f"g{g}": own for g in range(count) if (own := list(plan)[g::count])}
        made = stored(plan, groups, merging)
        assert sorted(task for entry in made for task in entry["tasks"]) == sorted(plan)
        assert len({entry["name"] for entry in made}) == len(made)
        for entry in made:
            assert set(entry["tasks"]) <= set(groups[entry["group"]])
            assert len({plan[task] for task in entry["tasks"]}) == 1
            assert (len(entry["tasks"]) == 1) == (entry["kind"] == ALONE)
        if merging:
            assert all(
                sum(e["group"] == g and e["kind"] == kind for e in made) <= 1
                for g in groups
                for kind in (JOINT, "merged")
            )


class TestGroupsOf:
    def test_fields_lists_and_directions(self):
        one, two = colours(name="one"), colours(name="two")
        one.group = two.group = "g"
        one.direction = "de-en"
        assert groups_of(None, [one, two]) == ({"g": ["one", "two"]}, {"one": "de-en"})
        assert groups_of({"a": ["two"], "b": {"one": "en-fr"}}, [one, two]) == (
            {"a": ["two"], "b": ["one"]},
            {"one": "en-fr"},
        )

    def test_fields_come_from_the_tasks_file(self, data):
        for name in ("one", "two"):
            (data / name / "task.yaml").write_text(f"group: g\ndirection: {name}-en\n")
        assert groups_of(None, pt.read_tasks(data)) == ({"g": ["one", "two"]}, {"one": "one-en", "two": "two-en"})

    def test_what_it_refuses(self):
        both = [colours(name="one"), colours(name="two")]
        with pytest.raises(ConfigError, match="in no group: two; say group"):
            groups_of({"g": ["one"]}, both)
        with pytest.raises(ConfigError, match="no task 'tow' .did you mean 'two'"):
            groups_of({"g": ["one", "tow"]}, both)
        with pytest.raises(ConfigError, match="'one' is named twice"):
            groups_of({"g": ["one"], "h": ["one", "two"]}, both)
        with pytest.raises(ConfigError, match="must be a list of tasks"):
            groups_of({"g": "one"}, both)
        with pytest.raises(ConfigError, match="'g/h' would give"):
            groups_of({"g/h": ["one", "two"]}, both)


class TestRun:
    def test_measured_plan_and_what_is_learned_for_it(self, encoder):
        """Of four tasks two gain; a measure that is better when lower is turned round."""
        names = ["a", "b", "c", "d"]
        alone = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 2.0}
        joint = {"a": 0.6, "b": 0.5, "c": 0.4, "d": 3.0}
        learned, merged = [], []

        def learn(name, own):
            learned.append((name, [task.name for task in own]))
            return pt.Adapter.new(encoder, pt.LoRA(rank=2), name=name)

        def merge(name, parts, own):
            merged.append((name, [part.name for part in parts], [task.name for task in own]))
            return pt.Adapter.new(encoder, pt.LoRA(rank=2), name=name)

        def score(adapter, task, split):
            known = joint if adapter.name == "g-joint" else alone
            return (known[task.name] if split == "dev" else 7.0), "accuracy", task.name != "d"

        run = Groups({n: colours(name=n) for n in names}, {"g": names}, {}, learn, merge, score)
        found = run.run()
        rows = {row["task"]: row for row in found.rows}
        assert {name: row["plan"] for name, row in rows.items()} == {"a": JOINT, "b": JOINT, "c": ALONE, "d": ALONE}
        assert [round(rows[n]["gain"], 6) for n in names] == [0.1, 0.0, -0.1, -1.0]
        assert learned == [("g-joint", names), *((n, [n]) for n in names), ("g-shared", ["a", "b"])]
        assert merged == [("g-merged", ["c", "d"], ["c", "d"])]
        assert [e["name"] for e in found.adapters] == ["g-joint", "g-merged"] and found.made[
            "g-joint"
        ].name == "g-shared"
        assert {row["score"] for row in found.rows} == {7.0}
        size = found.made["g-joint"].size
        assert found.totals["stored"] == {"adapters": 2, "parameters": 2 * size}
        assert found.totals["unmerged"] == {"adapters": 3, "parameters": 3 * size}

    def test_without_dev_nothing_is_measured(self, encoder):
        both = tasks()
        both[1].dev = []
        with pytest.raises(DataError, match="'inverse' has no dev split"):
            pt.groupwise(encoder, both, groups={"g": ["colours", "inverse"]}, **QUICK)

    def test_directions_from_end_to_end(self, encoder, tmp_path):
        """Two languages into English and two out of it: one adapter is joint and one merged, of the parts' rank."""
        four = [colours(name=n, start=40 * i) for i, n in enumerate(("de-en", "nl-en", "en-de", "en-nl"))]
        for task in four:
            task.group, task.direction = "germanic", task.name
        before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
        options = {"plan": "direction", "form": pt.LoRA(rank=2), "merge": {"name": "ties", "density": 0.5}, **QUICK}
        found = pt.groupwise(encoder, four, out=tmp_path / "g", **options)
        assert same_state(before, encoder.module) and not encoder.attached
        assert [(e["name"], e["kind"], sorted(e["tasks"])) for e in found.adapters] == [
            ("germanic-joint", JOINT, ["en-de", "en-nl"]), ("germanic-merged", "merged", ["de-en", "nl-en"]),
        ]  # fmt: skip
        assert found.totals["stored"]["adapters"] == 2 and found.totals["unmerged"]["adapters"] == 3
        parts = [pt.Adapter.load(tmp_path / "g" / "learned" / name) for name in ("de-en", "nl-en")]
        expected = pt.merge(parts, "ties", density=0.5, rank=2)
        merged = pt.Adapter.load(tmp_path / "g" / "adapters" / "germanic-merged")
        assert merged.form.rank == 2 and merged.size == parts[0].size and merged.hash == expected.hash
        assert found.adapters[1]["relative_error"] == expected.card.training["merge"]["relative_error"] > 0
        for row in found.rows:
            assert row["gain"] is None and row["direction"] == row["task"]
            name = encoder.attach(found.made[row["adapter"]], "one")
            task = next(task for task in four if task.name == row["task"])
            assert row["score"] == pt.evaluate(encoder, task, name, resamples=0).value
            encoder.detach(name)
        assert json.loads((tmp_path / "g" / "groupwise.json").read_text()) == found.as_dict()
        assert "stored: 2 adapters" in str(found) and str(found).count("germanic-merged") == 2

    def test_a_method_that_makes_no_adapter(self, encoder):
        with pytest.raises(MergeError, match="graft does not make one adapter"):
            pt.groupwise(
                encoder, tasks(), groups={"g": {"colours": "a-en", "inverse": "b-en"}}, plan="direction",
                merge={"name": "graft", "sparsities": [1e-3], "steps": 0}, form=pt.LoRA(rank=2), **QUICK,
            )  # fmt: skip

    def test_wrong_settings(self, encoder):
        with pytest.raises(ConfigError, match="plan must be measured or direction"):
            pt.groupwise(encoder, tasks(), plan="guessed")
        with pytest.raises(ConfigError, match="tise"):
            pt.groupwise(encoder, tasks(), groups={"g": ["colours", "inverse"]}, merge="tise")
        with pytest.raises(ConfigError, match="'colours' has the direction ''"):
            pt.groupwise(encoder, tasks(), groups={"g": ["colours", "inverse"]}, plan="direction")


def test_the_command_measures_saves_and_says(run, base, data, tmp_path):
    (tmp_path / "groups.yaml").write_text("both: [one, two]\n")
    command = ["groupwise", data, "--base", base, "--groups", tmp_path / "groups.yaml", "--merge", "none"]
    command += ["--form", "lora:rank=2", "--epochs", 1, "--out", tmp_path / "out", "--json"]
    code, said, err = run(*command)
    assert code == 0, err
    found = json.loads(said)
    assert [row["task"] for row in sorted(found["rows"], key=lambda row: row["task"])] == ["one", "two"]
    assert all(row["gain"] == row["joint"] - row["separate"] for row in found["rows"])
    kept = {path.name for path in (tmp_path / "out" / "adapters").iterdir()}
    assert kept == {entry["name"] for entry in found["adapters"]}
    assert json.loads((tmp_path / "out" / "groupwise.json").read_text()) == found
