"""A library of ten thousand adapters: opening it, finding some of them, adding one more."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from polytask import Adapter, Library, LoRA, Model

from .measure import result


def opening(quick: bool) -> dict[str, Any]:
    """Opening a library of 10,000 small adapters, in seconds"""
    count = 200 if quick else 10_000
    adapter = Adapter.new(Model(nn.Sequential(nn.Linear(8, 8))), LoRA(rank=2), "linear", name="a")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with Library(folder, signatures=()) as lib:
            for i in range(count):
                lib.add(adapter, f"a{i}", tags=[f"group{i % 50}"])
        adding = (time.perf_counter() - begin) / count
        took: dict[str, list[float]] = {"open": [], "find": [], "look up": []}
        for i in range(11):
            begin = time.perf_counter()
            with Library(Path(folder)) as lib:
                assert len(lib) == count
                took["open"].append(time.perf_counter() - begin)
                begin = time.perf_counter()
                found = lib.find("tag:group7 & rank<=2")
                took["find"].append(time.perf_counter() - begin)
                assert len(found) == count // 50
                begin = time.perf_counter()
                assert lib[f"a{i}"].size == adapter.size
                took["look up"].append(time.perf_counter() - begin)
    seconds = {name: round(statistics.median(values), 4) for name, values in took.items()}
    return result(
        opening.__doc__ or "", seconds["open"], 1.0, must="<= 1 s", adapters=count, add=round(adding, 4), **seconds
    )


BENCHMARKS = (opening,)
