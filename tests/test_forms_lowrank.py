"""What the low-rank forms promise beyond the contract of every form, and their files against the PEFT library itself."""

from __future__ import annotations

import copy
import functools
import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import output
from zoo import tiny as make

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError
from polytask.core.files import CARD, CONFIG, WEIGHTS
from polytask.core.form import Call
from polytask.forms.dora import _Scaled
from polytask.forms.lokr import split

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        "fan_in_fan_out is set to", "Specified to not", "Unable to fetch", "Could not find a config", "LoRA adapter added",
    )
]  # fmt: skip


@functools.cache
def _made(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return make(family)


def tiny(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of the caller's own; ``conv1d`` is a stack of one-dimensional convolutions."""
    if family == "conv1d":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 12, 1), nn.Conv1d(12, 8, 2, stride=2))
            return net, {"input": torch.randn(3, 6, 10)}
    net, batch = _made(family)
    return copy.deepcopy(net), batch


@torch.no_grad()
def run(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = net.eval()(**batch)
    return out if isinstance(out, Tensor) else output(out)


def applied(family: str, adapter: pt.Adapter, merged: bool = False) -> Tensor:
    """What polytask computes with an adapter."""
    net, batch = tiny(family)
    model = pt.Model(net)
    if merged:
        return run(adapter.merge_into(model).module, batch)
    model.attach(adapter, "a")
    with model.using("a"):
        return run(net, batch)


def new(family: str, form: Any, sites: str, seed: int = 3, moved: float = 0.1) -> pt.Adapter:
    """An adapter away from its start."""
    adapter = pt.Adapter.new(pt.Model(tiny(family)[0], name=f"tiny/{family}"), form, sites, seed=seed, name="a")
    return move(adapter, moved)


def move(adapter: pt.Adapter, by: float, seed: int = 5) -> pt.Adapter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in adapter.parts.values():
            for name, parameter in part.named_parameters():
                if name not in part.frozen:
                    parameter += by * torch.randn(parameter.shape, generator=generator)
    return adapter


def attached(module: nn.Module, form: Any, seed: int = 3, moved: float = 0.3) -> tuple[pt.Model, Any]:
    """A model around one layer with a moved adapter that acts, and the patch that is bound to it."""
    model = pt.Model(module)
    adapter = move(pt.Adapter.new(model, form, "kind:linear | kind:conv", seed=seed), moved)
    model.attach(adapter, "a")
    model.use("a")
    return model, model._hub.slots[next(iter(adapter.patches))].patches["a"]


class One(nn.Module):
    """A single layer, as a network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear(i: int, o: int, bias: bool = True, seed: int = 0) -> One:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return One(nn.Linear(i, o, bias=bias))


# --- PEFT reads ours

OURS: dict[str, tuple[str, Any, str]] = {
    "dora-bert": ("bert", pt.DoRA(rank=4, alpha=6), "linear"),
    "dora-llama-rs": ("llama", pt.DoRA(rank=4, scaling="rank-stabilised", init="random"), "linear"),
    "dora-gpt2": ("gpt2", pt.DoRA(rank=3), "linear"),
    "dora-resnet": ("resnet", pt.DoRA(rank=4), "conv"),
    "dora-conv1d": ("conv1d", pt.DoRA(rank=2), "kind:conv"),
    "lora-fa-bert": ("bert", pt.LoRAFA(rank=4), "query | value"),
    "vera-llama": ("llama", pt.VeRA(rank=7), "linear"),
    "vera-gpt2-drawn": ("gpt2", pt.VeRA(rank=5, save_projection=False, projection_prng_key=11), "linear"),
    "loha-bert": ("bert", pt.LoHa(rank=3, alpha=5), "linear"),
    "loha-resnet": ("resnet", pt.LoHa(rank=3), "conv"),
    "loha-resnet-cores": ("resnet", pt.LoHa(rank=3, effective=True), "conv"),
    "loha-conv1d-cores": ("conv1d", pt.LoHa(rank=3, effective=True), "kind:conv"),
    "lokr-bert": ("bert", pt.LoKr(rank=2, alpha=5), "linear"),
    "lokr-llama-both": ("llama", pt.LoKr(rank=2, factor=8, both=True), "linear"),
    "lokr-resnet": ("resnet", pt.LoKr(rank=1), "conv"),
    "lokr-resnet-whole": ("resnet", pt.LoKr(rank=8), "conv"),
    "lokr-resnet-cores": ("resnet", pt.LoKr(rank=1, effective=True), "conv"),
    "lokr-conv1d": ("conv1d", pt.LoKr(rank=1), "kind:conv"),
    "fourier-llama": ("llama", pt.Fourier(entries=600), "linear"),
    "fourier-gpt2": ("gpt2", pt.Fourier(entries=50, seed=3), "linear"),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_reads_ours_and_we_read_it_without_our_card(case: str, tmp_path: Path) -> None:
    family, form, sites = OURS[case]
    adapter = new(family, form, sites)
    adapter.save(tmp_path)
    net, batch = tiny(family)
    base, ours = run(net, batch), applied(family, adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(net, str(tmp_path))
    assert not torch.allclose(ours, base, atol=1e-3)
    torch.testing.assert_close(run(wrapped, batch), ours, **CLOSE)
    torch.testing.assert_close(applied(family, adapter, merged=True), ours, **CLOSE)
    (tmp_path / CARD).unlink()
    bare = pt.Adapter.load(tmp_path)
    torch.testing.assert_close(applied(family, bare), ours, **CLOSE)
    torch.testing.assert_close(applied(family, bare, merged=True), ours, **CLOSE)


# --- we read PEFT's

THEIRS: dict[str, tuple[str, Any]] = {
    "dora": ("bert", peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["query", "dense"])),
    "dora-pattern": (
        "llama",
        peft.LoraConfig(
            use_dora=True, use_rslora=True, rank_pattern={"q_proj": 3}, target_modules=["q_proj", "down_proj"]
        ),
    ),
    "dora-conv1d": ("gpt2", peft.LoraConfig(use_dora=True, target_modules=["c_attn", "c_proj"])),
    "dora-conv": ("resnet", peft.LoraConfig(r=4, use_dora=True, target_modules=["convolution"])),
    "vera": ("llama", peft.VeraConfig(r=6, target_modules=["q_proj", "up_proj", "down_proj"])),
    "vera-conv1d": ("gpt2", peft.VeraConfig(r=6, target_modules=["c_attn", "c_proj"], projection_prng_key=4)),
    "vera-drawn": (
        "llama",
        peft.VeraConfig(r=6, target_modules="all-linear", save_projection=False, projection_prng_key=9),
    ),
    "loha": ("bert", peft.LoHaConfig(r=3, alpha=5, target_modules=["query", "dense"], alpha_pattern={"query": 2})),
    "loha-conv": ("resnet", peft.LoHaConfig(r=3, target_modules=["convolution"])),
    "loha-cores": ("resnet", peft.LoHaConfig(r=3, target_modules=["convolution"], use_effective_conv2d=True)),
    "loha-1d": ("conv1d", peft.LoHaConfig(r=3, target_modules=["0", "1", "2"], use_effective_conv2d=True)),
    "lokr": ("bert", peft.LoKrConfig(r=2, alpha=5, target_modules=["query", "dense"], rank_pattern={"query": 3})),
    "lokr-both": ("llama", peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, target_modules="all-linear")),
    "lokr-conv": ("resnet", peft.LoKrConfig(r=1, target_modules=["convolution"])),
    "lokr-cores": ("resnet", peft.LoKrConfig(r=1, target_modules=["convolution"], use_effective_conv2d=True)),
    "lokr-1d": ("conv1d", peft.LoKrConfig(r=1, target_modules=["0", "2"])),
    "fourier": (
        "bert",
        peft.FourierFTConfig(n_frequency=300, scaling=90.0, target_modules=["query", "dense"], random_loc_seed=5),
    ),
    "fourier-conv1d": (
        "gpt2",
        peft.FourierFTConfig(n_frequency=100, target_modules=["c_attn"], n_frequency_pattern={"1.attn.c_attn": 50}),
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_pefts_and_write_it_again(case: str, tmp_path: Path) -> None:
    family, config = THEIRS[case]
    net, batch = tiny(family)
    base = run(net, batch)
    wrapped = peft.get_peft_model(net, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.add_(noise) if "magnitude" in name else parameter.copy_(noise)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    theirs = run(wrapped, batch)
    assert not torch.allclose(theirs, base, atol=1e-3)

    adapter = pt.Adapter.load(tmp_path / "theirs")
    assert adapter.form.name == case.split("-")[0]
    torch.testing.assert_close(applied(family, adapter), theirs, **CLOSE)
    torch.testing.assert_close(applied(family, adapter, merged=True), theirs, **CLOSE)

    adapter.save(tmp_path / "ours")
    assert pt.Adapter.load(tmp_path / "ours").hash == adapter.hash
    assert set(load_file(tmp_path / "ours" / WEIGHTS)) == set(load_file(tmp_path / "theirs" / WEIGHTS))
    again = peft.PeftModel.from_pretrained(tiny(family)[0], str(tmp_path / "ours"))
    torch.testing.assert_close(run(again, batch), theirs, **CLOSE)


@pytest.mark.parametrize(
    ("family", "form", "sites"),
    [
        ("gpt2", pt.LoHa(rank=2), "query | qkv"),
        ("gpt2", pt.LoKr(rank=2), "qkv"),
        ("conv1d", pt.LoKr(rank=8), "kind:conv"),
    ],
    ids=["loha-conv1d", "lokr-conv1d", "lokr-1d-whole"],
)
def test_what_peft_would_not_apply_alike_is_of_our_own_type(family: str, form: Any, sites: str, tmp_path: Path) -> None:
    adapter = new(family, form, sites)
    adapter.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == f"POLYTASK_{form.name.upper()}"
    again = pt.Adapter.load(tmp_path)
    assert again.hash == adapter.hash
    assert torch.equal(applied(family, again), applied(family, adapter))
    torch.testing.assert_close(applied(family, adapter, merged=True), applied(family, adapter), **CLOSE)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("llama", peft.LoraConfig(use_dora=True, target_modules=["embed_tokens"]), "DoRA at the embedding"),
        ("bert", peft.VeraConfig(target_modules=["query"], bias="all"), "trained biases.*'vera'"),
        ("conv1d", peft.LoKrConfig(r=8, target_modules=["0"]), "lays out the Kronecker product"),
    ],
    ids=["embedding", "bias", "lokr-1d"],
)
def test_what_is_not_read_is_refused_by_name(family: str, config: Any, words: str, tmp_path: Path) -> None:
    peft.get_peft_model(tiny(family)[0], copy.deepcopy(config)).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=words):
        pt.Adapter.load(tmp_path)


# --- DoRA


def randn(*shape: Any, requires_grad: bool = False) -> Tensor:
    """The same values each time."""
    shape = shape[0] if isinstance(shape[0], tuple) else shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(11)).requires_grad_(requires_grad)


SIZES = st.integers(1, 9)
QUICK = settings(max_examples=25, deadline=None)


def dense(patch: Any) -> Tensor:
    """The base's weight plus the change, as [d_out, the rest]."""
    weight = patch.base._parameters["weight"]
    total = weight + patch.delta()
    return (total.t() if patch.site.transposed else total.flatten(1)).detach()


def filled(patch: Any, **values: Any) -> Any:
    with torch.no_grad():
        for name, value in values.items():
            patch._parameters[name].copy_(torch.as_tensor(value, dtype=torch.float32))
    return patch


def test_dora_by_hand() -> None:
    net = linear(2, 1)
    with torch.no_grad():
        net.layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    model, patch = attached(net, pt.DoRA(rank=1, alpha=1), moved=0.0)
    assert patch.m.item() == 5.0
    filled(patch, A=[[0.0, 1.0]], B=[[1.0]])
    torch.testing.assert_close(dense(patch), torch.tensor([[3.0, 5.0]]) * 5 / 34**0.5)
    x = torch.tensor([[0.5, -2.0]])
    torch.testing.assert_close(net(x), F.linear(x, dense(patch), net.layer.bias))
    torch.testing.assert_close(net(torch.zeros(1, 2)), net.layer.bias[None])  # the bias is never scaled


@QUICK
@given(i=SIZES, o=SIZES, rank=st.integers(1, 4), kind=st.sampled_from(["linear", "transposed", "conv", "groups"]))
def test_dora_gives_each_row_the_length_m(i: int, o: int, rank: int, kind: str) -> None:
    torch.manual_seed(i * 10 + o)
    layer: nn.Module = nn.Linear(i, o)
    if kind == "transposed":
        layer = transformers.pytorch_utils.Conv1D(o, i)
        nn.init.normal_(layer.weight)
    if kind in ("conv", "groups"):
        groups = 2 if kind == "groups" else 1
        layer = nn.Conv2d(i * groups, o * groups, (3, 2), groups=groups)
    model, patch = attached(One(layer), pt.DoRA(rank=rank))
    rows = dense(patch)
    torch.testing.assert_close(rows.norm(dim=1), patch.m.detach().view(-1).abs(), **CLOSE)
    shape = {"conv": (2, i, 4, 5), "groups": (2, 2 * i, 4, 5)}.get(kind, (3, i))
    x = randn(shape)
    out = model.module(x)
    weight = rows.t() if kind == "transposed" else rows.view(patch.base._parameters["weight"].shape)
    plain = copy.deepcopy(layer)
    plain.__class__ = type(plain)._polytask_class
    with torch.no_grad():
        plain._parameters["weight"].copy_(weight)
    torch.testing.assert_close(out, plain(x), **CLOSE)


def test_dora_takes_the_norm_for_a_constant() -> None:
    """The gradients are those of the formula with a detached norm, with and without the fused path."""
    net = linear(5, 4)
    model, patch = attached(net, pt.DoRA(rank=2))
    x, target = randn(6, 5, requires_grad=True), randn(6, 4)
    weight, bias, s = net.layer._parameters["weight"], net.layer._parameters["bias"], patch.form.scale
    names = ("A", "B", "m")

    def expected() -> Tensor:
        total = weight + s * patch.B @ patch.A
        return F.linear(x, (patch.m / total.norm(dim=1).detach())[:, None] * total, bias)

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(((out - target) ** 2).sum(), [x, bias, *(patch._parameters[n] for n in names)]))

    def loose() -> Tensor:
        y = F.linear(x, weight, bias)
        return y + patch.contribute(x, y)

    want = gradients(expected())
    for got in (gradients(net(x)), gradients(loose())):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def test_dora_survives_a_row_of_zeros_and_sees_a_changed_weight() -> None:
    net = linear(4, 3)
    with torch.no_grad():
        net.layer.weight[1] = 0.0
    model, patch = attached(net, pt.DoRA(rank=2), moved=0.0)
    x = randn(2, 4)
    out = net(x)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in patch.parameters())
    assert torch.equal(out, F.linear(x, net.layer.weight, net.layer.bias))
    with torch.no_grad():
        net.layer._parameters["weight"].mul_(2.0)
    torch.testing.assert_close(dense(patch).norm(dim=1), patch.m.detach())  # not twice as long


