"""What acting through adapters costs: forwards, training steps, attaching, loading, importing, memory.

The base is a randomly initialised decoder of 33.9 million parameters (Llama's architecture), on the CPU in fp32. What
is compared runs alternately over the same base tensors; where PEFT is installed it has the same adapters, loaded from
the files that polytask wrote, and the largest difference between the two libraries' outputs is part of the result.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask import Adapter, LoRA, Model, PerRow

from .measure import interleave, result, twin, version

VOCAB = 16_000
PEFT = f"peft {version('peft')}" if version("peft") else ""


def decoder(hidden: int = 512, layers: int = 8, inner: int = 1408, vocab: int = VOCAB) -> nn.Module:
    """A random decoder in eval mode; its parameters do not take gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, vocab_size=vocab,
        num_attention_heads=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def adapters(module: nn.Module, count: int, rank: int = 16) -> dict[str, Adapter]:
    """LoRAs on all linear layers but the head, with random values in both factors."""
    model, form = Model(module), LoRA(rank=rank, init="random")
    return {f"a{i}": Adapter.new(model, form, "linear", seed=i, name=f"a{i}") for i in range(count)}


def attached(module: nn.Module, given: Mapping[str, Adapter], mix: Any = None) -> Model:
    """A model over the same parameter tensors with these adapters attached."""
    model = Model(twin(module))
    for name, adapter in given.items():
        model.attach(adapter, name)
    model.use(mix)
    return model


def peft_model(module: nn.Module, given: Mapping[str, Adapter]) -> Any:
    """PEFT's model over the same parameter tensors with the same adapters; the first one is active."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        wrapped = None
        for name, adapter in given.items():
            path = adapter.save(Path(folder) / name)
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(twin(module), str(path), adapter_name=name)
            else:
                wrapped.load_adapter(str(path), name)
    return wrapped.eval()


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float(f"{float((ours - theirs).abs().max() / theirs.abs().max()):.1e}")


def tokens(rows: int, length: int) -> Tensor:
    """[rows, length] token ids."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def changing(model: Model, names: Sequence[str], rows: int, ids: Tensor) -> Callable[[], Tensor]:
    """A forward with a new `PerRow` each time, of other adapters."""
    draw = random.Random(0)

    def forward() -> Tensor:
        model.use(PerRow(draw.sample(names, rows)))
        return model.module(ids).logits

    return forward


@torch.no_grad()
def forward_single(quick: bool) -> dict[str, Any]:
    """One LoRA of rank 16 on all linear layers, 8 x 64 tokens, over the bare forward."""
    base = decoder()
    given, ids = adapters(base, 1), tokens(8, 64)
    model = attached(base, given, "a0")
    cases = {"bare": lambda: base(ids), "ours": lambda: model.module(ids)}
    details = {}
    if PEFT:
        theirs = peft_model(base, given)
        cases["peft"] = lambda: theirs(ids)
        details["difference_to_peft"] = difference(model.module(ids).logits, theirs(ids).logits)
    took = interleave(cases, 2 if quick else 21, "bare")
    peer = {PEFT: took["peft"]["ratio"]} if PEFT else {}
    return result(forward_single.__doc__, took["ours"]["ratio"], 1.08, peer, cases=took, **details)


@torch.no_grad()
def forward_rows(quick: bool) -> dict[str, Any]:
    """8 different LoRAs of rank 16 in one batch of 8 x 64 tokens, over the bare forward.

    The ratio is of a forward whose `PerRow` acted before; ``cases`` has a new one for each forward too, and both with
    128 adapters loaded.
    """
    base = decoder()
    many = adapters(base, 12 if quick else 128)
    few = dict(list(many.items())[:8])
    ids, names = tokens(8, 64), list(few)
    kept = attached(base, few, PerRow(names))
    kept_of_many = attached(base, many, PerRow(names))
    cases = {
        "bare": lambda: base(ids),
        "kept": lambda: kept.module(ids),
        "new": changing(attached(base, few), names, 8, ids),
        "kept_of_128": lambda: kept_of_many.module(ids),
        "new_of_128": changing(attached(base, many), list(many), 8, ids),
    }
    details = {}
    if PEFT:
        theirs = peft_model(base, few)
        cases["peft"] = lambda: theirs(ids, adapter_names=names)
        details["difference_to_peft"] = difference(kept.module(ids).logits, theirs(ids, adapter_names=names).logits)
    took = interleave(cases, 2 if quick else 15, "bare")
    peer = {PEFT: took["peft"]["ratio"]} if PEFT else {}
    return result(forward_rows.__doc__.splitlines()[0], took["kept"]["ratio"], 1.10, peer, cases=took, **details)


