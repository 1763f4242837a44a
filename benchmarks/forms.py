"""Every form's training step and forward over LoRA's at about equal parameters, and over PEFT's for the same form.

The base is the decoder of `core.py` with 256 features and 4 layers. Each form is taken at the setting that brings it nearest to a
LoRA of rank 8 (those without a size as they are). PEFT has the same adapter, read from the files that polytask wrote.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polytask import Adapter, Model, PolytaskError
from polytask.core.form import Form, forms

from .core import PEFT, decoder, tokens
from .measure import interleave, result, twin

# a form's settings here, where its defaults are another size than LoRA's
SETTINGS: dict[str, dict[str, Any]] = {
    "lora-fa": {"rank": 16}, "vera": {"rank": 256}, "loha": {"rank": 4}, "lokr": {"rank": 32}, "hra": {"rank": 16},
    "oft": {"block_size": 32}, "boft": {"block_size": 8, "factors": 4}, "fourier": {"frequencies": 4000},
}  # fmt: skip
# the form's training step over LoRA's that is acceptable; PEFT's own for the others that it has
LIMITS = {"dora": 1.15, "oft": 1.2, "boft": 2.0}
ROUNDS = 15


def _form(name: str) -> Form:
    kind = forms[name]
    fields = set(kind().settings())
    return kind.of({"name": name, **{k: v for k, v in SETTINGS.get(name, {}).items() if k in fields}})


def _stepping(module: nn.Module, parameters: list[nn.Parameter], ids: torch.Tensor) -> Any:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _peft(base: nn.Module, adapter: Adapter) -> nn.Module | None:
    """PEFT's model with the same adapter, or None where PEFT does not have it."""
    if not (PEFT and adapter.form.in_peft):
        return None
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder) / "a")
        try:
            return PeftModel.from_pretrained(twin(base), str(Path(folder) / "a"), is_trainable=True)
        except (
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
        ):  # prompts and prefixes are not trained on from a file there
            return None


def _measure(name: str, quick: bool) -> dict[str, Any]:
    base, ids = decoder(256, 4, 704, 2000), tokens(4, 64) % 2000
    form = _form(name)
    made = {}
    for key, one in (("lora", _form("lora")), (name, form)):
        model = Model(twin(base))
        adapter = Adapter.new(model, one, seed=1)
        model.attach(adapter.trainable(), "a")
        model.use("a")
        made[key] = (model.module, adapter)
    cases, quiet = {}, {}
    for key, (module, adapter) in made.items():
        cases[key] = _stepping(module, [p for p in adapter.parameters() if p.requires_grad], ids)
        quiet[key] = lambda module=module: module(ids)
    theirs = _peft(base, made[name][1])
    if theirs is not None:
        learnt = [p for p in theirs.parameters() if p.requires_grad]
        cases["peft"] = _stepping(theirs, learnt, ids)
        quiet["peft"] = lambda: theirs(ids)
    rounds = 2 if quick else ROUNDS
    step = interleave(cases, rounds, "lora")
    with torch.no_grad():
        forward = interleave(quiet, rounds, "lora")
    limit = LIMITS.get(name)
    peer, ok = {}, None if limit is None else step[name]["ratio"] <= limit
    if theirs is not None:
        peer = {PEFT: step["peft"]["ratio"]}
        ok = (ok is not False) and step[name]["ratio"] <= step["peft"]["ratio"]
    must = " and ".join([*([f"<= {limit}"] if limit else []), *(["<= peft's"] if theirs is not None else [])])
    return result(
        f"training step of {name} over LoRA's", step[name]["ratio"], limit, peer, ok=ok, must=must,
        cpu=step[name]["cpu"], peft_cpu=step["peft"]["cpu"] if theirs is not None else None,
        forward=forward[name]["ratio"], forward_peft=forward["peft"]["ratio"] if theirs is not None else None,
        parameters=made[name][1].size, lora_parameters=made["lora"][1].size, settings=form.settings(),
    )  # fmt: skip


def _benchmark(name: str) -> Any:
    def benchmark(quick: bool = False) -> dict[str, Any]:
        try:
            return _measure(name, quick)
        except PolytaskError as error:  # it acts at no site of a decoder
            return result(f"{name}: {error}", None, None)

    benchmark.__name__ = name
    benchmark.__doc__ = f"The training step and the forward of {name}."
    return benchmark


BENCHMARKS = tuple(_benchmark(name) for name in forms if name not in ("lora", "head-only"))  # which has no step
