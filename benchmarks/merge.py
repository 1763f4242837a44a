"""Merging models beside mergekit, plain copies and PEFT: seconds, processor time and memory.

Models are folders of Llama's architecture with random bf16 weights, written into a temporary folder: one base and tuned ones near
it. Both libraries get the same mergekit file, as processes with the same threads, in turn. mergekit needs an environment of its
own: ``--mergekit PATH`` (or POLYTASK_MERGEKIT) is its ``mergekit-yaml``. ``--size`` (or POLYTASK_MERGE_SIZE) picks the models.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from ._llamas import METHODS, NO_BASE, SIZES, largest, write_config, write_models
from .core import PEFT
from .measure import interleave, result

MODELS = 4
ROUNDS = 3
HERE = Path(__file__).resolve().parent

# Processes


def mergekit() -> Path | None:
    """mergekit's executable, where somebody said it."""
    said = os.environ.get("POLYTASK_MERGEKIT")
    found = Path(said) if said else None
    return found if found and found.is_file() else None


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}


def process(command: list[str]) -> dict[str, float]:
    """Runs a command alone: seconds, the processor's seconds, and the peak of its resident memory in MB (files that it maps
    into memory count). Raises `RuntimeError` with what it said where it fails."""
    launcher = [sys.executable, "-P", str(HERE / "_merger.py"), "run", *command]
    said: dict[str, Any] = json.loads(
        subprocess.run(launcher, capture_output=True, env=_environment(), check=True).stdout
    )
    if "error" in said:
        raise RuntimeError(f"{Path(command[0]).name} failed: {said['error']}")
    return said


