"""What routing costs: each token its own adapters, chosen by scores, over the bare forward; with PEFT's routers beside it.

The base and the adapters are those of `benchmarks.core`. The router here is the smallest one: a random prototype for each adapter
at each site, scores by one product, the two largest, and a softmax over them. AdapterFusion of the ``adapters`` library stands
beside ours where ``--adapters PYTHON`` (or POLYTASK_ADAPTERS) is a Python that has it: it needs an older transformers.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask import Adapter, LoRA, Mix, Model, PerRow, Weights
from polytask.core.form import Call
from polytask.core.gate import Router, chosen
from polytask.core.levels import Levels
from polytask.core.site import Site
from polytask.forms.mixture import Mixture
from polytask.forms.mixtures import mixture_of, routing_of

from .core import PEFT, VOCAB, _resident, adapters, attached, decoder, difference, tokens
from .measure import interleave, result, twin

LAYERS, K, RANK = 8, 2, 16
DISTINCT = 16  # adapters with values of their own; the others share these tensors, and the stacks hold all of them


class Prototypes(Mix):
    """Each token the ``k`` adapters whose prototypes have the largest products with it, by a softmax over these.

    Args:
        names: the adapters.
        k: how many for each token.
        prototypes: [N, i] by site, whose products count without their sign, as Arrow's; random ones with theirs when None.
        probe: how many groups of prototypes a token looks into; all are scored where 0.
    """

    def __init__(
        self, names: tuple[str, ...], k: int = K, prototypes: dict[str, Tensor] | None = None, probe: int = 0
    ) -> None:
        self._names, self._k, self._signed = names, k, prototypes is None
        self._prototypes = dict[str, Tensor]() if prototypes is None else prototypes
        self._probe, self._levels = probe, dict[str, Levels]()

    def names(self) -> tuple[str, ...]:
        return self._names

    def weigh(self, site: Site, names: tuple[str, ...], x: Tensor, y: Tensor, call: Call) -> Weights:
        prototypes = self._prototypes.get(site.name)
        if prototypes is None:
            draw = torch.Generator().manual_seed(len(self._prototypes))
            prototypes = torch.nn.functional.normalize(torch.randn(len(names), x.shape[-1], generator=draw), dim=-1)
            self._prototypes[site.name] = prototypes
            if self._probe:
                self._levels[site.name] = Levels(prototypes)
        if self._probe:
            top, index = self._levels[site.name].best(x, self._k, self._probe)
            return Weights(names, top.softmax(-1), index)
        scores = nn.functional.linear(x, prototypes)
        return Weights(names, *chosen(scores if self._signed else scores.abs(), self._k))


def library(module: nn.Module, count: int) -> dict[str, Adapter]:
    """So many adapters; those after the first few share their tensors, so that a thousand fit into memory."""
    few = list(adapters(module, min(count, DISTINCT), RANK).values())
    return {f"a{i}": few[i % len(few)] for i in range(count)}


def _megabytes(model: Model) -> float:
    """What the banks at all sites keep between forwards."""
    kept = (
        bank._kept["stacks"][1]
        for slot in model._hub.slots.values()
        for bank in slot.banks(slot.names)
        if "stacks" in getattr(bank, "_kept", {})
    )
    return round(float(sum(t.numel() * t.element_size() for stacks in kept for t in stacks)) / 1e6, 1)


def _free() -> float:
    """Bytes of memory that can be had."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024.0
    return math.inf


