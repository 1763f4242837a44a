"""Merging into a plain model: it computes what the attached adapter does, and nothing of ours is left in it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import AdapterError
from polytask.core.form import Form, Patch

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
LORA = pt.LoRA(rank=3, alpha=4, init="random")


def shaken(model: pt.Model, form: Any, sites: str, size: float = 0.05) -> pt.Adapter:
    """An adapter with random values everywhere."""
    adapter = pt.Adapter.new(model, form, sites, name="a")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return adapter


@torch.no_grad()
def attached(model: pt.Model, adapter: pt.Adapter, batch: dict[str, Tensor], weight: float = 1.0) -> Tensor:
    name = model.attach(adapter)
    with model.using({name: weight}):
        found = output(model.module(**batch))
    model.detach()
    return found


@torch.no_grad()
def run(model: pt.Model | nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return output((model.module if isinstance(model, pt.Model) else model)(**batch))


CASES = {
    "lora-linear": ("bert", LORA, "linear"),
    "lora-conv1d": ("gpt2", LORA, "linear"),
    "lora-conv": ("resnet", LORA, "conv"),
    "lora-patches": ("vit", LORA, "patch | linear"),
    "lora-embedding": ("bert", LORA, "embedding"),
    "lora-experts": ("mixtral", LORA, "experts | query"),
    "lora-rslora": ("t5", pt.LoRA(rank=3, init="random", scaling="rank-stabilised"), "linear"),
    "full-linear": ("bert", pt.Full(), "linear"),
    "full-conv1d": ("gpt2", pt.Full(), "linear"),
    "full-norm": ("llama", pt.Full(), "norm"),
    "full-layer-norm": ("bert", pt.Full(), "norm"),
    "full-conv-and-batch-norm": ("resnet", pt.Full(), "conv | norm"),
    "full-embedding": ("bert", pt.Full(), "embedding"),
    "full-raw": ("vit", pt.Full(), "kind:parameter"),
    "full-experts": ("mixtral", pt.Full(), "experts"),
    "full-bias": ("bert", pt.Full(parameters="bias"), "linear | norm"),
    "full-weight": ("bert", pt.Full(parameters="weight"), "linear | norm"),
    "gemma-norm": ("gemma2", pt.Full(), "norm"),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_equals_attached(case: str) -> None:
    family, form, sites = CASES[case]
    net, batch = tiny(family)
    model = pt.Model(net, name="base")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adapter = shaken(model, form, sites)
    base = run(model, batch)
    for weight in (1.0, 0.5):
        expected = attached(model, adapter, batch, weight)
        assert not torch.allclose(expected, base, atol=1e-4)
        merged = adapter.merge_into(model, weight)
        torch.testing.assert_close(run(merged, batch), expected, **CLOSE)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert torch.equal(run(model, batch), base)
    assert type(merged.module) is type(net) and not merged.attached
    assert all(type(a) is type(b) for a, b in zip(merged.module.modules(), net.modules(), strict=True))
    assert not any("polytask" in key for m in merged.module.modules() for key in m.__dict__)
    assert merged.name == "base" and merged.fingerprint != model.fingerprint


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_embeddings_that_are_scaled(family: str) -> None:
    """Gemma multiplies what it looks up; a change of the weight is multiplied the same."""
    net, batch = tiny(family)
    for form in (LORA, pt.Full()):
        model = pt.Model(net)
        adapter = shaken(model, form, "token", 0.02)
        expected = attached(model, adapter, batch)
        assert not torch.allclose(expected, run(model, batch), atol=1e-4)
        merged = adapter.merge_into(model, untie=True)
        torch.testing.assert_close(run(merged, batch), expected, **CLOSE)


@pytest.mark.parametrize(
    "case", ["lora-linear", "lora-conv1d", "lora-conv", "full-linear", "full-norm", "full-experts"]
)
def test_merged_equals_attached_in_bf16(case: str) -> None:
    """A bf16 number has 8 bits: one rounding is off by up to 2^-9 of it, and a merged weight is rounded where the sum
    of two outputs is not. Over two layers the outputs differ by less than 3 % of their size; a merged weight is the
    exact sum, rounded once."""
    family, form, sites = CASES[case]
    net, batch = tiny(family)
    net.to(torch.bfloat16)
    batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    model = pt.Model(net)
    adapter = shaken(model, form, sites)
    expected = attached(model, adapter, batch).float()
    merged = adapter.merge_into(model)
    found = run(merged, batch).float()
    assert (found - expected).norm() <= 0.03 * expected.norm()
    assert (expected - run(model, batch).float()).norm() > 0.05 * expected.norm()
    assert {p.dtype for p in merged.module.parameters()} == {torch.bfloat16}
    for name, patch in adapter.patches.items():
        site = model.site(name)
        for key, delta in patch.bound(net.get_submodule(site.path), site).deltas().items():
            exact = net.get_submodule(site.path)._parameters[key].float() + delta
            stored = merged.module.get_submodule(site.path)._parameters[key]
            assert torch.equal(stored, exact.bfloat16())


def test_a_narrow_adapter_does_not_narrow_the_base() -> None:
    net, _ = tiny("bert")
    model = pt.Model(net)
    adapter = shaken(model, LORA, "query")
    for patch in adapter.patches.values():
        patch.to(torch.bfloat16)
    with torch.no_grad():
        for patch in adapter.patches.values():
            patch.B.zero_()
    merged = adapter.merge_into(model).module
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), merged.parameters(), strict=True))


def test_in_place() -> None:
    net, batch = tiny("bert")
    model = pt.Model(net, read_weights="pooler")
    adapter = shaken(model, LORA, "linear")
    expected = attached(model, adapter, batch)
    held = list(net.parameters())
    merged = adapter.merge_into(model, in_place=True)
    assert merged.module is net and all(a is b for a, b in zip(net.parameters(), held, strict=True))
    torch.testing.assert_close(run(net, batch), expected, **CLOSE)
    assert merged.site("pooler.dense").read == "weight"
    with pytest.raises(AdapterError, match="was made for the base"):
        adapter.merge_into(model)


def test_other_adapters_stay_attached_where_it_is_in_place_and_go_from_a_copy() -> None:
    net, batch = tiny("bert")
    model = pt.Model(net)
    one, two = shaken(model, LORA, "query"), shaken(model, LORA, "value", 0.1)
    with torch.no_grad():
        both = [model.attach(one, "one"), model.attach(two, "two")]
        with model.using(dict.fromkeys(both, 1.0)):
            expected = output(net(**batch))
    copied = one.merge_into(model)
    assert not copied.attached and model.attached == ("one", "two")
    kept = one.merge_into(model, in_place=True)
    assert kept.attached == ("one", "two")
    with torch.no_grad(), kept.using("two"):
        torch.testing.assert_close(output(net(**batch)), expected, **CLOSE)


# --- shared, computed and quantised weights


@pytest.mark.parametrize(("family", "site"), [("gpt2", "transformer.wte"), ("gemma2", "model.embed_tokens")])
def test_tied_embeddings(family: str, site: str, tmp_path: Path) -> None:
    net, batch = tiny(family)
    model = pt.Model(net)
    assert net.config.tie_word_embeddings
    adapter = shaken(model, LORA, site, 0.02)
    with pytest.raises(AdapterError, match=f"weight of '{site}' is shared with lm_head.*untie=True"):
        adapter.merge_into(model)
    expected = attached(model, adapter, batch)
    merged = adapter.merge_into(model, untie=True).module
    torch.testing.assert_close(run(merged, batch), expected, **CLOSE)
    assert torch.equal(merged.lm_head.weight, net.lm_head.weight) and net.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again, batch), expected, **CLOSE)


def test_a_tied_pair_that_is_changed_on_both_sides() -> None:
    net, batch = tiny("gpt2")
    model = pt.Model(net)
    adapter = shaken(model, pt.Full(), "wte | lm_head", 0.02)
    assert set(adapter.patches) == {"transformer.wte", "lm_head"}
    expected = attached(model, adapter, batch)
    torch.testing.assert_close(run(adapter.merge_into(model, untie=True), batch), expected, **CLOSE)


def test_tied_weights_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    net, batch = tiny("t5")
    model = pt.Model(net)
    adapter = shaken(model, LORA, "encoder.embed_tokens", 0.05)
    with pytest.raises(AdapterError, match="is shared with"):
        adapter.merge_into(model)
    expected = attached(model, adapter, batch)
    merged = adapter.merge_into(model, untie=True).module
    torch.testing.assert_close(run(merged, batch), expected, **CLOSE)
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(run(again, batch), expected, **CLOSE)


def test_weights_that_are_computed() -> None:
    net, batch = tiny("wav2vec2")
    model = pt.Model(net)
    computed = [s.name for s in model.sites if "pos_conv" in s.name and s.kind == "conv"]
    assert len(computed) == 1
    adapter = shaken(model, LORA, computed)
    assert not torch.allclose(attached(model, adapter, batch), run(model, batch), atol=1e-4)
    with pytest.raises(AdapterError, match="weight of .*pos_conv.* is computed"):
        adapter.merge_into(model)
    with pytest.raises(AdapterError, match="is computed .* a Full change cannot act on it"):
        model.attach(shaken(model, pt.Full(), computed))
    assert not model.attached


def test_quantised_weights() -> None:
    model = pt.Model(nn.Sequential(nn.Linear(3, 3)))
    adapter = shaken(model, LORA, "kind:linear")
    model.module[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    adapter.card.base.pop("fingerprint")
    with pytest.raises(AdapterError, match=r"is quantised \(torch.int8\)"):
        adapter.merge_into(model)


class Curved(Patch):
    """Something that is no change of a weight."""

    def contribute(self, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return y * 0


class Bent(Form):
    """A form for `Curved`."""

    name = "bent"

    def patch(self, site: pt.Site) -> Patch:
        return Curved(self, site)


def test_what_cannot_be_merged_is_named_and_nothing_changes() -> None:
    model = pt.Model(tiny("bert")[0])
    adapter = shaken(model, LORA, "query")
    last = list(adapter.patches)[-1]
    before = model.fingerprint
    for mergeable in (True, False):
        form = Bent()
        type(form).mergeable = mergeable
        adapter.patches[last] = form.patch(adapter.patches[last].site)
        with pytest.raises(AdapterError, match=f"form 'bent' at '{last}' has no dense change"):
            adapter.merge_into(model)
    with pytest.raises(AdapterError, match="has no dense change"):
        adapter.merge_into(model, in_place=True)
    assert model.fingerprint == before


# --- the merged model is an ordinary one


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "resnet"])
def test_a_merged_model_is_an_ordinary_folder(family: str, tmp_path: Path) -> None:
    net, batch = tiny(family)
    model = pt.Model(net)
    adapter = shaken(model, LORA, "linear | experts" if family != "resnet" else "conv")
    model.attach(adapter)
    model.use("a")
    expected = run(model, batch)
    merged = adapter.merge_into(model).module
    merged.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = type(net).from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(tiny(family)[0].state_dict())
    torch.testing.assert_close(run(again, batch), expected, **CLOSE)
    fresh = pt.Model(again)
    fresh.attach(pt.Adapter.new(fresh, LORA, "linear" if family != "resnet" else "conv", name="next"))
    torch.testing.assert_close(run(copy.deepcopy(merged), batch), expected, **CLOSE)


# --- LoRA at any convolution

sizes = st.integers(1, 3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=40, deadline=None)
@given(
    dims=sizes, groups=sizes, out=sizes, inner=sizes, kernel=sizes, stride=sizes, dilation=sizes,
    padding=st.integers(0, 2), mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]), same=st.booleans(),
    full=st.booleans(),
)  # fmt: skip
def test_convolutions_of_every_kind(
    dims: int, groups: int, out: int, inner: int, kernel: int, stride: int, dilation: int, padding: int, mode: str,
    same: bool, full: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    if same:
        stride = 1
    net = nn.Sequential(
        kind(
            inner * groups,
            out * groups,
            kernel,
            stride,
            "same" if same else padding,
            dilation,
            groups,
            padding_mode=mode,
        )
    )
    x = torch.randn(2, inner * groups, *[9] * dims)
    model = pt.Model(net)
    adapter = shaken(model, pt.Full() if full else LORA, "conv", 0.3)
    name = model.attach(adapter)
    with torch.no_grad():
        with model.using(name):
            one = net(x)
        with model.using([name, None]):  # by row: the change is added to the outputs
            rows = net(x)
        base = net(x) if model.use(None) is None else x
    merged = adapter.merge_into(model).module
    with torch.no_grad():
        torch.testing.assert_close(merged(x), one, **CLOSE)
    torch.testing.assert_close(rows[0], one[0], **CLOSE)
    torch.testing.assert_close(rows[1], base[1], **CLOSE)


# --- what Full contributes is the change of the weights


class GemmaNorm(nn.Module):
    """Multiplies by 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def module_of(kind: str, a: int, b: int, bias: bool) -> tuple[nn.Module, Tensor]:
    """A module and an input for it, [4 rows, ...]."""
    x = torch.randn(4, 3, a)
    if kind == "linear":
        return nn.Linear(a, b, bias=bias), x
    if kind == "conv1d":
        return transformers.pytorch_utils.Conv1D(b, a), x
    if kind == "conv":
        return nn.Conv2d(a, b, 3, padding=1, bias=bias), torch.randn(4, a, 5, 5)
    if kind == "embedding":
        return nn.Embedding(a + 1, b, padding_idx=0), torch.randint(0, a + 1, (4, 3))
    if kind == "scaled-embedding":
        return ScaledEmbedding(a + 1, b), torch.randint(0, a + 1, (4, 3))
    if kind == "layer-norm":
        return nn.LayerNorm((3, a), bias=bias), x
    if kind == "rms-norm":
        return nn.RMSNorm(a), x
    if kind == "gemma-norm":
        return GemmaNorm(a), x
    if kind == "group-norm":
        return nn.GroupNorm(b, a * b), torch.randn(4, a * b, 6)
    norm = nn.BatchNorm1d(a)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval(), torch.randn(4, a)


