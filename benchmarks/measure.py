"""How everything here is measured: alternately, many times, and as a ratio within one run."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def interleave(
    cases: Mapping[str, Callable[[], object]], rounds: int, baseline: str, warm: int = 2
) -> dict[str, dict[str, float]]:
    """Times several callables alternately, so that whatever else the machine does meets all of them alike.

    Args:
        cases: callables by name.
        rounds: how many times each is timed. The order turns from round to round.
        baseline: the case that the others are divided by, round by round.
        warm: untimed calls of each case before.

    Returns:
        By name: ``ms`` (median), ``ratio`` (median of the ratios to the baseline in the same round), the quartiles of
        these ratios as ``low`` and ``high``, and ``cpu``, the median of the same ratios of processor time. On a machine
        that does other work, ``cpu`` with one thread is the figure to trust; waiting threads count in it.
    """
    names = list(cases)
    for name in names:
        for _ in range(warm):
            cases[name]()
    took: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                begin, begin_busy = time.perf_counter(), time.process_time()
                cases[name]()
                busy[name].append(time.process_time() - begin_busy)
                took[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    found = {}
    for name in names:
        ratios = [a / b for a, b in zip(took[name], took[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        found[name] = {
            "ms": round(statistics.median(took[name]) * 1e3, 3),
            "ratio": round(middle, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "cpu": round(statistics.median(a / b for a, b in zip(busy[name], busy[baseline], strict=True)), 3),
        }
    return found


def result(
    what: str,
    ratio: float | None,
    limit: float | None,
    peer: Mapping[str, Any] | None = None,
    ok: bool | None = None,
    must: str = "",
    **details: Any,
) -> dict[str, Any]:
    """One line of the report.

    Args:
        what: what was compared, in words.
        ratio: the figure; None where it could not be taken.
        limit: the largest ratio that is acceptable; None where the figure is only reported.
        peer: the same figure of other libraries, by name and version; empty where they are not installed.
        ok: whether the target is met; from ``ratio`` and ``limit`` when None.
        must: the target in words; from ``limit`` when empty.
        details: anything else that was measured.
    """
    if ok is None and ratio is not None and limit is not None:
        ok = ratio <= limit
    return {
        "what": what,
        "ratio": ratio,
        "must": must or ("" if limit is None else f"<= {limit:g}"),
        "ok": ok,
        "peer": dict(peer or {}),
        **details,
    }


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": sys.version.split()[0],
        **{package: version(package) for package in ("polytask", "torch", "transformers", "peft")},
    }


def twin(module: nn.Module) -> nn.Module:
    """A second network over the same parameter tensors, so that one stays bare while the other has adapters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
