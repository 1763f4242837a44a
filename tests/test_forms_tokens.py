"""Forms that act on tokens: against real text, against the real PEFT, against plain attention over both."""

from __future__ import annotations

import pytest
import torch
from zoo import output, tiny

import polytask as pt

peft = pytest.importorskip("peft")


def run(model, batch, mix=None):
    with torch.no_grad(), model.using(mix):
        return output(model.module(**batch))


def moved(adapter, seed=0, by=0.5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.mark.parametrize("network", ["gpt2", "llama", "opt", "gpt-neox", "bloom", "qwen3", "gemma2", "phi3", "mixtral"])
def test_a_prompt_of_word_vectors_is_these_words(network):
    module, batch = tiny(network)
    model = pt.Model(module)
    ids = batch["input_ids"]
    words = torch.tensor([5, 9, 7])
    adapter = pt.Adapter.new(model, pt.Prompt(length=3))
    table = module.get_input_embeddings()
    with torch.no_grad():
        next(iter(adapter.patches.values())).P.copy_(table(words))
    model.attach(adapter, "a")
    full = torch.ones_like(ids)
    with_words = run(model, {"input_ids": torch.cat([words.expand(len(ids), 3), ids], 1)})
    assert torch.allclose(run(model, {"input_ids": ids}, "a"), with_words[:, 3:], atol=1e-5)
    assert torch.allclose(run(model, {"input_ids": ids, "attention_mask": full}, "a"), with_words[:, 3:], atol=1e-5)


@pytest.mark.parametrize("network", ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2"])
def test_encoders_take_prompts_and_keep_their_shape(network):
    module, batch = tiny(network)
    model = pt.Model(module)
    before = run(model, batch)
    for i, length in enumerate((2, 5)):
        model.attach(moved(pt.Adapter.new(model, pt.Prompt(length=length), seed=i), i), f"a{i}")
    mixed = run(model, batch, ["a0", "a1", None])
    assert mixed.shape == before.shape and not torch.allclose(mixed[0], before[0], atol=1e-4)
    for row, mix in enumerate(("a0", "a1", None)):  # prompts of two lengths, and a row without
        alone = run(model, {k: v[row : row + 1] for k, v in batch.items()}, mix)
        real = batch["attention_mask"][row].bool()
        assert torch.allclose(mixed[row][real], alone[0][real], atol=1e-5)


def test_two_prompts_at_one_half_are_their_mean():
    module, batch = tiny("llama")
    model = pt.Model(module)
    prompts = [moved(pt.Adapter.new(model, pt.Prompt(length=4), seed=i), i) for i in range(2)]
    mean = prompts[0].copy()
    mean.load_state({k: (v + prompts[1].state()[k]) / 2 for k, v in prompts[0].state().items()})
    for i, adapter in enumerate((*prompts, mean)):
        model.attach(adapter, f"a{i}")
    assert torch.allclose(run(model, batch, {"a0": 0.5, "a1": 0.5}), run(model, batch, "a2"), atol=1e-6)


@pytest.mark.parametrize("network", ["gpt2", "llama"])
def test_peft_reads_our_prompt_and_we_read_theirs(network, tmp_path):
    module, batch = tiny(network)
    ids = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    model = pt.Model(module)
    ours = moved(pt.Adapter.new(model, pt.Prompt(length=4)))
    ours.save(tmp_path / "ours")
    model.attach(ours, "a")
    wanted = run(model, ids, "a")
    model.detach()
    theirs = peft.PeftModel.from_pretrained(module, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**ids).logits[:, 4:], wanted, atol=1e-5)

    module, _ = tiny(network)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    made = peft.get_peft_model(module, config).eval()
    made.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = made(**ids).logits[:, 6:]
        text = made.generate(**ids, max_new_tokens=4, do_sample=False)
    fresh = pt.Model(tiny(network)[0])
    fresh.attach(pt.Adapter.load(tmp_path / "theirs"), "b")
    assert torch.allclose(run(fresh, ids, "b"), logits, atol=1e-5)
    with fresh.using("b"):
        assert torch.equal(fresh.module.generate(**ids, max_new_tokens=4, do_sample=False), text)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_we_read_peft_s_p_tuning(encoder, tmp_path):
    module, batch = tiny("llama")
    ids = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type=encoder
    )
    torch.manual_seed(0)
    made = peft.get_peft_model(module, config).eval()
    made.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = made(**ids).logits[:, 5:]
    fresh = pt.Model(tiny("llama")[0])
    fresh.attach(pt.Adapter.load(tmp_path / "theirs"), "b")
    assert torch.allclose(run(fresh, ids, "b"), logits, atol=1e-5)