def test_dora_in_a_narrow_type_keeps_what_m_has_learned() -> None:
    net = linear(64, 3)
    x = randn(5, 64)
    model, patch = attached(net, pt.DoRA(rank=2), moved=0.0)
    with torch.no_grad():
        patch.m.mul_(1 + 2**-10)  # which is 1 in bfloat16
        exact = net(x) - F.linear(x, net.layer._parameters["weight"], net.layer._parameters["bias"])
        net.to(torch.bfloat16)
        y = F.linear(x.bfloat16(), net.layer._parameters["weight"], net.layer._parameters["bias"])
        change = patch.contribute(x.bfloat16(), y)
    assert change.dtype == torch.bfloat16 and exact.abs().min() > 0
    torch.testing.assert_close(change.float(), exact, atol=1e-4, rtol=0.2)


@pytest.mark.parametrize("form", [pt.DoRA, pt.LoRAFA])
def test_starts_that_only_lora_has(form: Any) -> None:
    with pytest.raises(ConfigError, match="init must be one of zero-B, gaussian, random, got 'pissa'"):
        form(init="pissa")


# --- LoRA-FA


def test_lora_fa_is_lora_whose_random_factor_stays(tmp_path: Path) -> None:
    fa, plain = new("llama", pt.LoRAFA(rank=3), "linear | embed_tokens", moved=0.0), None
    sites = {name: ({"B"} if patch.site.kind == "embedding" else {"A"}) for name, patch in fa.patches.items()}
    assert {name: set(patch.frozen) for name, patch in fa.patches.items()} == sites
    assert all(
        p.requires_grad != (n in patch.frozen) for patch in fa.patches.values() for n, p in patch.named_parameters()
    )
    move(fa, 0.2)
    plain = new("llama", pt.LoRA(rank=3), "linear | embed_tokens", moved=0.0)
    plain.load_state(fa.state())
    assert torch.equal(applied("llama", fa), applied("llama", plain))
    fa.save(tmp_path)
    assert pt.Adapter.load(tmp_path).form == fa.form
    (tmp_path / CARD).unlink()
    assert pt.Adapter.load(tmp_path).form.name == "lora"


