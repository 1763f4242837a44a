"""Modules whose weight is read and which are not called: the adapter acts on the weight that the reader sees."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import MixError, SiteError
from polytask.core.form import Form, Patch

torch.set_num_threads(1)

FORMS = [pt.LoRA(rank=2, init="random"), pt.Full()]
both_forms = pytest.mark.parametrize("form", FORMS, ids=["lora", "full"])


def adapter_for(model, form, sites, seed=0):
    """An adapter that changes something."""
    adapter = pt.Adapter.new(model, form, sites, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.5 * p if form.name == "lora" else 0.1 * torch.randn(p.shape, generator=generator))
    return adapter


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, **options)
    nn.init.normal_(module.in_proj_bias, std=0.1)
    nn.init.normal_(module.out_proj.bias, std=0.1)
    return module


def encoder(batch_first=True, layers=2, norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    module = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    for p in module.parameters():  # the layers are copies, and norms and biases start as constants
        nn.init.normal_(p, std=0.2)
    return module


class Tagger(nn.Module):
    """Token embeddings, a linear layer, and a head that reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.lin(self.emb(ids)).tanh(), self.emb.weight)


# nn.MultiheadAttention


def test_the_sites_of_multihead_attention():
    sites = {s.name: s for s in pt.Model(attention()).sites}
    assert sites["in_proj_weight"].kind == "linear" and sites["in_proj_weight"].role == "qkv"
    assert sites["in_proj_weight"].shape == (48, 16) and sites["in_proj_weight"].param == "in_proj_weight"
    assert sites["out_proj"].read == "weight" and sites["out_proj"].kind == "linear"
    other = {s.name: s.role for s in pt.Model(attention(kdim=5, vdim=6)).sites if s.kind == "linear"}
    assert other == {
        "q_proj_weight": "query",
        "k_proj_weight": "key",
        "v_proj_weight": "value",
        "out_proj": "other",
    }


@both_forms
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_multihead_attention_equals_merged_weights(form, training, grad):
    module = attention(batch_first=True).train(training)
    model = pt.Model(module)
    adapter = adapter_for(model, form, "in_proj_weight | out_proj")
    assert set(adapter.patches) == {"in_proj_weight", "out_proj"}
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(grad):
        bare = module(x, x, x)[0]
        model.attach(adapter, "a")
        assert torch.equal(module(x, x, x)[0], bare)
        with model.using("a"):
            attached = module(x, x, x)[0]
        model.detach()
        assert torch.equal(module(x, x, x)[0], bare) and type(module) is nn.MultiheadAttention
        merged = adapter.merge_into(model).module(x, x, x)[0]
    torch.testing.assert_close(attached, merged, rtol=1e-5, atol=1e-6)
    assert (attached - bare).abs().max() > 0.01


@both_forms
def test_separate_projections_of_multihead_attention(form):
    module = attention(kdim=5, vdim=6, batch_first=True)
    model = pt.Model(module)
    adapter = adapter_for(model, form, "linear")
    q, k, v = torch.randn(2, 3, 16), torch.randn(2, 4, 5), torch.randn(2, 4, 6)
    merged = adapter.merge_into(model).module(q, k, v)[0]
    model.attach(adapter, "a")
    with model.using("a"):
        torch.testing.assert_close(module(q, k, v)[0], merged, rtol=1e-5, atol=1e-6)


# nn.TransformerEncoderLayer and nn.TransformerEncoder


def _counts_the_fast_path(monkeypatch):
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: calls.append(1) or fast(*a, **k))
    return calls


@both_forms
@pytest.mark.parametrize("mode", ["fast", "eval with gradients", "train"])
def test_encoder_layers_equal_merged_weights(form, mode, monkeypatch):
    calls = _counts_the_fast_path(monkeypatch)
    module = encoder(layers=1).layers[0].train(mode == "train")
    model = pt.Model(module)
    adapter = adapter_for(model, form, lambda s: s.kind in form.kinds)
    roles = {s.split(".")[-1] for s in adapter.patches}
    assert {"in_proj_weight", "out_proj", "linear1", "linear2"} <= roles
    assert ("norm1" in roles) == (form.name == "full")
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    pad = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
    with torch.set_grad_enabled(mode != "fast"):
        bare = module(x, src_key_padding_mask=pad)
        model.attach(adapter, "a")
        with model.using("a"):
            attached = module(x, src_key_padding_mask=pad)
        merged = adapter.merge_into(model).module(x, src_key_padding_mask=pad)
    assert len(calls) == (3 if mode == "fast" else 0)  # attaching does not turn the fast path off
    torch.testing.assert_close(attached[~pad], merged[~pad], rtol=1e-5, atol=1e-5)
    assert (attached - bare)[~pad].abs().max() > 0.05
    model.detach()
    with torch.set_grad_enabled(mode != "fast"):
        assert torch.equal(module(x, src_key_padding_mask=pad)[~pad], bare[~pad])


