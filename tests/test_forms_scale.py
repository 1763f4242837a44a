"""Forms that rotate, scale or shift, adapters between the layers, and forms made of forms: what each promises."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import AdapterError
from polytask.core.form import Form
from polytask.core.site import Site

QUIET = (
    "Failed to load the CUDA extension",
    "Setting boft_n_butterfly_factor to 1",
    "fan_in_fan_out is set to False",
    "Invalid `oft_block_size`",
    "Unsupported layer type",
    "Could not find a config file",
    "Unable to fetch remote file",
    "The symmetric initialization can NOT",
    "`is_gradient_checkpointing`",
    "`gradient_checkpointing_enable`",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{start}") for start in QUIET]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@torch.no_grad()
def run(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return output(net.eval()(**batch))


@torch.no_grad()
def move(parameters: Any, seed: int = 0, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter += size * torch.randn(parameter.shape, generator=generator)


def new(family: str, form: Any, sites: str | None = None, size: float = 0.1) -> tuple[pt.Model, dict, pt.Adapter]:
    """A tiny model, a batch and an adapter that was moved away from its start."""
    net, batch = tiny(family)
    model = pt.Model(net, name=f"tiny/{family}")
    adapter = pt.Adapter.new(model, form, sites, seed=3, name="a")
    move((p for p in adapter.parameters() if p.requires_grad), size=size)
    return model, batch, adapter


@torch.no_grad()
def applied(model: pt.Model, batch: dict[str, Tensor], adapter: pt.Adapter, mix: Any = "a") -> Tensor:
    model.attach(adapter, "a")
    with model.using(mix):
        out = output(model.module(**batch))
    model.detach("a")
    return out


# --- PEFT, both ways

OURS = {
    "ia3": ("bert", {"name": "ia3"}, None),
    "ia3-t5": ("t5", {"name": "ia3"}, None),
    "ia3-gpt2": ("gpt2", {"name": "ia3"}, None),
    "ia3-conv": ("resnet", {"name": "ia3"}, "conv"),
    "ia3-outputs": ("llama", {"name": "ia3", "side": "output"}, "key | up"),
    "oft": ("bert", {"name": "oft", "block_size": 8}, "linear"),
    "oft-neumann": ("llama", {"name": "oft", "block_size": 8, "cayley": "neumann"}, "linear"),
    "oft-shared": ("llama", {"name": "oft", "block_size": 16, "share": True}, "query | down"),
    "oft-blocks": ("vit", {"name": "oft", "blocks": 4}, "linear"),
    "oft-uneven": ("bert", {"name": "oft", "block_size": 11}, "query"),
    "boft": ("bert", {"name": "boft", "block_size": 4, "factors": 1, "scale": True}, "linear"),
    "boft-unscaled": ("llama", {"name": "boft", "block_size": 8, "factors": 1}, "query | down"),
    "hra": ("bert", {"name": "hra", "rank": 4}, "linear"),
    "hra-odd": ("llama", {"name": "hra", "rank": 3}, "query | down"),
    "hra-orthonormal": ("llama", {"name": "hra", "rank": 4, "orthonormal": True}, "query | down"),
    "norm": ("bert", {"name": "norm"}, None),
    "norm-rms": ("llama", {"name": "norm"}, None),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_reads_ours(case: str, tmp_path: Path) -> None:
    family, form, sites = OURS[case]
    model, batch, adapter = new(family, form, sites)
    base, ours = run(model.module, batch), applied(model, batch, adapter)
    adapter.save(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(tiny(family)[0], str(tmp_path))
    assert not torch.allclose(ours, base, atol=1e-3)
    torch.testing.assert_close(run(wrapped, batch), ours, **CLOSE)
    (tmp_path / "polytask.json").unlink()  # and without our card it is read as PEFT's
    again = pt.Adapter.load(tmp_path)
    torch.testing.assert_close(applied(model, batch, again), ours, **CLOSE)


THEIRS = {
    "ia3": ("bert", peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    "ia3-regex": ("t5", peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=r".*\.wo")),
    "ia3-gpt2": ("gpt2", peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "oft": ("bert", peft.OFTConfig(target_modules=["query", "dense"], oft_block_size=8)),
    "oft-exact": ("llama", peft.OFTConfig(target_modules="all-linear", oft_block_size=8, use_cayley_neumann=False)),
    "oft-terms": ("bert", peft.OFTConfig(target_modules=["query"], oft_block_size=8, num_cayley_neumann_terms=3)),
    "oft-blocks": ("llama", peft.OFTConfig(target_modules=["q_proj", "down_proj"], r=4, oft_block_size=0)),
    "oft-shared": ("bert", peft.OFTConfig(target_modules=["query"], oft_block_size=8, block_share=True)),
    "boft": ("bert", peft.BOFTConfig(target_modules=["query", "dense"], boft_block_size=4)),
    "boft-blocks": ("bert", peft.BOFTConfig(target_modules=["query"], boft_block_size=0, boft_block_num=4)),
    "hra": ("llama", peft.HRAConfig(target_modules=["q_proj", "down_proj"], r=4)),
    "hra-orthonormal": ("bert", peft.HRAConfig(target_modules=["query"], r=4, apply_GS=True)),
    "norm": ("bert", peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "norm-rms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_pefts_and_write_it_again(case: str, tmp_path: Path) -> None:
    family, config = THEIRS[case]
    net, batch = tiny(family)
    base = run(net, batch)
    wrapped = peft.get_peft_model(net, copy.deepcopy(config))
    move((p for p in wrapped.parameters() if p.requires_grad), seed=5)
    theirs = run(wrapped, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(tmp_path / "theirs"))
    adapter = pt.Adapter.load(tmp_path / "theirs")
    assert not torch.allclose(theirs, base, atol=1e-3)
    torch.testing.assert_close(applied(pt.Model(tiny(family)[0]), batch, adapter), theirs, **CLOSE)
    adapter.save(tmp_path / "ours")
    assert pt.Adapter.load(tmp_path / "ours").hash == adapter.hash
    again = peft.PeftModel.from_pretrained(tiny(family)[0], str(tmp_path / "ours"))
    torch.testing.assert_close(run(again, batch), theirs, **CLOSE)


@pytest.mark.parametrize("form", ["oft", "boft", "hra"])
def test_weights_that_are_stored_transposed_are_not_for_peft(form: str, tmp_path: Path) -> None:
    model, batch, adapter = new("gpt2", form, "linear")
    adapter.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == f"POLYTASK_{form.upper()}"
    ours = applied(model, batch, adapter)
    assert torch.equal(applied(model, batch, pt.Adapter.load(tmp_path)), ours)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.OFTConfig(target_modules=["query"], oft_block_size=8, coft=True), "the constrained variant"),
        (peft.HRAConfig(target_modules=["query"], r=4, bias="hra_only"), "also trained biases"),
        (peft.LNTuningConfig(target_modules=["query"]), "is no norm's"),
    ],
)
def test_what_peft_has_and_we_do_not_is_refused_by_name(config: Any, words: str, tmp_path: Path) -> None:
    peft.get_peft_model(tiny("bert")[0], config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=words):
        pt.Adapter.load(tmp_path)


# --- rotations


def linear(width: int, out: int = 6) -> tuple[nn.Module, Site]:
    torch.manual_seed(0)
    return nn.Linear(width, out), Site("lin", "linear", "other", (out, width), bias=True)


def rotation(form: Form, width: int, size: float = 0.7) -> Tensor:
    """R^T of a patch with random values: what the weight is multiplied by."""
    site = Site("lin", "linear", "other", (width, width))
    base = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.eye(width))
    patch = form.patch(site).bound(base, site)
    patch.start(torch.Generator().manual_seed(0))
    move((p for n, p in patch.named_parameters() if n != "s"), size=size)
    return (torch.eye(width) + patch.delta()).detach()


TURNS = ["oft", "oft8", "boft", "boft-many", "boft-wide", "hra", "hra-orthonormal"]
TURN = {
    "oft": pt.OFT(block_size=32),
    "oft8": pt.OFT(block_size=8, share=True),
    "boft": pt.BOFT(),
    "boft-many": pt.BOFT(block_size=4, factors=4),
    "boft-wide": pt.BOFT(block_size=4, factors=7),
    "hra": pt.HRA(),
    "hra-orthonormal": pt.HRA(orthonormal=True),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_input_is_only_rotated(name: str) -> None:
    R = rotation(TURN[name], 256)
    assert torch.dist(R @ R.T, torch.eye(256)).item() < 1e-5 * 16  # Frobenius: 1e-5 for a row
    assert (R @ R.T - torch.eye(256)).abs().max() < 1e-5
    assert (R - torch.eye(256)).abs().max() > 0.1


def test_it_stays_a_rotation_while_it_learns() -> None:
    for name in ("oft", "boft-many", "hra"):
        net, batch = tiny("llama")
        model = pt.Model(net)
        adapter = pt.Adapter.new(model, TURN[name], "q_proj | down_proj", name="a")
        model.attach(adapter)
        model.use("a")
        optimiser = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
        for _ in range(8):
            (-net(**batch).logits.square().mean()).backward()
            optimiser.step()
            optimiser.zero_grad()
        for path, patch in adapter.patches.items():
            weight = net.get_submodule(path)._parameters["weight"].detach()
            new = weight + patch.bound(net.get_submodule(path), patch.site).delta().detach()
            scale = (weight @ weight.T).abs().max()
            assert ((new @ new.T - weight @ weight.T).abs().max() / scale) < 1e-5  # the Gram matrix is kept
            assert (new - weight).abs().max() > 0.05


def test_a_block_by_hand() -> None:
    base, site = linear(2, 1)
    patch = pt.OFT(block_size=2).patch(site).bound(base, site)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0]]))
        patch.q.fill_(1.0)  # Q = [[0, 1], [-1, 0]], R = [[0, -1], [1, 0]]: a quarter turn
    assert torch.allclose(base.weight + patch.delta(), torch.tensor([[0.0, 1.0]]), atol=1e-6)
    half = pt.OFT(block_size=2, cayley="neumann").patch(site).bound(base, site)
    with torch.no_grad():
        half.q.fill_(0.5)
        base.weight.copy_(torch.tensor([[1.0, 0.0]]))
        new = base.weight + half.delta()
    assert torch.allclose((new @ new.T).item() * torch.ones(1), torch.tensor([(1 - 0.5**4) ** 2]), atol=1e-6)


def test_one_factor_is_oft_bit_for_bit() -> None:
    base, site = linear(32)
    oft, boft = (f.patch(site).bound(base, site) for f in (pt.OFT(block_size=8), pt.BOFT(block_size=8, factors=1)))
    move([oft.q])
    row, column = torch.triu_indices(8, 8, 1)
    with torch.no_grad():
        boft.D[0, :, row, column] = oft.q
        boft.D[0, :, column, row] = -oft.q
    x = torch.randn(5, 32)
    assert torch.equal(oft.delta(), boft.delta())
    assert torch.equal(oft.around(base, x), boft.around(base, x))


@pytest.mark.parametrize(("size", "factors"), [(2, 4), (4, 3), (8, 2), (2, 3)])
def test_the_butterfly_is_wired_as_in_peft(size: int, factors: int) -> None:
    """Its own product needs a compiler for CUDA; its permutations and its Cayley transform do not."""
    width = 16 if size < 8 else 32
    base, site = linear(width)
    patch = pt.BOFT(block_size=size, factors=factors).patch(site).bound(base, site)
    move([patch.D], size=0.5)
    layer = peft.tuners.boft.layer.BOFTLayer
    total = torch.eye(width)
    for k in range(factors):
        blocks = layer.cayley_batch(None, patch.D[k].detach())
        order = layer.block_butterfly_perm(None, width, width // size // 2**k, size // 2, factors - 1)
        P = layer.perm2mat(None, order)
        total = P @ torch.block_diag(*blocks) @ P.T @ total
    x = torch.randn(3, width)
    with torch.no_grad():
        torch.testing.assert_close(patch.around(base, x), base(x @ total), **CLOSE)
        torch.testing.assert_close(base.weight + patch.delta(), base.weight @ total.T, **CLOSE)
    assert ((total != 0).sum(1) == min(width, size * 2 ** (factors - 1))).all()  # how far it reaches


def test_multiplied_out_or_factor_by_factor_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import polytask.forms.boft

    base, site = linear(64)
    patch = pt.BOFT(block_size=4, factors=4, scale=True).patch(site).bound(base, site)
    move(patch.parameters())
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        dense = patch.around(base, x), patch.delta()
        monkeypatch.setattr(polytask.forms.boft, "DENSE", 8)
        move(patch.parameters(), size=0.0)  # a change of version: what was kept is dropped
        torch.testing.assert_close((patch.around(base, x), patch.delta()), dense, **CLOSE)
        torch.testing.assert_close(base(x) + patch.contribute(x, base(x)), dense[0], **CLOSE)


def test_reflections() -> None:
    base, site = linear(2, 2)
    patch = pt.HRA(rank=1).patch(site).bound(base, site)
    with torch.no_grad():
        patch.U.copy_(torch.tensor([[3.0], [0.0]]))
        base.weight.copy_(torch.eye(2))
    assert torch.allclose(base.weight + patch.delta(), torch.diag(torch.tensor([-1.0, 1.0])))
    for rank in (3, 4):
        H = rotation(pt.HRA(rank=rank), 16)
        assert torch.isclose(torch.linalg.det(H), torch.tensor((-1.0) ** rank), atol=1e-4)
        assert torch.linalg.matrix_rank(H - torch.eye(16), atol=1e-4) <= rank


def test_a_rotation_is_not_computed_again_while_nothing_changes() -> None:
    base, site = linear(32)
    patch = pt.OFT(block_size=8).patch(site).bound(base, site)
    x = torch.randn(2, 32)
    with torch.no_grad():
        patch.around(base, x)
        first = patch._kept[1]
        patch.around(base, x)
        assert patch._kept[1] is first
        patch.q += 0.3
        assert not torch.allclose(patch.around(base, x), base(x))
        assert patch._kept[1] is not first


# --- scales and shifts


def test_the_bias_is_scaled_with_the_output_and_not_with_the_input() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        net[0].bias.copy_(torch.tensor([1.0, 1.0]))
    x = torch.tensor([[1.0, 1.0]])
    for side, wanted in (("output", [[8.0, 8.0]]), ("input", [[5.0, 11.0]])):
        model = pt.Model(net)
        adapter = pt.Adapter.new(model, pt.IA3(side=side), "kind:linear", name="a")
        with torch.no_grad():
            adapter.patches["0"].l.copy_(torch.tensor([2.0, 1.0]).view_as(adapter.patches["0"].l))
        model.attach(adapter)
        with torch.no_grad(), model.using("a"):
            assert torch.allclose(net(x), torch.tensor(wanted))
        assert torch.allclose(adapter.merge_into(model).module(x), torch.tensor(wanted))
        model.detach()


def test_a_feed_forward_role_scales_its_input() -> None:
    _, _, adapter = new("llama", pt.IA3())
    shapes = {path.rsplit(".", 1)[-1]: tuple(p.l.shape) for path, p in adapter.patches.items()}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 64)}


def test_norms_hold_the_new_values_and_only_those_asked_for() -> None:
    model, _, _ = new("bert", "norm")
    fresh = pt.Adapter.new(model, "norm")
    for path, patch in fresh.patches.items():
        norm = model.module.get_submodule(path)
        assert torch.equal(patch.weight, norm.weight) and torch.equal(patch.bias, norm.bias)
    only = pt.Adapter.new(model, pt.Norm(parameters="weight"))
    assert {n.rsplit(":", 1)[-1] for n, _ in only.named_parameters()} == {"weight"} and only.size * 2 == fresh.size


def test_a_norm_that_acts_alone_reads_its_own_values_as_they_are() -> None:
    model, batch, adapter = new("llama", "norm")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 3.0)
    model.attach(adapter, "a")
    path, patch = next(iter(adapter.patches.items()))
    norm = model.module.get_submodule(path)
    with model.using("a"):
        assert torch.equal(norm.weight, patch.weight)
    with torch.no_grad(), model.using({"a": 0.5}):
        assert torch.allclose(norm.weight, 0.5 * (norm._parameters["weight"] + patch.weight), atol=1e-6)


def test_a_scale_near_one_is_not_rounded_away_in_a_narrow_type() -> None:
    base, site = linear(8)
    base = base.bfloat16()
    patch = pt.IA3(side="output").patch(site).bound(base, site)
    x = torch.randn(64, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = base(x)
        for value, changes in ((1.0, False), (1.0 + 2**-8 * 0.99, True)):
            patch.l.fill_(value)
            assert bool((patch.around(base, x) != y).any()) == changes
            wide = patch.around(base.float(), x.float())
            assert torch.equal(wide, base(x.float()) * value) and wide.dtype == torch.float32
            base.bfloat16()


def test_bitfit_trains_every_bias_and_nothing_else() -> None:
    model, _, adapter = new("bert", "bitfit", "all")
    biases = {name for name, _ in model.module.named_parameters() if name.endswith(".bias")}
    assert {f"{path}.bias" for path in adapter.patches} == biases
    merged = adapter.merge_into(model).module.state_dict()
    changed = {k for k, v in model.module.state_dict().items() if not torch.equal(v, merged[k])}
    assert changed == biases


@pytest.mark.parametrize("family", ["gemma2", "qwen2", "deit"])
def test_scales_and_shifts_of_unusual_modules_are_merged(family: str) -> None:
    """Gemma's norms store their weight less one; Qwen's queries have a bias and its other layers none."""
    model, batch, adapter = new(family, "ssf")
    merged = adapter.merge_into(model)
    ours = applied(model, batch, adapter)
    assert not torch.allclose(ours, run(model.module, batch), atol=1e-2)
    torch.testing.assert_close(run(merged.module, batch), ours, **CLOSE)


def test_scale_and_shift_by_hand() -> None:
    model = pt.Model(nn.Sequential(nn.Linear(1, 1)))
    with torch.no_grad():
        model.module[0].weight.fill_(2.0)
        model.module[0].bias.fill_(1.0)
    adapter = pt.Adapter.new(model, "ssf", "kind:linear", name="a")
    with torch.no_grad():
        adapter.patches["0"].g.fill_(3.0)
        adapter.patches["0"].h.fill_(-1.0)
    merged = adapter.merge_into(model).module[0]
    assert (merged.weight.item(), merged.bias.item()) == (6.0, 2.0)


# --- edits of the stream


def test_reft_sets_the_coordinates_of_its_subspace_and_no_other() -> None:
    model, batch, adapter = new("llama", pt.ReFT(rank=3), size=0.5)
    site = model.site("model.layers.1")
    patch = adapter.patches[site.name].bound(model.module.get_submodule(site.path), site)
    h = torch.randn(2, 5, 32)
    with torch.no_grad():
        R, new_h = patch.subspace(), h + patch.contribute(h, h)
        eye = torch.eye(32)
        assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-5)
        torch.testing.assert_close(new_h @ R.T, h @ patch.W.T + patch.b, **CLOSE)
        torch.testing.assert_close(new_h @ (eye - R.T @ R), h @ (eye - R.T @ R), **CLOSE)


def test_a_patch_at_blocks_says_when_the_width_is_another() -> None:
    _, _, adapter = new("llama", "reft")
    for patch in adapter.patches.values():
        patch.load({"A": torch.eye(4, 16), "W": torch.eye(4, 16), "b": torch.zeros(4)})
    with pytest.raises(AdapterError, match="a stream of 16, and the model's has 32"):
        pt.Model(tiny("llama")[0]).attach(adapter, "b")


def test_the_connected_stream_does_not_pass_through_frozen_blocks() -> None:
    net, batch = tiny("llama")
    model = pt.Model(net)
    adapter = pt.Adapter.new(model, "connected", name="a")
    move(adapter.parameters())
    model.attach(adapter)
    for layer in net.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, out: (out[0].detach(), *out[1:]))
        layer.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    with model.using("a"):
        net(**batch).logits.square().mean().backward()
    first, last = adapter.patches.values()
    assert first.down.grad.abs().max() > 0 and last.down.grad.abs().max() > 0
    assert not adapter.copy().shared.stream  # a copy takes nothing that is on its way


# --- bottlenecks


def by_hand(patch: Any, h: Tensor, activation: Any, scale: Any) -> Tensor:
    return scale * (activation(h @ patch.down.T + patch.down_bias) @ patch.up.T + patch.up_bias)


def seen(net: nn.Module, batch: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    """Input and output of a module."""
    kept: list[Tensor] = []
    hook = net.get_submodule(path).register_forward_hook(lambda _, args, out: kept.extend((args[0], out)))
    run(net, batch)
    hook.remove()
    return kept[0], kept[1]


@pytest.mark.parametrize("style", ["houlsby", "pfeiffer", "parallel", "scaled-parallel"])
def test_each_style_stands_where_it_says(style: str) -> None:
    model, batch, adapter = new("llama", pt.Bottleneck(style))
    net = model.module
    ends = {path.rsplit(".", 1)[-1] for path in adapter.patches}
    assert ends == {
        "houlsby": {"o_proj", "down_proj"}, "pfeiffer": {"down_proj"},
        "parallel": {"up_proj", "down_proj"}, "scaled-parallel": {"up_proj", "down_proj"},
    }[style]  # fmt: skip
    path = "model.layers.0.mlp.down_proj"
    row = adapter.form.row
    activation = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}[row.activation]
    model.attach(adapter, "a")
    attention = adapter.patches.get("model.layers.0.self_attn.o_proj")
    with torch.no_grad():
        for parameter in attention.parameters() if attention else ():  # only what is looked at shall act
            parameter.zero_()
    x, y = seen(net, batch, "model.layers.0.mlp.up_proj")[0], seen(net, batch, path)[1]
    with model.using("a"):
        _, out = seen(net, batch, path)
    patch = adapter.patches[path]
    with torch.no_grad():
        torch.testing.assert_close(out, y + by_hand(patch, x if row.beside else y, activation, row.scale), **CLOSE)
    assert patch.down.shape == (32 // row.reduction, 32)


def test_adapterplus_scales_each_channel_of_a_block() -> None:
    model, batch, adapter = new("vit", pt.Bottleneck("adapterplus", reduction=8))
    assert {p.site.kind for p in adapter.patches.values()} == {"block"}
    patch = next(iter(adapter.patches.values()))
    y = torch.randn(2, 3, 32)
    with torch.no_grad():
        got = patch.contribute(y, y)
        torch.testing.assert_close(got, by_hand(patch, y, nn.functional.gelu, patch.s), **CLOSE)


class Sparse(pt.core.mix.Mix):
    """Each row its own adapter, another one at every site."""

    def names(self) -> tuple[str, ...]:
        return ("a", "b")

    def weigh(self, site: Any, names: tuple[str, ...], x: Tensor, y: Tensor, call: Any) -> Any:
        values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
        return pt.core.form.Weights(("a", "b"), values.roll(len(site.name) + (site.role == "down"), 0))


def test_a_parallel_adapter_gets_its_own_rows_whatever_the_mix() -> None:
    """The rows at a feed-forward's first layer are others than at its last one."""
    model, batch, adapter = new("gpt2", pt.Bottleneck("parallel"))
    other = adapter.copy()
    move(other.parameters(), seed=9)
    path = "transformer.h.0.mlp.c_proj"
    model.attach(adapter, "a")
    model.attach(other, "b")
    x, y = seen(model.module, batch, "transformer.h.0.mlp.c_fc")[0], seen(model.module, batch, path)[1]
    with model.using(Sparse()):
        _, out = seen(model.module, batch, path)
    values = Sparse().weigh(model.site(path), (), x, y, None).values
    with torch.no_grad():
        parts = [by_hand(a.patches[path], x, nn.functional.relu, 1.0) for a in (adapter, other)]
        wanted = y + sum(values[:, i, None, None] * part for i, part in enumerate(parts))
    torch.testing.assert_close(out, wanted, **CLOSE)