@torch.no_grad()
def decode_rows(quick: bool) -> dict[str, Any]:
    """32 different LoRAs of rank 16 in one batch of 32 x 1 tokens, over the bare forward."""
    base = decoder()
    many = adapters(base, 32)
    ids, names = tokens(32, 1), list(many)
    kept = attached(base, many, PerRow(names))
    four = attached(base, many, PerRow([names[i % 4] for i in range(32)]))
    one = attached(base, many, names[0])
    cases = {
        "bare": lambda: base(ids),
        "kept": lambda: kept.module(ids),
        "new": changing(attached(base, many), names, 32, ids),
        "four_adapters": lambda: four.module(ids),
        "one_adapter": lambda: one.module(ids),
    }
    details = {}
    if PEFT:
        theirs = peft_model(base, many)
        cases["peft"] = lambda: theirs(ids, adapter_names=names)
        details["difference_to_peft"] = difference(kept.module(ids).logits, theirs(ids, adapter_names=names).logits)
    took = interleave(cases, 3 if quick else 61, "bare")
    peer = {PEFT: took["peft"]["ratio"]} if PEFT else {}
    return result(decode_rows.__doc__, took["kept"]["ratio"], 1.6, peer, cases=took, **details)


def train_step(quick: bool) -> dict[str, Any]:
    """Forward, backward and AdamW step of one LoRA of rank 16, 8 x 64 tokens, over the bare forward."""
    base = decoder()
    given, ids = adapters(base, 1), tokens(8, 64)
    model = attached(base, {"a0": given["a0"].copy().trainable()}, "a0")

    def bare() -> None:
        with torch.no_grad():
            base(ids)

    def stepping(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)

        def step() -> float:
            loss = module(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    # every timed module trains as it was made: dropout is 0 on both sides
    mine = stepping(model.module.train(), list(model.adapters["a0"].parameters()))
    cases, details = {"bare": bare, "ours": mine}, {}
    if PEFT:
        theirs = peft_model(base, given)
        learnt = [p for n, p in theirs.named_parameters() if "lora_" in n]
        for parameter in learnt:
            parameter.requires_grad_(True)
        peft_step = stepping(theirs.train(), learnt)
        cases["peft"] = peft_step
        losses = [(mine(), peft_step()) for _ in range(3)]
        details["loss_difference_to_peft"] = float(f"{max(abs(a - b) / b for a, b in losses):.1e}")
    took = interleave(cases, 2 if quick else 21, "bare")
    limit = took["peft"]["ratio"] if PEFT else None
    peer = {PEFT: limit} if PEFT else {}
    must = f"<= peft's ({limit})" if PEFT else "<= peft's"
    return result(train_step.__doc__, took["ours"]["ratio"], limit, peer, must=must, cases=took, **details)


def attach_many(quick: bool) -> dict[str, Any]:
    """The time to attach the 101st adapter at 224 sites over that of the first one."""
    base = decoder(hidden=64, layers=32, inner=128, vocab=256)
    count = 11 if quick else 101
    given = adapters(base, count, rank=4)
    turns = [_attach_all(base, given) for _ in range(2 if quick else 12)]
    ms = {name: round(statistics.median(turn[name] for turn in turns[1:]) * 1e3, 2) for name in turns[0]}
    ms["first_of_all"] = round(turns[0]["first"] * 1e3, 2)  # also makes the classes that the modules get
    ratio = round(statistics.median(turn["last"] / turn["first"] for turn in turns[1:]), 3)
    peer = {PEFT: _peft_attach(base, 3 if quick else 26)} if PEFT else {}
    return result(
        f"attaching adapter {count} at 224 sites over attaching the first",
        ratio,
        1.3,
        peer,
        ok=ratio <= 1.3 and ms["last"] < 20,
        must="<= 1.3, < 20 ms",
        ms=ms,
    )


def _attach_all(base: nn.Module, given: Mapping[str, Adapter]) -> dict[str, float]:
    model = Model(twin(base))
    model.sites, model.fingerprint  # noqa: B018  both are kept by a model that is in use
    gc.collect()
    times = [_seconds(lambda name=name: model.attach(given[name], name)) for name in given]
    last = list(given)[-1]
    return {
        "first": times[0],
        "second": times[1],
        "last": times[-1],
        "detach_last": _seconds(lambda: model.detach(last)),
        "detach_all_others": _seconds(model.detach),
    }


def _peft_attach(base: nn.Module, count: int) -> dict[str, float]:
    """PEFT's times, in ms, for ``add_adapter``, which also makes the values; few, as the time grows with each."""
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")

    wrapped = get_peft_model(twin(base), config(), adapter_name="a0")
    times = [_seconds(lambda i=i: wrapped.add_adapter(f"a{i}", config())) for i in range(1, count)]
    return {"second_ms": round(times[0] * 1e3, 1), f"{count}th_ms": round(times[-1] * 1e3, 1)}


def load_adapter(quick: bool) -> dict[str, Any]:
    """Loading an adapter of 11 MB with 224 sites from a folder over safetensors' load_file of the same file."""
    from safetensors.torch import load_file

    base = decoder(hidden=256, layers=32, inner=832, vocab=256)
    adapter = adapters(base, 1)["a0"]
    with tempfile.TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "a0")
        weights = path / "adapter_model.safetensors"
        cases: dict[str, Callable[[], object]] = {
            "load_file": lambda: load_file(weights),
            "ours": lambda: Adapter.load(path),
        }
        took = interleave(cases, 3 if quick else 21, "load_file")
        peer = {PEFT: _peft_load(base, path, took["load_file"]["ms"], 1 if quick else 5)} if PEFT else {}
        size = round(weights.stat().st_size / 1e6, 1)
    return result(load_adapter.__doc__, took["ours"]["ratio"], 4.0, peer, cases=took, megabytes=size)


