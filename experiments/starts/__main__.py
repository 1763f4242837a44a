"""Starts side by side: ``python -m experiments.starts``. What is done is kept beside the YAML, so a run may be cut short."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

from ..__main__ import ROOT, _mean, tasks_of

HERE = Path(__file__).parent
KEPT = HERE / "starts.results.json"


def one(config: dict[str, Any], model: Any, table: dict[str, Any], name: str, seed: int) -> list[dict[str, Any]]:
    """Every task learned from one start: the score and the processor time."""
    import tempfile

    import polytask as pt

    rows = []
    for task in tasks_of(config, seed):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            adapter = pt.learn(
                model, task, form={**table["form"], **table["starts"][name]}, seed=seed, progress=False, out=folder,
                **config["learn"],
            )  # fmt: skip
        busy = time.process_time() - began
        model.attach(adapter, "a")
        score = pt.evaluate(model, task, "a", resamples=0).value
        model.detach("a")
        rows.append({"task": task.name, "score": score, "cpu": busy, "steps": adapter.card.training["steps"]})
    return rows


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.starts", description=__doc__)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many minutes")
    given = parser.parse_args()
    config = read_yaml(HERE / "starts.yaml")
    until = time.monotonic() + 60 * given.minutes
    done: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    model: Any = None
    for table in config["tables"]:
        for seed in range(table["seeds"]):
            for name in table["starts"]:
                kept = done.setdefault(table["title"], {}).setdefault(name, {})
                if str(seed) in kept or time.monotonic() > until:
                    continue
                if model is None:
                    import polytask as pt

                    model = pt.Model.load(config["base"])
                print(f"{time.strftime('%H:%M:%S')} {table['title']}: {name}, seed {seed}", file=sys.stderr, flush=True)
                kept[str(seed)] = one(config, model, table, name, seed)
                KEPT.write_text(json.dumps(done, indent=1))
    page = page_of(config, done)
    (ROOT / config["page"]).write_text(page, encoding="utf-8")
    print(page)


def page_of(config: dict[str, Any], done: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = [task["name"] for task in config["tasks"]]
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Base {config['base']}, sizes `{json.dumps(config['sizes'])}`. Accuracy: mean over seeds with a 95 % t-interval. The "
        "last columns are paired: the difference from the first row at the same seed, averaged over the tasks, and the processor "
        "time of a run (its start included) over that row's. Made by `python -m experiments.starts`.", "",
    ]  # fmt: skip
    for table in config["tables"]:
        found = done.get(table["title"], {})
        lines += [f"## {table['title']}", "", f"Settings `{json.dumps({**table['form'], **config['learn']})}`.", ""]
        lines += [f"| start | {' | '.join(names)} | difference | time | seeds |", f"|---|{'---|' * (len(names) + 3)}"]
        base = found.get(table["baseline"], {})
        for name, seeds in found.items():
            if not seeds:
                continue
            cells = [
                _mean([row["score"] for rows in seeds.values() for row in rows if row["task"] == n]) for n in names
            ]
            both = [seed for seed in seeds if seed in base]
            gaps = [_average(seeds[seed], "score") - _average(base[seed], "score") for seed in both]
            pace = [_average(seeds[seed], "cpu") / _average(base[seed], "cpu") for seed in both]
            last = ["-", "1.00"] if name == table["baseline"] else [_mean(gaps), f"{statistics.median(pace):.2f}"]
            lines.append(f"| {name} | {' | '.join([*cells, *last])} | {len(seeds)} |")
        lines += ["", *([table["reading"].strip(), ""] if table.get("reading") else [])]
    return "\n".join(lines).rstrip() + "\n"


def _average(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


if __name__ == "__main__":
    main()