@both_forms
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoders_equal_merged_weights(form, batch_first, training):
    module = encoder(batch_first).train(training)
    model = pt.Model(module)
    adapter = adapter_for(model, form, lambda s: s.kind in form.kinds)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            bare = module(x)
            merged = adapter.merge_into(model).module(x)
            model.attach(adapter, "a")
            with model.using("a"):
                attached = module(x)
            model.detach()
        torch.testing.assert_close(attached, merged, rtol=1e-5, atol=1e-5)
        assert (attached - bare).abs().max() > 0.02


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_and_depth_of_an_encoder(batch_first):
    model = pt.Model(encoder(batch_first, layers=3))
    assert [(s.layer, s.depth) for s in model.select("linear1")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert {s.rows for s in model.sites if s.path} == {batch_first}


def test_a_sequence_first_decoder_refuses_rows_by_name():
    """Its linear layers are called with [T, B, d]: taking the first dimension for the batch would mix up the rows."""
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0).eval()
    model = pt.Model(layer)
    model.attach(adapter_for(model, FORMS[0], "linear1"), "a")
    x = torch.randn(4, 2, 16)  # four tokens of two rows
    with model.using("a"):
        layer(x, x)
    with model.using(["a", None, "a", None]), pytest.raises(MixError, match="site 'linear1' does not see the rows"):
        layer(x, x)


# Fused experts


@both_forms
def test_fused_experts_equal_merged_weights(form):
    module, batch = tiny("mixtral")
    model = pt.Model(module)
    adapter = adapter_for(model, form, "experts")
    assert len(adapter.patches) == 4
    with torch.no_grad():
        bare = output(module(**batch))
        merged = output(adapter.merge_into(model).module(**batch))
        model.attach(adapter, "a")
        with model.using("a"):
            attached = output(module(**batch))
        with model.using({"a": 0.5}):
            half = output(module(**batch))
        model.detach()
        half_merged = output(adapter.merge_into(model, 0.5).module(**batch))
    torch.testing.assert_close(attached, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half, half_merged, rtol=1e-5, atol=1e-5)
    assert (attached - bare).abs().max() > 0.01


def test_each_expert_has_factors_of_its_own():
    module, _ = tiny("mixtral")
    model = pt.Model(module)
    patch = next(iter(adapter_for(model, FORMS[0], "experts & gate_up_proj").patches.values()))
    assert patch.A.shape == (4, 2, 32) and patch.B.shape == (4, 128, 2)
    delta = patch.delta()
    for expert in range(4):
        torch.testing.assert_close(delta[expert], patch.B[expert] @ patch.A[expert] * patch.form.scale)


# A weight that another module reads


@both_forms
def test_a_tied_head_reads_the_adapted_embedding(form):
    module = Tagger()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        bare = module(ids)
        model = pt.Model(module, read_weights="emb")
        assert model.site("emb").read == "weight" and model.site("lin").read == "call"
        adapter = adapter_for(model, form, "emb | lin")
        model.attach(adapter, "a")
        with model.using("a"):
            attached = module(ids)
        model.detach()
        merged = adapter.merge_into(model).module(ids)
    torch.testing.assert_close(attached, merged, rtol=1e-5, atol=1e-6)
    assert (attached - bare).abs().max() > 0.05


