"""Attachment on 27 families: sites and roles, life of an adapter from a fresh start to detaching, and exact merging."""

import warnings

import pytest
import torch
from zoo import FAMILIES, output, tiny

import polytask as pt
from polytask.core.errors import MixError, SiteError
from polytask.core.hub import InactiveSiteWarning

torch.set_num_threads(1)

_BERT = "query key value attn_out up down"
_TEXT = "token position"
_LLAMA = "token query key value attn_out gate up down head"

# Which roles a family's sites have, beside norms, blocks, attention modules and the input.
ROLES = {
    "bert": f"{_BERT} {_TEXT} type pooler",
    "roberta": f"{_BERT} {_TEXT} type pooler",
    "distilbert": f"{_BERT} {_TEXT}",
    "deberta-v2": f"{_BERT} {_TEXT}",
    "electra": f"{_BERT} {_TEXT} type projection",
    "albert": f"{_BERT} {_TEXT} type pooler projection",
    "gpt2": f"qkv attn_out up down {_TEXT} head",
    "gpt-neox": "qkv attn_out up down token head",
    "opt": f"{_BERT} {_TEXT} head",
    "bloom": "qkv attn_out up down token head",
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "phi3": "token qkv attn_out gate_up down head",
    "mixtral": "token query key value attn_out gate_up down router head",
    "t5": f"{_BERT} {_TEXT} head",
    "bart": f"{_BERT} {_TEXT} head",
    "vit": f"{_BERT} position patch pooler other",  # other: the class token
    "deit": f"{_BERT} position patch pooler other",
    "swin": f"{_BERT} position patch projection",
    "clip": f"{_BERT} {_TEXT} patch projection other",  # other: the class token and the logit scale
    "whisper": f"{_BERT} {_TEXT} conv head",
    "wav2vec2": f"{_BERT} projection conv other",  # other: the vector that masks spans
    "ast": f"{_BERT} position patch other",
    "resnet": "conv",
}
NO_ROLE = {"norm", "block", "attention", "input"}

# Sites that the family's forward never reaches: an embedding that the stacks have their own name for.
UNREACHED = {"t5": {"shared"}, "bart": {"model.shared"}}

# A weight norm computes this weight: a LoRA acts on the output there, and a change of the weight cannot be merged.
COMPUTED = {"encoder.pos_conv_embed.conv"}

# Stacks of blocks: what comes before the block's number, how many blocks there are.
STACKS = {
    "bert": {"encoder.layer": 2},
    "albert": {"encoder.albert_layer_groups": 1},
    "gpt2": {"transformer.h": 2},
    "llama": {"model.layers": 2},
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "bart": {"model.encoder.layers": 2, "model.decoder.layers": 2},
    "clip": {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 2},
    "swin": {"encoder.layers": 4},
    "resnet": {"encoder.stages": 4},
    "wav2vec2": {"feature_extractor.conv_layers": 3, "encoder.layers": 2},
}