def test_a_parallel_adapter_needs_both_ends() -> None:
    with pytest.raises(pt.PolytaskError, match="needs the first layer of each feed-forward beside its last"):
        new("llama", pt.Bottleneck("parallel"), "down_proj")
    with pytest.raises(pt.PolytaskError, match="stands at up, gate_up, down"):
        new("llama", pt.Bottleneck("parallel"), "q_proj")
    with pytest.raises(pt.PolytaskError, match=r"style must be one of .*got 'parrallel' .did you mean 'parallel'"):
        pt.Bottleneck("parrallel")


def test_parallel_adapters_learn_through_checkpointed_blocks() -> None:
    for form in ("connected", {"name": "bottleneck", "style": "parallel"}):
        grads = []
        for checkpoint in (False, True):
            model, batch, adapter = new("llama", form)
            model.attach(adapter, "a")
            model.module.train()
            if checkpoint:
                model.module.gradient_checkpointing_enable({"use_reentrant": False})
            with model.using("a"):
                model.module(**batch, use_cache=False).logits.square().mean().backward()
            grads.append({n: p.grad for n, p in adapter.named_parameters()})
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, **CLOSE)


def test_kronecker_products() -> None:
    from polytask.forms.compacter import kronecker

    torch.manual_seed(0)
    S, u, v, x = torch.randn(3, 3, 3), torch.randn(3, 2, 2), torch.randn(3, 2, 4), torch.randn(5, 2, 6)
    H = sum(torch.kron(S[i], u[i] @ v[i]) for i in range(3))
    torch.testing.assert_close(kronecker(x, S, u, v), x @ H, **CLOSE)
    S = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    one = kronecker(torch.eye(2), S, torch.ones(2, 1, 1), torch.full((2, 1, 1), 2.0))
    assert torch.equal(one, 2.0 * torch.eye(2))