@pytest.mark.parametrize("form", [pt.PTuning(length=4), pt.PTuning(length=4, encoder="lstm", hidden=6)])
def test_p_tuning_ends_as_the_prompt_that_its_network_gives(form, tmp_path):
    module, batch = tiny("llama")
    model = pt.Model(module)
    adapter = moved(pt.Adapter.new(model, form))
    model.attach(adapter, "a")
    plain = form.finish(adapter)
    assert plain.form.name == "prompt" and plain.size < adapter.size
    plain.save(tmp_path / "p")
    model.attach(pt.Adapter.load(tmp_path / "p"), "b")
    assert torch.allclose(run(model, batch, "a"), run(model, batch, "b"), atol=1e-6)


def test_prompts_start_from_words():
    class Letters:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) % 30 for c in text]}

    module, _ = tiny("llama")
    model = pt.Model(module, processor=Letters())
    table = module.get_input_embeddings().weight
    text = pt.Adapter.new(model, pt.Prompt(length=5, init="text", text="abc"))
    ids = [ord(c) % 30 for c in "abcab"]
    assert torch.equal(next(iter(text.patches.values())).P, table[ids])
    labels = pt.Adapter.new(model, pt.Prompt(length=2, init="labels", text="ab, c"))
    first = table[[ord("a") % 30, ord("b") % 30]].mean(0)
    assert torch.allclose(next(iter(labels.patches.values())).P, torch.stack([first, table[ord("c") % 30]]))
    with pytest.raises(pt.PolytaskError, match="needs a model with a tokenizer"):
        pt.Adapter.new(pt.Model(module), pt.Prompt(init="text", text="x"))