# --- VeRA


def test_vera_by_hand() -> None:
    net = linear(2, 2)
    model, patch = attached(net, pt.VeRA(rank=1), moved=0.0)
    x = torch.ones(1, 2)
    base = net(x)
    filled(patch.shared, A=[[1.0, 2.0]], B=[[1.0], [1.0]])
    filled(patch, l_d=[0.5], l_b=[2.0, 0.0])
    torch.testing.assert_close(net(x) - base, torch.tensor([[3.0, 0.0]]))
    with torch.no_grad():
        torch.testing.assert_close(net(x) - base, torch.tensor([[3.0, 0.0]]))


def test_vera_shares_one_pair_that_no_seed_changes() -> None:
    model = pt.Model(tiny("llama")[0])
    one, two = (pt.Adapter.new(model, pt.VeRA(rank=4), seed=seed) for seed in (1, 2))
    assert len({id(patch.shared.A) for patch in one.patches.values()}) == 1
    assert torch.equal(one.shared.A, two.shared.A) and torch.equal(one.shared.B, two.shared.B)
    other = pt.Adapter.new(model, pt.VeRA(rank=4, projection_prng_key=1))
    assert not torch.equal(one.shared.A, other.shared.A)
    sizes = [patch.site for patch in one.patches.values()]
    assert one.shared.A.shape == (4, max(s.d_in for s in sizes))
    assert one.size == sum(s.d_out + 4 for s in sizes)


