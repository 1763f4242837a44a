"""What a trace says of a router, and the command `polytask route`."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import colours
from test_routers import made
from zoo import tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.core.head import head_for
from polytask.core.routing import Routing
from polytask.report.trace import picture
from polytask.route.trace import trace

NAMES = ("a", "b", "c")


def tasks():
    return [colours(name=name) for name in NAMES]


class TestTrace:
    def test_the_oracle_always_agrees(self, encoder):
        mix = pt.route(made(encoder), "oracle", model=encoder)
        found = trace(encoder, mix, tasks(), examples=3)
        assert found.agreement == {"a": 1.0, "b": 1.0, "c": 1.0}
        assert found.chance == pytest.approx(1 / 3)
        assert found.tasks == {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
        assert max(found.entropy) == 0.0
        assert found.sites == list(mix.gates)

    def test_uniform_is_undecided(self, encoder):
        found = trace(encoder, pt.route(made(encoder), "uniform", model=encoder), tasks(), examples=2)
        assert found.entropy == pytest.approx([math.log(3)] * len(found.sites))
        assert found.agreement["b"] == pytest.approx(1 / 3)  # ties are shared
        for row in found.load:
            assert row == pytest.approx([1 / 3] * 3)

    def test_the_sums_are_those_of_the_weights(self, encoder):
        """Against a plain loop over examples, sites and tokens."""
        mix = pt.route(made(encoder), "arrow", model=encoder, top_k=2)
        task = tasks()[1]
        found = trace(encoder, mix, [task], examples=3)
        load = {site: torch.zeros(3) for site in mix.gates}
        entropy, agree, count = dict.fromkeys(mix.gates, 0.0), 0, 0

        def see(gate, weights, call):
            nonlocal agree, count
            for token in weights.dense().reshape(-1, 3):
                load[gate.site.name] += token
                entropy[gate.site.name] -= sum(float(w * w.log()) for w in token if w > 0)
                agree += int(token.argmax()) == 1
                count += 1

        sizes = 0
        for example in task.test[:3]:
            batch = encoder.processor(example.inputs[0], return_tensors="pt")
            sizes += batch["input_ids"].shape[1]
            with torch.no_grad(), mix.tracing(see), encoder.using(mix):
                encoder.module(**batch)
        for site, row, mean in zip(found.sites, found.load, found.entropy, strict=True):
            assert row == pytest.approx((load[site] / load[site].sum()).tolist(), abs=1e-5)
            assert mean == pytest.approx(entropy[site] / sizes, abs=1e-5)
        assert found.agreement["b"] == pytest.approx(agree / count)
        first = found.examples[0]
        assert first["tokens"][0] == "[CLS]" and len(first["weights"][0]) == len(first["tokens"])

    def test_padding_does_not_count(self, encoder):
        """The sequences of one example may have other lengths than each other."""
        row = pt.Example(("where?",), 1, choices=("here", "a long way from here, over there"))
        task = pt.Task(name="a", kind="choose", train=[row], dev=[row], test=[row])
        mix = pt.route(made(encoder), "arrow", model=encoder, top_k=1)
        found = trace(encoder, mix, [task])
        batch = encoder.processor(["where?"] * 2, list(row.choices), padding=True, return_tensors="pt")
        assert int((batch["attention_mask"] == 0).sum()) > 0
        assert all(len(site) == int(batch["attention_mask"].sum()) for site in found.examples[0]["weights"])

    @pytest.mark.parametrize("family", ["decoder", "seq2seq"])
    def test_on_models_that_write(self, family, request):
        model = request.getfixturevalue(family)
        mix = pt.route(made(model), "arrow", model=model)
        found = trace(model, mix, tasks(), examples=2)
        for shares in found.tasks.values():
            assert sum(shares) == pytest.approx(1.0)
        assert picture(found.as_dict())[:4] == b"\x89PNG"

    @pytest.mark.parametrize("router", ["arrow", "uniform"])
    def test_while_the_model_writes(self, decoder, router):
        """With a cache each token is decided once, and as in one forward over the text that came out."""
        mix = pt.route(made(decoder), router, model=decoder)
        task = pt.Task(name="a", kind="generate", train=[], dev=[], test=[pt.Example(("what a day",), "fine")])
        found = trace(decoder, mix, [task], write=True)
        (example,) = found.examples
        decided = torch.tensor(example["weights"])
        assert 1 < example["prompt"] < len(example["tokens"]) == decided.shape[1]
        texts = []
        with decoder.using(mix):
            head = head_for(decoder, task)
            texts.append(head.written(decoder, head.rows(decoder, task.test))[0][:, :-1])
        seen = {}
        see = lambda gate, weights, call: seen.__setitem__(gate.site.name, weights.dense())  # noqa: E731
        with torch.no_grad(), decoder.using(mix), mix.tracing(see):
            decoder.module(input_ids=texts[0])
        for site, weights in zip(example["sites"], decided, strict=True):
            torch.testing.assert_close(weights, seen[site].reshape(-1, 3).expand(len(weights), -1), atol=1e-3, rtol=0)
        given = trace(decoder, mix, [task]).examples[0]
        assert given["tokens"][: example["prompt"]] == example["tokens"][: example["prompt"]]
        assert picture(found.as_dict())[:4] == b"\x89PNG"

    def test_only_texts_are_written(self, encoder):
        mix = pt.route(made(encoder), "uniform", model=encoder)
        with pytest.raises(ConfigError, match="none of .* asks for text"):
            trace(encoder, mix, tasks(), write=True)

    def test_on_images(self):
        module, _ = tiny("vit")
        model = pt.Model(module)
        mix = pt.route(made(model), "arrow", model=model)
        examples = [pt.Example((), "x", image=np.full((32, 32, 3), i, "uint8")) for i in (9, 99)]
        task = pt.Task(name="a", kind="classify", train=[], dev=[], test=examples, labels=("x", "y"))
        found = trace(model, mix, [task])
        assert found.examples[0]["tokens"] == []
        assert picture(found.as_dict())[:4] == b"\x89PNG"

    def test_many_adapters_have_one_column_for_the_rest(self, encoder):
        names = tuple(f"n{i}" for i in range(20))
        found = trace(encoder, pt.route(made(encoder, names), "arrow", model=encoder), [colours(name="n3")], examples=1)
        assert picture(found.as_dict())[:4] == b"\x89PNG"

    def test_a_task_without_examples(self, encoder):
        mix = pt.route(made(encoder), "arrow", model=encoder)
        with pytest.raises(ConfigError, match="no examples in dev"):
            trace(
                encoder,
                mix,
                [pt.Task(name="a", kind="classify", train=[], dev=[], test=[], labels=("x", "y"))],
                split="dev",
            )


@pytest.fixture
def library(base, data, tmp_path):
    model = pt.Model.load(str(base))
    for name, adapter in made(model, ("one", "two")).items():
        adapter.save(tmp_path / "lib" / name)
    return tmp_path / "lib"


class TestCommand:
    def test_route_and_trace(self, run, base, data, library, tmp_path):
        code, out, _ = run("route", library, "--router", "arrow:top_k=1", "--out", tmp_path / "m.safetensors", "--json")
        assert code == 0
        assert json.loads(out)["router"] == {"name": "arrow", "top_k": 1, "temperature": 1.0, "probe": 0}
        assert Routing.load(tmp_path / "m.safetensors", library).router.top_k == 1
        code, out, _ = run(
            "route", "trace", tmp_path / "m.safetensors", library, "--base", base, "--data", data, "--out", tmp_path / "t",
            "--examples", 2,
        )  # fmt: skip
        assert code == 0 and "its own leads at" in out
        assert json.loads((tmp_path / "t" / "trace.json").read_text())["adapters"] == ["one", "two"]
        assert (tmp_path / "t" / "trace.png").read_bytes()[:4] == b"\x89PNG"

    def test_what_learns(self, run, base, data, library, tmp_path):
        """Adapters that learn with their router are saved beside the mix."""
        code, _, err = run(
            "route", library, "--router", "molora:top_k=1", "--base", base, "--data", data, "--set", "epochs=1",
            "--out", tmp_path / "m.safetensors",
        )  # fmt: skip
        assert code == 0, err
        mix = Routing.load(tmp_path / "m.safetensors", tmp_path / "m")
        assert set(mix.heads) == {"one", "two"}

    def test_groups(self, run, base, data, library, tmp_path):
        code, out, err = run("route", "mbc", library, "--set", "k=2", "--json")
        assert code == 0, err
        assert json.loads(out)["groups"] == [["one"], ["two"]]
        code, out, err = run(
            "route",
            "mbc",
            library,
            "--set",
            "k=1",
            "--set",
            "epochs=1",
            "--base",
            base,
            "--data",
            data,
            "--out",
            tmp_path / "g",
        )
        assert code == 0 and "group0: one, two" in out, err
        assert (tmp_path / "g" / "group0" / "adapter_config.json").is_file()

    def test_experts_for_a_few_examples(self, run, base, data, tmp_path):
        code, _, err = run("learn", data, "--base", base, "--epochs", 1, "--out", tmp_path / "own")
        assert code == 0, err
        code, out, err = run(
            "route", "kshot-experts", tmp_path / "own", "--base", base, "--data", data / "one", "--set", "k=4", "--set",
            "experts=2", "--set", "epochs=1", "--pool", data / "two", "--out", tmp_path / "m.safetensors", "--json",
        )  # fmt: skip
        assert code == 0, err
        found = json.loads(out)
        assert sorted(found["chosen"]) == ["one", "two"] and found["examples"] >= 4
        assert Routing.load(tmp_path / "m.safetensors", tmp_path / "m").heads

    def test_the_list(self, run):
        code, out, _ = run("route", "list", "--json")
        records = {record["name"]: record for record in json.loads(out)}
        assert code == 0 and records["arrow"]["settings"]["top_k"] == 4
        assert all(record["summary"] for record in records.values())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--router", "arow"), "did you mean 'arrow'"),
            (("--router", "arrow:topk=2"), "did you mean 'top_k'"),
            (("--router", "molora"), "learns; give the base"),
            (("--set", "epochs"), "write a setting and its value"),
            (("more",), "no word of route"),
            (("more", "and more"), "not polytask route"),
        ],
    )
    def test_wrong_flags(self, run, library, arguments, message):
        code, _, err = run("route", library, *arguments)
        assert code == 2 and message in err

    def test_no_mix(self, run, library, base, data, tmp_path):
        (tmp_path / "bad").write_bytes(b"x" * 20)
        code, _, err = run("route", "trace", tmp_path / "bad", library, "--base", base, "--data", data)
        assert code == 1 and "holds no mix" in err
        code, _, err = run("route", tmp_path / "nothing")
        assert code == 1 and "no folders of adapters" in err


class TestCompare:
    def test_routers_beside_the_others(self, run, base, data, tmp_path):
        code, _, err = run("learn", data, "--base", base, "--epochs", 1, "--out", tmp_path / "lib")
        assert code == 0, err
        code, out, err = run(
            "compare", tmp_path / "lib", data, "--base", base, "--no-joint", "--no-cross", "--route", "oracle", "--route",
            "arrow:top_k=1", "--route", "scalearn", "--out", tmp_path / "report", "--json",
        )  # fmt: skip
        assert code == 0, err
        table = json.loads(out)
        rows = {(row["method"], row["task"]): row["value"] for row in table["rows"]}
        for task in ("one", "two"):  # a perfect router is each task by its own adapter
            assert rows["routed: oracle", task] == rows["adapter per task", task]
            assert rows["routed: scalearn", task] is not None
        methods = {m["method"]: m for m in table["methods"]}
        assert "routed: arrow top_k=1" in methods and methods["routed: scalearn"]["seconds"] > 0
        assert "routed: oracle" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")

    def test_the_base_is_as_before(self, encoder):
        tasks = [colours(name="a"), colours(name="b", start=50)]
        adapters = [pt.learn(encoder, task, epochs=1, progress=False) for task in tasks]
        pt.compare(encoder, adapters, tasks, joint=False, cross=False, routes=["molora"], resamples=0)
        assert encoder.attached == () and encoder.mix is None