@pytest.mark.parametrize("network", ["bert", "gpt2", "llama", "qwen3", "t5", "bart", "vit", "gemma2"])
def test_a_prefix_is_attention_over_both(network):
    """The additive change equals plain attention over the prefix's keys and values and the text's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from polytask.core import tokens

    module, batch = tiny(network)
    model = pt.Model(module)
    adapter = pt.Adapter.new(model, pt.Prefix(length=3), seed=1)
    model.attach(adapter, "a")
    seen = []

    def both(module, query, key, value, attention_mask, **options):
        patch = adapter.patches[paths[id(module)]]
        K, V = (t[None].expand(len(query), -1, -1, -1) for t in (patch.K, patch.V))
        heads = tokens.Heads(
            query, torch.cat([K, key], 2), torch.cat([V, value], 2), None, options["scaling"], False,
            softcap=options.get("softcap"),
        )  # fmt: skip
        scores = heads.scores(heads.key)
        m = K.shape[2]
        if options.get("position_bias") is not None:
            scores[..., m:] += options["position_bias"]
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            scores[..., m:] = scores[..., m:].masked_fill(~allowed[..., : key.shape[2]], float("-inf"))
        elif options.get("is_causal", getattr(module, "is_causal", False)) and query.shape[2] > 1:
            later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
            scores[..., m:] = scores[..., m:].masked_fill(later, float("-inf"))
        seen.append(module)
        out = heads.look(scores.softmax(-1), heads.value)
        return out.reshape(len(query), query.shape[2], query.shape[1], -1), None

    wanted = run(model, batch, "a")
    model.detach()
    paths = {id(model.module.get_submodule(path)): path for path in adapter.patches}
    ALL_ATTENTION_FUNCTIONS.register("both", both)
    try:
        real = {id(m): m.config for m in module.modules() if id(m) in paths}
        for m in module.modules():
            if id(m) in paths:

                class Config(type("Base", (), {})):
                    def __init__(self, config):
                        self.__dict__.update(inner=config, _attn_implementation="both")

                    def __getattr__(self, name):
                        return getattr(self.inner, name)

                m.config = Config(real[id(m)])
        got = run(model, batch)
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("both", None)
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("both", None)
    assert len(seen) == len(adapter.patches)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_silent_key_halves_a_lonely_token():
    """One key of zeros with values of zeros: a token that sees only itself, with score 0, gets half of its value."""
    module, batch = tiny("bert")
    model = pt.Model(module)
    adapter = pt.Adapter.new(model, pt.Prefix(length=1))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    from polytask.core.form import Call
    from polytask.core.tokens import Heads

    patch = next(iter(adapter.patches.values()))
    H, G, D = patch.site.shape
    value = torch.randn(2, G, 1, D)
    heads = Heads(torch.zeros(2, H, 1, D), torch.zeros(2, G, 1, D), value, None, 1.0, False)
    y = heads.look(torch.ones(2, H, 1, 1), value)
    assert torch.allclose(y + patch.contribute(y, y, Call(heads=heads)), y / 2)


def test_a_gated_prefix_starts_as_the_base_and_is_learned():
    module, batch = tiny("llama")
    model = pt.Model(module)
    before = run(model, batch)
    adapter = pt.Adapter.new(model, pt.Prefix(length=4, gated=True))
    model.attach(adapter, "a")
    assert torch.equal(run(model, batch, "a"), before)


def test_a_reparametrised_prefix_ends_as_plain_keys_and_values(tmp_path):
    module, batch = tiny("llama")
    model = pt.Model(module)
    form = pt.Prefix(length=4, hidden=8, gated=True)
    adapter = moved(pt.Adapter.new(model, form))
    model.attach(adapter, "a")
    plain = form.finish(adapter)
    assert plain.shared is None and plain.form.hidden is None
    plain.save(tmp_path / "p")
    model.attach(pt.Adapter.load(tmp_path / "p"), "b")
    assert torch.allclose(run(model, batch, "a"), run(model, batch, "b"), atol=1e-6)


@pytest.mark.parametrize("network", ["gpt2", "llama", "qwen3"])
def test_peft_reads_our_prefix_and_we_read_theirs(network, tmp_path):
    module, batch = tiny(network)
    ids = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    model = pt.Model(module)
    ours = pt.Adapter.new(model, pt.Prefix(length=4, shifted=True), sites="kind:attention | kind:input")
    ours.save(tmp_path / "ours")
    model.attach(ours, "a")
    wanted = run(model, ids, "a")
    model.detach()
    theirs = peft.PeftModel.from_pretrained(module, str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(**ids).logits, wanted, atol=1e-5)

    module, _ = tiny(network)
    made = peft.get_peft_model(module, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    made.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = made(**ids).logits
        text = made.generate(**ids, max_new_tokens=4, do_sample=False)
    fresh = pt.Model(tiny(network)[0])
    loaded = pt.Adapter.load(tmp_path / "theirs")
    fresh.attach(loaded, "b")
    assert torch.allclose(run(fresh, ids, "b"), logits, atol=1e-5)
    with fresh.using("b"):
        assert torch.equal(fresh.module.generate(**ids, max_new_tokens=4, do_sample=False), text)
    loaded.save(tmp_path / "again")
    assert pt.Adapter.load(tmp_path / "again").hash == loaded.hash


def test_what_a_prefix_cannot_act_on_is_said():
    model = pt.Model(tiny("bloom")[0])
    with pytest.raises(pt.PolytaskError, match="does not use transformers' attention functions"):
        pt.Adapter.new(model, "prefix")
    with pytest.raises(pt.PolytaskError, match="takes no token ids"):
        pt.Adapter.new(pt.Model(tiny("resnet")[0]), "prompt")


@pytest.mark.parametrize("depth", [1, 2])
def test_visual_prompts_stand_behind_the_class_token(depth):
    module, batch = tiny("vit")
    model = pt.Model(module)
    before = run(model, batch)
    adapter = pt.Adapter.new(model, pt.VisualPrompt(length=3, depth=depth))
    assert adapter.size == 3 * depth * model.width
    model.attach(adapter, "a")
    after = run(model, batch, "a")
    assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-4)
    # their order does not matter
    with torch.no_grad():
        P = next(iter(adapter.patches.values())).P
        P.copy_(P[:, [2, 0, 1]])
    assert torch.allclose(run(model, batch, "a"), after, atol=1e-5)
    # the same by hand, through the network's own parts
    d = module.config.hidden_size
    with torch.no_grad():
        hidden = module.embeddings(batch["pixel_values"])
        blocks = [
            m
            for n, m in module.named_modules()
            if model.sites and any(s.name == n and s.kind == "block" for s in model.sites)
        ]
        for i, block in enumerate(blocks):
            if i < depth:
                rest = hidden[:, 1:] if i == 0 else hidden[:, 4:]
                hidden = torch.cat([hidden[:, :1], P[i].expand(len(hidden), 3, d), rest], 1)
            hidden = block(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = module.layernorm(hidden)
    assert torch.allclose(torch.cat([hidden[:, :1], hidden[:, 4:]], 1), after, atol=1e-5)
    with pytest.raises(pt.PolytaskError, match="every row of a batch needs a visual prompt"):
        run(model, batch, ["a", None, "a"])


def test_rows_may_have_different_visual_prompts():
    module, batch = tiny("vit")
    model = pt.Model(module)
    for i in range(3):
        model.attach(moved(pt.Adapter.new(model, pt.VisualPrompt(length=2, depth=2), seed=i), i), f"a{i}")
    mixed = run(model, batch, ["a0", "a1", "a2"])
    for i in range(3):
        alone = run(model, {k: v[i : i + 1] for k, v in batch.items()}, f"a{i}")
        assert torch.allclose(mixed[i], alone[0], atol=1e-5)


def test_ept_starts_as_its_prompt_and_changes_words_by_their_place():
    module, batch = tiny("llama")
    model = pt.Model(module)
    form = pt.EPT(length=3, rank=2, longest=4, spaces=2)
    adapter = pt.Adapter.new(model, form, seed=1)
    patch = next(iter(adapter.patches.values()))
    plain = pt.Adapter.new(model, pt.Prompt(length=3))
    plain.load_state({k: patch.P.detach().clone() for k in plain.state()})
    model.attach(adapter, "a")
    model.attach(plain, "p")
    assert torch.allclose(run(model, batch, "a"), run(model, batch, "p"), atol=1e-6)
    moved(adapter)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        embeds = module.get_input_embeddings()(ids)
        change = (patch.A @ patch.B) * form.alpha / form.rank**0.5
        from polytask.core.form import NO_CALL

        prompt = patch.virtual(NO_CALL)
        embeds[:, :4] += change
        wanted = module(inputs_embeds=torch.cat([prompt[None], embeds], 1)).logits[:, 3:]
    assert torch.allclose(run(model, {"input_ids": ids}, "a"), wanted, atol=1e-4)
    left = {"input_ids": torch.cat([ids.new_zeros(1, 2), ids], 1), "attention_mask": torch.ones(1, ids.shape[1] + 2)}
    left["attention_mask"] = left["attention_mask"].long()
    left["position_ids"] = (torch.arange(ids.shape[1] + 2) - 2).clamp(min=0)[None]  # as generate counts them
    left["attention_mask"][:, :2] = 0  # padding on the left moves no word to another place
    assert torch.allclose(run(model, left, "a")[:, 2:], wanted, atol=1e-3)


def test_mpt_reads_the_task_of_each_row():
    module, batch = tiny("llama")
    model = pt.Model(module)
    adapter = moved(pt.Adapter.new(model, pt.MPT(length=3, tasks=("x", "y"))))
    patch = next(iter(adapter.patches.values()))
    model.attach(adapter, "m")
    for name, values in {"x": patch.prompt(0), "y": patch.prompt(1), "shared": patch.P}.items():
        plain = pt.Adapter.new(model, pt.Prompt(length=3))
        plain.load_state({k: values.detach().clone() for k in plain.state()})
        model.attach(plain, name)
    wanted = run(model, batch, ["y", "shared", "x"])
    with torch.no_grad(), model.using("m", tasks=["y", "else", "x"]):
        assert torch.allclose(output(model.module(**batch)), wanted, atol=1e-6)
    assert torch.allclose(run(model, batch, "m"), run(model, batch, "shared"), atol=1e-6)
    # (c u, v / c) is the same prompt
    with torch.no_grad():
        patch.u *= 3.0
        patch.v /= 3.0
    with torch.no_grad(), model.using("m", tasks=["y", "else", "x"]):
        assert torch.allclose(output(model.module(**batch)), wanted, atol=1e-5)


def test_mpt_takes_prompts_that_were_learned_apart():
    module, _ = tiny("llama")
    model = pt.Model(module)
    # what is exactly of this kind is found again
    source = moved(pt.Adapter.new(model, pt.MPT(length=4, tasks=("x", "y", "z"))), by=0.3)
    patch = next(iter(source.patches.values()))
    prompts = {}
    for k, name in enumerate(("x", "y", "z")):
        plain = pt.Adapter.new(model, pt.Prompt(length=4), name=name)
        plain.load_state({n: patch.prompt(k).detach().clone() for n in plain.state()})
        prompts[name] = plain
    made = next(iter(pt.MPT.from_prompts(prompts, steps=300).patches.values()))
    for k in range(3):
        assert torch.allclose(made.prompt(k), patch.prompt(k), atol=1e-2)
    with pytest.raises(pt.PolytaskError, match="takes prompts"):
        pt.MPT.from_prompts({"x": pt.Adapter.new(model, "lora")})


class Vocabulary:
    """A tokenizer with nothing but its words."""

    all_special_tokens = ()

    def __init__(self, words):
        self.words = {word: i for i, word in enumerate(words)}

    def get_vocab(self):
        return self.words


def test_a_prompt_moves_to_a_model_whose_words_lie_alike():
    """The target's table is the source's, turned and in another order: cosines decide all but the prompt's size."""
    import copy

    module, _ = tiny("llama")
    with torch.no_grad():  # more words than dimensions, or the answer is not unique
        module.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(module)
    size, d = module.get_input_embeddings().weight.shape
    turn = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))[0]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        other.get_input_embeddings().weight.copy_((module.get_input_embeddings().weight @ turn)[order])
    names = [f"w{i}" for i in range(size)]
    source = pt.Model(module, Vocabulary(names))
    target = pt.Model(other, Vocabulary([names[i] for i in order]))
    learned = moved(pt.Adapter.new(source, pt.Prompt(length=3), name="p"))
    made = pt.transfer_prompt((learned, source), target, steps=300, lr=3e-2)
    got, want = (next(iter(a.patches.values())).P.detach() for a in (made, learned))
    assert torch.nn.functional.cosine_similarity(got, want @ turn, dim=1).min() > 0.99
    table = other.get_input_embeddings().weight
    assert torch.allclose(got.std(), table.std(), rtol=1e-4) and torch.allclose(got.mean(), table.mean(), atol=1e-5)
    assert made.card.parents == [learned.hash]
    with pytest.raises(pt.PolytaskError, match="only prompts are transferred"):
        pt.transfer_prompt((pt.Adapter.new(source, "lora"), source), target)
    with pytest.raises(pt.PolytaskError, match="only 0 tokens in common"):
        pt.transfer_prompt((learned, source), pt.Model(other, Vocabulary([f"x{i}" for i in range(size)])))