def _fitting(count: int) -> tuple[nn.Module, int]:
    """The decoder, with fewer layers where the stacks of so many adapters would take more than half of the free memory.

    The head shrinks with the layers, so that its share of the forward, and with it the ratio, stays.
    """
    per_layer = count * RANK * (4 * (512 + 512) + 3 * (512 + 1408)) * 4
    layers = next((n for n in (8, 4, 2) if n * per_layer < _free() / 2), 1)
    return decoder(layers=layers, vocab=VOCAB * layers // LAYERS), layers


def _routed(count: int, rows: int, length: int, rounds: int, peft: bool = False, probe: int = 0) -> dict[str, Any]:
    """The cases' times, the memory of the stacks, and how long attaching and the first forward took."""
    base, layers = _fitting(count)
    ids = tokens(rows, length) % (VOCAB * layers // LAYERS)
    given = library(base, count)
    begin = time.perf_counter()
    model = attached(base, given)
    attaching = time.perf_counter() - begin
    model.use(Prototypes(tuple(given), probe=probe))
    begin = time.perf_counter()
    model.module(ids)
    first = time.perf_counter() - begin
    cases: dict[str, Callable[[], object]] = {"bare": lambda: base(ids), "ours": lambda: model.module(ids)}
    details = {}
    if peft and PEFT:
        arrow = _arrow(base, count)
        cases["peft"] = lambda: arrow(ids)
        details["difference_to_peft"] = _difference(base, count, arrow, ids)
    took = interleave(cases, rounds, "bare")
    found = {
        "cases": took, "layers": layers, "megabytes": _megabytes(model), "resident": round(_resident("VmRSS") / 1e6),
        "seconds_attaching": round(attaching, 2), "seconds_first": round(first, 2), **details,
    }  # fmt: skip
    model.use(None)
    model.detach()
    gc.collect()
    return found


def _arrow(base: nn.Module, count: int) -> Any:
    """PEFT's Arrow over the same tensors: top-2 of as many LoRAs of the same rank."""
    from peft import ArrowConfig, create_arrow_model

    with tempfile.TemporaryDirectory() as folder:
        paths = [str(adapter.save(Path(folder) / name)) for name, adapter in adapters(base, count, RANK).items()]
        made = create_arrow_model(twin(base), paths, ArrowConfig(top_k=K))
        return made.eval()


def _difference(base: nn.Module, count: int, arrow: Any, ids: Tensor) -> float:
    """Between PEFT's output and ours with the prototypes that it found."""
    expected = arrow(ids).logits  # finds the prototypes
    theirs: dict[str, Tensor] = {
        name.removeprefix("base_model.model."): next(iter(module.lora_arrow.values())).prototypes
        for name, module in arrow.named_modules()
        if getattr(module, "lora_arrow", None)
    }
    given = adapters(base, count, RANK)
    model = attached(base, given, Prototypes(tuple(given), prototypes=theirs))
    return difference(model.module(ids).logits, expected)


def _benchmark(
    count: int, limit: float, rows: int = 8, length: int = 64, peft: bool = False, probe: int = 0
) -> Callable[..., Any]:
    @torch.no_grad()
    def benchmark(quick: bool) -> dict[str, Any]:
        found = _routed(count if not quick else min(count, 32), rows, length, 2 if quick else 11, peft, probe)
        if probe:
            found["found"] = {what: _found(vectors, probe) for what, vectors in _kinds(count).items()}
        ours = found["cases"]["ours"]
        peer = {f"{PEFT} arrow": found["cases"]["peft"]["cpu"]} if "peft" in found["cases"] else {}
        return result(benchmark.__doc__ or "", ours["cpu"], limit, peer, **found)

    benchmark.__name__ = f"{'top2' if length > 1 else 'decode'}_of_{count}{f'_probe_{probe}' if probe else ''}"
    benchmark.__doc__ = f"{rows} x {length} tokens, each by two of {count} LoRAs of rank {RANK}, over the bare forward"
    if probe:
        benchmark.__doc__ += f"; scored are those in {probe} groups of like prototypes"
    return benchmark


def _kinds(count: int, width: int = 512) -> dict[str, Tensor]:
    """Prototypes without any order, and in 40 clusters whose spread is half their distance from the origin."""
    draw = torch.Generator().manual_seed(0)
    loose = torch.randn(count, width, generator=draw)
    centres = torch.randn(40, width, generator=draw)[torch.arange(count) % 40]
    return {"random": loose, "clustered": centres + 0.5 * loose}


def _found(vectors: Tensor, probe: int) -> float:
    """The share of the best two that are among the two found, of inputs near to a prototype."""
    draw = torch.Generator().manual_seed(1)
    vectors = nn.functional.normalize(vectors, dim=1)
    near = vectors[torch.randint(len(vectors), (512,), generator=draw)]
    x = near + 0.5 * nn.functional.normalize(torch.randn(near.shape, generator=draw), dim=1)
    index = Levels(vectors).best(x, K, probe)[1]
    wanted = (x @ vectors.T).topk(K, -1).indices
    return round(float((index.unsqueeze(-1) == wanted.unsqueeze(1)).any(1).float().mean()), 3)


@torch.no_grad()
def rows_of_1024(quick: bool) -> dict[str, Any]:
    """8 x 64 tokens, 8 different adapters in the batch and 1,024 attached, over the bare forward."""
    base, ids = decoder(), tokens(8, 64)
    given = library(base, 32 if quick else 1024)
    model = attached(base, given, PerRow(list(given)[:8]))
    took = interleave({"bare": lambda: base(ids), "ours": lambda: model.module(ids)}, 2 if quick else 11, "bare")
    return result(rows_of_1024.__doc__ or "", took["ours"]["cpu"], 1.15, cases=took)


def _x_lora(count: int) -> Callable[..., Any]:
    @torch.no_grad()
    def benchmark(quick: bool) -> dict[str, Any]:
        base, ids = decoder(), tokens(8, 64)
        given = adapters(base, count, RANK)
        mixture = mixture_of(Router.of("x-lora").told(list(given)), given, seed=1, name="mixture")
        model = attached(base, {})
        model.use(routing_of(mixture.trainable(False), given).attach(model))
        cases: dict[str, Callable[[], object]] = {"bare": lambda: base(ids), "ours": lambda: model.module(ids)}
        details = {}
        if PEFT:
            theirs = _peft_x_lora(base, given)
            cases["peft"] = lambda: theirs(input_ids=ids, use_cache=False)
            shared, layers = model._hub.mix.shared, theirs.base_model.internal_xlora_classifier.layers  # type: ignore[union-attr]
            for i, layer in enumerate(m for m in layers if isinstance(m, nn.Linear)):
                shared.get_parameter(f"W{i}").copy_(layer.weight)
                shared.get_parameter(f"b{i}").copy_(layer.bias)
            theirs_out = theirs(input_ids=ids, use_cache=False).logits
            details["difference_to_peft"] = difference(model.module(ids).logits, theirs_out)
        return _beside(benchmark.__doc__ or "", cases, "x-lora", quick, **details)

    benchmark.__name__ = f"x_lora_of_{count}"
    benchmark.__doc__ = (
        f"8 x 64 tokens, all of {count} LoRAs weighed by X-LoRA after a first pass, over the bare forward"
    )
    return benchmark


def _peft_x_lora(base: nn.Module, given: dict[str, Adapter]) -> Any:
    """PEFT's X-LoRA over the same tensors and adapters."""
    from peft import XLoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        # it calls them by their numbers, whatever they are called here
        paths = {str(i): str(adapter.save(Path(folder) / name)) for i, (name, adapter) in enumerate(given.items())}
        config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=512, adapters=paths, xlora_depth=1)
        return get_peft_model(twin(base), config).eval()  # type: ignore[arg-type]


@torch.no_grad()
def poly_of_8(quick: bool) -> dict[str, Any]:
    """8 x 64 tokens, each row the mean of 8 skills' factors that its task takes, over the bare forward"""
    base, ids = decoder(), tokens(8, 64)
    names = [str(i) for i in range(8)]
    form = Mixture({"name": "poly", "tasks": names}, 8, LoRA(rank=RANK, init="random"))
    model = attached(base, {"inventory": Adapter.new(Model(base), form, "linear", seed=0)}, "inventory")
    cases: dict[str, Callable[[], object]] = {"bare": lambda: base(ids), "ours": lambda: model.module(ids)}
    if PEFT:
        from peft import PolyConfig, get_peft_model

        config = PolyConfig(
            target_modules=r"model\.layers\..*_proj", r=RANK, n_tasks=8, n_skills=8, n_splits=1, init_weights=False
        )
        theirs, tasks = get_peft_model(twin(base), config).eval(), torch.arange(8)  # type: ignore[arg-type]
        cases["peft"] = lambda: theirs.base_model(input_ids=ids, task_ids=tasks)
    with model.using("inventory", tasks=names):
        return _beside(poly_of_8.__doc__ or "", cases, "poly", quick)


@torch.no_grad()
def fusion_of_8(quick: bool) -> dict[str, Any]:
    """8 x 64 tokens, AdapterFusion's attention over 8 bottlenecks after each feed-forward, over the bare forward"""
    base, ids = decoder(), tokens(8, 64)
    given = {
        f"a{i}": Adapter.new(Model(base), {"name": "bottleneck", "style": "pfeiffer"}, seed=i, name=f"a{i}")
        for i in range(8)
    }
    mixture = mixture_of(Router.of("adapterfusion").told(list(given)), given, seed=1, name="mixture")
    model = attached(base, {})
    model.use(routing_of(mixture.trainable(False), given).attach(model))
    cases = {"bare": lambda: base(ids), "ours": lambda: model.module(ids)}
    took = interleave(cases, 2 if quick else 11, "bare")
    theirs = _adapters_fusion(2 if quick else 11)
    if theirs:
        took[f"adapters {theirs.pop('version')}"] = theirs
    peer = {name: found["cpu"] for name, found in took.items() if name.startswith("adapters")}
    return result(fusion_of_8.__doc__ or "", took["ours"]["cpu"], None, peer, cases=took)


def _adapters_fusion(rounds: int) -> dict[str, Any] | None:
    """What the ``adapters`` library takes for the same over its own bare forward; None where no Python with it was said."""
    python = os.environ.get("POLYTASK_ADAPTERS")
    if not python:
        return None
    command = [python, "-m", "benchmarks._fuser", str(torch.get_num_threads()), str(rounds), str(VOCAB)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ran.returncode}: {ran.stderr.strip()[-400:]}")
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def _beside(
    what: str, cases: dict[str, Callable[[], object]], router: str, quick: bool, **details: Any
) -> dict[str, Any]:
    """A result whose limit is what PEFT takes for the same, where it is installed."""
    took = interleave(cases, 2 if quick else 11, "bare")
    ours, theirs = took["ours"]["cpu"], took["peft"]["cpu"] if "peft" in took else None
    peer = {} if theirs is None else {f"{PEFT} {router}": theirs}
    return result(
        what, ours, None, peer, ok=None if theirs is None else ours <= theirs, must="<= PEFT's", cases=took, **details
    )


BENCHMARKS = (
    _benchmark(8, 1.35, peft=True), _benchmark(32, 1.45, peft=True), _benchmark(128, 1.7), _benchmark(1024, 2.7),
    _benchmark(1024, 2.7, probe=4), _benchmark(128, 2.0, 32, 1), rows_of_1024, _x_lora(8), _x_lora(32),
    poly_of_8, fusion_of_8,
)  # fmt: skip