class Worker:
    """A library in a process of its own that has imported everything; see `_merger.py`."""

    def __init__(self, library: str, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-P", str(HERE / "_merger.py"), library], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=_environment(),
        )  # fmt: skip

    def __call__(self, config: Path, out: Path, **options: Any) -> dict[str, Any]:
        """Merges once. Raises `RuntimeError` where the library cannot."""
        shutil.rmtree(out, ignore_errors=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"config": str(config), "out": str(out), "options": options}) + "\n")
        self._process.stdin.flush()
        said: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "it ended"}')
        if "error" in said:
            raise RuntimeError(said["error"])
        return said

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def in_turn(cases: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of what the cases say of themselves, run alternately after one untimed run of each; of one round there is none."""
    names, found = list(cases), {name: [] for name in cases}
    for call in cases.values() if rounds > 1 else ():
        call()
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            found[name].append(cases[name]())
    return {
        name: {key: round(statistics.median(entry[key] for entry in entries), 3) for key in entries[0]}
        for name, entries in found.items()
    }


@contextmanager
def _bench(size: str, count: int = MODELS) -> Iterator[tuple[Path, list[Path]]]:
    """A folder, and models in it."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("POLYTASK_BENCH_FOLDER")) as held:
        yield Path(held), write_models(Path(held), size, count)


@contextmanager
def _workers() -> Iterator[dict[str, Worker]]:
    """Ours, and mergekit's where it is there."""
    pythons = {"polytask": sys.executable}
    if kit := mergekit():
        pythons["mergekit"] = str(kit.parent / "python")
    with ExitStack() as stack:
        made = {library: Worker(library, python) for library, python in pythons.items()}
        for worker in made.values():
            stack.callback(worker.close)
        yield made


def _size(quick: bool) -> str:
    size = os.environ.get("POLYTASK_MERGE_SIZE") or ("40m" if quick else "160m")
    if size not in SIZES:
        raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {size!r}")
    return size


def _rounds(quick: bool) -> int:
    return int(os.environ.get("POLYTASK_MERGE_ROUNDS") or (1 if quick else ROUNDS))


def _peer(ratio: float | None) -> dict[str, Any]:
    return {"mergekit": "not installed"} if mergekit() is None else {"mergekit": ratio}


def _over(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    return {key: round(ours[key] / theirs[key], 3) for key in ("seconds", "cpu", "peak_mb")}


# What is measured


def linear_copy(quick: bool) -> dict[str, Any]:
    """A linear merge of four models over reading them and writing the result with plain copies."""
    size = _size(quick)
    with _bench(size) as (folder, models), _workers() as workers:
        config, ours = write_config(folder, "linear", models), workers["polytask"]
        buffer = memoryview(bytearray(8 << 20))

        def copy() -> dict[str, float]:
            began, busy = time.perf_counter(), time.process_time()
            for model in models:
                with (
                    open(model / "model.safetensors", "rb", buffering=0) as file,
                    open(folder / "copy" if model is models[-1] else os.devnull, "wb", buffering=0) as out,
                ):
                    while count := file.readinto(buffer):
                        out.write(buffer[:count])
                    if model is models[-1]:
                        os.fsync(out.fileno())
            (folder / "copy").unlink()
            return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - busy}

        cases: dict[str, Callable[[], dict[str, float]]] = {
            "copy": copy,
            "ours": lambda: ours(config, folder / "ours"),
            "without hashes": lambda: ours(config, folder / "bare", hashes=False),
        }
        if "mergekit" in workers:
            cases["mergekit"] = lambda: workers["mergekit"](config, folder / "kit", lazy_unpickle=True)
        took = in_turn(cases, _rounds(quick))
    ratios = {name: round(entry["seconds"] / took["copy"]["seconds"], 3) for name, entry in took.items()}
    return result(
        linear_copy.__doc__ or "", ratios["ours"], 1.5, _peer(ratios.get("mergekit")), size=size, ratios=ratios,
        cases=took,
    )  # fmt: skip


def methods(quick: bool) -> dict[str, Any]:
    """Every method that mergekit has too, in processes that have imported everything: the largest share of its seconds."""
    size, kit = _size(quick), mergekit()
    chosen = ("linear", "ties") if quick else tuple(METHODS)
    found: dict[str, dict[str, Any]] = {}
    with _bench(size) as (folder, models), _workers() as workers:
        for method in chosen:
            config = write_config(folder, method, models)
            cases = {"polytask": lambda config=config: workers["polytask"](config, folder / "ours")}
            if kit:
                cases["mergekit"] = lambda config=config: workers["mergekit"](
                    config, folder / "kit", lazy_unpickle=True
                )
            try:
                took = in_turn(cases, _rounds(quick))
            except RuntimeError as error:  # the other methods are still worth comparing
                found[method] = {"error": str(error)}
                continue
            found[method] = {**took, **({"ratio": _over(took["polytask"], took["mergekit"])} if kit else {})}
            print(f"  {method}: {found[method].get('ratio', took)}", file=sys.stderr, flush=True)  # some take minutes
    ratios = [entry["ratio"]["seconds"] for entry in found.values() if "ratio" in entry]
    return result(
        methods.__doc__ or "", max(ratios, default=None), 1.0, _peer(1.0 if ratios else None), size=size, methods=found
    )


def _commands(method: str, quick: bool, size: str, **more: Any) -> dict[str, Any]:
    """The command lines of both libraries with the same file, their start-up (a merge of almost nothing) taken apart."""
    kit = mergekit()
    found: dict[str, Any] = {}
    for name in ("tiny", size):
        with _bench(name) as (folder, models):
            config = write_config(folder, method, models, **more)
            plain = [sys.executable, "-m", "polytask", "merge", str(config)]
            ours = {
                "ours": [*plain, str(folder / "ours")],
                "without hashes": [*plain, str(folder / "bare"), "--no-hash"],
            }
            flags = {"mergekit": ["--lazy-unpickle"], "mergekit plain": []}
            theirs = {
                case: [str(kit), str(config), str(folder / case), "--no-copy-tokenizer", "--quiet", *own]
                for case, own in (flags if kit else {}).items()
            }

            def call(command: list[str], out: Path) -> dict[str, float]:
                shutil.rmtree(out, ignore_errors=True)
                return process(command)

            cases = {}
            for case, command in {**ours, **theirs}.items():
                out = folder / {"ours": "ours", "without hashes": "bare"}.get(case, case)
                cases[case] = lambda command=command, out=out: call(command, out)
            found[name] = in_turn(cases, _rounds(quick))
    for case, entry in found[size].items():
        entry["merging"] = round(entry["seconds"] - found["tiny"][case]["seconds"], 3)
    return found


def _against(method: str, quick: bool, limit: float, what: str, figure: str, **more: Any) -> dict[str, Any]:
    size = _size(quick)
    found = _commands(method, quick, size, **more)
    took = found[size]
    ratio = None
    if "mergekit" in took:
        ratio = round(took["ours"][figure] / min(took[k][figure] for k in ("mergekit", "mergekit plain")), 3)
    return result(what, ratio, limit, _peer(1.0), size=size, cases=found)


def ties(quick: bool) -> dict[str, Any]:
    """The command with a file that says TIES, over mergekit's command with the same file: seconds with start-up."""
    return _against("ties", quick, round(1 / 3, 3), ties.__doc__ or "", "seconds")


def memory(quick: bool) -> dict[str, Any]:
    """The command with a file that says linear, over mergekit's command: peak of resident memory."""
    return _against("linear", quick, 0.5, memory.__doc__ or "", "peak_mb")


def bound(quick: bool) -> dict[str, Any]:
    """Peak memory over 2.5 x the largest tensor x the number of models in fp32 + 300 MB, the worst of several rules."""
    size = _size(quick)
    rules = (
        ("linear", "ties")
        if quick
        else ("linear", "ties", "dare_ties", "della", "sce", "multislerp", "model_stock", "emr", "pcb")
    )
    found = {}
    with _bench(size) as (folder, models):
        allowed = 2.5 * largest(size) * 4 * len(models) / 1e6 + 300
        for rule in rules:
            shutil.rmtree(folder / "out", ignore_errors=True)
            base = [] if rule in NO_BASE else ["--base", str(models[0])]
            given = [str(model) for model in (models[1:] if base else models)]
            used = process(
                [
                    sys.executable,
                    "-m",
                    "polytask",
                    "merge",
                    *given,
                    *base,
                    "--method",
                    rule,
                    "--out",
                    str(folder / "out"),
                ]
            )
            found[rule] = {key: round(value, 2) for key, value in used.items()}
    worst = max(entry["peak_mb"] for entry in found.values())
    return result(
        bound.__doc__ or "", round(worst / allowed, 3), 1.0, size=size, allowed_mb=round(allowed), rules=found
    )


@torch.no_grad()
def lora_svd(quick: bool) -> dict[str, Any]:
    """Eight LoRAs of rank 16 at two layers of 2048 x 2048 to one of rank 16, over PEFT's add_weighted_adapter("svd")."""
    import polytask as pt
    from polytask import Adapter, LoRA, Model

    from .core import peft_model

    side, count = (256, 3) if quick else (2048, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(side, side, False), torch.nn.Linear(side, side, False))
    made = {
        f"a{i}": Adapter.new(Model(module), LoRA(rank=16, init="random"), "linear", seed=i, name=f"a{i}")
        for i in range(count)
    }
    share = [1.0 / count] * count
    cases: dict[str, Callable[[], Any]] = {
        "ours": lambda: pt.merge(list(made.values()), weights=share, rank=16, normalize=False)
    }
    if not PEFT:
        return result(lora_svd.__doc__ or "", None, None)
    theirs, number = peft_model(module, made), iter(range(1000))

    def svd() -> str:
        name = f"merged{next(number)}"
        theirs.add_weighted_adapter(list(made), share, name, combination_type="svd", svd_rank=16)
        return name

    cases["peft"] = svd
    took = interleave(cases, 1 if quick else ROUNDS, "peft", warm=1)
    apart = []
    merged, name = cases["ours"](), svd()
    for site, patch in merged.patches.items():
        layer = theirs.base_model.model.get_submodule(site)
        other = layer.get_delta_weight(name)
        apart.append(float((patch.delta() - other).norm() / other.norm()))
    return result(
        lora_svd.__doc__ or "", took["ours"]["ratio"], round(1 / 30, 4), {PEFT: 1.0}, cases=took, difference_to_peft=max(apart)
    )  # fmt: skip


def compeft(quick: bool) -> dict[str, Any]:
    """ComPEFT of a difference of 100 MB in fp32, written to a file: MB of the difference in a second, over 200."""
    from polytask.core.packed import write
    from polytask.merge.compress import ternary

    count, parts = (10, 100_000) if quick else (25, 1_000_000)
    made = [(f"w{i}", torch.randn(parts, generator=torch.Generator().manual_seed(i)) * 0.01) for i in range(count)]
    size = count * parts * 4 / 1e6
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "compress": lambda: list(ternary(lambda: made)),
            "and write": lambda: write(Path(folder) / "c.safetensors", dict(ternary(lambda: made))),
        }
        took = interleave(cases, 2 if quick else 7, "compress", warm=1)
    rates = {case: round(size / entry["ms"] * 1e3, 1) for case, entry in took.items()}
    return result(
        compeft.__doc__ or "", round(rates["and write"] / 200, 3), None, ok=rates["and write"] >= 200, must=">= 1",
        megabytes=size, megabytes_per_second=rates, cases=took,
    )  # fmt: skip


BENCHMARKS = (linear_copy, methods, ties, memory, bound, lora_svd, compeft)
