"""Dual models: virtual tokens in both towers, heads of class texts, and the forms of vision-language prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import polytask as pt
from polytask.core.dual import DecoupledHead, Pairs, SimilarityHead, keywords, similarity
from polytask.core.form import forms
from polytask.core.head import Head, Seen, collate, head_for
from polytask.core.rows import Row

LABELS = ("cat", "dog", "old ship", "truck")
ABOUT = {
    "cat": "a small animal with soft fur and whiskers", "dog": "a loyal animal that barks",
    "old ship": "a large vessel that sails on the water", "truck": "a heavy vehicle with wheels for loads",
}  # fmt: skip
DUAL = ("coop", "cocoop", "maple", "promptsrc", "mvlpt", "ctp-tft", "kapt")
ACROSS = ("cocoop", "ctp-tft")  # a text is encoded for each image
MOVED = 0.1


def pictures(count=6, seed=0):
    """Noise with a bright square whose place is the label."""
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for i in range(count):
        image = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        label = i % len(LABELS)
        image[8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8, label % 3] = 255
        images.append(image)
        labels.append(LABELS[label])
    return images, labels


def task(name="squares", count=16, about=True, seed=0):
    splits = []
    for i, size in enumerate((count, 8, 8)):
        images, labels = pictures(size, seed + i)
        splits.append(
            [
                pt.Example((), y, image=x, where=f"{name}:{j}")
                for j, (x, y) in enumerate(zip(images, labels, strict=True))
            ]
        )
    return pt.Task(name, "classify", *splits, labels=LABELS, modality="image", about=dict(ABOUT) if about else {})


def batch_of(model, head, count=3):
    rows = head.rows(model, task(count=count).train)
    return collate(model, head, rows), rows


def adapter_for(model, name, seed=0, moved=True, **settings):
    adapter = pt.Adapter.new(model, {"name": name, "length": 2, **settings} if name in DUAL else name, seed=seed)
    if moved:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += MOVED * torch.randn(parameter.shape, generator=generator)
    return adapter


def head_of(model, name, about=True):
    return head_for(model, task(about=about), form=pt.Form.of(name))


def logits(model, head, mix=None, count=3):
    batch, _ = batch_of(model, head, count)
    with torch.no_grad(), model.using(mix):
        return head.run(model, batch).logits()


# The towers


def test_similarity_is_what_transformers_computes(clip):
    head = SimilarityHead(LABELS)
    batch, _ = batch_of(clip, head)
    with torch.no_grad():
        ours = similarity(clip, batch).logits()
        theirs = clip.module(**batch).logits_per_image
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.shape == (3, 4)


def test_several_templates_are_averaged_after_normalising(clip):
    templates = ("a photo of a {}.", "one {}", "the picture of some {}")
    batch, _ = batch_of(clip, SimilarityHead(LABELS, templates))
    with torch.no_grad():
        ours = similarity(clip, batch, 3).texts
        each = []
        for template in templates:
            one, _ = batch_of(clip, SimilarityHead(LABELS, (template,)))
            each.append(F.normalize(similarity(clip, one).texts, dim=-1))
    assert torch.allclose(ours, torch.stack(each).mean(0), atol=1e-5)


def test_the_order_of_classes_permutes_the_logits(clip):
    one, other = SimilarityHead(LABELS), SimilarityHead(LABELS[::-1])
    assert torch.allclose(logits(clip, one), logits(clip, other).flip(1), atol=1e-5)


def test_a_context_of_words_is_these_words(clip):
    """With the vectors of "a photo of a" the learned context is zero-shot CLIP with that template."""
    words = "a photo of a "
    length = len(clip.tokenizer(words, add_special_tokens=False)["input_ids"])
    clip.attach(pt.Adapter.new(clip, {"name": "coop", "text": words, "length": length}), "a")
    plain = logits(clip, SimilarityHead(LABELS, ("a photo of a {}.",)))
    assert torch.allclose(logits(clip, SimilarityHead(LABELS, ("{}.",)), "a"), plain, atol=1e-4)
    assert not torch.allclose(logits(clip, SimilarityHead(LABELS, ("{}.",))), plain, atol=1e-2)


def test_too_long_a_context_says_so(clip):
    clip.attach(pt.Adapter.new(clip, {"name": "coop", "length": 90}), "a")
    with pytest.raises(pt.PolytaskError, match="the base has positions for 96"):
        logits(clip, SimilarityHead(LABELS), "a")


def test_too_deep_a_prompt_says_so(clip):
    clip.attach(pt.Adapter.new(clip, {"name": "visual-prompt", "depth": 3}), "a")
    with pytest.raises(pt.PolytaskError, match="depth 3 does not fit a network of 2 blocks"):
        logits(clip, SimilarityHead(LABELS), "a")


def test_other_forms_act_on_both_towers_too(clip):
    clip.attach(adapter_for(clip, "lora"), "a")
    head = SimilarityHead(LABELS)
    changed = logits(clip, head, "a")
    assert not torch.allclose(changed, logits(clip, head), atol=1e-3)
    merged = clip.adapters["a"].merge_into(clip)
    assert torch.allclose(logits(merged, head), changed, atol=1e-4)


# The contract


@pytest.mark.parametrize("name", DUAL)
def test_two_steps_move_every_parameter_and_nothing_else(clip, name):
    adapter = adapter_for(clip, name, moved=False)
    clip.attach(adapter, "a")
    head = head_of(clip, name)
    batch, rows = batch_of(clip, head)
    start, base = adapter.state(), {k: v.clone() for k, v in clip.module.state_dict().items()}
    for parameter in clip.module.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        with clip.using("a"):
            out = head.run(clip, batch)
        loss = head.loss(out, rows)[0].sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    still = {n for n, v in adapter.state().items() if torch.equal(v, start[n])}
    assert not still
    assert all(torch.equal(v, base[k]) for k, v in clip.module.state_dict().items())


@pytest.mark.parametrize("name", DUAL)
def test_saved_and_loaded_bit_for_bit_and_detached_exactly(clip, name, tmp_path):
    head = head_of(clip, name)
    before = logits(clip, head)
    adapter = adapter_for(clip, name)
    assert adapter_for(clip, name).hash == adapter.hash != adapter_for(clip, name, seed=1).hash
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash and again.form == adapter.form
    clip.attach(adapter, "a")
    clip.attach(again, "b")
    with_a = logits(clip, head, "a")
    assert torch.allclose(with_a, logits(clip, head, "b"), atol=1e-6) and not torch.allclose(with_a, before, atol=1e-3)
    clip.detach()
    assert torch.equal(logits(clip, head), before)


@pytest.mark.parametrize("name", [n for n in DUAL if "rows" not in forms[n].exceptions])
def test_a_mixed_batch_equals_one_row_at_a_time(clip, name):
    for i in range(2):
        clip.attach(adapter_for(clip, name, seed=i), f"a{i}")
    head = head_of(clip, name)
    mixed = logits(clip, head, ["a0", None, "a1", "a0"], 4)
    for row, mix in enumerate(("a0", None, "a1", "a0")):
        assert torch.allclose(mixed[row], logits(clip, head, mix, 4)[row], atol=1e-4), mix


@pytest.mark.parametrize("name", [n for n in DUAL if "rows" in forms[n].exceptions])
def test_rows_with_two_prompts_in_both_towers_equal_one_at_a_time(clip, name):
    for i in range(2):
        clip.attach(adapter_for(clip, name, seed=i), f"a{i}")
    head = head_of(clip, name)
    mixed = logits(clip, head, ["a0", "a1", "a0"])
    for row, mix in enumerate(("a0", "a1", "a0")):
        assert torch.allclose(mixed[row], logits(clip, head, mix)[row], atol=1e-4), mix
    with pytest.raises(pt.PolytaskError, match="every row of a batch needs"):
        logits(clip, head, ["a0", None, "a0"])


@pytest.mark.parametrize("name", DUAL)
def test_learns_and_serves_new_classes(clip, name, tmp_path):
    settings = {"name": name, "length": 2}
    adapter = pt.learn(clip, task(), form=settings, epochs=2, batch_size=8, out=tmp_path / "a", progress=False)
    assert type(adapter.heads["squares"]) is SimilarityHead and list(adapter.state())
    clip.attach(pt.Adapter.load(tmp_path / "a"), "a")
    new = task("other")
    new.labels, new.about = ("bird", "frog"), {"bird": "it flies", "frog": "it jumps"}
    for split in new.splits.values():
        split[:] = [pt.Example((), "bird", image=e.image) for e in split]
    assert 0.0 <= pt.evaluate(clip, new, "a", resamples=0).value <= 1.0
    new.name = "squares"  # other classes under the learned name are other classes
    found = pt.evaluate(clip, new, "a", resamples=0, keep=True)
    assert set(found.predictions) <= {"bird", "frog"}


def test_joint_learning_of_tasks_with_other_classes(clip):
    other = task("other", seed=5)
    other.labels = ("bird", "frog")
    for split in other.splits.values():
        split[:] = [pt.Example((), "bird", image=e.image, where=e.where) for e in split]
    other.about = {}
    adapter = pt.learn(clip, [task(), other], form={"name": "mvlpt", "length": 2}, joint=True, epochs=1, progress=False)
    assert set(adapter.heads) == {"squares", "other"}
    target = pt.learn(clip, task(), start=adapter, epochs=1, progress=False)
    assert target.card.parents == [adapter.hash]


def test_together_is_what_separate_runs_give(clip):
    tasks = [task("one"), task("two", seed=3)]
    settings = {"epochs": 1, "batch_size": 8, "progress": False, "max_grad_norm": 0}
    both = pt.learn(clip, tasks, form={"name": "cocoop", "length": 2}, together=True, **settings)
    for learned, one in zip(both, tasks, strict=True):
        alone = pt.learn(clip, one, form={"name": "cocoop", "length": 2}, **settings)
        for key, value in alone.state().items():
            assert torch.allclose(value, learned.state()[key], atol=1e-4), key


# Each form's own invariant


def test_contexts_of_classes_that_are_equal_are_the_shared_one(clip):
    shared = {"text": "a photo", "length": 3}
    one = pt.Adapter.new(clip, {"name": "coop", **shared}, seed=4)
    clip.attach(one, "coop")
    own = pt.Adapter.new(clip, {"name": "coop", "per_class": True, "classes": LABELS[::-1], **shared})
    assert own.patches["text_model"].P.shape == (4, *one.patches["text_model"].P.shape)
    with torch.no_grad():
        own.patches["text_model"].P.copy_(one.patches["text_model"].P.expand(4, -1, -1))
    clip.attach(own, "own")
    head = head_of(clip, "coop")
    assert torch.allclose(logits(clip, head, "coop"), logits(clip, head, "own"), atol=1e-5)
    assert torch.allclose(logits(clip, head, ["coop", "own", "coop"]), logits(clip, head, "coop"), atol=1e-5)


def test_a_context_of_a_class_is_of_that_class_alone(clip):
    """Also where the head has other classes, in another order, and several templates."""
    form = {"name": "coop", "length": 2, "per_class": True, "classes": LABELS}
    adapter = pt.Adapter.new(clip, form, seed=1)
    clip.attach(adapter, "a")
    heads = SimilarityHead(LABELS), SimilarityHead(("truck", "cat"), ("{}.", "one {}"))
    before = [logits(clip, head, "a") for head in heads]
    with torch.no_grad():
        adapter.patches["text_model"].P[LABELS.index("truck")].normal_(generator=torch.Generator().manual_seed(2))
    moved = [(logits(clip, head, "a") - old).abs().amax(0) > 1e-4 for head, old in zip(heads, before, strict=True)]
    assert [m.tolist() for m in moved] == [[False, False, False, True], [True, False]]
    with pytest.raises(pt.PolytaskError, match="'frog' has no context"):
        logits(clip, SimilarityHead(("cat", "frog")), "a")


def test_contexts_of_classes_learn_the_classes_of_the_task(clip, tmp_path):
    form = {"name": "coop", "length": 2, "per_class": True, "text": "a photo"}
    settings = {"epochs": 1, "batch_size": 8, "progress": False}
    adapter = pt.learn(clip, task(), form=form, out=tmp_path / "a", **settings)
    loaded = pt.Adapter.load(tmp_path / "a")
    assert loaded.form.classes == LABELS and loaded.patches["text_model"].P.shape[0] == 4
    assert torch.equal(loaded.patches["text_model"].P, adapter.patches["text_model"].P)
    one, both = task(), task("other")
    both.labels = ("bird", "cat")
    both.about = {}
    for split in both.splits.values():
        split[:] = [pt.Example((), "bird", image=e.image, where=e.where) for e in split]
    joint = pt.learn(clip, [one, both], form=form, joint=True, **settings)
    assert joint.form.classes == (*LABELS, "bird")
    with pytest.raises(pt.PolytaskError, match="needs their names"):
        pt.Adapter.new(clip, form)


def test_cocoop_with_a_zero_network_is_coop(clip):
    shared = {"text": "a photo", "length": 7}
    clip.attach(pt.Adapter.new(clip, {"name": "coop", **shared}), "coop")
    clip.attach(pt.Adapter.new(clip, {"name": "cocoop", "zero": True, **shared}), "cocoop")
    head = head_of(clip, "coop")
    assert torch.allclose(logits(clip, head, "coop"), logits(clip, head, "cocoop"), atol=1e-5)


def test_cocoop_moves_all_tokens_by_one_vector_of_the_image(clip):
    adapter = adapter_for(clip, "cocoop")
    clip.attach(adapter, "a")
    patch = adapter.patches["text_model"]
    head = head_of(clip, "cocoop")
    batch, _ = batch_of(clip, head)
    with torch.no_grad(), clip.using("a"):
        out = head.run(clip, batch)
        x = F.normalize(out.images[1], dim=-1)
        moved = patch.W2 @ torch.relu(patch.W1 @ x + patch.b1) + patch.b2
        patch.W2.zero_()
        patch.b2.zero_()
        patch.P += moved
        assert torch.allclose(head.run(clip, batch).texts[1], out.texts[1], atol=1e-5)
    assert out.texts.shape == (3, 4, 16)


def test_two_classes_of_one_image_get_different_contexts(clip):
    adapter = adapter_for(clip, "ctp-tft")
    patch = adapter.patches["text_model"]
    other = pt.core.form.Other(
        torch.randn(2, 16), torch.randn(1, 16).repeat(2, 1), torch.randn(1, 16, 48).repeat(2, 1, 1)
    )
    tokens = patch.virtual(pt.core.form.Call(other=other))
    assert tokens.shape == (2, 2, 32) and not torch.allclose(tokens[0], tokens[1], atol=1e-4)


@pytest.mark.parametrize("name", ["ctp-tft", "kapt"])
def test_zero_outputs_are_coop(clip, name):
    clip.attach(adapter_for(clip, name, moved=False), "a")
    clip.attach(adapter_for(clip, "coop", moved=False, text="a photo of a"), "coop")
    with torch.no_grad():
        clip.adapters["coop"].patches["text_model"].P.copy_(clip.adapters["a"].patches["text_model"].P)
    head = head_of(clip, name)
    assert torch.allclose(logits(clip, head, "a"), logits(clip, head, "coop"), atol=1e-5)


def test_kapt_reads_the_descriptions(clip):
    clip.attach(adapter_for(clip, "kapt"), "a")
    form = clip.adapters["a"].form
    true = SimilarityHead(LABELS, ("{}.",), [ABOUT[x] for x in LABELS])
    swapped = SimilarityHead(LABELS, ("{}.",), [ABOUT[x] for x in LABELS[::-1]])
    without = SimilarityHead(LABELS, ("{}.",))
    assert not torch.allclose(logits(clip, true, "a"), logits(clip, swapped, "a"), atol=1e-4)
    assert not torch.allclose(logits(clip, true, "a"), logits(clip, without, "a"), atol=1e-4)
    assert form.template == "{}, {keywords}."


def test_keywords_are_what_other_descriptions_lack():
    found = keywords(
        ["an animal with whiskers", "an animal that barks loudly", "the vessel"], ["cat", "dog", "vessel"], 1
    )
    assert found == ["whiskers", "loudly", ""]


def test_templates_lose_what_nobody_says(clip):
    assert "," not in clip.tokenizer.decode(SimilarityHead(("cat",), ("{}, {keywords}.",)).texts(clip)["input_ids"][0])


def test_maple_s_image_tokens_are_a_linear_map_of_its_text_tokens(clip):
    adapter = adapter_for(clip, "maple")
    shared = adapter.shared
    text, image = shared.tokens("text"), shared.tokens("image")
    assert torch.equal(text, shared.P_text) and image.shape == (2, 2, 48)
    for layer in range(2):
        assert torch.allclose(image[layer], F.linear(text[layer], shared.W[layer], shared.b[layer]), atol=1e-6)


def test_mvlpt_starts_as_independent_prompts(clip):
    adapter = adapter_for(clip, "mvlpt", moved=False)
    assert torch.equal(adapter.shared.tokens("text"), adapter.shared.P_text)
    assert torch.equal(adapter.shared.tokens("image"), adapter.shared.P_image)


# PromptSRC


def seen_of(model, name, adapter, head, count=4):
    batch, rows = batch_of(model, head, count)
    adapter.heads["squares"] = head
    with model.using(name):
        out = head.run(model, batch)
    return Seen(model, name, adapter, "squares", rows, out)


def test_each_regulariser_of_promptsrc_is_its_formula_and_can_be_left_out(clip):
    form = {"text_weight": 0.0, "image_weight": 0.0, "logit_weight": 0.0}
    head = head_of(clip, "promptsrc")
    adapter = adapter_for(clip, "promptsrc")
    clip.attach(adapter, "a")
    seen = seen_of(clip, "a", adapter, head)
    zero = torch.zeros(4)
    templates = adapter.form.templates
    plain = SimilarityHead(LABELS, templates)
    base = plain.run(clip, collate(clip, plain, seen.rows))
    v, t = F.normalize(seen.out.images, dim=-1), F.normalize(seen.out.texts, dim=-1)
    v0, t0 = F.normalize(base.images, dim=-1), F.normalize(base.texts, dim=-1)
    z, z0 = seen.out.logits().softmax(1), base.logits().softmax(1)
    wanted = {
        "text_weight": (t - t0).abs().mean().expand(4), "image_weight": (v - v0).abs().mean(1),
        "logit_weight": (z0 * (z0.log() - z.log())).sum(1) / 4,
    }  # fmt: skip
    assert torch.equal(pt.Form.of({"name": "promptsrc", **form}).loss(seen, zero), zero)
    for key, value in wanted.items():
        found = pt.Form.of({"name": "promptsrc", **form, key: 1.0}).loss(seen, zero)
        assert torch.allclose(found, value, atol=1e-5) and float(value.detach().min()) > 1e-4


def test_the_regularisers_are_zero_for_the_base_itself(clip):
    head = SimilarityHead(LABELS, ("a {}.",))
    adapter = adapter_for(clip, "promptsrc", templates=("a {}.",))
    batch, rows = batch_of(clip, head)
    clip.attach(adapter, "a")
    seen = Seen(clip, "a", adapter, "squares", rows, head.run(clip, batch))
    adapter.heads["squares"] = head
    assert torch.allclose(adapter.form.loss(seen, torch.zeros(3)), torch.zeros(3), atol=1e-5)


def test_gaussian_weights_of_the_epochs():
    form = pt.Form.of({"name": "promptsrc", "mu": 2 / 3, "sigma": 1.0})
    assert form.averages(3) == pytest.approx((0.2741, 0.4519, 0.2741), abs=1e-4)
    assert pt.Form.of({"name": "promptsrc", "mu": 0.5, "sigma": 1e-6}).averages(4) == pytest.approx((0, 1, 0, 0))
    assert pt.Form.of({"name": "promptsrc", "sigma": 1e9}).averages(4) == pytest.approx((0.25,) * 4)
    assert pt.Form.of({"name": "promptsrc", "mu": None}).averages(4) is None


def test_what_is_learned_is_the_average_of_the_epochs_ends(clip, monkeypatch):
    from polytask.learn.course import Course

    ends, average = [], Course._average

    def noting(self):
        average(self)
        if self.step in self.ends:
            ends.append(self.adapter.state())

    monkeypatch.setattr(Course, "_average", noting)
    form = {"name": "promptsrc", "length": 2, "mu": 0.5, "sigma": 0.7}
    learned = pt.learn(clip, task(), form=form, epochs=4, batch_size=8, progress=False)
    weights = pt.Form.of(form).averages(4)
    assert len(ends) == 4 and math.isclose(sum(weights), 1.0)
    scores = learned.card.training["dev"]
    assert len(scores) == 5 and learned.card.metrics == {"dev/squares": scores[-1]["dev"]["squares"]}  # of the average
    for key, value in learned.state().items():
        assert torch.allclose(value, sum(w * end[key] for w, end in zip(weights, ends, strict=True)), atol=1e-6)


def test_an_interrupted_average_goes_on_bit_for_bit(clip, tmp_path, monkeypatch):
    from polytask.learn import learner
    from polytask.learn.learner import Interrupted

    settings = {"form": {"name": "promptsrc", "length": 2}, "epochs": 3, "batch_size": 8, "progress": False}
    whole = pt.learn(clip, task(), **settings)
    step, taken = learner.Run._step, []

    def stopping(self, courses):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, courses)

    monkeypatch.setattr(learner.Run, "_step", stopping)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        pt.learn(clip, task(), **settings, out=tmp_path / "a")
    monkeypatch.setattr(learner.Run, "_step", step)
    again = pt.learn(clip, task(), **settings, out=tmp_path / "a")
    assert again.hash == whole.hash


# Heads


def test_the_decoupled_head_is_two_heads(clip):
    head = DecoupledHead(LABELS, width=16).start(torch.Generator().manual_seed(0))
    batch, rows = batch_of(clip, head)
    with torch.no_grad():
        out = head.run(clip, batch)
        z = out.logits()
        second = F.linear(out.images, head.linear.weight)  # scales are 1 and shifts 0 at the start
    assert torch.allclose(head.logits(out), 0.3 * z + 0.7 * second, atol=1e-5)
    target = torch.tensor([row.target for row in rows])
    both = F.cross_entropy(second, target, reduction="none")
    texts = F.cross_entropy(F.linear(out.texts[target], head.linear.weight), target, reduction="none")
    wanted = 0.3 * F.cross_entropy(z, target, reduction="none") + 0.35 * (both + texts)
    assert torch.allclose(head.loss(out, rows)[0], wanted, atol=1e-5)
    plain = DecoupledHead(LABELS, width=16, share=0.0)
    assert torch.equal(plain.logits(out), z)
    assert torch.allclose(plain.loss(out, rows)[0], SimilarityHead(LABELS).loss(out, rows)[0])


def test_the_decoupled_head_leaves_the_first_untouched_for_new_classes(clip, tmp_path):
    adapter = pt.learn(clip, task(), form={"name": "coop", "length": 2}, head="decoupled", epochs=1, progress=False)
    head = adapter.heads["squares"]
    assert type(head) is DecoupledHead
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a").heads["squares"]
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
    clip.attach(adapter, "a")
    fresh = SimilarityHead(("bird", "frog"), ("{}.",))
    before = logits(clip, fresh, "a")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(clip, fresh, "a"), before)


def test_the_second_head_learns_faster(clip):
    from polytask.core.recipe import Stage
    from polytask.learn.course import Course

    adapter = pt.Adapter.new(clip, {"name": "coop", "length": 2})
    adapter.heads["squares"] = head_for(clip, task(), kind="decoupled")
    course = Course("a", adapter, [task()], Stage())
    groups = course._optimiser().param_groups
    assert groups[1]["lr"] == pytest.approx(6.5 * groups[0]["lr"])


def test_a_linear_head_on_images(clip):
    adapter = pt.learn(clip, task(), form="lora", head="linear", epochs=1, progress=False)
    assert type(adapter.heads["squares"]).__name__ == "LinearHead" and adapter.heads["squares"].width == 16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimilarityHead(LABELS, ("no place",)), "must hold {} where the class name goes"),
        (lambda: SimilarityHead(LABELS, about=["one"]), "1 descriptions for 4 classes"),
        (lambda: DecoupledHead(LABELS, share=2.0), "between 0 and 1"),
        (lambda: pt.Form.of({"name": "maple", "depth": 0}), "depth must be a whole number"),
        (lambda: pt.Form.of({"name": "promptsrc", "mu": 3}), "mu from 0 to 1"),
        (lambda: pt.Form.of({"name": "promptsrc", "templates": ["none"]}), "must hold {}"),
        (lambda: pt.Form.of({"name": "mvlpt", "heads": 3}), "multiple of heads"),
        (lambda: pt.Form.of({"name": "ctp-tft", "contrast": -1}), "contrast must be 0 or more"),
    ],
)
def test_what_cannot_be_done_is_said(make, message):
    with pytest.raises(pt.PolytaskError, match=message):
        make()


def test_a_text_model_has_no_place_for_them(encoder):
    for name in DUAL:
        with pytest.raises(pt.PolytaskError, match="dual model|joins both towers|image tower|text tower"):
            pt.Adapter.new(encoder, name)
    with pytest.raises(pt.PolytaskError, match="compares images with class texts"):
        pt.learn(
            encoder, pt.Task("t", "classify", [pt.Example(("a",), "x")], [], [], labels=("x", "y")), head="decoupled"
        )


def test_heads_are_known_by_their_settings(clip):
    for head in (SimilarityHead(LABELS, ("a {}",), list(ABOUT.values())), DecoupledHead(LABELS, width=16)):
        assert Head.of(head.settings()).settings() == head.settings()
    assert isinstance(logits(clip, SimilarityHead(LABELS)), torch.Tensor) and Pairs and Row