def test_vera_starts_with_a_gradient_on_l_b_only() -> None:
    net = linear(3, 4)
    model, patch = attached(net, pt.VeRA(rank=2), moved=0.0)
    net(randn(5, 3)).square().sum().backward()
    assert patch.shared.A.grad is None and patch.shared.B.grad is None
    assert not patch.l_d.grad.any() and patch.l_b.grad.any()


def test_vera_without_projections_is_a_small_file(tmp_path: Path) -> None:
    for name, flag in (("with", True), ("without", False)):
        adapter = new("bert", pt.VeRA(rank=64, save_projection=flag), "linear")
        adapter.save(tmp_path / name)
        again = pt.Adapter.load(tmp_path / name)
        assert torch.equal(applied("bert", again), applied("bert", adapter))
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("with", "without")]
    assert sizes[0] - sizes[1] >= 4 * 64 * (64 + 64)
    assert not {"base_model.vera_A", "base_model.vera_B"} & set(load_file(tmp_path / "without" / WEIGHTS))


# --- LoHa, LoKr


def test_loha_by_hand_and_its_rank() -> None:
    _, patch = attached(linear(2, 2), pt.LoHa(rank=1))
    filled(patch, w1a=[[1.0], [2.0]], w1b=[[1.0, 1.0]], w2a=[[3.0], [1.0]], w2b=[[1.0, -1.0]])
    torch.testing.assert_close(patch.delta().detach(), torch.tensor([[3.0, -3.0], [2.0, -2.0]]))
    _, wide = attached(linear(12, 10), pt.LoHa(rank=2))
    assert torch.linalg.matrix_rank(wide.delta()) == 4


