"""What the documents say can be done as they say it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polytask.core.config import read_yaml

ROOT = Path(__file__).resolve().parents[1]


def test_every_command_in_the_readme_exists():
    from polytask.cli import commands

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = set(re.findall(r"`polytask (\w+)", text))
    app = commands()
    groups = {group.typer_instance.info.name for group in app.registered_groups}
    assert said == {command.callback.__name__ for command in app.registered_commands} | groups


def test_every_link_in_the_documents_leads_somewhere():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_shipped_configuration_is_understood():
    import inspect

    from polytask.cli.app import learn
    from polytask.core.recipe import Schedule

    known = set(inspect.signature(learn).parameters)
    assert set(read_yaml(ROOT / "examples" / "demo.yaml")) <= known
    for file in ROOT.glob("experiments/*/*.yaml"):
        config = read_yaml(file)
        Schedule.of({k: v for k, v in config["learn"].items() if k in Schedule.model_fields})
        assert set(config["learn"]) <= set(Schedule.model_fields) | {"form", "sites"}


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "accuracy" in capsys.readouterr().out
    assert names["hidden"].shape[0] == 2 and (tmp_path / "lib" / "helpdesk-urgency" / "adapter_config.json").is_file()


def test_the_example_tasks_are_what_their_page_says():
    import polytask as pt

    tasks = pt.read_tasks(ROOT / "examples" / "tasks")
    assert len(tasks) == 6
    page = (ROOT / "examples" / "tasks" / "README.md").read_text(encoding="utf-8")
    for task in tasks:
        assert (len(task.train), len(task.dev), len(task.test)) == (180, 40, 80)
        assert task.name in page and task.duplicates == 0 and task.licence == "Apache-2.0"
        assert set(task.labels) == {e.target for e in task.train} == {e.target for e in task.test}


def test_the_page_of_forms_has_each_of_them_once():
    from polytask.core.form import forms

    page = (ROOT / "docs" / "forms.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([\w-]+)` \|", page, re.M)
    assert sorted(named) == sorted(forms)
    for form in forms.values():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{form.name}` |"))
        said = tuple(cell.strip() == "yes" for cell in row.split("|")[-3:-1])
        assert said == (form.mergeable, form.in_peft) and form.paper in row
