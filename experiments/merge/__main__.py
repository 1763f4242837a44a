"""Every merge method on eight classifiers of one encoder: ``python -m experiments.merge``.

Each (kind of model, seed) runs in a process of its own: it learns a model for each set, and merges them by every method. What
is done is kept beside the YAML (``.results.json``), so an interrupted run goes on; models are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

from ..__main__ import interval, tasks_of

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE = HERE / "eight.yaml"
KEPT = HERE / "eight.results.json"
OWN = "own model each"
# the order of methods in their papers, each above the one before
PAPERS = (("average", "task_arithmetic"), ("task_arithmetic", "ties"), ("ties", "lines"), ("ties", "pcb"),
          ("lines", "adamerging"), ("pcb", "adamerging"), ("adamerging", OWN))  # fmt: skip


def results() -> dict[str, Any]:
    """What is done: by kind, seed and method; and the settings that were chosen, by kind and method."""
    return dict(json.loads(KEPT.read_text())) if KEPT.exists() else {}


def keep(path: tuple[str, ...], value: Any) -> None:
    """Adds to what is done; several processes may."""
    import fcntl

    with (HERE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = results()
        place = done
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
        KEPT.write_text(json.dumps(done, indent=1))


class Bench:
    """The base, the tasks and the tuned models of one kind and seed."""

    def __init__(self, config: dict[str, Any], kind: str, seed: int, cache: Path) -> None:
        import polytask as pt
        from polytask.jobs import learn_each

        self.config, self.kind, self.seed, self.cache = config, kind, seed, cache
        self.model = pt.Model.load(config["base"])
        self.model.module.requires_grad_(False)
        self.tasks = tasks_of(config, seed)
        learn = {**config["learn"], "form": config["kinds"][kind]}
        self.adapters = learn_each(
            self.model, self.tasks, out=cache / f"{kind}-{seed}", seed=seed, progress=False, **learn
        )

    def scores(self, mixes: dict[str, Any], split: str, heads: dict[str, Any] | None = None) -> dict[str, float]:
        """Of each task under its mix, read by its head; by a probe where there is none."""
        import polytask as pt

        found = {}
        for task in self.tasks:
            score = pt.evaluate(
                self.model, task, mixes[task.name], split=split, head=(heads or {}).get(task.name), resamples=0,
                longest=self.config["learn"]["longest"],
            )  # fmt: skip
            found[task.name] = score.value
        return found

    def own(self, split: str = "test") -> dict[str, float]:
        """Every task by its own model."""
        names = {task.name: self.model.attach(a, task.name) for task, a in zip(self.tasks, self.adapters, strict=True)}
        found = self.scores(names, split)
        self.model.detach()
        return found

    def bare(self) -> dict[str, float]:
        """A probe on the base's features."""
        return self.scores({task.name: None for task in self.tasks}, "test")

    def merged(self, entry: dict[str, Any], settings: dict[str, Any], split: str) -> dict[str, Any]:
        """The scores of one merged model, and what it cost to make."""
        import polytask as pt
        from polytask.merge.fit import Parts, fits

        method = entry["method"]
        if method == "groupwise":
            return self.grouped(settings, split)
        looking: dict[str, Any] = (
            {"base": self.model, "data": self.tasks, "split": entry["data"]} if entry.get("data") else {}
        )
        if looking:
            looking["longest"] = self.config["learn"]["longest"]
        if method not in fits or fits[method].gives == "model":
            looking["as_"] = "lora" if self.kind == "lora" and method in ("linear", "task_arithmetic") else "full"
        began, busy = time.perf_counter(), time.process_time()
        made = pt.merge(self.adapters, method, seed=self.seed, **looking, **settings)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        if method == "graft":  # sparse adapters, one for each model
            return {**self.parted(made.adapters, split), "seconds": seconds, "cpu": busy, "settings": settings}
        if method == "cycleqd":
            made = made.adapter
        mix = made.attach(self.model) if isinstance(made, Parts) else self.model.attach(made, "merged")
        heads = {task: head for adapter in self.adapters for task, head in adapter.heads.items()}
        found = self.scores({task.name: mix for task in self.tasks}, split, heads)
        self.model.detach()
        size = sum(p.numel() for p in made.parameters())
        return {"scores": found, "seconds": seconds, "cpu": busy, "parameters": size, "settings": settings}

    def parted(self, adapters: dict[str, Any], split: str) -> dict[str, Any]:
        """Several adapters, each for the tasks whose heads it has."""
        mixes, heads = {}, {}
        for name, adapter in adapters.items():
            attached = self.model.attach(adapter, name)
            mixes |= dict.fromkeys(adapter.heads, attached)
            heads |= adapter.heads
        found = self.scores(mixes, split, heads)
        self.model.detach()
        return {"scores": found, "parameters": sum(adapter.size for adapter in adapters.values())}

    def grouped(self, settings: dict[str, Any], split: str) -> dict[str, Any]:
        """Tasks that gain together share, the others of their group are merged."""
        import polytask as pt

        began, busy = time.perf_counter(), time.process_time()
        learn = {**self.config["learn"], "form": self.config["kinds"][self.kind]}
        out = self.cache / f"grouped-{self.kind}-{self.seed}"
        for task in self.tasks:  # each set's own is there already
            own, target = self.cache / f"{self.kind}-{self.seed}" / task.name, out / "learned" / task.name
            if own.exists() and not target.exists():
                shutil.copytree(own, target)
        made = pt.groupwise(self.model, self.tasks, seed=self.seed, out=out, **settings, **learn).made
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        return {**self.parted(made, split), "seconds": seconds, "cpu": busy, "settings": settings}


