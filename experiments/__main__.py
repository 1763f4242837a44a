"""Runs an experiment and writes its table: ``python -m experiments experiments/real/eight.yaml``.

Each seed draws its own training examples, learns, and compares; the table has the mean over seeds with a 95 % t-interval.
Finished seeds are kept beside the YAML (``.results.json``), so an interrupted experiment goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

ROOT = Path(__file__).resolve().parents[1]
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided, by number of seeds


def tasks_of(config: dict[str, Any], seed: int) -> list[Any]:
    """The tasks, cut to the sizes in the configuration: training examples by seed, test examples the same for all."""
    import random

    import polytask as pt

    made = []
    for entry in config["tasks"]:
        settings = dict(entry)
        file = (ROOT / config["data"] / settings.pop("file")).resolve()
        task = pt.Task.read(file, skip_bad_rows=True, **settings)  # a few rows of the collections are empty
        sizes = config["sizes"]
        train, dev, test = list(task.train), list(task.dev), list(task.test)
        random.Random(seed).shuffle(train)
        random.Random(0).shuffle(test)
        if not dev:
            dev = train[sizes["train"] :]
        made.append(
            pt.Task(
                **{
                    **vars(task),
                    "train": train[: sizes["train"]],
                    "dev": dev[: sizes["dev"]],
                    "test": test[: sizes["test"]],
                }
            )
        )
    return made


def one_seed(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Learns and compares once."""
    import polytask as pt
    from polytask.jobs import learn_each

    say = lambda text: print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: E731
    model = pt.Model.load(config["base"])
    tasks = tasks_of(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        adapters = learn_each(model, tasks, out=folder, say=say, seed=seed, progress=False, **config["learn"])
        table = pt.compare(model, adapters, tasks, seed=seed, say=say, **config.get("compare", {}))
    return table.as_dict()


def main() -> None:
    """Runs the seeds that are missing and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, help="how many seeds; the configuration's number when not given")
    parser.add_argument("--out", type=Path, help="the page to write; the configuration's when not given")
    given = parser.parse_args()
    config = read_yaml(given.config)
    if not (ROOT / config["data"]).exists():
        sys.exit(f"the data folder {config['data']} is not there; it holds the public collections that the YAML names")
    kept = given.config.with_suffix(".results.json")
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in range(given.seeds or config["seeds"]):
        if str(seed) not in done:
            print(f"seed {seed}", file=sys.stderr)
            done[str(seed)] = one_seed(config, seed)
            kept.write_text(json.dumps(done, indent=1))
    page = page_of(config, list(done.values()), given.config)
    out = given.out or ROOT / config["page"]
    out.write_text(page, encoding="utf-8")
    print(page)


def page_of(config: dict[str, Any], tables: list[dict[str, Any]], file: Path) -> str:
    """The results as Markdown."""
    names = [t["name"] for t in tables[0]["tasks"]]
    methods = [m["method"] for m in tables[0]["methods"]]
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Base {tables[0]['base']['name']}, {config['sizes']['train']} training, {config['sizes']['dev']} dev and "
        f"{config['sizes']['test']} test examples at most; settings `{json.dumps(config['learn'])}`; {len(tables)} seeds "
        "(training examples, order and start differ). Mean ± 95 % t-interval over seeds; in brackets the mean 95 % bootstrap "
        f"interval over test examples. Made by `python -m experiments {file}`.", "",
        f"| method | {' | '.join(names)} | average |", f"|---|{'---|' * (len(names) + 1)}",
    ]  # fmt: skip
    for method in methods:
        cells = [_cell(tables, method, name) for name in names]
        means = [next(m["average"] for m in t["methods"] if m["method"] == method) for t in tables]
        lines.append(f"| {method} | {' | '.join(cells)} | {interval(means)} |")
    lines += [
        "",
        "| method | trained parameters | bytes | seconds | peak memory, MB | forgot |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        found = [next(m for m in t["methods"] if m["method"] == method) for t in tables]
        forgot = [m["forgot"] for m in found if m["forgot"] is not None]
        lines.append(
            f"| {method} | {found[0]['trained_parameters'] or 0:,} | {found[0]['bytes']:,} | "
            f"{statistics.median(m['seconds'] for m in found):.0f} | {statistics.median(m['peak_mb'] or 0 for m in found):.0f} | "
            f"{interval(forgot) if forgot else '-'} |"
        )
    lines += ["", f"Forgot: change of the {tables[0]['forgetting'].get('measure', 'base')}.", ""]
    lines += [
        "Every adapter on every task (probe on frozen features), change against the bare base, mean over seeds:",
        "",
    ]
    lines += [f"| adapter | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for i, adapter in enumerate(tables[0]["cross"]["adapters"]):
        changes = [
            statistics.mean(t["cross"]["values"][i][j] - t["cross"]["base"][j] for t in tables)
            for j in range(len(names))
        ]
        lines.append(f"| {adapter} | {' | '.join(f'{c:+.3f}' for c in changes)} |")
    lines += ["", config.get("reading", "").strip(), ""]
    return "\n".join(lines)


def _cell(tables: list[dict[str, Any]], method: str, task: str) -> str:
    rows = [next(r for r in t["rows"] if (r["method"], r["task"]) == (method, task)) for t in tables]
    if any(r["value"] is None for r in rows):
        return "-"
    low, high = statistics.mean(r["low"] for r in rows), statistics.mean(r["high"] for r in rows)
    return f"{interval([r['value'] for r in rows])} [{low:.2f}, {high:.2f}]"


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = T_95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


if __name__ == "__main__":
    main()
