"""Base classes, new classes and their harmonic mean: ``python -m experiments.vision_language [--base FOLDER-OR-HUB-NAME]``.

Without ``--base`` the model is the small CLIP of `small_clip`, trained here the first time. Each (set, method, seed) is kept
in ``results.json`` beside this file, so an interrupted run goes on; with another base the results lie in a file of its name.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from polytask.core.config import read_yaml

from ..__main__ import interval

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def pictures(config: dict[str, Any], file: str) -> tuple[list[Any], list[int]]:
    """The images (uint8 arrays) and class numbers of one of the packs."""
    from PIL import Image

    packed = np.load((ROOT / config["data"] / file).resolve())
    if "jpeg" not in packed:
        images = packed["x"] if "x" in packed else packed[next(k for k in packed if packed[k].ndim >= 3)]
        return list(images), [int(y) for y in packed["y"]]
    jpeg, off = packed["jpeg"], packed["off"]
    images = [
        np.asarray(Image.open(io.BytesIO(jpeg[off[i] : off[i + 1]].tobytes())).convert("RGB"))
        for i in range(len(packed["y"]))
    ]
    return images, [int(y) for y in packed["y"]]


def descriptions(group: str) -> dict[str, str]:
    """What is said of each class, two sentences."""
    classes = read_yaml(HERE / "data" / "classes.yaml")["groups"][group]["classes"]
    return {str(name): " ".join(said[:2]) for name, said in classes.items()}


def split(config: dict[str, Any], name: str, packs: dict[str, Any], seed: int, shots: int) -> tuple[Any, Any]:
    """The task of the base classes, with ``shots`` training images each, and that of the new ones."""
    import polytask as pt

    made = config["sets"][name]
    labels: list[str] = made["labels"]
    order = sorted(labels)
    known = descriptions(made["group"])
    tasks = []
    for part, own in (("base", order[:5]), ("new", order[5:])):
        splits: dict[str, list[Any]] = {"train": [], "test": []}
        for where, key in (("train", seed), ("test", 0)):
            images, numbers = packs[where]
            places = list(range(len(numbers)))
            random.Random(key).shuffle(places)
            room = dict.fromkeys(own, shots if where == "train" else config["sizes"]["test"] // 5)
            turn = 255 if made.get("negative") else 0
            for i in places:
                label = labels[numbers[i]]
                if room.get(label, 0):
                    room[label] -= 1
                    splits[where].append(
                        pt.Example((), label, image=images[i] ^ turn if turn else images[i], where=f"{name}:{i}")
                    )
        tasks.append(
            pt.Task(
                f"{name} {part}", "classify", splits["train"], [], splits["test"], labels=tuple(own), modality="image",
                instruction=made.get("template", ""), about={label: known[label] for label in own},
            )
        )  # fmt: skip
        tasks[-1].notes.append(part)
    return tasks[0], tasks[1]


def scores(model: Any, base: Any, new: Any, mix: str | None) -> dict[str, float]:
    """Accuracies on both parts and their harmonic mean; on the first alone where what learned serves no new classes."""
    import polytask as pt

    if new is None:
        return {"base": pt.evaluate(model, base, mix, resamples=0).value}
    found = {part: pt.evaluate(model, task, mix, resamples=0).value for part, task in (("base", base), ("new", new))}
    both = found["base"] + found["new"]
    return {**found, "h": 2 * found["base"] * found["new"] / both if both else 0.0}


def one(
    model: Any, config: dict[str, Any], method: dict[str, Any], tasks: dict[str, Any], name: str, seed: int
) -> dict[str, Any]:
    """One method on one set."""
    import polytask as pt

    base, new = tasks[name]
    began = time.perf_counter()
    settings = {**config["learn"], **({"head": method["head"]} if "head" in method else {})}
    start = None
    if method.get("source"):
        others = [tasks[other][0] for other in tasks if other != name]
        start = pt.learn(model, others, form=method["form"], joint=True, seed=seed, progress=False, **config["learn"])
    adapter = pt.learn(model, base, form=method["form"], seed=seed, start=start, progress=False, **settings)
    seconds = time.perf_counter() - began
    model.attach(adapter, "a")
    if method.get("shuffled"):
        turned = list(new.about.values())
        new = pt.Task(**{**vars(new), "about": dict(zip(new.about, turned[1:] + turned[:1], strict=True))})
    found = scores(model, base, None if method.get("closed") else new, "a")
    model.detach("a")
    return {**found, "parameters": adapter.size, "seconds": round(seconds, 1)}


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.vision_language", description=__doc__)
    parser.add_argument("--base", help="a folder or a hub name of a CLIP; the small one of this project when not given")
    parser.add_argument("--methods", help="names out of methods.yaml, separated by semicolons; all when not given")
    parser.add_argument("--seeds", type=int, help="how many; the configuration's number when not given")
    parser.add_argument(
        "--shots", type=int, help="training images of a class; the configuration's number when not given"
    )
    given = parser.parse_args()
    import polytask as pt

    from .small_clip import small_clip

    config: dict[str, Any] = dict(read_yaml(HERE / "methods.yaml"))
    shots = given.shots or config["shots"]
    model = pt.Model.load(given.base or str(small_clip()))
    suffix = "" if given.base is None else "-" + re.sub(r"\W+", "-", given.base)
    suffix += "" if shots == config["shots"] else f"-{shots}-shots"
    kept = HERE / f"results{suffix}.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    packs = {
        name: {part: pictures(config, made[part]) for part in ("train", "test")}
        for name, made in config["sets"].items()
    }
    chosen = given.methods.split(";") if given.methods else list(config["methods"])
    for seed in range(given.seeds or config["seeds"]):
        tasks = {name: split(config, name, packs[name], seed, shots) for name in config["sets"]}
        for name in tasks:
            for method in ("zero-shot", *chosen):
                key = f"{name}/{method}/{seed}"
                if key in done:
                    continue
                if method == "zero-shot":
                    done[key] = scores(model, *tasks[name], None)
                else:
                    done[key] = one(model, config, config["methods"][method], tasks, name, seed)
                print(f"{time.strftime('%H:%M:%S')} {key} {done[key]}", file=sys.stderr, flush=True)
                kept.write_text(json.dumps(done, indent=1))
        key = f"transfer/{seed}"
        if key not in done and not given.methods:
            bases = [base for base, _ in tasks.values()]
            settings = {**config["learn"], **config["transfer"]}
            gains = pt.transferability(model, bases, split="test", seed=seed, **settings).gains
            done[key] = dict(zip(tasks, [dict(zip(tasks, row, strict=True)) for row in gains], strict=True))
            kept.write_text(json.dumps(done, indent=1))
    page = page_of(config, done, model.name if given.base else "the small CLIP of this project", shots)
    file = ROOT / config["page"]
    (file if not suffix else file.with_stem(file.stem + suffix)).write_text(page, encoding="utf-8")
    print(page)


def page_of(config: dict[str, Any], done: dict[str, Any], base: str, shots: int) -> str:
    """The results as Markdown, the methods of each set by H."""
    lines = [f"# {config['title']}", "", config["about"].strip(), ""]
    lines += [
        f"Base: {base}. {shots} training images of each base class; `{json.dumps(config['learn'])}`; means over seeds (of the "
        "training images and of everything random) with 95 % t-intervals. Made by `python -m experiments.vision_language`.",
    ]  # fmt: skip
    for name in config["sets"]:
        lines += [
            "",
            f"## {name}",
            "",
            "| method | base | new | H | parameters | seconds |",
            "|---|---|---|---|---|---|",
        ]
        rows = {}
        for key, found in done.items():
            where, method, _ = key.rsplit("/", 2) if key.count("/") == 2 else (key, "", "")
            if where == name:
                rows.setdefault(method, []).append(found)
        for method, found in sorted(
            rows.items(), key=lambda entry: -statistics.mean(f.get("h", 0.0) for f in entry[1])
        ):
            cells = [interval([f[k] for f in found]) if k in found[0] else "-" for k in ("base", "new", "h")]
            size = f"{found[0]['parameters']:,}" if "parameters" in found[0] else "0"
            seconds = f"{statistics.median(f['seconds'] for f in found):.0f}" if "seconds" in found[0] else "-"
            shown = f"*{method}*" if method == "zero-shot" else method
            lines.append(f"| {shown} | {' | '.join(cells)} | {size} | {seconds} |")
    moved = [found for key, found in done.items() if key.startswith("transfer/")]
    if moved:
        sets = list(config["sets"])
        lines += [
            "", "## Transfer", "",
            "What a set's accuracy (column, base classes) gains when its prompt starts from another set's (row) instead of anew: "
            f"`{json.dumps(config['transfer'])}`, as `polytask transferability` measures it.", "",
            f"| from | {' | '.join(sets)} |", f"|---|{'---|' * len(sets)}",
        ]  # fmt: skip
        for a in sets:
            cells = ["-" if a == b else interval([found[a][b] for found in moved]) for b in sets]
            lines.append(f"| {a} | {' | '.join(cells)} |")
    lines += ["", str(config.get("reading", "")).strip()]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