def test_lokr_by_hand_and_its_rank() -> None:
    _, patch = attached(linear(2, 2), pt.LoKr(rank=1))
    _, tall = attached(linear(2, 2), pt.LoKr(rank=4, factor=1))
    filled(tall, w1=[[2.0]], w2=[[1.0, 2.0], [3.0, 6.0]])
    torch.testing.assert_close(tall.delta().detach(), torch.tensor([[2.0, 4.0], [6.0, 12.0]]))
    _, wide = attached(linear(12, 20), pt.LoKr(rank=1, alpha=1))
    w1, w2 = wide._factors()
    assert torch.linalg.matrix_rank(wide.delta()) == torch.linalg.matrix_rank(w1) * torch.linalg.matrix_rank(w2)
    torch.testing.assert_close(wide.delta(), torch.kron(w1, w2))
    assert patch.delta().shape == (2, 2)


@QUICK
@given(size=st.integers(1, 2000), factor=st.sampled_from([-1, 1, 2, 3, 7, 8, 50]))
def test_lokr_splits_as_peft(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert split(size, factor) == factorization(size, factor)


@QUICK
@given(
    i=st.sampled_from([4, 6, 9, 16, 30]), o=st.sampled_from([4, 10, 16, 27]), rank=st.integers(1, 5), both=st.booleans()
)
def test_lokr_is_applied_without_the_dense_change(i: int, o: int, rank: int, both: bool) -> None:
    net = linear(i, o)
    x = randn(2, 3, i)
    model, patch = attached(net, pt.LoKr(rank=rank, both=both))
    plain = F.linear(x, net.layer._parameters["weight"], net.layer._parameters["bias"])
    torch.testing.assert_close(net(x), plain + F.linear(x, patch.delta()), **CLOSE)


# --- FourierFT


def test_fourier_by_hand() -> None:
    form = pt.Fourier(entries=4)
    _, patch = attached(linear(2, 2), form)
    places = torch.randperm(4, generator=torch.Generator().manual_seed(777)).tolist()
    filled(patch, spectrum=[float(place == 0) for place in places])
    torch.testing.assert_close(patch.delta().detach(), torch.full((2, 2), 37.5))


@QUICK
@given(i=SIZES, o=SIZES, part=st.floats(0.1, 1.0), seed=st.integers(0, 5))
def test_fourier_is_the_real_part_of_the_inverse_transform(i: int, o: int, part: float, seed: int) -> None:
    n = max(1, int(part * i * o))
    _, patch = attached(linear(i, o), pt.Fourier(entries=n, seed=seed, scaling=3.0))
    places = torch.randperm(i * o, generator=torch.Generator().manual_seed(seed))[:n]
    spectrum = torch.zeros(i * o)
    spectrum[places] = patch.spectrum.detach()
    torch.testing.assert_close(patch.delta().detach(), torch.fft.ifft2(spectrum.view(o, i)).real * 3.0, **CLOSE)


def test_fourier_can_start_as_in_the_paper() -> None:
    adapter = pt.Adapter.new(pt.Model(tiny("llama")[0]), pt.Fourier(init="normal"), "query | key")
    counts = {patch.site.shape: len(patch.spectrum) for patch in adapter.patches.values()}
    assert counts == {(32, 32): 1000, (16, 32): 512}  # all there are, where there are fewer
    assert all(0.8 < float(patch.spectrum.detach().std()) < 1.2 for patch in adapter.patches.values())


# --- SMoRA


def test_smora_with_all_ranks_and_equal_gates_is_lora() -> None:
    net = linear(6, 5)
    x = randn(4, 3, 6)
    model, patch = attached(net, pt.SMoRA(rank=4, k=4, alpha=8.0))
    filled(patch, R=torch.zeros(4, 6), beta=torch.zeros(4))
    assert torch.equal(patch.gates(x), torch.ones(4, 3, 4))
    plain = F.linear(x, net.layer._parameters["weight"], net.layer._parameters["bias"])
    expected = plain + F.linear(F.linear(x, patch.A), patch.B * 2.0)
    assert torch.equal(net(x), expected)


def test_smora_gates_by_hand() -> None:
    _, patch = attached(linear(1, 2), pt.SMoRA(rank=3, k=2))
    values = torch.tensor([0.9, 0.6, 0.1])
    filled(patch, R=torch.logit(values)[:, None], beta=torch.zeros(3))
    torch.testing.assert_close(patch.gates(torch.ones(1, 1)), torch.tensor([[1.2, 0.8, 0.0]]))
    filled(patch, beta=[0.0, 0.0, 5.0])  # which enters the choice and the gate
    torch.testing.assert_close(patch.gates(torch.ones(1, 1)), torch.tensor([[0.3, 0.0, 1.7]]))


@QUICK
@given(blocks=st.integers(2, 5), size=st.integers(1, 3), data=st.data())
def test_smora_gates_sum_to_k(blocks: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, blocks)) * size
    form = pt.SMoRA(rank=blocks * size, k=k, block=size)
    net = linear(4, 3)
    model, patch = attached(net, form)
    filled(patch, beta=patch.beta / 10)
    net.eval()  # while it trains, each call moves beta
    x = randn(7, 4)
    g = patch.gates(x).repeat_interleave(size, -1)
    torch.testing.assert_close(g.sum(-1), torch.full((7,), float(k)))
    assert ((g != 0).sum(-1) == k).all()
    change = patch.contribute(x, net(x))
    # a sum of LoRAs of rank `size`, each with its gate
    parts = [
        F.linear(F.linear(x, patch.A[b : b + size]), patch.B[:, b : b + size]) * g[:, b : b + 1]
        for b in range(0, form.rank, size)
    ]
    torch.testing.assert_close(change, torch.stack(parts).sum(0) * form.alpha / k, **CLOSE)