def test_all_layers_share_the_kernels() -> None:
    model, batch, adapter = new("bert", pt.Compacter(reduction=8))
    assert {id(p.shared) for p in adapter.patches.values()} == {id(adapter.shared)}
    d, n, w = 32, 4, 4
    assert adapter.size == n**3 + len(adapter.patches) * (2 * (d + w) + d + w)
    assert {p.rsplit(".", 3)[-3] for p in pt.Adapter.new(model, pt.Compacter(style="compacter++")).patches} == {
        "0",
        "1",
    }


# --- forms made of forms

PAIR = {"name": "union", "forms": [{"name": "lora", "rank": 2}, {"name": "lora", "rank": 3, "alpha": 5}, "norm"]}


def test_a_union_is_its_parts_attached_together(tmp_path: Path) -> None:
    model, batch, adapter = new("bert", {**PAIR, "sites": ["query | up", "", ""]})
    parts = [
        pt.Adapter.new(model, form, where)
        for form, where in zip(adapter.form.forms, adapter.form.sites, strict=True)
        if where
    ]
    assert [set(p.patches) for p in parts] == [{n for n, p in adapter.patches.items() if 0 in p.subs}]
    singles = [adapter.form._part(adapter, i) for i in range(3)]
    for i, single in enumerate(singles):
        model.attach(single.copy(), f"p{i}")
    with torch.no_grad(), model.using({"p0": 1.0, "p1": 1.0, "p2": 1.0}):
        wanted = output(model.module(**batch))
    ours = applied(model, batch, adapter)
    torch.testing.assert_close(ours, wanted, **CLOSE)
    torch.testing.assert_close(run(adapter.merge_into(model).module, batch), wanted, **CLOSE)
    adapter.save(tmp_path)
    again = pt.Adapter.load(tmp_path)
    assert again.hash == adapter.hash and again.form == adapter.form
    assert torch.equal(applied(model, batch, again), ours)


