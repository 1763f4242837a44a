"""Every registered form at an equal number of trained parameters: ``python -m experiments.forms [suite ...]``.

Each (form, seed) of a suite runs in a process of its own, so that peak memory is its own. What is done is kept beside the
suite's YAML (``.results.json``), so an interrupted run goes on; the page is written from what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from polytask.core.config import read_yaml

from ..__main__ import interval

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# what makes a form larger, the first that it has; the others keep their defaults
KNOBS = ("rank", "frequencies", "width", "length", "prototypes", "block_size", "count", "k")


def suite(name: str) -> dict[str, Any]:
    """A suite's configuration."""
    return dict(read_yaml(HERE / f"{name}.yaml"))


def base_of(config: dict[str, Any]) -> Any:
    """The suite's base as a fresh model."""
    import polytask as pt

    if config["base"] != "resnet20":
        folder = ROOT / config["base"]
        return pt.Model.load(str(folder.resolve()) if folder.exists() else config["base"])
    from .resnet import load

    module, _ = load((ROOT / config["data"]).resolve().parent / "weights" / "resnet20")
    return pt.Model(module, kind="image", name="resnet20", pooling="none")


def tasks_of(config: dict[str, Any], seed: int) -> list[Any]:
    """The suite's tasks; the seed draws the training examples, the test examples are the same for all."""
    from ..__main__ import tasks_of as texts

    return _images(config, seed) if config["base"] == "resnet20" else texts(config, seed)


def _images(config: dict[str, Any], seed: int) -> list[Any]:
    import numpy as np
    from PIL import Image

    import polytask as pt

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    splits = {}
    for split, key in (("train", seed), ("test", 0)):
        packed = np.load((ROOT / config["data"] / f"cifar10_jpeg_{split}.npz").resolve())
        order = list(range(len(packed["y"])))
        random.Random(key).shuffle(order)
        jpeg, off = packed["jpeg"], packed["off"]
        splits[split] = [
            pt.Example(
                (), names[int(packed["y"][i])],
                image=np.asarray(Image.open(io.BytesIO(jpeg[off[i] : off[i + 1]].tobytes())).convert("RGB")),
            )
            for i in order[: config["sizes"][split]]
        ]  # fmt: skip
    return [pt.Task(name="cifar10-jpeg", kind="classify", train=splits["train"], dev=[], test=splits["test"],
                    labels=tuple(sorted(names)), metric="accuracy")]  # fmt: skip


def sized(name: str, model: Any, budget: int, config: dict[str, Any]) -> Any:
    """The form with the setting of `KNOBS` that brings it nearest to the budget; as it is where it has none.

    Returns (form, parameters), or None where the form acts at no site of the model.
    """
    import polytask as pt
    from polytask.core.errors import SiteError
    from polytask.core.form import forms

    kind = forms[name]
    given = config.get("settings", {}).get(name, {})
    sites = config.get("sites", {}).get(name, config.get("everywhere"))

    def count(**extra: Any) -> int | None:
        try:
            return pt.Adapter.new(model, kind.of({"name": name, **given, **extra}), sites).size
        except (pt.PolytaskError, RuntimeError, ValueError) as error:
            if extra or isinstance(error, SiteError):  # a size that does not fit
                return None
            raise

    fields = {f.name for f in dataclasses.fields(kind)}
    knob = next((k for k in KNOBS if k in fields and k not in given), None)
    tried: dict[int, int] = {}
    if knob is not None:
        for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096):
            found = count(**{knob: size})
            if found:
                tried[size] = found
                if found > 2 * budget:
                    break
    if tried:
        best = min(tried, key=lambda size: abs(math.log(tried[size] / budget)))
        return kind.of({"name": name, **given, knob: best}), tried[best]
    found = count()
    return None if found is None else (kind.of({"name": name, **given}), found)


