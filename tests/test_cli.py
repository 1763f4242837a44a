"""The command line: what it prints, its exit codes, and its YAML files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

import polytask as pt

COMMANDS = ("learn", "evaluate", "compare", "search", "inspect", "tasks", "sites", "forms", "transfer", "merge")


def test_learn_evaluate_compare_inspect(run, base, data, tmp_path):
    lib = tmp_path / "lib"
    code, out, err = run(
        "learn",
        data,
        "--base",
        base,
        "--out",
        lib,
        "--epochs",
        1,
        "--batch-size",
        8,
        "--form",
        "lora:rank=2,alpha=4",
        "--json",
    )
    assert code == 0, err
    records = json.loads(out)
    assert [r["adapter"] for r in records] == ["one", "two"] and records[0]["training"]["precision"] == "fp32"
    assert pt.Adapter.load(lib / "one").form == pt.LoRA(rank=2, alpha=4)

    code, out, _ = run("evaluate", data / "one", "--base", base, "--adapter", lib / "one", "--json")
    assert code == 0 and json.loads(out)["one"]["n"] == 10
    code, out, _ = run(
        "evaluate",
        data / "one",
        "--base",
        base,
        "--adapter",
        f"a={lib / 'one'}",
        "--adapter",
        f"b={lib / 'two'}",
        "--mix",
        "a=0.5,b=0.5",
    )
    assert code == 0 and out.startswith("one: accuracy")
    code, _, err = run("evaluate", data / "one", "--base", base, "--adapter", lib / "one", "--adapter", lib / "two")
    assert code == 2 and "say which act with --mix" in err

    code, out, err = run("compare", lib, data, "--base", base, "--out", tmp_path / "r")
    assert code == 0, err
    assert "adapter per task" in out and (tmp_path / "r" / "report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "r" / "table.json").read_text())["tasks"][0]["name"] == "one"

    code, out, _ = run("inspect", lib / "one")
    assert code == 0 and "LoRA(rank=2" in out and "learned from one" in out
    code, out, _ = run("inspect", lib / "one", "--json")
    assert json.loads(out)["card"]["training"]["steps"] == 3


def test_joint_and_together(run, base, data, tmp_path):
    code, out, err = run("learn", data, "--base", base, "--out", tmp_path / "j", "--joint", "--epochs", 1)
    assert code == 0 and out.startswith("joint:"), err
    code, out, err = run("learn", data, "--base", base, "--out", tmp_path / "t", "--together", "--epochs", 1)
    assert code == 0 and (tmp_path / "t" / "two" / "adapter_model.safetensors").is_file(), err


def test_a_file_says_the_same_as_the_flags(run, base, data, tmp_path):
    flags = [
        "learn",
        data / "one",
        "--base",
        base,
        "--out",
        tmp_path / "flags",
        "--epochs",
        1,
        "--form",
        "lora:rank=2",
        "--seed",
        3,
        "--base-dropout",
    ]
    assert run(*flags)[0] == 0
    file = tmp_path / "learn.yaml"
    settings = {
        "tasks": str(data / "one"), "base": str(base), "out": str(tmp_path / "file"), "epochs": 1, "seed": 3,
        "base-dropout": True,        "form": {"name": "lora", "rank": 2},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(settings))
    code, _, err = run("learn", "--config", file)
    assert code == 0, err
    assert pt.Adapter.load(tmp_path / "flags" / "one").hash == pt.Adapter.load(tmp_path / "file" / "one").hash
    code, _, err = run("learn", "--config", file, "--out", tmp_path / "third", "--seed", 4)  # flags win
    assert pt.Adapter.load(tmp_path / "third" / "one").hash != pt.Adapter.load(tmp_path / "file" / "one").hash


def test_an_unknown_name_in_the_file_is_refused_with_the_nearest(run, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("epoch: 3\nbatchsize: 8\nseed: many\n")
    code, _, err = run("learn", "--config", file)
    assert code == 2
    assert "unknown setting 'epoch' (did you mean 'epochs'?)" in err and "'batch_size'" in err
    assert "seed:" in err and "bad.yaml" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["learn", "--nonsense"], 2, "No such option"),
        (["lern"], 2, "No such command"),
        (["learn"], 2, "the tasks is missing"),
        (["tasks", "/nowhere/at/all"], 1, "/nowhere/at/all"),
        (["sites", "no-such-base-anywhere"], 1, "could not be loaded"),
        (["sites", "./nope"], 1, "does not exist"),
        (["inspect", "./nope"], 1, "there is no adapter at"),
        (["learn", "x", "--form", "lora:rank"], 2, "write name=value"),
        (["learn", "x", "--precision", "fp8"], 2, "precision"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(run, arguments, code, text):
    found, _, err = run(*arguments)
    assert found == code and text in err and "Traceback" not in err


def test_help_shows_an_example_for_each_command(run):
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0 and f"Example: polytask {command}" in out


def test_merge(run, tmp_path):
    import transformers
    from zoo import tiny

    for seed in range(2):
        tiny("llama", seed=seed)[0].save_pretrained(tmp_path / f"m{seed}")
    models = [tmp_path / "m0", tmp_path / "m1"]
    code, out, err = run("merge", *models, "--weights", "1,3", "--out", tmp_path / "out", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["method"] == "linear" and found["weights"] == [1.0, 3.0]
    merged, *parts = [transformers.AutoModelForCausalLM.from_pretrained(f) for f in (found["out"], *models)]
    a, b = (p.lm_head.weight for p in parts)
    assert pt.Model(merged).kind == "causal" and (merged.lm_head.weight - (a + 3 * b) / 4).abs().max() < 1e-6
    code, out, _ = run("merge", "list", "--json")
    assert code == 0 and {r["name"] for r in json.loads(out)} >= {"linear", "task_arithmetic"}
    for arguments, text in (
        ([*models, "--weights", "1,x"], "write a number for each input"),
        ([*models, "--method", "linear:density=1"], "has no setting 'density'"),
        ([*models, "--method", "task_arithmetic"], "say which (base=, --base)"),
        ([], "what to merge is missing"),
    ):
        code, _, err = run("merge", *arguments, "--out", tmp_path / "no")
        assert code in (1, 2) and text in err


def test_lists(run, data, base):
    code, out, _ = run("tasks", data, "--json")
    assert [t["kind"] for t in json.loads(out)] == ["classify", "classify"] and code == 0
    code, out, _ = run("sites", base, "--select", "query & layer==0", "--json")
    assert [s["name"] for s in json.loads(out)] == ["encoder.layer.0.attention.self.query"]
    code, out, _ = run("sites", base, "--select", "qery")
    assert code == 1 and out == ""
    code, out, _ = run("forms", "--json", "--base", base)
    found = {f["name"]: f for f in json.loads(out)}
    code, out, _ = run("forms")
    table = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and set(table) == {"form", *found} and "arXiv 2106.09685" in table["lora"]
    code, out, _ = run("forms", "dora", "--base", base)
    assert (
        code == 0 and "can be merged, in PEFT" in out and "Reference:" in out and "rank=" in out and "vera" not in out
    )
    code, _, err = run("forms", "dorra")
    assert code == 2 and "did you mean 'dora'" in err
    assert found["lora"]["in_peft"] and found["lora"]["parameters"] > 0 and found["full"]["paper"]


def test_version_and_light_imports():
    """Neither the package nor the help of the command line may import torch."""
    code = "import sys, polytask, polytask.cli.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    done = subprocess.run([sys.executable, "-m", "polytask", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == pt.__version__
