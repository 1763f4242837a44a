"""Which task helps which: the matrix of gains, its groups and its files."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from conftest import colours
from hypothesis import given
from hypothesis import strategies as st
from test_merge_pool import QUICK, tasks

import polytask as pt
from polytask.core.errors import ConfigError, DataError
from polytask.evaluate.transferability import Transferability
from polytask.merge.groups import groups_of

GAINS = st.integers(2, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(-1, 1), min_size=n, max_size=n), min_size=n, max_size=n)
)


def found(gains, higher=True, alone=0.5):
    names = [f"t{i}" for i in range(len(gains))]
    sign = 1 if higher else -1
    scores = [[None if i == j else alone + sign * g for j, g in enumerate(row)] for i, row in enumerate(gains)]
    return Transferability(
        names, [{"name": "m", "higher_is_better": higher}] * len(names), [alone] * len(names), scores
    )


class TestGains:
    @pytest.mark.parametrize("higher", [True, False])
    def test_positive_is_better_whatever_the_metric(self, higher):
        made = found([[0, 0.25, -0.5], [0.125, 0, 0.5], [-0.25, 0, 0]], higher)
        assert made.gains == [[None, 0.25, -0.5], [0.125, None, 0.5], [-0.25, 0.0, None]]
        assert made.best() == {"t0": "t1", "t1": "t0", "t2": "t1"}
        assert found([[0, -0.25], [0, 0]]).best() == {"t0": None, "t1": None}

    def test_groups_join_while_that_is_a_gain_on_average(self):
        # t0 and t1 help each other, t2 and t3 too; between them the mean is below zero though t0 helps t2
        made = found([[0, 0.2, 0.3, -0.2], [0.1, 0, -0.2, -0.2], [-0.4, -0.2, 0, 0.4], [-0.2, -0.2, -0.1, 0]])
        assert made.groups() == {"group-1": ["t0", "t1"], "group-2": ["t2", "t3"]}
        assert made.groups(1) == {"group-1": ["t0", "t1", "t2", "t3"]}
        assert list(made.groups(4).values()) == [["t0"], ["t1"], ["t2"], ["t3"]]
        assert list(found([[0, 0.5], [-0.5, 0]]).groups().values()) == [["t0"], ["t1"]]  # no gain is none
        for wrong in (0, 5):
            with pytest.raises(ConfigError, match="1 to 4 groups of 4"):
                made.groups(wrong)

    @given(GAINS, st.randoms(use_true_random=False))
    def test_groups_are_a_partition_that_the_order_does_not_change(self, gains, random):
        n = len(gains)
        own = found(gains).groups()
        assert sorted(task for group in own.values() for task in group) == [f"t{i}" for i in range(n)]
        mutual = [[(gains[i][j] + gains[j][i]) / 2 for j in range(n)] for i in range(n)]
        values = sorted(mutual[i][j] for i in range(n) for j in range(i))
        if any(b - a < 1e-6 for a, b in zip(values, values[1:], strict=False)) or any(abs(v) < 1e-6 for v in values):
            return  # ties may go either way
        if values[-1] < 0:
            assert len(own) == n
        order = list(range(n))
        random.shuffle(order)
        turned = found([[gains[a][b] for b in order] for a in order]).groups()
        assert {frozenset(g) for g in own.values()} == {
            frozenset(f"t{order[int(t[1:])]}" for t in g) for g in turned.values()
        }

    def test_groups_are_what_groupwise_takes(self):
        made = found([[0, 0.2], [0.1, 0]])
        assert groups_of(made.groups(), [colours(name="t0"), colours(name="t1")])[0] == {"group-1": ["t0", "t1"]}


class TestRun:
    def test_scores_are_of_adapters_that_start_from_each_other(self, encoder, tmp_path):
        form, both = pt.LoRA(rank=2), tasks()
        made = pt.transferability(encoder, both, form=form, out=tmp_path / "t", seed=3, **QUICK)
        own = pt.learn(encoder, both[0], form=form, seed=3, **QUICK)
        went_on = pt.learn(encoder, both[1], start=own, form=form, seed=3, **QUICK)
        for adapter, task, score in ((own, both[0], made.alone[0]), (went_on, both[1], made.scores[0][1])):
            encoder.attach(adapter, "one")
            assert pt.evaluate(encoder, task, "one", split="dev", resamples=0).value == score
            encoder.detach("one")
        assert made.scores[0][0] is made.scores[1][1] is None
        kept = pt.Adapter.load(tmp_path / "t" / "from" / both[0].name / both[1].name)
        assert kept.card.parents == [pt.Adapter.load(tmp_path / "t" / "alone" / both[0].name).hash]
        assert not encoder.attached
        rows = list(csv.reader((tmp_path / "t" / "transferability.csv").open()))
        assert rows[0][1:] == made.names and [row[0] for row in rows[1:]] == made.names
        read = [[float(cell) if cell else None for cell in row[1:]] for row in rows[1:]]
        assert read == made.gains
        assert json.loads((tmp_path / "t" / "transferability.json").read_text()) == made.as_dict()
        assert yaml.safe_load((tmp_path / "t" / "groups.yaml").read_text()) == made.groups()
        assert (tmp_path / "t" / "transferability.png").read_bytes().startswith(b"\x89PNG")

    def test_it_goes_on_where_it_was(self, encoder, tmp_path, monkeypatch):
        settings = {"form": pt.LoRA(rank=2), "out": tmp_path / "t", **QUICK}
        first = pt.transferability(encoder, tasks(), **settings)
        stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "t").rglob("*.safetensors")}
        assert len(stamps) >= 4
        again = pt.transferability(encoder, tasks(), **settings)
        assert again == first and all(file.stat().st_mtime_ns == at for file, at in stamps.items())

    def test_what_it_refuses(self, encoder):
        one, two = tasks()
        with pytest.raises(ConfigError, match="two or more"):
            pt.transferability(encoder, [one])
        two.dev = []
        with pytest.raises(DataError, match="'inverse' has no split 'dev'"):
            pt.transferability(encoder, [one, two])


def test_the_command(run, base, data, tmp_path):
    command = [
        "transferability",
        data,
        "--base",
        base,
        "--form",
        "lora:rank=2",
        "--epochs",
        1,
        "--out",
        tmp_path / "out",
    ]
    code, said, err = run(*command)
    assert code == 0, err
    assert "best starts: " in said and "groups: " in said and "learning two from one" in err
    code, said, _ = run(*command, "--json")
    assert code == 0 and json.loads(said) == json.loads((tmp_path / "out" / "transferability.json").read_text())
    code, _, err = run("transferability", data, "--base", base, "--split", "deve", "--out", tmp_path / "new")
    assert code and "no split 'deve'" in err