def test_smora_balances_once_per_step_and_only_while_it_trains() -> None:
    net = linear(4, 3)
    model, patch = attached(net, pt.SMoRA(rank=4, k=2, balance=0.25), moved=0.0)
    filled(patch, R=torch.tensor([3.0, 2.0, -2.0, -3.0])[:, None].expand(4, 4))
    x = torch.ones(5, 4)
    net.eval()
    patch.contribute(x, net(x))
    assert not patch.beta.any()
    net.train()
    for _ in range(2):  # the second is what a checkpointed backward would do
        patch.contribute(x, torch.zeros(5, 3), Call(step=1))
    assert patch.beta.tolist() == [-0.25, -0.25, 0.25, 0.25]
    patch.contribute(x, torch.zeros(5, 3), Call(step=2))
    assert patch.beta.tolist() == [-0.5, -0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "wrong", [{"k": 1}, {"k": 9, "rank": 8}, {"rank": 8, "block": 3}, {"rank": 8, "k": 4, "block": 4}]
)
def test_smora_refuses_what_no_router_learns_from(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="SMoRA: "):
        pt.SMoRA(**wrong)


# --- MTL-LoRA and MTLoRA

TASKS = ("mood", "topic", "spam")


def tasked(form: Any, moved: float = 0.3) -> tuple[One, Any]:
    net = linear(5, 4)
    _, patch = attached(net, form, moved=moved)
    return net, patch


def rows(patch: Any, x: Tensor, tasks: tuple[str, ...] | None) -> Tensor:
    return patch.contribute(x, x.new_zeros(*x.shape[:-1], 4), Call(tasks=tasks, rows=len(x)))


FORMS = [pt.MTLLoRA(tasks=TASKS, rank=3), pt.MTLoRA(tasks=TASKS, rank=3, task_rank=2, where="all")]
BOTH = pytest.mark.parametrize("form", FORMS, ids=["mtl-lora", "mtlora"])


@BOTH
def test_each_row_gets_the_parts_of_its_task(form: Any) -> None:
    _, patch = tasked(form)
    x = randn(5, 3, 5)
    tasks = ("topic", "mood", "topic", "unknown", "spam")
    got = rows(patch, x, tasks)
    for i, task in enumerate(tasks):
        change = patch.delta() if task == "unknown" else patch.delta_of(task)
        torch.testing.assert_close(got[i], F.linear(x[i], change), **CLOSE)
        torch.testing.assert_close(rows(patch, x[i : i + 1], (task,))[0], got[i], **CLOSE)
    torch.testing.assert_close(rows(patch, x, None), F.linear(x, patch.delta()), **CLOSE)
    # two windows of each row, next to each other
    windows = patch.contribute(x.repeat_interleave(2, 0), x.new_zeros(10, 3, 4), Call(tasks=tasks, rows=5))
    torch.testing.assert_close(windows[::2], got)
    with pytest.raises(AdapterError, match="has no task 'weather'"):
        patch.delta_of("weather")


@BOTH
def test_the_parts_of_other_tasks_are_neither_read_nor_moved(form: Any) -> None:
    _, patch = tasked(form)
    x = randn(4, 2, 5)
    tasks = ("spam", "mood", "mood", "spam")
    other = [name for name, key in patch.keys.items() if key.endswith(".topic")]
    assert other
    before = rows(patch, x, tasks)
    with torch.no_grad():
        for name in other:
            patch._parameters[name].fill_(float("nan"))
    after = rows(patch, x, tasks)
    assert torch.equal(before, after)
    after[1].sum().backward()
    of = {name: key.rpartition(".")[2] for name, key in patch.keys.items() if "." in key}
    for name, task in of.items():
        grad = patch._parameters[name].grad
        assert grad is None or not grad.any() if task != "mood" else grad.any(), name


