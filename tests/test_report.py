"""The report: what it says, that it needs nothing else, and that odd tables do not break it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.core.errors import DataError, StorageError
from polytask.report import Comparison, count, duration, headline, listed, lower_is_better, number, pictures, render
from polytask.report import signed, size
from polytask.report.pictures import fit, lines, width

TASKS: dict[str, tuple[list[str], str]] = {
    "helpdesk-intent": (
        ["account", "billing", "bug", "cancel", "delivery", "feature", "how-to", "praise"],
        "Messages that people send to an IT or customer help desk, each with what the sender wants.",
    ),
    "helpdesk-urgency": (
        ["high", "low", "medium"],
        "Messages to a help desk, each with its urgency as judged by the impact and not by the tone.",
    ),
    "review-sentiment": (
        ["mixed", "negative", "positive"],
        "Short product reviews, some of them ironic or faint in their praise.",
    ),
    "question-type": (
        ["date", "definition", "number", "person", "place", "procedure", "reason", "yes-no"],
        "Everyday questions and requests for information, many without an obvious question word.",
    ),
    "commit-type": (
        ["build", "docs", "feature", "fix", "performance", "refactor", "test"],
        "First lines of software commit messages, each with the kind of change.",
    ),
    "pair-entailment": (
        ["contradiction", "entailment", "neutral"],
        "Pairs of sentences about everyday scenes and simple facts.",
    ),
}
SCORES = {
    "majority": [0.125, 0.35, 0.4, 0.138, 0.15, 0.338],
    "base + probe": [0.762, 0.55, 0.7, 0.788, 0.525, 0.4],
    "adapter per task": [0.875, 0.663, 0.838, 0.9, 0.775, 0.512],
    "joint": [0.863, 0.65, 0.825, 0.913, 0.738, 0.475],
    "average of adapters": [0.775, 0.588, 0.725, 0.813, 0.6, 0.388],
}
WHAT = {
    "majority": "The commonest training answer, always.",
    "base + probe": "A linear classifier on the frozen features of the bare base.",
    "adapter per task": "One LoRA adapter and one head per task.",
    "joint": "One LoRA adapter for all tasks, one head per task, trained on their mixture.",
    "average of adapters": "The mean of the adapters' weights, with a probe on its features.",
}


def fake() -> dict[str, Any]:
    """What `polytask compare` writes for six small tasks, with the numbers made up."""
    names = list(TASKS)
    rows = []
    for method, values in SCORES.items():
        for task, value in zip(names, values, strict=True):
            half = round(1.96 * (value * (1 - value) / 80) ** 0.5, 4)
            row = {"method": method, "task": task, "metric": "accuracy", "value": value, "n": 80, "note": ""}
            rows.append(row | {"low": max(0.0, value - half), "high": min(1.0, value + half)})
    costs: dict[str, list[Any]] = {
        "trained_parameters": [0, 12_314, 6 * 98_304 + 12_314, 98_304 + 12_314, 12_314],
        "bytes": [None, 49_664, 2_412_018, 442_880, 442_880],
        "seconds": [0.01, 4.2, 143.2, 96.0, 6.1],
        "peak_mb": [None, 412.0, 1180.0, 1204.0, 412.0],
        "forgot": [None, 0.0, -0.043, -0.061, -0.012],
    }
    methods = []
    for place, (method, values) in enumerate(SCORES.items()):
        entry = {"method": method, "what": WHAT[method], "average": sum(values) / 6, "worst": min(values), "note": ""}
        methods.append(entry | {key: column[place] for key, column in costs.items()})
    base = SCORES["base + probe"]
    values = [
        [round(b + (0.11 if i == j else ((i * 7 + j * 5) % 9 - 6) / 80), 4) for j, b in enumerate(base)] for i in range(6)
    ]
    losses = [-0.031, -0.022, -0.05, -0.044, -0.084, -0.027]
    return {
        "base": {"name": "minilm", "kind": "encoder", "parameters": 22_713_216, "fingerprint": "0319e2a7c4d85b10"},
        "tasks": [
            {"name": name, "kind": "classify", "metric": "accuracy", "labels": labels, "train": 180, "dev": 40}
            | {"test": 80, "description": text}
            for name, (labels, text) in TASKS.items()
        ],
        "rows": rows,
        "methods": methods,
        "cross": {
            "measure": "Accuracy of a linear probe on the frozen features of the base with one adapter.",
            "adapters": names,
            "tasks": names,
            "values": values,
            "base": base,
        },
        "forgetting": {
            "measure": "Share of masked words that the base fills in correctly, on 500 sentences of its own kind.",
            "rows": [{"adapter": n, "before": 0.612, "after": 0.612 + c, "change": c} for n, c in zip(names, losses)],
        },
        "settings": {
            "seed": 0,
            "precision": "bf16",
            "seconds": 249.5,
            "versions": {"polytask": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "device": "cpu",
            "created": "2026-11-21",
        },
    }


def large() -> dict[str, Any]:
    """Twenty tasks of several metrics, eight methods, long and foreign names, and holes."""
    odd = ["中文情感分类任务", "задача <b>&amp; вопросы", "a" * 70, "cost in $ and $x^2$", "مهمة التصنيف", "loss & gain"]
    names = [*odd, *(f"natural_instructions/task{i:04d}_long_descriptive_name_of_a_task_{i}" for i in range(14))]
    metrics = ["perplexity" if i % 7 == 3 else "pearson" if i % 7 == 5 else "accuracy" for i in range(20)]
    methods = [*SCORES, "routed by <router> & co", "sparse task arithmetic with trimmed and elected signs", "平均"]
    rows = []
    for m, method in enumerate(methods):
        for t, name in enumerate(names):
            value = (18.0 + t - m * 1.3) if metrics[t] == "perplexity" else ((m * 3 + t * 5) % 17) / 18 - 0.1 * (t % 7 == 5)
            row = {"method": method, "task": name, "metric": metrics[t], "value": value, "low": value - 0.05, "n": 80}
            if (m + t) % 11 == 0:
                row |= {"value": None, "low": None, "note": "the base has no <head> for this & cannot answer"}
            rows.append(row | {"high": None if row["value"] is None else value + 0.06})
    cross = {"measure": "", "adapters": names, "tasks": names, "base": [0.5] * 19 + [None]}
    cross["values"] = [[None if (i + j) % 13 == 0 else 0.5 + ((i * 3 + j) % 9 - 4) / 20 for j in range(20)] for i in range(20)]
    tasks = [{"name": n, "kind": "classify", "metric": k, "labels": names * 3} for n, k in zip(names, metrics, strict=True)]
    return {"base": {"name": "<big> & 大"}, "tasks": tasks, "rows": rows, "cross": cross}


if __name__ == "__main__":  # python tests/test_report.py FOLDER: the pages themselves, to look at
    folder = Path(sys.argv[1])
    for label, table in {"fake": fake(), "large": large()}.items():
        start = time.perf_counter()
        (folder / f"{label}.html").write_text(render(table), encoding="utf-8")
        print(label, round(time.perf_counter() - start, 2), "s")
        pictures(table, folder / label)