def test_a_union_from_a_configuration(tmp_path: Path) -> None:
    import yaml

    form = Form.of(yaml.safe_load(yaml.safe_dump(PAIR)))
    assert form == pt.Union(pt.LoRA(rank=2), pt.LoRA(rank=3, alpha=5), "norm")
    assert Form.of(json.loads(json.dumps({"name": "union", **form.settings()}))) == form
    assert form.mergeable and not pt.Union().mergeable
    with pytest.raises(pt.PolytaskError, match="sites must be one selector for each of the 3 parts, got 1"):
        Form.of({**PAIR, "sites": ["query"]})
    with pytest.raises(pt.PolytaskError, match="no site for 'lora', the part of the union at 'conv'"):
        new("bert", {**PAIR, "sites": ["conv", "", ""]})


def test_mix_and_match(tmp_path: Path) -> None:
    """Prefixes in attentions, parallel adapters at feed-forwards; several unions in one batch."""
    model, batch, adapter = new("bert", "union")
    kinds = {name: [sub.form.name for sub in p.subs.values()] for name, p in adapter.patches.items()}
    assert set(map(tuple, kinds.values())) == {("prefix",), ("bottleneck",)}
    other = adapter.copy()
    move(other.parameters(), seed=4)
    model.attach(adapter, "a")
    model.attach(other, "b")
    with torch.no_grad(), model.using(["a", None, "b"]):
        mixed = output(model.module(**batch))
    for i, mix in enumerate(("a", None, "b")):
        with torch.no_grad(), model.using(mix):
            torch.testing.assert_close(mixed[i], output(model.module(**batch))[i], **CLOSE)