@BOTH
def test_the_model_s_call_tells_the_tasks(form: Any, tmp_path: Path) -> None:
    adapter = new("bert", form, "linear")
    net, batch = tiny("bert")
    model = pt.Model(net)
    model.attach(adapter, "a")
    outs = {}
    for tasks in (("mood", "topic", "mood"), "mood", "topic"):
        with model.using("a", tasks=tasks):
            outs[tasks] = run(net, batch)
    mixed = outs["mood", "topic", "mood"]
    torch.testing.assert_close(mixed[0], outs["mood"][0], **CLOSE)
    torch.testing.assert_close(mixed[1], outs["topic"][1], **CLOSE)
    assert not torch.allclose(outs["mood"], outs["topic"], atol=1e-3)
    adapter.save(tmp_path)
    assert pt.Adapter.load(tmp_path).hash == adapter.hash


def test_mtl_lora_of_one_task_is_lora_and_what_it_costs() -> None:
    net = linear(6, 5)
    x = randn(3, 6)
    _, patch = attached(net, pt.MTLLoRA(rank=4, alpha=8.0))
    filled(patch, L0=torch.eye(4))
    assert set(patch._parameters) == {"A", "B", "L0"}
    torch.testing.assert_close(patch.contribute(x, x), F.linear(F.linear(x, patch.A), patch.B[0]) * 2.0)
    _, many = attached(linear(6, 5), pt.MTLLoRA(tasks=TASKS, rank=4, ups=2))
    assert sum(p.numel() for p in many.parameters()) == 4 * 6 + 2 * 5 * 4 + 3 * (4 * 4 + 2)


def test_mtlora_has_the_tasks_parts_in_the_last_block_only() -> None:
    adapter = new("bert", pt.MTLoRA(tasks=TASKS), "linear")
    own = {name for name, patch in adapter.patches.items() if patch.tasks}
    layer = "encoder.layer.1"
    assert own == {f"{layer}.{end}" for end in ("attention.output.dense", "intermediate.dense", "output.dense")}


@pytest.mark.parametrize("form", [pt.MTLLoRA, pt.MTLoRA])
@pytest.mark.parametrize("tasks", ["mood", ("mood", "mood"), ("mood", "")])
def test_names_of_tasks_that_are_refused(form: Any, tasks: Any) -> None:
    with pytest.raises(ConfigError, match="tasks must be different names"):
        form(tasks=tasks)


# --- Hydra


def test_hydra_by_hand() -> None:
    net = linear(1, 1)
    filled(net.layer, weight=[[2.0]], bias=[1.0])
    model, patch = attached(net, pt.Hydra(rank=1, sequential_rank=1), moved=0.0)
    filled(patch, A=[[1.0]], B=[[1.0]], C=[[0.5]], D=[[1.0]])
    torch.testing.assert_close(net(torch.tensor([[3.0]])), torch.tensor([[13.5]]))
    changes = patch.deltas()
    assert float(changes["weight"]) == 2.0 and float(changes["bias"]) == 0.5


@QUICK
@given(i=SIZES, o=SIZES, p=st.integers(0, 3), q=st.integers(0, 3), bias=st.booleans())
def test_hydra_merges_into_weight_and_bias(i: int, o: int, p: int, q: int, bias: bool) -> None:
    if p == q == 0:
        with pytest.raises(ConfigError, match="leaves no branch"):
            pt.Hydra(rank=0, sequential_rank=0)
        return
    net = linear(i, o, bias)
    x = randn(4, i)
    model, patch = attached(net, pt.Hydra(rank=p, sequential_rank=q, scale=0.7))
    out = net(x).detach()
    adapter = model.adapters["a"]
    assert torch.linalg.matrix_rank(patch.delta()) <= p + q
    model.detach("a")
    merged = adapter.merge_into(model)
    torch.testing.assert_close(merged.module(x), out, **CLOSE)
    if not q:  # nothing but a LoRA
        torch.testing.assert_close(out, net(x) + F.linear(F.linear(x, patch.A), patch.B) * 0.7, **CLOSE)


# --- FLoRA


def test_flora_by_hand_and_what_it_costs() -> None:
    _, patch = attached(linear(2, 2), pt.FLoRA(rank=1, scale=2.0))
    filled(patch, G=[[3.0]], F0=[[1.0], [2.0]], F1=[[1.0], [-1.0]])
    torch.testing.assert_close(patch.delta().detach(), torch.tensor([[6.0, -6.0], [12.0, -12.0]]))
    _, conv = attached(One(nn.Conv2d(64, 64, 3)), pt.FLoRA(rank=8, kernel_rank=2))
    assert sum(p.numel() for p in conv.parameters()) == 256 + 1024 + 12