def test_transfer_on_the_command_line(run, base, tmp_path):
    adapter = pt.Adapter.new(pt.Model.load(str(base)), pt.Prompt(length=2), name="p")
    adapter.save(tmp_path / "p")
    done = run("transfer", tmp_path / "p", "--base", base, "--to", base, "--steps", "2", "--out", tmp_path / "q")
    assert done[0] == 0 and "1 - cosine" in done[1]
    assert pt.Adapter.load(tmp_path / "q").form.length == 2
    code, _, said = run("transfer", tmp_path / "p", "--base", base)
    assert code == 2 and "the target model (--to) is missing" in said


def test_a_p_adapter_at_p_2_aggregates_along_the_attention_map():
    module, _ = tiny("bert")
    adapter = pt.Adapter.new(pt.Model(module), pt.PAdapter(p=2.0, mu=0.0))
    patch = next(iter(adapter.patches.values()))
    P, nodes = torch.rand(2, 3, 4, 4).softmax(-1), torch.randn(2, 3, 4, 5)
    assert torch.allclose(patch.messages(P, nodes), P @ nodes, atol=1e-6)
    with torch.no_grad():
        patch.p.fill_(1.0)  # by the formula, one entry at a time
    rest, got = 0.0, patch.messages(P, nodes)
    M = torch.zeros(4)
    for j in range(4):
        gap = (P[0, 0, 1, j].sqrt() * (nodes[0, 0, 1] - nodes[0, 0, j]).norm()).clamp(min=patch.form.floor)
        M[j] = P[0, 0, 1, j] / gap
    assert torch.allclose(got[0, 0, 1], (M @ nodes[0, 0] + rest) / M.sum(), atol=1e-5)


def test_a_p_adapter_leaves_cross_attention_out():
    model = pt.Model(tiny("t5")[0])
    paths = pt.Adapter.new(model, "p-adapter").patches
    assert paths and not any("EncDec" in path for path in paths)