def _peft_load(base: nn.Module, path: Path, over_ms: float, count: int) -> float:
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(twin(base), str(path), adapter_name="first")
    times = [_seconds(lambda i=i: wrapped.load_adapter(str(path), f"b{i}")) for i in range(count)]
    return round(statistics.median(times) * 1e3 / over_ms, 1)


def import_time(quick: bool) -> dict[str, Any]:
    """Seconds for ``import polytask`` in a new interpreter."""
    code = (
        "import json, sys, time; begin = time.perf_counter(); import polytask; "
        "print(json.dumps([time.perf_counter() - begin, 'torch' in sys.modules]))"
    )
    took, with_torch = _subprocesses(code, 2 if quick else 7, within=True)
    return result(
        import_time.__doc__, round(took, 4), None, ok=took < 0.2 and not with_torch, must="< 0.2 s, no torch",
        imports_torch=with_torch,
    )  # fmt: skip


def help_time(quick: bool) -> dict[str, Any]:
    """Seconds for ``polytask --help`` as a whole process; null while there is no command line."""
    must = "< 0.5 s, no torch"
    if importlib.util.find_spec("polytask.cli") is None:
        return result(help_time.__doc__, None, None, must=must, imports_torch=None)
    code = (
        "import json, sys\n"
        "from polytask.cli import main\n"
        "sys.argv = ['polytask', '--help']\n"
        "try:\n    main()\n"
        "finally:\n    print(json.dumps([None, 'torch' in sys.modules]))\n"
    )
    took, with_torch = _subprocesses(code, 2 if quick else 7, within=False)
    return result(
        help_time.__doc__, round(took, 4), None, ok=took < 0.5 and not with_torch, must=must, imports_torch=with_torch
    )


def _subprocesses(code: str, repeats: int, within: bool) -> tuple[float, bool]:
    """Median seconds, said by the process (``within``) or of the whole process, and whether torch was imported."""
    times, with_torch = [], False
    for _ in range(repeats):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        whole = time.perf_counter() - begin
        inner, loaded = json.loads(done.stdout.splitlines()[-1])
        times.append(inner if within else whole)
        with_torch |= loaded
    return statistics.median(times), with_torch


def memory(quick: bool) -> dict[str, Any]:
    """Peak memory of loading and attaching 8 adapters over the size of their files."""
    if not Path("/proc/self/clear_refs").exists():
        return result(memory.__doc__, None, 1.2, reason="the peak can be reset on Linux only")
    base = decoder()
    with tempfile.TemporaryDirectory() as folder:
        size = 0
        for name, adapter in adapters(base, 8).items():
            path = adapter.save(Path(folder) / name)
            size += (path / "adapter_model.safetensors").stat().st_size
        ours = _peak(folder, "ours")
        theirs = _peak(folder, "peft") if PEFT else {}
    ratios = {name: round(value / size, 2) for name, value in ours.items()}
    peer = {PEFT: {name: round(value / size, 2) for name, value in theirs.items()}} if PEFT else {}
    return result(memory.__doc__, ratios["attach"], 1.2, peer, ratios=ratios, megabytes=round(size / 1e6, 1))


def _peak(folder: str, library: str) -> dict[str, int]:
    code = f"from benchmarks.core import _peak_within; _peak_within({folder!r}, {library!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def _peak_within(folder: str, library: str) -> None:
    """In a process of its own: prints how far the resident memory rose above that of the base after one forward."""
    base = decoder()
    ids, names = tokens(8, 8), [f"a{i}" for i in range(8)]
    if library == "peft":
        import peft  # noqa: F401  its own size is not the adapters'
    else:
        Adapter.load(Path(folder) / "a0")  # so that what is imported when it is needed is there
    base(ids)
    start = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    if library == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, f"{folder}/a0", adapter_name="a0")
        for name in names[1:]:
            model.load_adapter(f"{folder}/{name}", name)
        found = {"attach": _resident("VmHWM") - start}
        model.eval()(ids, adapter_names=names)
    else:
        model = Model(base)
        for name in names:
            model.attach(Adapter.load(Path(folder) / name), name)
        found = {"attach": _resident("VmHWM") - start}
        model.use(names[0])
        base(ids)
        found["forward_single"] = _resident("VmHWM") - start
        model.use(names)
        base(ids)
    found["forward_rows"] = _resident("VmHWM") - start
    print(json.dumps(found))


def _resident(key: str) -> int:
    """Bytes of the process's resident memory, now (``VmRSS``) or at its peak (``VmHWM``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


BENCHMARKS = (
    forward_single, forward_rows, decode_rows, train_step, attach_many, load_adapter, import_time, help_time, memory,
)  # fmt: skip