def variants(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of a method's grid, one after the other."""
    fixed, grid = entry.get("settings", {}), entry.get("grid", {})
    for values in itertools.product(*grid.values()):
        yield {**fixed, **dict(zip(grid, values, strict=True))}


def one(config: dict[str, Any], kind: str, seed: int, cache: Path, until: float) -> None:
    """Every method that is missing, for one kind and seed."""
    done = results().get(kind, {}).get(str(seed), {})
    bench = Bench(config, kind, seed, cache)
    if OWN not in done:
        keep((kind, str(seed), OWN), {"scores": bench.own()})
        keep((kind, str(seed), "probe on the base"), {"scores": bench.bare()})
    for name, given in config["methods"].items():
        entry = {"method": name, **given}
        if name in done or time.time() > until or kind not in entry.get("kinds", config["kinds"]):
            continue
        print(f"{time.strftime('%H:%M:%S')} {kind} seed {seed} {name}", file=sys.stderr, flush=True)
        settings = next(variants(entry))
        if entry.get("grid"):
            chosen = results().get("chosen", {}).get(kind, {}).get(name)
            if chosen is None:
                tried = [
                    (statistics.mean(bench.merged(entry, s, "dev")["scores"].values()), s) for s in variants(entry)
                ]
                chosen = max(tried, key=lambda pair: pair[0])[1]
                keep(("chosen", kind, name), chosen)
            settings = chosen
        keep((kind, str(seed), name), bench.merged(entry, settings, "test"))


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.merge", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many minutes")
    parser.add_argument(
        "--cache", type=Path, default=Path("~/.cache/polytask/experiments/merge"), help="for the models"
    )
    parser.add_argument("--one", nargs=3, metavar=("KIND", "SEED", "UNTIL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    config = dict(read_yaml(FILE))
    if given.one:
        kind, seed, until = given.one
        one(config, kind, int(seed), given.cache.expanduser(), float(until))
        return
    until = time.time() + 60 * min(given.minutes, 1e6)

    def run(job: tuple[int, str]) -> None:
        seed, kind = job
        command = [sys.executable, "-m", "experiments.merge", "--cache", str(given.cache), "--one", kind, str(seed)]
        subprocess.run([*command, str(until)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)

    for seed in range(config["seeds"]):  # the first chooses settings, so it is done before the others begin
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(run, [(seed, kind) for kind in config["kinds"]]))
    page = page_of(config, results())
    (ROOT / config["page"]).write_text(page, encoding="utf-8")
    print(page)


# The page


def page_of(config: dict[str, Any], done: dict[str, Any]) -> str:
    """The results as Markdown, for each kind best first."""
    names = [task["name"] for task in config["tasks"]]
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Sizes `{json.dumps(config['sizes'])}`. A score is the accuracy; normalised: over that of the set's own model, then the "
        "mean over sets; worst: the lowest of these. Means over seeds with 95 % t-intervals. Settings in the column were chosen "
        "on the dev splits of the first seed. Made by `python -m experiments.merge`."
    ]
    for kind in config["kinds"]:
        seeds = done.get(kind, {})
        table = []
        for method in (OWN, "probe on the base", *config["methods"]):
            rows = [(s[method], s[OWN]["scores"]) for s in seeds.values() if method in s and OWN in s]
            if rows:
                table.append((method, rows))
        table.sort(key=lambda entry: -statistics.mean(_average(row) for row, _ in entry[1]))
        lines += ["", f"## {kind}", "", f"`{json.dumps({**config['learn'], 'form': config['kinds'][kind]})}`", ""]
        lines += [
            f"| method | average | normalised | worst | seeds | settings | seconds | {' | '.join(names)} |",
            f"|---|---|---|---|---|---|---|{'---|' * len(names)}",
        ]
        for method, rows in table:
            ratios = [[row["scores"][n] / own[n] for n in names] for row, own in rows]
            seconds = [row["cpu"] for row, _ in rows if "cpu" in row]
            cells = [f"{statistics.mean(row['scores'][n] for row, _ in rows):.3f}" for n in names]
            said = ", ".join(f"{k} {_plain(v)}" for k, v in rows[0][0].get("settings", {}).items())
            lines.append(
                f"| {method} | {interval([_average(row) for row, _ in rows])} | "
                f"{interval([statistics.mean(r) for r in ratios])} | {interval([min(r) for r in ratios])} | {len(rows)} | "
                f"{said or '-'} | {f'{statistics.median(seconds):.1f}' if seconds else '-'} | {' | '.join(cells)} |"
            )
        lines += ["", *_orders(dict(table))]
    lines += ["", config.get("reading", "").strip()]
    return "\n".join(lines).rstrip() + "\n"


def _average(row: dict[str, Any]) -> float:
    return statistics.mean(row["scores"].values())


def _plain(value: Any) -> str:
    return " ".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def _orders(table: dict[str, list[tuple[dict[str, Any], Any]]]) -> list[str]:
    """The papers' order beside ours: differences of the same seed."""
    lines = ["| papers say | ours: difference of the averages |", "|---|---|"]
    for low, high in PAPERS:
        if low in table and high in table:
            pairs = zip(table[low], table[high], strict=False)
            differences = [_average(b) - _average(a) for (a, _), (b, _) in pairs]
            lines.append(f"| {low} < {high} | {interval(differences)} |")
    return lines


if __name__ == "__main__":
    main()