KINDS = ("linear", "conv1d", "conv", "embedding", "scaled-embedding", "layer-norm", "rms-norm", "gemma-norm")


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from([*KINDS, "group-norm", "batch-norm"]),
    a=st.integers(1, 6),
    b=st.integers(1, 6),
    bias=st.booleans(),
    stored=st.sampled_from(["delta", "value"]),
    parameters=st.sampled_from(["all", "weight", "bias"]),
)
def test_full_contributes_the_change_of_the_weights(
    kind: str, a: int, b: int, bias: bool, stored: str, parameters: str
) -> None:
    torch.manual_seed(0)
    net, x = module_of(kind, a, b, bias)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    root = nn.ModuleDict({"it": net})
    model = pt.Model(root)
    site = model.site("it")
    form = pt.Full(parameters=parameters, stored=stored)
    if form.refuses(site):
        assert parameters == "bias" and not site.bias
        return
    patch = form.patch(site)
    changed = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            parameter.normal_()
            own = changed._parameters[name]
            own.copy_(parameter) if stored == "value" else own.add_(parameter)
    bound = patch.bound(net, site)
    seen = []
    net.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        found = bound.contribute(x, net(x))
        torch.testing.assert_close(found, changed(x) - net(x), atol=1e-4, rtol=1e-4)
    assert len(seen) == 2  # a hook of the base's saw its own two calls and not ours
    adapter = pt.Adapter(form, {"it": patch}, name="a")
    model.attach(adapter)
    with torch.no_grad(), model.using("a"):
        torch.testing.assert_close(net(x), changed(x), atol=1e-4, rtol=1e-4)
    model.detach()
    for name, parameter in adapter.merge_into(model).module["it"].named_parameters():
        torch.testing.assert_close(parameter, changed._parameters[name])


def test_full_on_an_embedding_with_max_norm() -> None:
    model = pt.Model(nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)))
    adapter = shaken(model, pt.Full(), "embedding")
    model.attach(adapter)
    with torch.no_grad(), model.using(["a", None]), pytest.raises(AdapterError, match="has max_norm"):
        model.module(torch.tensor([[1], [2]]))


def test_weight_norm_of_any_module() -> None:
    model = pt.Model(nn.Sequential(weight_norm(nn.Linear(3, 4))))
    with pytest.raises(AdapterError, match="is computed"):
        shaken(model, LORA, "kind:linear").merge_into(model)