def one(config: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """One form, one seed: every task learned, scored, and what it cost."""
    import torch

    import polytask as pt
    from polytask.evaluate.probe import probe

    model = base_of(config)
    model.module.requires_grad_(False)
    tasks = tasks_of(config, seed)
    chosen = sized(name, model, config["budget"], config)
    if chosen is None:
        return {"absent": f"acts at no site of {Path(config['base']).name}"}
    form, size = chosen
    if "tasks" in {f.name for f in dataclasses.fields(form)}:
        form = dataclasses.replace(form, tasks=tuple(task.name for task in tasks))
    rows = []
    for i, task in enumerate(tasks):
        began, busy = time.perf_counter(), time.process_time()
        adapter = pt.learn(
            model,
            task,
            form=form,
            sites=config.get("sites", {}).get(name, config.get("everywhere")),
            seed=seed,
            progress=False,
            **config["learn"],
        )
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        with tempfile.TemporaryDirectory() as folder:
            saved = adapter.save(Path(folder) / "a")
            weight = (saved / "adapter_model.safetensors").stat().st_size
        model.attach(adapter, "a")
        score = pt.evaluate(model, task, "a", resamples=0).value
        row = {"task": task.name, "score": score, "seconds": seconds, "cpu": busy, "bytes": weight,
               "steps": adapter.card.training["steps"], "peak_mb": adapter.card.training["peak_mb"]}  # fmt: skip
        other = tasks[(i + 1) % len(tasks)]
        if config.get("forgetting") == "probe" and other is not task and seed == 0:  # it costs as much as learning
            with model.using("a"):
                found = probe(model, other).predict(model, other.test)
            right = sum(f == e.target for f, e in zip(found, other.test, strict=True)) / len(found)
            row["other"] = {"task": other.name, "score": right}  # the base's own is among the base's results
        model.detach("a")
        rows.append(row)
    return {"form": form.settings(), "parameters": size, "rows": rows, "threads": torch.get_num_threads()}


def absent(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the base does by itself: a probe on frozen features, or its answers without training."""
    import polytask as pt

    model = base_of(config)
    return {
        "rows": [{"task": t.name, "score": pt.evaluate(model, t, resamples=0).value} for t in tasks_of(config, seed)]
    }


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.forms", description=__doc__)
    parser.add_argument("suites", nargs="*", help="which (english, p3, cifar); all when not given")
    parser.add_argument("--forms", help="names, separated by commas; all when not given")
    parser.add_argument("--seeds", type=int, help="how many; the configuration's number when not given")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--one", nargs=3, metavar=("SUITE", "FORM", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, form, seed = given.one
        config = suite(name)
        found = absent(config, int(seed)) if form == "base" else one(config, form, int(seed))
        print(json.dumps(found))
        return
    from polytask.core.form import forms

    until = time.monotonic() + 60 * given.minutes
    names = ["base", *(given.forms.split(",") if given.forms else forms)]
    suites = given.suites or ["english", "p3", "cifar"]
    most = max(given.seeds or suite(s)["seeds"] for s in suites)
    lock = threading.Lock()  # of the results' files

    def fill(job: tuple[int, str, str]) -> None:
        seed, name, form = job
        if time.monotonic() < until and seed < (given.seeds or suite(name)["seeds"]):
            _fill(name, form, seed, lock)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(fill, itertools.product(range(most), suites, names)))
    for name in suites:
        page = page_of(name)
        (ROOT / suite(name)["page"]).write_text(page, encoding="utf-8")
        print(page)


def _fill(name: str, form: str, seed: int, lock: threading.Lock) -> None:
    kept = HERE / f"{name}.results.json"
    with lock:
        done = json.loads(kept.read_text()) if kept.exists() else {}
    if str(seed) in done.get(form, {}):
        return
    print(f"{time.strftime('%H:%M:%S')} {name} {form} seed {seed}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "experiments.forms", "--one", name, form, str(seed)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ran.returncode < 0:  # killed: it says nothing of the form
        return
    if ran.returncode:
        lines = ran.stderr.strip().splitlines()
        found: dict[str, Any] = {"failed": lines[-1] if lines else "no message"}
        print(f"  {found['failed']}", file=sys.stderr, flush=True)
    else:
        found = json.loads(ran.stdout.strip().splitlines()[-1])
    with lock:
        done = json.loads(kept.read_text()) if kept.exists() else {}
        done.setdefault(form, {})[str(seed)] = found
        kept.write_text(json.dumps(done, indent=1))


def page_of(name: str) -> str:
    """The results of a suite as Markdown, by the gain over the base; and a picture of score against parameters beside it."""
    config = suite(name)
    kept = HERE / f"{name}.results.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Budget {config['budget']:,} parameters; settings `{json.dumps(config['learn'])}`, "
        f"sizes `{json.dumps(config['sizes'])}`. "
        "Score: mean over tasks, then over seeds, with a 95 % t-interval over seeds. Gain: the same of the difference to the "
        "base with the same seed, so that rows with other seeds can be compared. "
        "Step time (of one thread) is over LoRA's of the same seed. "
        f"Made by `python -m experiments.forms {name}`.", "",
        "| form | score | gain | seeds | parameters | bytes on disk | step time / LoRA | peak MB | probe on another task |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    pace = {s: _pace(r) for s, r in done.get("lora", {}).items() if "rows" in r}
    bare = {s: {row["task"]: row["score"] for row in r["rows"]} for s, r in done.get("base", {}).items() if "rows" in r}
    table, missing = [], []
    for form, seeds in done.items():
        good = {s: r for s, r in seeds.items() if "rows" in r}
        if not good:
            missing.append(
                f"{form}: {next(iter(seeds.values())).get('absent') or next(iter(seeds.values())).get('failed')}"
            )
            continue
        scores = {s: statistics.mean(row["score"] for row in r["rows"]) for s, r in good.items()}
        none = {s: statistics.mean(found.values()) for s, found in bare.items()}
        gains = [score - none[s] for s, score in scores.items() if s in none]
        table.append((form, list(scores.values()), gains, good))
    for form, scores, gains, good in sorted(table, key=lambda entry: -statistics.mean(entry[2] or [0.0])):
        first = next(iter(good.values()))
        if form == "base":
            lines.append(f"| *{config['bare']}* | {interval(scores)} | - | {len(scores)} | 0 | 0 | - | - | - |")
            continue
        gain = interval(gains) if gains else "-"
        ratios = [_pace(r) / pace[s] for s, r in good.items() if s in pace]
        lost = [
            row["other"]["score"] - bare[s][row["other"]["task"]]
            for s, r in good.items()
            for row in r["rows"]
            if "other" in row and s in bare
        ]
        peak = statistics.median(row["peak_mb"] or 0 for r in good.values() for row in r["rows"])
        weight = statistics.median(row["bytes"] for row in first["rows"])
        lines.append(
            f"| {form} | {interval(scores)} | {gain} | {len(scores)} | {first['parameters']:,} | {weight:,.0f} | "
            f"{f'{statistics.median(ratios):.2f}' if ratios else '-'} | {peak:.0f} | "
            f"{f'{statistics.mean(lost):+.3f}' if lost else '-'} |"
        )
    picture = (ROOT / config["page"]).with_suffix(".png")
    points = [
        (f, statistics.mean(d), next(iter(g.values()))["parameters"]) for f, _, d, g in table if f != "base" and d
    ]
    _draw(points, picture)
    lines += ["", f"![Gain against parameters]({picture.name})", "", config.get("reading", "").strip()]
    if missing:
        reasons: dict[str, list[str]] = {}
        for entry in missing:
            form, _, reason = entry.partition(": ")
            reasons.setdefault(reason, []).append(form)
        said = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
        lines += ["", "Not in the table: " + "; ".join(said) + "."]
    return "\n".join(lines).rstrip() + "\n"


def _pace(result: dict[str, Any]) -> float:
    """Processor time of a step, of one thread: unlike time on the clock it says little of what else the machine did."""
    return statistics.median(row.get("cpu", row["seconds"]) / row["steps"] for row in result["rows"])


def _draw(points: list[tuple[str, float, int]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [point for point in points if point[2]]  # nothing has no logarithm
    figure, axes = plt.subplots(figsize=(9, 7))
    axes.scatter([size for _, _, size in points], [score for _, score, _ in points], s=18, color="#3060a0")
    axes.set_xscale("log")
    axes.margins(x=0.08)
    figure.canvas.draw()
    placed: list[tuple[float, float]] = []
    for form, score, size in sorted(points, key=lambda point: (point[1], point[2])):
        x, y = axes.transData.transform((size, score)) * 72 / figure.dpi  # in points
        right, up = 5.0, -2.0
        while any(abs(x + right - a) < 46 and abs(y + up - b) < 7.5 for a, b in placed):
            right, up = (right, up + 1.0) if up < 24 else (right + 50, -2.0)
        placed.append((x + right, y + up))
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.4} if (right, up) != (5.0, -2.0) else None
        axes.annotate(form, (size, score), (right, up), textcoords="offset points", fontsize=7, arrowprops=line)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("gain over the base")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
