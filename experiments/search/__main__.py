"""Searches on the first task of a configuration and tries the best find on the others: ``python -m experiments.search``.

What is done is kept (the trials in ``runs``, scores beside the YAML), so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

from ..__main__ import ROOT, _mean, tasks_of

HERE = Path(__file__).parent
SELECTORS = ("linear", "mlp", "attention", "query | value", "value", "value & depth>=0.5")
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def lora_like(model: Any, parameters: int) -> tuple[Any, str]:
    """LoRA with the rank and the sites that bring it nearest to a number of parameters."""
    import polytask as pt

    tried = [
        (abs(math.log(pt.Adapter.new(model, pt.LoRA(rank=rank), sites).size / max(1, parameters))), i, rank, sites)
        for i, sites in enumerate(SELECTORS)
        for rank in RANKS
    ]
    _, _, rank, sites = min(tried)
    return pt.LoRA(rank=rank), sites


def main() -> None:
    """Searches, compares, writes the page."""
    import polytask as pt

    parser = argparse.ArgumentParser(prog="python -m experiments.search", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=HERE / "trec.yaml")
    given = parser.parse_args()
    config = read_yaml(given.config)
    if not (ROOT / config["data"]).exists():
        sys.exit(f"the data folder {config['data']} is not there; it holds the public collections that the YAML names")
    say = lambda text: print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: E731
    model = pt.Model.load(config["base"])
    first = tasks_of(config, 0)[0]
    out = ROOT / "runs" / f"search-{given.config.stem}"
    found = pt.search(config["base"], first, out=out, seed=0, say=say, **config["search"], **config["learn"])
    best = found.best
    lora, sites = lora_like(model, best.parameters)
    ways = {"the find": (best.form, best.sites), "LoRA": (lora, sites)}
    kept = given.config.with_suffix(".results.json")
    scores = json.loads(kept.read_text()).get("scores", {}) if kept.exists() else {}
    for seed in range(config["seeds"]):
        for task in tasks_of(config, seed)[1:]:
            for way, (form, where) in ways.items():
                key = f"{way}/{task.name}/{seed}"
                if key in scores:
                    continue
                began = time.perf_counter()
                adapter = pt.learn(model, task, form=form, sites=where, seed=seed, progress=False, **config["learn"])
                model.attach(adapter, "it")
                score = pt.evaluate(model, task, mix="it").value
                model.detach("it")
                scores[key] = {"score": score, "seconds": time.perf_counter() - began, "parameters": adapter.size}
                say(f"{key}: {score:.3f} with {adapter.size:,} parameters")
                kept.write_text(json.dumps({"search": found.as_dict(), "scores": scores}, indent=1))
    kept.write_text(json.dumps({"search": found.as_dict(), "scores": scores}, indent=1))
    page = ROOT / config["page"]
    found.to_png(page.with_suffix(".png"))
    text = page_of(config, found, scores, {"the find": best.what, "LoRA": f"{lora.name} rank={lora.rank} at {sites}"})
    page.write_text(text, encoding="utf-8")
    print(text)


def page_of(config: dict[str, Any], found: Any, scores: dict[str, Any], ways: dict[str, str]) -> str:
    """The results as Markdown."""
    search, seeds = config["search"], config["seeds"]
    lines = [
        f"# {config['title']}", "", config["about"].strip(), "",
        f"{search['trials']} configurations, {search['startup']} of them random; `{json.dumps(config['learn'])}`, "
        f"{json.dumps(config['sizes'])} texts; one seed. Together {sum(p.seconds for p in found.trials) / 60:.0f} minutes of "
        "learning on a shared machine. Made by `python -m experiments.search`.", "",
        f"![Score against parameters](./{Path(config['page']).stem}.png)", "",
        f"| trial | {found.metric} on dev | parameters | what |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {p.number} | {p.score:.3f} | {p.parameters:,} | {p.what} |" for p in found.front]
    lines += [
        "",
        "The hypervolume after each trial (score times log2 of the size, from the worst score and the base's size):",
        "",
    ]
    lines += [", ".join(f"{value:.3f}" for value in found.hypervolume), ""]
    names = [task["name"] for task in config["tasks"][1:]]
    lines += [
        f"The best point on another task, beside LoRA of about its size; test score, {seeds} seeds, "
        "mean ± 95 % t-interval:", "",
        f"| adapter | parameters | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}",
    ]  # fmt: skip
    for way, what in ways.items():
        cells = [[scores[f"{way}/{name}/{seed}"]["score"] for seed in range(seeds)] for name in names]
        size = scores[f"{way}/{names[0]}/0"]["parameters"]
        lines.append(f"| {way} ({what.replace('|', '&#124;')}) | {size:,} | {' | '.join(map(_mean, cells))} |")
    lines += ["", config.get("reading", "").strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