@pytest.fixture(autouse=True)
def _no_unreached_sites():
    """A site that does not act is a bug unless the test says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", InactiveSiteWarning)
        yield


def _sites(family):
    """The sites that a LoRA gets in the tests: its default ones, convolutions, and the embeddings that are reached."""

    def pick(site):
        return site.name not in UNREACHED.get(family, ()) and (
            site.kind in ("conv", "embedding")
            or (site.kind == "linear" and site.role not in ("head", "pooler", "router"))
        )

    return pick


def _run(model, batch):
    with torch.no_grad():
        return output(model(**batch))


def _values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles(family):
    model = pt.Model(tiny(family)[0])
    assert {site.role for site in model.sites} - NO_ROLE == set(ROLES[family].split())
    assert len({site.name for site in model.sites}) == len(model.sites)
    for site in model.sites:  # every role that is found can be asked for, and asking gives these sites
        asked = {s.name for s in model.select(f"role:{site.role}")}
        assert asked == {s.name for s in model.sites if s.role == site.role}


@pytest.mark.parametrize("family", STACKS)
def test_layer_and_depth_count_the_blocks_of_each_stack(family):
    model = pt.Model(tiny(family)[0])
    blocks = [site for site in model.sites if site.kind == "block"]
    assert len(blocks) == sum(STACKS[family].values())
    for prefix, count in STACKS[family].items():
        stack = [site for site in blocks if site.path.startswith(prefix + ".")]
        assert [site.layer for site in stack] == list(range(count))
        assert [site.depth for site in stack] == [i / (count - 1) if count > 1 else 0.0 for i in range(count)]
        for block in stack:
            inside = [site for site in model.sites if site.path.startswith(block.path + ".")]
            assert inside and {(site.layer, site.depth) for site in inside} == {(block.layer, block.depth)}


def test_gpt2_keeps_its_transposed_layout():
    model = pt.Model(tiny("gpt2")[0])
    site = model.site("transformer.h.0.attn.c_attn")
    assert site.transposed and site.shape == (32, 96) and (site.d_in, site.d_out) == (32, 96)
    assert not model.site("lm_head").transposed
    adapter = pt.Adapter.new(model, pt.LoRA(rank=2, init="random"), "qkv")
    assert adapter.patches[site.name].delta().shape == (32, 96)


def test_albert_has_one_site_for_each_shared_module():
    module, batch = tiny("albert")
    model = pt.Model(module)
    assert len(model.select("query")) == 1 and module.config.num_hidden_layers == 2
    adapter = pt.Adapter.new(model, pt.LoRA(rank=2, init="random"), "query")
    calls = []
    model.attach(adapter, "a")
    patch = next(iter(model._hub.slots.values())).patches["a"]
    patch.__dict__["add"] = lambda *args, add=patch.add: calls.append(1) or add(*args)
    with model.using("a"):
        _run(module, batch)
    assert len(calls) == 2  # the shared layer runs once for each layer, with the same adapter


def test_mixtral_has_fused_experts_and_a_router():
    model = pt.Model(tiny("mixtral")[0])
    experts = model.select("experts")
    assert [(s.layer, s.role, s.shape, s.read) for s in experts] == [
        (0, "gate_up", (4, 128, 32), "weight"),
        (0, "down", (4, 32, 64), "weight"),
        (1, "gate_up", (4, 128, 32), "weight"),
        (1, "down", (4, 32, 64), "weight"),
    ]
    assert [(s.kind, s.param) for s in model.select("router")] == [("parameter", "weight")] * 2
    assert {s.role for s in model.select("linear")} == {"query", "key", "value", "attn_out"}


def test_tables_whose_weight_is_read_are_known():
    """Where x is not what the table is looked up with, the adapter acts on the table."""
    read = {
        "opt": {"model.decoder.embed_positions"},
        "bart": {"model.encoder.embed_positions", "model.decoder.embed_positions"},
        "whisper": {"model.decoder.embed_positions"},
        "deberta-v2": {"encoder.rel_embeddings"},
        "bert": set(),
        "gpt2": set(),
        "t5": set(),
    }
    for family, names in read.items():
        sites = pt.Model(tiny(family)[0]).select("kind:embedding")
        assert {site.name for site in sites if site.read == "weight"} == names, family


def test_a_network_without_linear_layers_says_what_it_has():
    with pytest.raises(SiteError, match=r"no site matches 'linear'.*kinds conv \(14\)"):
        pt.Adapter.new(pt.Model(tiny("resnet")[0]))


def _train_a_step(model, adapter, name, batch):
    """One SGD step that the whole output has a part in; returns the gradients."""
    adapter.trainable()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    with model.using(name):
        out = output(model.module(**batch))
        generator = torch.Generator().manual_seed(0)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
    optimizer.step()
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    optimizer.zero_grad()
    adapter.trainable(False)
    return grads


def _check_a_life(family, adapter_of, tmp_path, starting):
    """From fresh to detached; ``starting`` names the parameters that get the first gradients."""
    module, batch = tiny(family)
    module.requires_grad_(False)
    classes = [type(m) for m in module.modules()]
    bare, before = _run(module, batch), _values(module)
    model = pt.Model(module)
    adapter = adapter_of(model)
    model.attach(adapter, "a")
    assert torch.equal(_run(module, batch), bare)  # present, and not acting
    with model.using("a"):
        assert torch.equal(_run(module, batch), bare)

    start = adapter.state()
    grads = _train_a_step(model, adapter, "a", batch)
    moved = {name for name, value in adapter.state().items() if not torch.equal(value, start[name])}
    expected = {name for name in start if starting(name, adapter)}
    assert expected and all(grads[name] is not None for name in expected)
    assert moved == expected - {name for name in expected if not grads[name].any()}
    # a softmax does not see what is added to all keys alike: nearly every other parameter must have moved
    assert len(moved) > 0.8 * len(expected)

    with model.using("a"):
        changed = _run(module, batch)
    assert not torch.equal(changed, bare) and changed.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())

    adapter.save(tmp_path / "a")
    loaded = pt.Adapter.load(tmp_path / "a")
    assert loaded.hash == adapter.hash
    other = pt.Model(tiny(family)[0])
    other.attach(loaded, "b")
    with other.using("b"):
        assert torch.equal(_run(other.module, batch), changed)

    model.detach("a")
    assert [type(m) for m in module.modules()] == classes
    assert not [key for m in module.modules() for key in vars(m) if key.startswith("_polytask")]
    assert torch.equal(_run(module, batch), bare)
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


def _zero_factor(name, adapter):
    """Of a LoRA the factor that starts at zero, which is the only one that gets a gradient in the first step."""
    site, _, parameter = name.partition(":")
    return parameter == ("A" if adapter.patches[site].site.kind == "embedding" else "B")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_life_of_a_lora(family, tmp_path):
    _check_a_life(
        family, lambda model: pt.Adapter.new(model, pt.LoRA(rank=2), _sites(family), seed=1), tmp_path, _zero_factor
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral", "t5", "vit", "wav2vec2", "resnet"])
def test_the_life_of_a_full_change(family, tmp_path):
    kinds = ("linear", "conv", "embedding", "norm", "experts")

    def make(model):
        skip = UNREACHED.get(family, set()) | COMPUTED
        # the pooler is called, and has no part in the output that is compared
        sites = [s.name for s in model.sites if s.kind in kinds and s.name not in skip and s.role != "pooler"]
        return pt.Adapter.new(model, pt.Full(), lambda site: site.name in sites)

    _check_a_life(family, make, tmp_path, lambda name, adapter: True)


@pytest.mark.parametrize("form", [pt.LoRA(rank=2, init="random"), pt.Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_is_the_same_as_merged(family, form):
    """The strongest check of what a site sees: adding the change to the weight must give what attaching gives."""
    module, batch = tiny(family)
    model = pt.Model(module)
    skip = UNREACHED.get(family, set()) | COMPUTED | {"masked_spec_embed"}  # used in training only
    adapter = pt.Adapter.new(
        model, form, lambda s: s.kind not in ("block", "attention", "input") and s.name not in skip, seed=1
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in adapter.parameters():
            p.copy_(0.3 * p if form.name == "lora" else 0.05 * torch.randn(p.shape, generator=generator))
    bare = _run(module, batch)
    model.attach(adapter, "a")
    with model.using("a"):
        attached = _run(module, batch)
    model.detach()
    merged = adapter.merge_into(model, untie=True)
    torch.testing.assert_close(attached, _run(merged.module, batch), rtol=1e-4, atol=2e-5)
    assert (attached - bare).abs().max() > 0.05


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "clip"])  # each of CLIP's logits belongs to two rows
def test_rows_with_adapters_of_their_own(family):
    """One batch with two adapters and a bare row gives each row what its adapter gives alone."""
    module, batch = tiny(family)
    model = pt.Model(module)
    sites = [
        s.name
        for s in model.sites
        if _sites(family)(s) and s.rows and s.read == "call" and s.name != "model.encoder.embed_positions"
    ]
    for seed, name in enumerate("ab"):
        adapter = pt.Adapter.new(model, pt.LoRA(rank=2 + seed, init="random"), lambda s: s.name in sites, seed=seed)
        model.attach(adapter, name)
    alone = []
    for name in ("a", None, "b"):
        with model.using(name):
            alone.append(_run(module, batch))
    with model.using(["a", None, "b"]):
        rows = _run(module, batch)
    for i, want in enumerate(alone):
        torch.testing.assert_close(rows[i], want[i], rtol=1e-4, atol=1e-5)
    assert (alone[0][0] - alone[1][0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"),
        ("deberta-v2", "encoder.layer.0.attention.self.query_proj"),
        ("whisper", "model.encoder.embed_positions"),
        ("opt", "model.decoder.embed_positions"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_site_that_does_not_see_rows_refuses_them_by_name(family, site):
    module, batch = tiny(family)
    model = pt.Model(module)
    model.attach(pt.Adapter.new(model, pt.LoRA(rank=2, init="random"), site), "a")
    with model.using(["a", "a", None]), pytest.raises(MixError, match=site.replace(".", r"\.")):
        _run(module, batch)
    with model.using("a"):
        alone = _run(module, batch)
    with model.using(["a", "a", "a"]):  # the same for all rows is no difference by row
        torch.testing.assert_close(_run(module, batch), alone)
