"""The tokens that `tr-pts` leaves out on the way through an image network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import same_state
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import ConfigError, MixError
from polytask.forms._fewer import Merging, Proportional, fewer

N = 16  # tokens of the tiny networks beside the special ones


def run(model, batch, mix=None):
    with torch.no_grad(), model.using(mix):
        return output(model.module(**batch))


@pytest.fixture
def vit():
    module, batch = tiny("vit")
    return pt.Model(module, name="tiny-vit"), batch


def moved(adapter, by=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return adapter


def test_the_rest_is_merged_by_hand():
    y = torch.tensor([[[7.0], [1.0], [3.0]]])  # the class token, then two others
    out, sizes = fewer(y, torch.tensor([[0.2, 0.6]]), 0.4, 1, None)
    assert torch.allclose(out, torch.tensor([[[7.0], [2.5]]])) and sizes.tolist() == [[1.0, 2.0]]
    y = torch.arange(6.0).view(1, 6, 1)
    out, sizes = fewer(y, torch.tensor([[0.1, 0.3, 0.1, 0.4, 0.1]]), 0.4, 1, None)
    assert torch.allclose(out.flatten(), torch.tensor([0.0, 2.0, 4.0, 3.0]))  # kept in their order, the mean of 1, 3, 5
    again, grown = fewer(out, torch.tensor([[0.5, 0.25, 0.25]]), 0.4, 1, sizes)
    assert again.flatten().tolist() == [0.0, 2.0, 3.5] and grown.tolist() == [[1.0, 1.0, 4.0]]
    for keep in (1.0, 0.9):  # one token alone is not merged
        same, _ = fewer(y, torch.rand(1, 5), keep, 1, None)
        assert torch.equal(same, y)


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("special", [1, 2])
def test_special_tokens_are_never_dropped(keep, special):
    y = torch.randn(3, special + 9, 4)
    attention = torch.rand(3, 9)
    out, sizes = fewer(y, attention, keep, special, None)
    left = int(keep * 9)
    assert out.shape == (3, special + left + 1, 4) and torch.equal(out[:, :special], y[:, :special])
    assert torch.allclose(sizes.sum(1), torch.tensor(float(special + 9)))
    for row in range(3):
        best = attention[row].topk(left).indices.sort().values
        assert torch.equal(out[row, special : special + left], y[row, special + best])


def test_keeping_all_is_the_form_without_tokens(vit):
    model, batch = vit
    plain, all_ = pt.Adapter.new(model, pt.TRPTS()), pt.Adapter.new(model, pt.TRPTS(keep=1.0, merges=1))
    assert plain.hash == all_.hash and list(plain.patches) == list(all_.patches) and all_.shared is None
    model.attach(pt.Adapter.new(model, pt.TRPTS(keep=0.999)), "most")  # floor(0.999 * 16) = 15: one is not merged
    assert torch.equal(run(model, batch, "most"), run(model, batch))


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_merging_equal_tokens_changes_nothing(family, keep):
    module, batch = tiny(family)
    with torch.no_grad():
        special = module.embeddings.position_embeddings.shape[1] - N
        module.embeddings.position_embeddings[:, special:] = 0.0
    batch = {"pixel_values": torch.full_like(batch["pixel_values"], 0.3)}
    model = pt.Model(module)
    model.attach(pt.Adapter.new(model, pt.TRPTS(keep=keep)), "a")
    full, fewer_ = run(model, batch), run(model, batch, "a")
    assert fewer_.shape[1] == special + int(keep * N) + 1
    assert torch.allclose(fewer_, full[:, : fewer_.shape[1]], atol=1e-5)


def test_each_merge_leaves_what_it_says_and_other_tokens_make_another_output():
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model = pt.Model(transformers.ViTModel(config).eval())
    batch = {"pixel_values": torch.randn(3, 3, 32, 32)}
    form = pt.TRPTS(keep=0.5, merges=2)
    adapter = pt.Adapter.new(model, form)
    model.attach(adapter, "a")
    merging = [p.site.layer for p in adapter.patches.values() if isinstance(p, Merging)]
    assert merging == [0, 1, 2, 3]  # without data, all but the last
    assert run(model, batch, "a").shape[1] == 1 + 2  # 16, 9, 5, 3, 2
    before = run(model, batch)

    def loss():
        with model.using("a"):
            out = output(model.module(**batch))
            assert out.shape == before.shape  # F is that of the whole image
            return (out[:, 0] - 1.0).square().mean()

    form.begin(model, adapter, [loss])
    model.rebind("a")
    merging = sorted(p.site.layer for p in adapter.patches.values() if isinstance(p, Merging))
    assert len(merging) == 2
    trained = {}
    for patch in adapter.patches.values():
        if not isinstance(patch, Merging | Proportional):
            trained[patch.site.layer] = trained.get(patch.site.layer, 0) + len(patch.values)
    assert max(trained[layer] for layer in merging) <= min(trained[i] for i in range(4) if i not in merging)
    assert min(p.site.layer for p in adapter.patches.values() if isinstance(p, Proportional)) == merging[0] + 1
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda m, a, i=i: seen.__setitem__(i, a[0].shape[1]))
        for i, block in enumerate(model.module.layers)
    ]
    after = run(model, batch, "a")
    for hook in hooks:
        hook.remove()
    found = form.measured(model, adapter)
    assert found["tokens"] == [seen[i] for i in range(5)] and found["tokens"][0] == 17 and found["tokens"][4] == 1 + 5
    assert 0.3 < found["operations"] < 1.0
    assert found["trained_percent"] == pytest.approx(
        100 * adapter.size / sum(p.numel() for p in model.module.parameters()), abs=1e-3
    )
    assert after.shape[1] == 1 + 5 and not torch.allclose(after[:, 0], before[:, 0], atol=1e-4)
    assert torch.equal(run(model, batch), before)


def test_rows_in_one_batch_are_independent_and_files_remember(vit, tmp_path):
    model, batch = vit
    adapter = moved(pt.Adapter.new(model, pt.TRPTS(keep=0.5)))
    model.attach(adapter, "a")
    whole = run(model, batch, "a")
    for row in range(3):
        alone = run(model, {k: v[row : row + 1] for k, v in batch.items()}, "a")
        assert torch.allclose(whole[row], alone[0], atol=1e-5)
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and again.form == adapter.form
    model.attach(again, "b")
    assert torch.allclose(run(model, batch, "b"), whole, atol=1e-6)


def test_what_cannot_be_is_refused(vit):
    model, batch = vit
    model.attach(pt.Adapter.new(model, pt.TRPTS(keep=0.5)), "a")
    for mix in ({"a": 0.5}, ["a", None, "a"]):
        with pytest.raises(MixError, match="leaves out tokens at 'layers.0', so it acts alone"):
            run(model, batch, mix)
    with pytest.raises(ConfigError, match="sites picks no block"):
        pt.Adapter.new(model, pt.TRPTS(keep=0.5), sites="query")
    with pytest.raises(ConfigError, match="class token"):
        pt.Adapter.new(pt.Model(tiny("bert")[0]), pt.TRPTS(keep=0.5))
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"merges": 0}):
        with pytest.raises(ConfigError, match="keep must be above 0"):
            pt.TRPTS(**wrong)
    with pytest.raises(pt.PolytaskError, match="no dense change"):
        model.adapters["a"].merge_into(model)


def test_it_learns_and_its_card_says_what_it_costs(vit):
    model, _ = vit
    rng = np.random.default_rng(0)
    rows = []
    for i in range(16):
        image = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        image[..., i % 2] += 150
        rows.append(pt.Example((), "ab"[i % 2], image=image))
    task = pt.Task(name="hue", kind="classify", train=rows, dev=[], test=rows, labels=("a", "b"), metric="accuracy")
    before = copy.deepcopy(model.module.state_dict())
    form = pt.TRPTS(keep=0.5, merges=1, samples=8)
    adapter = pt.learn(model, task, form=form, epochs=4, batch_size=8, progress=False, precision="fp32", lr=1e-2)
    assert same_state(before, model.module)
    assert adapter.card.training["measured"]["tokens"] == [17, 1 + 9]
    model.attach(adapter, "a")
    assert pt.evaluate(model, task, "a", resamples=0).value >= 0.9
