"""Ways to choose among many adapters of one base, on held-in and held-out tasks: ``python -m experiments.route [suite ...]``.

Each seed learns an adapter for every held-in task (kept in ``--cache``); each row of the suite is then scored on all tasks, its
router traced and its forward timed beside the bare one's. What is done is kept beside the YAML (``.results.json``), so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

from ..__main__ import interval, tasks_of
from .texts import composite_score, composites, plain_score, plain_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SUITES = ("encoder", "causal")


class Bench:
    """The base, its tasks and their adapters, for one seed."""

    def __init__(self, config: dict[str, Any], seed: int, cache: Path) -> None:
        import polytask as pt
        from polytask.jobs import learn_each

        self.config, self.seed = config, seed
        folder = ROOT / config["base"]
        self.model = pt.Model.load(str(folder.resolve()) if folder.exists() else config["base"])
        self.model.module.requires_grad_(False)
        self.tasks = tasks_of(config, seed)
        self.held_out = set(config["held_out"])
        self.inside = [task for task in self.tasks if task.name not in self.held_out]
        self.learn = {**config["learn"], "progress": False}
        self.cache = cache / f"{config['name']}-{seed}"
        made = learn_each(self.model, self.inside, out=self.cache / "own", seed=seed, say=say, **self.learn)
        # a library keeps what routers make of an adapter's data, so that rows which need the same share it
        self.library = pt.Library(self.cache / "library", self.model, signatures=())
        for task, adapter in zip(self.inside, made, strict=True):
            if task.name not in self.library:
                self.library.add(adapter, task.name)
        self.adapters = {task.name: self.library[task.name] for task in self.inside}
        self.picked: dict[str, Any] = {}  # experts for a few examples, by held-out task
        self.heads = {name: adapter.heads[name] for name, adapter in self.adapters.items()}
        asked = config.get("composite")
        self.composites = composites(self.model, self.inside, **asked) if asked else []
        plain = dict(config.get("plain") or {})
        self.plain = plain_text(self.model, ROOT / config["data"] / plain.pop("file"), **plain) if plain else []

    def row(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Scores, routing accuracy, numbers that learned, seconds and the cost of a forward, of one row of the suite."""
        kind, began, busy = entry["kind"], time.perf_counter(), time.process_time()
        mixes, heads, trained, routing = getattr(self, f"_{kind}")(dict(entry.get("settings", {})), entry)
        found: dict[str, Any] = {
            "seconds": time.perf_counter() - began,
            "cpu": time.process_time() - busy,
            "trained": trained,
        }
        found["scores"] = {
            task.name: self._score(task, mixes(task), heads.get(task.name))
            for task in self.tasks
            if mixes(task) is not False
        }
        if routing is not None:
            from polytask.route.trace import trace

            seen = trace(self.model, routing, self.inside, examples=self.config["traced"])
            found["agreement"] = {name: value for name, value in seen.agreement.items() if value is not None}
            found["entropy"] = statistics.mean(seen.entropy)
        first = next(task for task in self.tasks if mixes(task) is not False)
        whole = kind in ("base", "joint", "route", "merge")  # one and the same mix for all tasks
        if self.composites and (whole or kind == "own"):
            by_name = {task.name: mixes(task) for task in self.inside}
            acting = by_name.__getitem__ if kind == "own" else mixes(first)
            found["composite"] = composite_score(self.model, self.composites, acting, own=kind == "own")
        if self.plain and whole:
            found["plain"] = plain_score(self.model, self.plain, mixes(first), first.name)
        found["cost"] = self._cost(mixes(first), first.name)
        self.model.detach()
        return found

    # Kinds of rows: the mix of a task (None is the base, False leaves the task out), heads by task, what learned, the routing

    def _base(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        return (lambda task: None), {}, 0, None

    def _own(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        names = {name: self.model.attach(adapter, name) for name, adapter in self.adapters.items()}
        trained = sum(adapter.size for adapter in self.adapters.values())
        return (lambda task: names.get(task.name, False)), self.heads, trained, None

    def _joint(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        """One adapter, or a mixture of experts, that learns all held-in tasks."""
        import polytask as pt

        name = entry["name"]
        learn = {**self.learn, **settings}
        adapter = pt.learn(
            self.model, self.inside, joint=True, seed=self.seed, name=name, out=self.cache / name, **learn
        )
        self.model.attach(adapter, name)
        return (lambda task: name), adapter.heads, adapter.size, None

    def _merge(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        import polytask as pt

        adapter = pt.merge(list(self.adapters.values()), entry["method"], seed=self.seed, as_="full", **settings)
        self.model.attach(adapter, "merged")
        return (lambda task: "merged"), self.heads, 0, None

    def _route(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        import polytask as pt

        router = entry["method"]
        more = {"data": self.inside} if entry.get("data") else {}
        if entry.get("learn") is not None:
            more |= {**{k: v for k, v in self.learn.items() if k != "form"}, **entry["learn"]}
            more["out"] = self.cache / entry["name"]
        mix = pt.route(self.library, router, model=self.model, seed=self.seed, **more, **settings)
        trained = mix.size if entry.get("learn") is not None else 0
        return (lambda task: mix), mix.heads or self.heads, trained, mix

    def _alone(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        """An adapter for each held-out task, from its own examples."""
        import polytask as pt

        found = {
            task.name: pt.learn(
                self.model,
                task,
                seed=self.seed,
                out=self.cache / entry["name"] / task.name,
                **{**self.learn, **settings},
            )
            for task in self.tasks
            if task.name in self.held_out
        }
        names = {name: self.model.attach(adapter, f"new/{name}") for name, adapter in found.items()}
        heads = {name: adapter.heads[name] for name, adapter in found.items()}
        size = next(iter(found.values())).size
        return (lambda task: names.get(task.name, False)), heads, size, None

    def _each(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        """A router for each held-out task, which learns from its examples over the adapters of the others."""
        import polytask as pt

        learn = {**{k: v for k, v in self.learn.items() if k != "form"}, **entry.get("learn", {})}
        mixes = {
            task.name: pt.route(
                self.adapters, entry["method"], model=self.model, data=[task], seed=self.seed,
                out=self.cache / entry["name"] / task.name, **learn, **settings,
            )
            for task in self.tasks
            if task.name in self.held_out
        }  # fmt: skip
        heads = {name: mix.heads[name] for name, mix in mixes.items()}
        return (lambda task: mixes.get(task.name, False)), heads, next(iter(mixes.values())).size, None

    def _shots(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        """For each held-out task the adapters that do best on a few of its examples: a mixture that learns on."""
        found = self._experts(settings, entry)

        def acting(task: Any) -> Any:
            if task.name not in found:
                return False
            self.model.detach()  # the next task's experts have the same names
            return found[task.name].mix.attach(self.model)

        return acting, {}, next(iter(found.values())).mix.size, None

    def _single(self, settings: dict[str, Any], entry: dict[str, Any]) -> Any:
        """The best one of them, as it is."""
        found = self._experts(settings, entry)
        first = {task: experts.ranking[0].name for task, experts in found.items()}
        names = {name: self.model.attach(self.adapters[name], name) for name in sorted({*first.values()})}
        return (lambda task: names[first[task.name]] if task.name in first else False), {}, 0, None

    def _experts(self, settings: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        import polytask as pt

        learn = {k: v for k, v in {**self.learn, **entry.get("learn", {})}.items() if k != "form"}
        for task in self.tasks:
            if task.name in self.held_out and task.name not in self.picked:
                self.picked[task.name] = pt.kshot_experts(
                    self.model, self.library, task, seed=self.seed, out=self.cache / "shots" / task.name,
                    **learn, **settings,
                )  # fmt: skip
                self.model.detach()
        return self.picked

    # Measures

    def _score(self, task: Any, mix: Any, head: Any) -> float:
        import polytask as pt
        from polytask.core.head import collate, head_for
        from polytask.core.predict import batches

        if self.model.kind != "causal":
            score = pt.evaluate(self.model, task, mix, head=head, resamples=0, longest=self.learn["longest"])
            return score.value
        import torch

        head = head_for(self.model, task)
        rows = head.rows(self.model, task.test, longest=self.learn["longest"])
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.model.using(mix, tasks=task.name):
            for batch in batches([row.length for row in rows], [row.count for row in rows], 32):
                nll, count = self.model.likelihood(collate(self.model, head, [rows[i] for i in batch]))
                total += torch.stack([nll.double().sum(), count.double().sum()])
        return float(total[0] / total[1])

    def _cost(self, mix: Any, name: str, times: int = 9) -> float:
        """Processor time of a forward over the bare one's: the median of ratios of neighbours."""
        import torch

        ids = torch.randint(5, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        def once(acting: Any) -> float:
            with torch.no_grad(), self.model.using(acting, tasks=name):
                self.model.module(**batch)
                began = time.process_time()
                self.model.module(**batch)
                return time.process_time() - began

        return statistics.median(once(mix) / once(None) for _ in range(times))


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(name: str, cache: Path, until: float, only: list[str], seeds: int | None = None) -> None:
    """What is missing of a suite, and its page."""
    file = HERE / f"{name}.yaml"
    config = {"name": name, **read_yaml(file)}
    kept = file.with_suffix(".results.json")
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for seed in range(seeds or config["seeds"]):
        missing = [row for row in config["rows"] if row["name"] not in done.get(str(seed), {})]
        missing = [row for row in missing if not only or row["name"] in only]
        if not missing or time.time() > until:
            continue
        bench = Bench(config, seed, cache)
        for entry in missing:
            if time.time() > until:
                break
            say(f"{name} seed {seed} {entry['name']}")
            done.setdefault(str(seed), {})[entry["name"]] = bench.row(entry)
            kept.write_text(json.dumps(done, indent=1))
    if done:
        page = page_of(config, done)
        (ROOT / config["page"]).write_text(page, encoding="utf-8")
        print(page)


def main() -> None:
    """Runs what is missing and writes the pages."""
    parser = argparse.ArgumentParser(prog="python -m experiments.route", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(SUITES))
    parser.add_argument("--only", nargs="*", default=[], help="rows to run; all by default")
    parser.add_argument("--seeds", type=int, help="how many; the configuration's number by default")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many minutes")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/polytask/experiments/route"), help="for adapters")
    given = parser.parse_args()
    until = time.time() + 60 * min(given.minutes, 1e6)
    for name in given.suites:
        run(name, given.cache.expanduser(), until, given.only, given.seeds)


# The page


def page_of(config: dict[str, Any], done: dict[str, Any]) -> str:
    """The results as Markdown: a row for each way, and one for each task."""
    held_out = set(config["held_out"])
    rows = [row for row in config["rows"] if any(row["name"] in seed for seed in done.values())]
    measure, better = config["measure"], config.get("lower_is_better", False)
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Sizes `{json.dumps(config['sizes'])}`, learning `{json.dumps(config['learn'])}`. The measure is the {measure}, "
        f"{'lower' if better else 'higher'} is better; means over seeds with 95 % t-intervals. Agreement: how often the adapter "
        "of the task has the largest weight at a token of a held-in task. Cost: processor time of a forward of 8 texts of 64 "
        "tokens over the bare base's. Learned: numbers that learned beside the adapters. Made by "
        "`python -m experiments.route`.", "",
        "| way | held-in | held-out | agreement | cost | learned | seconds | seeds |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip

    def mean(seed: dict[str, Any], test: Callable[[str], bool]) -> float | None:
        values = [v for name, v in seed["scores"].items() if test(name)]
        return statistics.mean(values) if values else None

    for row in rows:
        seeds = [seed[row["name"]] for seed in done.values() if row["name"] in seed]
        inside = [v for seed in seeds if (v := mean(seed, lambda n: n not in held_out)) is not None]
        outside = [v for seed in seeds if (v := mean(seed, lambda n: n in held_out)) is not None]
        agree = [statistics.mean(seed["agreement"].values()) for seed in seeds if seed.get("agreement")]
        cost = statistics.median(seed["cost"] for seed in seeds)
        lines.append(
            f"| {row['name']} | {interval(inside) if inside else '-'} | {interval(outside) if outside else '-'} | "
            f"{f'{statistics.mean(agree):.2f}' if agree else '-'} | {cost:.2f} | {seeds[0]['trained'] or '-'} | "
            f"{statistics.median(seed['cpu'] for seed in seeds):.0f} | {len(seeds)} |"
        )
    lines += _beside(config, rows, done)
    names = list(next(iter(done.values()))[rows[0]["name"]]["scores"])
    lines += ["", "By task, the mean over seeds:", "", f"| task | {' | '.join(row['name'] for row in rows)} |"]
    lines += [f"|---|{'---|' * len(rows)}"]
    for name in names:
        cells = []
        for row in rows:
            values = [s[row["name"]]["scores"].get(name) for s in done.values() if row["name"] in s]
            known = [v for v in values if v is not None]
            cells.append(f"{statistics.mean(known):.3f}" if known else "-")
        lines.append(f"| {name}{' (held out)' if name in held_out else ''} | {' | '.join(cells)} |")
    lines += ["", config.get("reading", "").strip()]
    return "\n".join(lines).rstrip() + "\n"


def _beside(config: dict[str, Any], rows: list[dict[str, Any]], done: dict[str, Any]) -> list[str]:
    """The table of texts of several tasks, and of plain text."""
    asked, plain = config.get("composite"), config.get("plain")
    if not (asked and plain):
        return []
    lines = [
        "",
        f"Texts of {asked['parts']} held-in tasks each, one example after the other ({asked['texts']} texts): the "
        "log-likelihood of the answers, which a router serves well that changes its adapter within a text, and how often the "
        f"adapter of a token's own part leads. Plain text ({plain['task']}): what the base knew and a change of it may lose. "
        "Nats a token, lower is better.", "",
        "| way | texts of several tasks | agreement | plain text |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seeds = [seed[row["name"]] for seed in done.values() if row["name"] in seed]
        nll = [seed["composite"]["nll"] for seed in seeds if "composite" in seed]
        agree = [seed["composite"]["agreement"] for seed in seeds if "agreement" in seed.get("composite", {})]
        text = [seed["plain"] for seed in seeds if "plain" in seed]
        if nll or text:
            lines.append(
                f"| {row['name']} | {interval(nll) if nll else '-'} | {interval(agree) if agree else '-'} | "
                f"{interval(text) if text else '-'} |"
            )
    return lines


if __name__ == "__main__":
    main()
