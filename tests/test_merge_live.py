"""Merges that are weighted sums as live mixes: the oracle is the adapter that the same merge makes."""

from __future__ import annotations

import pytest
import torch
from test_merge_adapters import shaken
from test_merge_pool import tasks, two
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError, MergeError


@pytest.fixture(scope="module")
def llama():
    model, batch = tiny("llama")
    return pt.Model(model), batch


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("linear", {"weights": [0.2, 0.5, 0.3]}),
        ("task_arithmetic", {"scale": 0.4, "weights": [1.0, [0.0, 1.0], -0.5]}),
        ("task_arithmetic", {"weights": [1.0, [{"filter": "mlp", "value": 0.5}, {"value": 2.0}], 0.0]}),
        ("model_stock", {}),
        ("karcher", {}),
        ("multislerp", {}),
    ],
)
@pytest.mark.parametrize("forms", [("lora", "lora", "lora"), ("lora", "full", "lokr")])
def test_a_mix_acts_as_the_merged_adapter(llama, method, options, forms):
    model, batch = llama
    adapters = [shaken(model, form, "linear", seed, 0.05) for seed, form in enumerate(forms, 1)]
    mix = pt.merge(adapters, method, as_="mix", **options)
    made = pt.merge(adapters, method, as_="full", **options)
    for adapter in (*adapters, made):
        model.attach(adapter)
    try:
        with torch.no_grad(), model.using(mix):
            ours = output(model.module(**batch))
        with torch.no_grad(), model.using(made.name):
            wanted = output(model.module(**batch))
        bare = output(model.module(**batch))
    finally:
        model.detach()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, bare, atol=1e-3)


def test_an_adapter_that_differences_are_taken_to_is_weighed_too(llama):
    model, _ = llama
    adapters = [shaken(model, "lora", "linear", seed) for seed in (1, 2, 3)]
    mix = pt.merge(adapters[:2], "task_arithmetic", adapters[2], as_="mix", scale=0.5)
    own = next(iter(mix.weights.values()))
    assert own == pytest.approx({"a1": 0.5, "a2": 0.5})  # a3 has 1 - 1
    mix = pt.merge(adapters[:1], "task_arithmetic", adapters[2], as_="mix", scale=0.5)
    assert next(iter(mix.weights.values())) == pytest.approx({"a1": 0.5, "a3": 0.5})


def test_what_was_learned_may_stay_a_mix(encoder):
    made = two(encoder)
    for adapter, name in zip(made, "ab", strict=True):
        adapter.name = name
    options = {"data": tasks(), "steps": 2, "lr": 0.1}
    mix = pt.merge(made, "adamerging", encoder, as_="mix", **options)
    found = pt.merge(made, "adamerging", encoder, **options)
    site = next(iter(found.patches))
    weights = found.card.training["merge"]["weights"]
    tensor = f"{found.patches[site].site.path}.weight"
    assert mix.weights[site] == pytest.approx({"a": weights[0]["tensors"][tensor], "b": weights[1]["tensors"][tensor]})


def test_what_is_no_mix(llama, tmp_path):
    model, _ = llama
    adapters = [shaken(model, "lora", "linear", seed) for seed in (1, 2)]
    with pytest.raises(MergeError, match="ties is no weighted sum"):
        pt.merge(adapters, "ties", as_="mix")
    with pytest.raises(ConfigError, match="gives a live mix, which has no folder"):
        pt.merge(adapters, as_="mix", out=tmp_path)
    adapters[1].name = adapters[0].name
    with pytest.raises(MergeError, match="give each a name of its own"):
        pt.merge(adapters, as_="mix")
    with pytest.raises(ConfigError, match="one of lora, full, sparse, mix"):
        pt.merge(adapters, as_="mixx")
    full = [shaken(model, "full", "norm", seed) for seed in (1, 2)]
    mixed = [shaken(pt.Model(tiny("bert")[0]), "full", "norm", seed) for seed in (1, 2)]
    assert pt.merge(full, as_="mix").weights
    uneven = [1.0, [{"filter": "bias", "value": 0.5}, {"value": 2.0}]]
    with pytest.raises(MergeError, match="weights of weight and bias differ"):
        pt.merge(mixed, "task_arithmetic", weights=uneven, as_="mix")