def test_without_read_weights_only_the_call_is_adapted():
    """What read_weights is for: the head would keep the base's weight."""
    module = Tagger()
    model = pt.Model(module)
    adapter = adapter_for(model, FORMS[0], "emb")
    model.attach(adapter, "a")
    ids = torch.tensor([[1, 2, 3]])
    weight = module.emb.weight + adapter.patches["emb"].delta()
    with torch.no_grad(), model.using("a"):
        torch.testing.assert_close(
            module(ids), F.linear(module.lin(weight[ids]).tanh(), module.emb.weight), rtol=1e-5, atol=1e-6
        )


def test_read_weights_that_match_nothing_are_an_error():
    with pytest.raises(SiteError, match="no site matches 'embb' \\(did you mean 'emb'\\?\\)"):
        pt.Model(Tagger(), read_weights="embb").sites  # noqa: B018


# What cannot act on a weight


@pytest.mark.parametrize("mix", [["a", None], ["a", "b"], [{"a": 0.5}, {"a": 1.0}]])
def test_a_mix_by_row_is_refused_by_name(mix):
    module = Tagger()
    model = pt.Model(module, read_weights="emb")
    for seed, name in enumerate("ab"):
        model.attach(adapter_for(model, FORMS[0], "emb", seed), name)
    with model.using(mix), pytest.raises(MixError, match=r"the weight of site 'emb' is read.*PerRow\(2 rows of a"):
        module(torch.tensor([[1, 2], [3, 4]]))


def test_rows_that_agree_at_the_site_are_not_refused():
    """Where every row has the same adapter there, or none of the rows' adapters is there."""
    module = Tagger()
    model = pt.Model(module, read_weights="emb")
    model.attach(adapter_for(model, FORMS[0], "emb"), "a")
    model.attach(adapter_for(model, FORMS[0], "lin"), "lin")
    ids = torch.tensor([[1, 2], [3, 4]])
    with torch.no_grad():
        rows = []
        for mix in ({"a": 1.0, "lin": 1.0}, {"a": 1.0}, "lin", None):
            with model.using(mix):
                rows.append(module(ids))
        with model.using([{"a": 1.0, "lin": 1.0}, "a"]):
            torch.testing.assert_close(module(ids), torch.stack([rows[0][0], rows[1][1]]), rtol=1e-5, atol=1e-6)
        with model.using(["lin", None]):
            torch.testing.assert_close(module(ids), torch.stack([rows[2][0], rows[3][1]]), rtol=1e-5, atol=1e-6)


def test_averaged_parameters_are_refused_by_name():
    model = pt.Model(Tagger(), read_weights="emb")
    for seed, name in enumerate("ab"):
        model.attach(adapter_for(model, FORMS[0], "emb", seed), name)
    with (
        model.using(pt.Fixed({"a": 0.5, "b": 0.5}, combines="parameters")),
        pytest.raises(MixError, match="the weight of site 'emb' is read.*only a mix of outputs"),
    ):
        model.module(torch.tensor([[1, 2]]))


class Shift(Form):
    """Adds a vector to the output: no change of a weight."""

    name = "shift"
    kinds = ("linear", "embedding")

    def patch(self, site):
        return ShiftPatch(self, site)


class ShiftPatch(Patch):
    def __init__(self, form, site):
        super().__init__(form, site)
        self.shift = nn.Parameter(torch.ones(site.d_out))

    def contribute(self, x, y, call=None):
        return self.shift.expand_as(y)


def test_a_form_without_a_dense_change_is_refused_by_name():
    module = Tagger()
    model = pt.Model(module, read_weights="emb")
    model.attach(pt.Adapter.new(model, Shift(), "emb"), "a")
    with model.using("a"), pytest.raises(SiteError, match="the form 'shift' has no dense change.*site 'emb'"):
        module(torch.tensor([[1, 2]]))


def test_a_failing_form_is_not_taken_for_a_missing_attribute():
    """An AttributeError out of a property would make nn.Module answer with the bare weight, silently."""
    module = Tagger()
    model = pt.Model(module, read_weights="emb")
    model.attach(adapter_for(model, FORMS[0], "emb"), "a")
    model._hub.slots["emb"].patches["a"].__dict__["deltas"] = lambda: torch.no_such_function()
    with model.using("a"), pytest.raises(RuntimeError, match="adapters at site 'emb' failed: .*no_such_function"):
        module(torch.tensor([[1, 2]]))


# When the change is computed


