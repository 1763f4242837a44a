"""``python -m benchmarks [module ...] [--only NAME] [--quick]``: one JSON document on stdout, a table on stderr.

Runs every module of this folder that has ``BENCHMARKS``, a sequence of functions ``(quick: bool) -> dict``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .measure import machine


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks. Returns 1 when one of them raised an error; a target that is missed is only reported."""
    folder = Path(__file__).parent
    there = [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_") and m.name != "measure"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios of two things in one run.")
    parser.add_argument("modules", nargs="*", metavar="module", help=f"which modules to run ({', '.join(there)}); all")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only functions with this name")
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes: shows that it runs")
    parser.add_argument("--threads", type=int, help="torch's threads; torch's own choice if not given")
    parser.add_argument("--mergekit", metavar="PATH", help="mergekit's mergekit-yaml, of an environment of its own")
    parser.add_argument("--adapters", metavar="PYTHON", help="the Python of an environment with the adapters library")
    parser.add_argument("--size", help="of the models that are merged: 40m, 160m, 500m or 1.5b")
    parser.add_argument("--rounds", type=int, help="of the merges that are timed; 3 if not given")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.modules) - set(there))
    if unknown:
        parser.error(f"there is no module {', '.join(unknown)}; there are: {', '.join(there)}")
    for name, value in (
        ("POLYTASK_MERGEKIT", given.mergekit),
        ("POLYTASK_ADAPTERS", given.adapters),
        ("POLYTASK_MERGE_SIZE", given.size),
        ("POLYTASK_MERGE_ROUNDS", given.rounds),
    ):
        if value:
            os.environ[name] = str(value)
    if given.threads:
        torch.set_num_threads(given.threads)
    document: dict[str, Any] = {"machine": machine(), "quick": given.quick, "results": []}
    print(f"{'':44}{'ratio':>8}  {'target':18}{'':6}peers", file=sys.stderr)
    for module in given.modules or there:
        for benchmark in getattr(importlib.import_module(f"benchmarks.{module}"), "BENCHMARKS", ()):
            if given.only and benchmark.__name__ not in given.only:
                continue
            begin = time.perf_counter()
            name = f"{module}.{benchmark.__name__}"
            try:
                found = benchmark(given.quick)
            except Exception as error:  # the others are still worth running
                found = {"what": benchmark.__doc__.splitlines()[0], "error": f"{type(error).__name__}: {error}"}
            found = {"name": name, **found, "seconds": round(time.perf_counter() - begin, 1)}
            document["results"].append(found)
            print(_line(found), file=sys.stderr, flush=True)
    print(json.dumps(document, indent=2))
    return int(any("error" in found for found in document["results"]))


def _line(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{found['name']:44}{found['error']}"
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.3f}"
    verdict = {True: "ok", False: "MISSED", None: ""}[found["ok"]]
    peers = ", ".join(f"{name} {value}" for name, value in found["peer"].items())
    return f"{found['name']:44}{ratio:>8}  {found['must']:18}{verdict:8}{peers}"


if __name__ == "__main__":
    sys.exit(main())
