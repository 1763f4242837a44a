"""X-LoRA: a first pass of the bare base says what each token gets, as in PEFT."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from test_routers import BATCH, made, mix_of, run
from zoo import tiny

import polytask as pt
from polytask.core.errors import ConfigError, MixError
from polytask.core.gate import Router
from polytask.forms.mixtures import mixture_of

IDS = torch.tensor([[5, 6, 7, 8, 11, 3], [9, 5, 6, 7, 12, 4]])


def llama(family="llama", names=("0", "1", "2"), sites="query | value | up"):
    """A base, and adapters named as PEFT's X-LoRA wants them."""
    model = pt.Model(tiny(family)[0])
    return model, made(model, names, sites=sites)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    for name, adapter in llama()[1].items():
        adapter.save(folder / name)
    return folder


class TestXLoRA:
    @pytest.mark.parametrize(
        "ours, theirs",
        [
            ({}, {}),
            (
                {"depth": 3, "width": 7, "temperature": 0.5},
                {"xlora_depth": 3, "xlora_size": 7, "softmax_temperature": 0.5},
            ),
            ({"layerwise": True, "scale": 1.5}, {"layerwise_scalings": True, "global_scaling_weight": 1.5}),
            ({"top_k": 2}, {"top_k_lora": 2}),
            ({"top_k": 2, "renormalise": True}, {"top_k_lora": 2, "enable_softmax_topk": True}),
            ({"renormalise": True, "layerwise": True}, {"enable_softmax_topk": True, "layerwise_scalings": True}),
        ],
        ids=str,
    )
    def test_against_peft(self, ours, theirs, saved):
        model, adapters = llama()
        base = tiny("llama")[0]
        base.config.use_cache = False
        paths = {name: str(saved / name) for name in adapters}
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, **{"xlora_depth": 1, **theirs})
        with torch.random.fork_rng():
            torch.manual_seed(3)
            other = peft.get_peft_model(base, config).eval()
        mix = mix_of("x-lora", model, adapters, **ours)
        linears = [m for m in other.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
        with torch.no_grad():
            for i, linear in enumerate(linears):
                linear.weight.mul_(4.0)  # weights that differ from token to token
                mix.shared.get_parameter(f"W{i}").copy_(linear.weight)
                mix.shared.get_parameter(f"b{i}").copy_(linear.bias)
            with model.using(mix):
                here = model.module(IDS).logits
            there = other(input_ids=IDS, use_cache=False).logits
        assert len(linears) * 2 == len(mix.shared._parameters)
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(here, model.module(IDS).logits, atol=0.1)

    def test_a_classifier_of_zeros_weighs_all_alike(self, encoder):
        adapters = made(encoder)
        mix = mix_of("x-lora", encoder, adapters)
        with torch.no_grad():
            mix.shared.W0.zero_()
            mix.shared.b0.zero_()
        torch.testing.assert_close(run(encoder, mix), run(encoder, pt.route(adapters, "uniform")), rtol=1e-5, atol=1e-6)

    def test_what_a_token_gets_depends_on_the_tokens_before_it(self):
        model, adapters = llama()
        mix = mix_of("x-lora", model, adapters)
        seen = []
        changed = IDS.clone()
        changed[:, 4] = 40
        for ids in (IDS, changed):
            with torch.no_grad(), model.using(mix):
                model.module(ids)
            seen.append(mix.shared.weights)
        torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 6, 1))
        torch.testing.assert_close(seen[0][:, :4], seen[1][:, :4])
        assert not torch.allclose(seen[0][:, 4:], seen[1][:, 4:])

    def test_only_the_classifier_gets_gradients_and_the_base_reads_without(self, encoder):
        adapters = made(encoder)
        mix = mix_of("x-lora", encoder, adapters)
        mix.shared.requires_grad_()
        count = []
        hook = encoder.module.encoder.register_forward_hook(lambda *_: count.append(torch.is_grad_enabled()))
        with warnings.catch_warnings(), encoder.using(mix):
            warnings.simplefilter("error")  # the sites that the first pass does not use are used by the second
            loss = encoder.features(BATCH).square().sum()
        hook.remove()
        assert count == [False, True]
        loss.backward()
        assert bool(mix.shared.W0.grad.any())
        assert all(p.grad is None for a in adapters.values() for p in a.parameters())

    def test_writing_needs_no_cache(self):
        model, adapters = llama()
        mix = mix_of("x-lora", model, adapters)
        ask = {"max_new_tokens": 4, "do_sample": False}
        with torch.no_grad(), model.using(mix):
            with pytest.raises(MixError, match="use_cache=False"):
                model.module.generate(IDS, use_cache=True, **ask)
            out = model.module.generate(IDS, use_cache=False, **ask)
            text = IDS
            for _ in range(out.shape[1] - IDS.shape[1]):
                text = torch.cat([text, model.module(text).logits[:, -1:].argmax(-1)], 1)
            assert torch.equal(out, text)
            assert torch.equal(model.module.generate(IDS, **ask), text)
            assert len(model.module.generate(IDS, use_cache=False, num_beams=2, **ask)) == 2

    def test_as_an_adapter_it_needs_no_cache_either(self):
        model, adapters = llama()
        model.attach(mixture_of(Router.of("x-lora"), adapters, seed=1, name="m").trainable(False))
        ask = {"max_new_tokens": 4, "do_sample": False}
        with torch.no_grad(), model.using("m"):
            assert torch.equal(model.module.generate(IDS, **ask), model.module.generate(IDS, use_cache=False, **ask))
            with pytest.raises(MixError, match="use_cache=False"):
                model.module.generate(IDS, use_cache=True, **ask)

    def test_a_decoder_takes_the_weights_of_the_text(self):
        model, adapters = llama("t5", sites=None)
        mix = mix_of("x-lora", model, adapters)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        found = {}
        see = lambda gate, weights, call: found.__setitem__(gate.site.name, weights.values)  # noqa: E731
        with torch.no_grad(), model.using(mix), mix.tracing(see):
            # as many tokens as the text has: they are others all the same
            model.module(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS)
            weights = mix.shared.weights[:, :, 0]
            one = model.module.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
            again = model.module.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=False)
            model.module.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=2)
        assert torch.equal(one, again)
        rows = torch.stack([weights[0].mean(0), weights[1, :4].mean(0)])
        for name, values in found.items():
            if name.startswith("decoder"):
                torch.testing.assert_close(values[:: len(values) // 2][:2], rows)
            else:
                assert values.dim() == 3

    def test_what_it_refuses(self, encoder):
        with pytest.raises(ConfigError, match="depth must be a whole number of at least 1"):
            Router.of({"name": "x-lora", "depth": 0})
        with pytest.raises(MixError, match="cannot tell the width"):
            mixture_of(Router.of("x-lora"), made(encoder, ("a",), sites="token"))
        mix = mix_of("x-lora", encoder, made(encoder))
        with pytest.raises(MixError, match="a part of the model was called alone"), encoder.using(mix):
            encoder.module.encoder.layer[0](torch.randn(2, 3, 32))