def _counted(model, site, name):
    calls = []
    patch = model._hub.slots[site].patches[name]
    patch.__dict__["deltas"] = lambda deltas=patch.deltas: calls.append(1) or deltas()
    return calls


def test_the_delta_is_computed_again_only_when_it_changes():
    module = Tagger().requires_grad_(False)
    model = pt.Model(module, read_weights="emb")
    adapter = adapter_for(model, FORMS[0], "emb").trainable(False)
    model.attach(adapter, "a")
    calls = _counted(model, "emb", "a")
    ids = torch.tensor([[1, 2, 3]])

    def run():
        before = len(calls)
        out = module(ids)
        return out, len(calls) - before

    run()
    assert not calls  # nothing acts
    with model.using("a"):
        first, count = run()
        assert count == 1  # the embedding and the head read the same one
        again, count = run()
        assert count == 0 and torch.equal(again, first)
        with torch.no_grad():
            next(adapter.parameters()).mul_(2)
        other, count = run()
        assert count == 1 and not torch.equal(other, first)
        with torch.no_grad():
            module.emb._parameters["weight"].add_(1.0)
        moved, count = run()
        assert count == 1 and not torch.equal(moved, other)
        with model.using({"a": 0.5}):
            half, count = run()
            assert count == 1 and not torch.equal(half, moved)
        assert torch.equal(run()[0], moved)
        replaced = module.emb._parameters["weight"].detach().clone()
        module.emb.weight = nn.Parameter(replaced * 0.5, requires_grad=False)
        assert run()[1] == 1
    # while it is learned, each reader has a graph of its own
    adapter.trainable()
    with model.using("a"):
        assert run()[1] == 2 and run()[1] == 2


def test_gradients_flow_to_the_adapter_through_a_read_weight():
    module = Tagger().requires_grad_(False)
    model = pt.Model(module, read_weights="emb")
    adapter = adapter_for(model, FORMS[0], "emb").trainable()
    model.attach(adapter, "a")
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):  # a second step must not meet the first one's graph
        with model.using("a"):
            module(ids).square().sum().backward()
    got = {n: p.grad / 2 for n, p in adapter.named_parameters()}
    patch = adapter.patches["emb"]
    weight = module.emb.weight + (patch.B @ patch.A).T * patch.form.scale
    loss = F.linear(module.lin(weight[ids]).tanh(), weight).square().sum()
    for (name, p), want in zip(
        adapter.named_parameters(), torch.autograd.grad(loss, list(adapter.parameters())), strict=True
    ):
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-4, msg=name)
        assert p.grad.any()
    assert module.emb.weight.grad is None


@both_forms
def test_a_base_that_learns_gets_its_gradients_beside_a_frozen_adapter(form):
    """A sum that was kept from a forward without gradients must not cut the base off."""
    module = Tagger()
    model = pt.Model(module, read_weights="emb")
    model.attach(adapter_for(model, form, "emb").trainable(False), "a")
    ids = torch.tensor([[1, 2, 3]])
    with model.using("a"):
        with torch.no_grad():
            module(ids)
        for _ in range(2):
            module.emb._parameters["weight"].grad = None
            module(ids).sum().backward()
            assert module.emb._parameters["weight"].grad.any()


def test_a_sum_of_inference_mode_is_not_met_by_a_later_backward():
    module = Tagger().requires_grad_(False)
    module.lin.requires_grad_(True)
    model = pt.Model(module, read_weights="emb")
    model.attach(adapter_for(model, FORMS[0], "emb").trainable(False), "a")
    ids = torch.tensor([[1, 2, 3]])
    with model.using("a"):
        with torch.inference_mode():
            first = module(ids)
        out = module(ids)
        out.sum().backward()
    assert torch.equal(out.detach(), first) and module.lin.weight.grad.any()


def test_a_bf16_weight_is_rounded_once():
    module = Tagger().to(torch.bfloat16)
    model = pt.Model(module, read_weights="emb")
    adapter = adapter_for(model, FORMS[0], "emb")
    model.attach(adapter, "a")
    with torch.no_grad(), model.using("a"):
        seen = module.emb.weight
    want = (module.emb.weight.float() + adapter.patches["emb"].delta()).to(torch.bfloat16)
    assert seen.dtype == torch.bfloat16 and torch.equal(seen, want)
