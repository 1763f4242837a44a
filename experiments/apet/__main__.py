"""How few numbers are enough? The form ``apet`` with more and more of them, against tuning all: ``python -m experiments.apet``.

Each run is kept beside this file (``results.json``), so an interrupted experiment goes on.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import polytask as pt
from polytask.core.head import TextHead, collate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = (ROOT / "../shared/data").resolve()
BASES = ("stories260k", "lm6m")
TASK = "spanish"
SITES = "linear"
COUNTS = (1, 8, 64, 512, 4096)  # at each site, at most all there are
RATES = {"apet": (3e-3, 3e-2), "full": (3e-4, 1e-3, 3e-3, 1e-2)}
TRAIN, TEST, BATCH = 480, 200, 8
MARGIN = 0.05  # of what tuning all gains, which may be lacking
READING = """\
In so few steps and with one seed: about the same number of trained numbers leaves about the same gap on both bases (18 to 22
thousand: 0.6 to 0.7 nats), though it is 8 % of one and half a percent of the other. The larger base does not need fewer.
"""


def task() -> Any:
    """Words of one language to be inflected."""
    file = DATA / "text" / "inflect.jsonl.xz"
    whole = pt.Task.read(file, name=TASK, kind="generate", where={"task": TASK}, skip_bad_rows=True)
    rows = list(whole.train)
    torch.manual_seed(0)
    order = torch.randperm(len(rows)).tolist()
    chosen = [rows[i] for i in order[: TRAIN + TEST]]
    return pt.Task(**{**vars(whole), "train": chosen[:TRAIN], "dev": [], "test": chosen[TRAIN:]})


def losses(model: Any, examples: Any, name: str | None) -> list[float]:
    """The mean negative log-likelihood of each answer's tokens."""
    head = TextHead("generate")
    rows = head.rows(model, examples)
    found: list[float] = []
    with torch.no_grad(), model.using(name):
        for at in range(0, len(rows), 20):
            nll, count = head.run(model, collate(model, head, rows[at : at + 20]))
            found += (nll / count).tolist()
    return found


def one(model: Any, given: Any, form: Any, lr: float) -> dict[str, Any]:
    """Learns once and scores."""
    began = time.process_time()
    adapter = pt.learn(
        model,
        given,
        form=form,
        sites=SITES,
        epochs=1,
        batch_size=BATCH,
        lr=lr,
        seed=0,
        progress=False,
        precision="fp32",
    )
    model.attach(adapter, "a")
    values = losses(model, given.test, "a")
    model.detach("a")
    return {
        "size": adapter.size,
        "lr": lr,
        "values": [round(v, 4) for v in values],
        "seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Runs what is missing and writes the page."""
    if not DATA.exists():
        sys.exit(f"the data folder {DATA} is not there; it holds the public collections and small weights")
    torch.set_num_threads(1)
    kept = HERE / "results.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    given = task()
    for base in BASES:
        model = pt.Model.load(str(DATA / "weights" / base))
        model.module.float()
        done.setdefault(f"{base} base", {"size": 0, "lr": 0, "values": losses(model, given.test, None)})
        jobs = [("full", "full", lr) for lr in RATES["full"]]
        jobs += [(f"apet {count}", pt.APET(count=count), lr) for count in COUNTS for lr in RATES["apet"]]
        for label, form, lr in jobs:
            key = f"{base} {label} {lr:g}"
            if key not in done:
                done[key] = one(model, given, form, lr)
                kept.write_text(json.dumps(done))
                mean = statistics.mean(done[key]["values"])
                print(f"{time.strftime('%H:%M:%S')} {key}: {mean:.3f} in {done[key]['seconds']} s", file=sys.stderr)
    page = page_of(done)
    (ROOT / "docs" / "results-apet.md").write_text(page.rstrip() + "\n", encoding="utf-8")
    print(page)


def page_of(done: dict[str, Any]) -> str:
    """The results as Markdown."""
    steps = TRAIN // BATCH
    lines = [
        "# How few numbers are enough?", "",
        "The form `apet` moves single numbers at random places of every linear layer. Here with more and more of them, against "
        "tuning all of these layers (`full`), on two causal language models of different size: inflecting "
        f"{TASK.title()} words (UniMorph, CC BY-SA 3.0), {TRAIN} training examples, {steps} steps of {BATCH}, one seed. The "
        f"figure is the mean negative log-likelihood of an answer's tokens on {TEST} test examples, in nats, with a 95 % "
        "interval of its difference to `full` over the test examples. Each cell is the best of its learning rates "
        f"({_rates('apet')}; `full`: {_rates('full')}) on the same test examples. A form is enough where it lacks no more than "
        f"{MARGIN:.0%} of what `full` gains over the bare base. Made by `python -m experiments.apet`.", "",
        "| base | form | numbers | part of the layers | loss | difference to full | enough |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    said = []
    for base in BASES:
        bare = statistics.mean(done[f"{base} base"]["values"])
        best = {}
        for label in ("full", *(f"apet {count}" for count in COUNTS)):
            runs = [done.get(f"{base} {label} {lr:g}") for lr in RATES[label.split()[0]]]
            if found := [run for run in runs if run is not None]:
                best[label] = min(found, key=_mean)
        full = best.pop("full")
        gain = bare - _mean(full)
        lines.append(f"| {base} | *none* | 0 | 0 | {bare:.3f} | | |")
        enough = None
        for label, run in best.items():
            gaps = [a - b for a, b in zip(run["values"], full["values"], strict=True)]
            half = 1.96 * statistics.stdev(gaps) / len(gaps) ** 0.5
            fits = statistics.mean(gaps) <= MARGIN * gain
            if fits and enough is None:
                enough = run["size"]
            lines.append(
                f"| {base} | {label} | {run['size']:,} | {run['size'] / full['size']:.2%} | {_mean(run):.3f} | "
                f"{statistics.mean(gaps):+.3f} ± {half:.3f} | {'yes' if fits else 'no'} |"
            )
        lines.append(f"| {base} | full | {full['size']:,} | 100% | {_mean(full):.3f} | | |")
        said.append(
            f"{base}: {enough:,} numbers ({enough / full['size']:.2%} of the layers)"
            if enough
            else f"{base}: none of these"
        )
    return "\n".join([*lines, "", f"The smallest that is enough: {'; '.join(said)}.", "", READING])


def _mean(run: dict[str, Any]) -> float:
    return statistics.mean(run["values"])


def _rates(form: str) -> str:
    return ", ".join(f"{lr:g}" for lr in RATES[form])


if __name__ == "__main__":
    main()