def test_what_a_part_keeps_to_itself_stays_so_in_a_union() -> None:
    model, _, adapter = new("bert", pt.Union({"name": "boft", "factors": 1}, "compacter"))
    frozen = {n for n, p in adapter.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}:p0_s" for name, patch in adapter.patches.items() if 0 in patch.subs}
    assert adapter.shared is not None and {n for n, _ in adapter.shared.named_parameters()} == {"p1_S"}
    assert all(p.shared is adapter.shared.subs[1] for q in adapter.patches.values() for i, p in q.subs.items() if i)


def test_a_union_ends_as_its_parts_end() -> None:
    """A prefix that was learned through a network becomes plain."""
    form = pt.Union({"name": "prefix", "hidden": 8, "gated": True}, {"name": "lora", "rank": 2})
    model, batch, adapter = new("bert", form)
    ours = applied(model, batch, adapter)
    done = form.finish(adapter)
    assert done.form.forms[0].hidden is None and done.shared is None
    torch.testing.assert_close(applied(model, batch, done), ours, **CLOSE)
    assert pt.Union("lora").finish(plain := pt.Adapter.new(model, pt.Union("lora"))) is plain


@pytest.mark.parametrize("size", [0.01, 0.5])
def test_the_cayley_transform_and_its_derivatives(size: float) -> None:
    """Small matrices go through a series, others through an inverse; both are the same function, derived twice."""
    from polytask.forms.oft import cayley

    torch.manual_seed(0)
    D = (size * torch.randn(2, 16, 16, dtype=torch.float64)).requires_grad_()
    eye = torch.eye(16, dtype=torch.float64)

    def plain(Q: Tensor) -> Tensor:
        return torch.linalg.solve(eye + Q, eye - Q) - eye

    found = []
    for transform in (cayley, plain):
        out = transform(0.5 * (D - D.mT))
        (first,) = torch.autograd.grad((out**3).sum() + out[:, 0].sum(), D, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), D)
        found.append((out, first, second))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_a_rotation_acts_around_a_module_however_it_is_called() -> None:
    """The base runs once, on the rotated input, also behind a forward that was set on the instance."""
    base = nn.Linear(8, 4)
    model = pt.Model(nn.ModuleDict({"lin": base}))
    adapter = pt.Adapter.new(model, pt.OFT(block_size=4), "kind:linear", name="a")
    move(adapter.parameters(), size=0.5)
    x, runs = torch.randn(2, 8), []
    plain = base.forward
    model.attach(adapter)
    with torch.no_grad(), model.using("a"):
        wanted = base(x)
        torch.testing.assert_close(base(input=x), wanted, **CLOSE)
        y = plain(x)
        patch = adapter.patches["lin"].bound(base, adapter.patches["lin"].site)
        torch.testing.assert_close(patch.add(x, y, y), wanted, **CLOSE)
        patch.around(lambda h: runs.append(h) or h, x)
    assert len(runs) == 1 and torch.allclose(runs[0].norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    model.detach()
    base.forward = lambda *args: plain(*args)
    model.attach(adapter)
    with torch.no_grad(), model.using("a"):
        torch.testing.assert_close(base(x), wanted, **CLOSE)