@QUICK
@given(
    dims=st.integers(1, 3), groups=st.sampled_from([1, 2]), stride=st.integers(1, 2), dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]), kernel=st.integers(1, 3), rank=st.integers(1, 5),
)  # fmt: skip
def test_flora_is_three_thin_convolutions(
    dims: int, groups: int, stride: int, dilation: int, mode: str, kernel: int, rank: int
) -> None:
    if dims == 3 and mode == "reflect":
        mode = "zeros"
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(4, 6, kernel, stride, padding=1, dilation=dilation, groups=groups, padding_mode=mode)
    x = randn(2, 4, *[6] * dims)
    model, patch = attached(One(layer), pt.FLoRA(rank=rank))
    plain = copy.deepcopy(layer)
    plain.__class__ = kind
    with torch.no_grad():
        plain.weight += patch.delta()
        torch.testing.assert_close(model.module(x), plain(x), **CLOSE)


def test_flora_starts_with_a_gradient_on_its_core_only() -> None:
    net = linear(3, 4)
    _, patch = attached(net, pt.FLoRA(rank=2), moved=0.0)
    net(randn(5, 3)).square().sum().backward()
    assert patch.G.grad.any() and not patch.F0.grad.any() and not patch.F1.grad.any()


# --- TriAdaptLoRA


def test_tri_is_b_times_both_triangles_times_a() -> None:
    net = linear(4, 5)
    _, patch = attached(net, pt.Tri(rank=3, alpha=6.0))
    core = torch.tril(patch.L) + torch.triu(patch.U)
    torch.testing.assert_close(patch.delta(), 2.0 * patch.B @ core @ patch.A)
    _, fresh = attached(linear(4, 5), pt.Tri(rank=3), moved=0.0)
    assert torch.equal(fresh.core, torch.eye(3))  # at first a LoRA
    fresh.contribute(randn(2, 4), torch.zeros(2, 5)).sum().backward()
    assert fresh.B.grad.any()


def test_tri_grows_without_a_change_of_what_it_computes(tmp_path: Path) -> None:
    adapter = new("bert", pt.Tri(rank=2), "query | value")
    before = applied("bert", adapter)
    grown = next(iter(adapter.patches))
    adapter.patches[grown].grow(3, torch.Generator().manual_seed(0))
    patch = adapter.patches[grown]
    assert patch.form.rank == 5 and patch.A.shape == (5, 32) and patch.form.scale == adapter.form.scale
    torch.testing.assert_close(applied("bert", adapter), before, **CLOSE)
    patch.contribute(randn(2, 32), torch.zeros(2, 32)).square().sum().backward()
    assert patch.B.grad[:, 2:].any()  # and the new part learns
    adapter.save(tmp_path)
    again = pt.Adapter.load(tmp_path)
    assert again.hash == adapter.hash and again.patches[grown].form == patch.form


def test_vera_projects_an_input_once_for_the_sites_that_share_it() -> None:
    module, batch = make("llama")
    model = pt.Model(module)
    adapter = pt.Adapter.new(model, pt.VeRA(rank=4))
    with torch.no_grad():
        for parameter in (p for patch in adapter.patches.values() for p in patch.parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.attach(adapter.trainable(), "a")
    merged = adapter.merge_into(model).module(**batch).logits
    shared = adapter.shared
    counted = []
    plain = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch, model.using("a"):
        patch.setattr("polytask.forms.vera.F.linear", lambda x, w, *b: counted.append(w.shape) or plain(x, w, *b))
        for context in (torch.no_grad(), torch.enable_grad()):
            counted.clear()
            with context:
                assert torch.allclose(model.module(**batch).logits, merged, atol=1e-4)
            projections = sum(shape[0] == 4 and shape[1] in (32, 64) for shape in counted)
            # queries, keys and values have one, and so have gates and what they gate
            assert projections == 2 * 4, counted
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        first = shared.project(x)
        assert shared.project(x) is first
        x += 1.0  # in place: what was kept is another tensor's
        assert torch.equal(shared.project(x), plain(x, shared.A[:, :32])) and not torch.equal(first, shared.project(x))
        shared.A += 1.0
        assert torch.equal(shared.project(x), plain(x, shared.A[:, :32]))
        shared.A -= 1.0
    del x
    gc.collect()
    assert "_last" not in shared.__dict__
    x = torch.randn(2, 3, 32, requires_grad=True)
    kept = weakref.ref(shared.project(x))  # nobody's graph needs it
    assert kept() is None
    copy.deepcopy(adapter)


@pytest.mark.parametrize("bias", [True, False])
def test_doras_fused_product_has_the_gradients_of_the_plain_one(bias):
    """Also where a row of the weight is zero, whose magnitude does nothing."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (5, 2), (4, 2), (4,), *([(4,)] if bias else [])]
    given = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    n = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=torch.float64)

    def fused(y, h, B, m, b=None):
        return _Scaled.apply(y, h, B, 0.7, m, n, b)

    def plain(y, h, B, m, b=0.0):
        return torch.where(n > 0, m / n, 1.0) * (y - b + 0.7 * h @ B.T) + b

    torch.testing.assert_close(fused(*given), plain(*given))
    assert torch.autograd.gradcheck(fused, given)
