"""Forms that move parts of the base, or stand beside it: what each promises beyond the contract of all forms."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import colours, same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from zoo import output, tiny

import polytask as pt
from polytask.core.files import WEIGHTS
from polytask.core.head import LinearHead
from polytask.forms.importance import fisher, largest
from polytask.forms.mask import pack, unpack
from polytask.forms.sparse import SparsePatch
from polytask.forms.surgical import layers
from polytask.forms.two_stage import channels
from polytask.learn.dropout import GradientDropout, agreement

QUICK = {"epochs": 2, "batch_size": 4, "progress": False, "precision": "fp32", "lr": 1e-2}


def net(family="bert"):
    module, batch = tiny(family)
    module.requires_grad_(False)
    return pt.Model(module), batch


def run(model, batch, mix=None, **using):
    with torch.no_grad(), model.using(mix, **using):
        return output(model.module(**batch))


def moved(adapter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapter


def losses(model, batch, name, count=3):
    """Batches as `Form.begin` gets them: the distance to some targets."""
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(run(model, batch).shape, generator=generator) for _ in range(count)]

    def loss(target):
        with model.using(name):
            return (output(model.module(**batch)) - target).square().mean()

    return [lambda target=target: loss(target) for target in targets]


def changed(model, adapter):
    """For each parameter of the base, which entries a merged model has otherwise."""
    merged = adapter.merge_into(model).module.state_dict()
    return {name: merged[name] != value for name, value in model.module.state_dict().items()}


# Sparse changes


def test_apet_moves_exactly_the_numbers_it_says(encoder, task):
    before = copy.deepcopy(encoder.module.state_dict())
    adapter = pt.learn(encoder, task, form=pt.APET(count=5), **QUICK)
    assert same_state(before, encoder.module)
    assert adapter.size == 5 * len(adapter.patches)
    places = {name: int(c.sum()) for name, c in changed(encoder, adapter).items() if c.any()}
    assert 0 < sum(places.values()) <= adapter.size and len(places) >= len(adapter.patches) / 2
    other = pt.Adapter.new(encoder, pt.APET(count=5), seed=1)
    assert any(not torch.equal(p.at, other.patches[n].at) for n, p in adapter.patches.items())


def test_lt_sft_keeps_what_full_tuning_moves_most(encoder, task):
    form = pt.LTSFT(density=0.02, lr=1e-3)
    model, batch = net()
    adapter = pt.Adapter.new(model, form)
    model.attach(adapter, "a")
    total = sum(patch.total for patch in adapter.patches.values())
    model.attach(pt.Adapter.new(model, "full"), "full")
    full = model.adapters["full"]
    optimiser = torch.optim.AdamW(full.parameters(), lr=1e-3, weight_decay=0.0)
    for loss in losses(model, batch, "full"):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    form.begin(model, adapter, losses(model, batch, "a"))
    model.rebind("a")
    assert sum(len(p.at) for p in adapter.patches.values()) == round(0.02 * total) == adapter.size
    assert all(not p.values.any() for p in adapter.patches.values())
    kept, left = [], []
    for name, patch in full.patches.items():
        flat = torch.cat([p.detach().abs().flatten() for p in patch.parameters()])
        mine = torch.zeros(len(flat), dtype=torch.bool)
        if name in adapter.patches:
            mine[adapter.patches[name].at.long()] = True
        kept.append(flat[mine])
        left.append(flat[~mine])
    assert torch.cat(kept).min() >= torch.cat(left).max()
    assert torch.equal(run(model, batch, "a"), run(model, batch))


def test_lt_sft_learns_only_there(encoder, task):
    adapter = pt.learn(encoder, task, form=pt.LTSFT(density=0.01, pull=0.1), **QUICK)
    there = changed(encoder, adapter)
    assert 0 < sum(int(c.sum()) for c in there.values()) <= adapter.size
    dense = pt.Adapter.new(encoder, pt.LTSFT(density=0.01))
    assert adapter.size == round(0.01 * sum(p.total for p in dense.patches.values()))
    stored = {site.removesuffix(".weight"): c for site, c in there.items() if site.endswith(".weight")}
    for site, patch in adapter.patches.items():
        weights = patch.at[patch.at < stored[site].numel()].long()
        outside = stored[site].flatten().clone()
        outside[weights] = False
        assert not outside.any()


def test_lt_sft_sets_the_heads_back(encoder):
    adapter = pt.Adapter.new(encoder, "lt-sft")
    head = adapter.heads["h"] = LinearHead("classify", encoder.width, ("a", "b")).start(
        torch.Generator().manual_seed(0)
    )
    encoder.attach(adapter, "a")
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    seen = []

    def batch():
        seen.append(head.linear.weight.detach().clone())
        with encoder.using("a"):
            features = encoder.features({"input_ids": torch.arange(6).view(2, 3)})
        return F.cross_entropy(head.linear(features), torch.tensor([0, 1]))

    adapter.form.begin(encoder, adapter, [batch, batch])
    assert not torch.equal(*seen)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in head.named_parameters())


def test_sparse_files_of_two_tasks_add_up_exactly(tmp_path):
    model, batch = net()
    for seed in (1, 2):
        form = pt.APET(density=0.1)
        moved(pt.Adapter.new(model, form, seed=seed), seed).save(tmp_path / str(seed))
    one, two = (pt.Adapter.load(tmp_path / str(seed)) for seed in (1, 2))
    state = {n: v.clone() for n, v in model.module.state_dict().items()}
    for adapter in (one, two):
        for site, patch in adapter.patches.items():
            for name, delta in patch.deltas().items():
                state[f"{site}.{name}"] += delta
    summed, _ = tiny("bert")
    summed.load_state_dict(state)
    model.attach(one, "one")
    model.attach(two, "two")
    assert torch.equal(run(model, batch, {"one": 1.0, "two": 1.0}), run(pt.Model(summed), batch))


@pytest.mark.parametrize(
    "spoil", [lambda at: at.flip(0), lambda at: at + 10**6, lambda at: at - 10**6, lambda at: at[:-1]]
)
def test_sparse_places_of_a_damaged_file_are_refused(spoil, tmp_path):
    model, _ = net()
    adapter = pt.Adapter.new(model, pt.APET(count=9))
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(k for k in tensors if k.endswith("sparse.at"))
    tensors[key] = spoil(tensors[key]).contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(pt.PolytaskError, match="places of a sparse change|has shape"):
        pt.Adapter.load(tmp_path)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_tr_pts_gives_every_output_its_most_informative_weights(family):
    model, batch = net(family)
    form = pt.TRPTS(fewest=2, most=3, density=0.05)
    adapter = pt.Adapter.new(model, form, sites="linear")
    model.attach(adapter, "a")
    batches = losses(model, batch, "a")
    full = pt.Adapter.new(model, pt.Full(parameters="weight"), sites="linear")
    model.attach(full, "full")
    measured = fisher([p.weight for p in full.patches.values()], losses(model, batch, "full"))
    form.begin(model, adapter, batches)
    model.rebind("a")
    budgets = set()
    for (name, patch), scores in zip(adapter.patches.items(), measured, strict=True):
        site = patch.site
        chosen = torch.zeros(patch.total, dtype=torch.bool)
        chosen[patch.at.long()] = True
        rows, scores = chosen.view(site.shape), scores.view(site.shape)
        rows, scores = (rows.T, scores.T) if site.transposed else (rows, scores)
        each = rows.sum(1)
        assert len(each.unique()) == 1 and 2 <= int(each[0]) <= 6, name
        budgets.add(int(each[0]))
        worst = torch.where(rows, scores, torch.inf).amin(1)
        assert (worst >= torch.where(rows, -1.0, scores).amax(1)).all()
    assert len(budgets) > 1
    untouched = {n for n, c in changed(model, moved(adapter)).items() if not c.any()}
    assert all(f"{name}.weight" not in untouched for name in adapter.patches)
    assert all(int(c.sum()) <= len(adapter.patches[n.removesuffix(".weight")].at)
               for n, c in changed(model, adapter).items() if n not in untouched)  # fmt: skip


def test_fisher_is_the_mean_square_of_gradients_of_the_log_likelihood():
    weight = torch.nn.Parameter(torch.zeros(2, 1))
    x = torch.tensor([[2.0]])
    batches = [
        lambda: F.cross_entropy(x @ weight.T, torch.tensor([1])),
        lambda: F.cross_entropy(0 * x @ weight.T, torch.tensor([1])),
    ]
    assert torch.allclose(fisher([weight], batches)[0], torch.full((2, 1), 0.5))  # ((1 - .5) * 2)^2 = 1, and 0
    tied = largest([torch.tensor([1.0, 1.0, 3.0]), torch.ones(2)], 3)
    assert sum(map(len, tied)) == 3 and 2 in tied[0].tolist()


# Layers that are tuned


def test_surgical_tunes_the_layers_with_most_information(encoder):
    adapter = pt.learn(encoder, colours(), form=pt.Surgical(keep=1), **QUICK)
    blocks = {layers(encoder, adapter)[name] for name in adapter.patches}
    assert len(blocks) == 1
    block = blocks.pop()
    there = {name for name, c in changed(encoder, adapter).items() if c.any()}
    assert there and all(name.startswith(f"{block}.") for name in there)
    assert adapter.card.notes == [f"surgical: 1 of 2 layers are tuned: {block}"]


@pytest.mark.parametrize("score", ["sum", "norm"])
def test_surgical_scores_are_the_blocks_fisher_information(score):
    model, batch = net("t5")
    form = pt.Surgical(keep=0.5, score=score)
    adapter = pt.Adapter.new(model, form)
    model.attach(adapter, "a")
    batches = losses(model, batch, "a")
    found = form.scores(model, adapter, batches)
    assert set(found) == {f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (0, 1)}
    squares = {name: [torch.zeros_like(p) for p in patch.parameters()] for name, patch in adapter.patches.items()}
    for batch_loss in batches:
        adapter.load_state(adapter.state())
        for parameter in adapter.parameters():
            parameter.grad = None
        batch_loss().backward()
        for name, patch in adapter.patches.items():
            for total, parameter in zip(squares[name], patch.parameters(), strict=True):
                total += parameter.grad**2 / len(batches)
    for block, value in found.items():
        mine = [t for name, ts in squares.items() if name.startswith(f"{block}.") for t in ts]
        wanted = sum(float(t.sum() if score == "sum" else t.norm()) for t in mine)
        assert value == pytest.approx(wanted, rel=1e-4)
    form.begin(model, adapter, batches)
    model.rebind("a")
    best = sorted(found, key=found.get)[-2:]
    assert {layers(model, adapter)[name] for name in adapter.patches} == set(best)
    slots = {name for name, slot in model._hub.slots.items() if "a" in slot.patches}
    assert slots == set(adapter.patches)
    model.detach()


def test_two_stage_scores_channels_by_activation_times_gradient():
    model, batch = net("gpt2")
    adapter = pt.Adapter.new(model, pt.TwoStage(density=0.1), sites="linear | norm")
    model.attach(adapter, "a")
    target = {n: p for n, p in adapter.patches.items() if isinstance(p, SparsePatch)}
    wanted = {}
    for name in target:
        kept = []
        hook = model.module.get_submodule(name).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        loss = losses(model, batch, "a", 1)[0]()
        (gradient,) = torch.autograd.grad(loss, kept[-1])
        wanted[name] = (kept[-1] * gradient).flatten(0, -2).sum(0).abs().detach()
        hook.remove()
    at = channels(model, adapter, target, losses(model, batch, "a", 1), 0.1)
    best = largest(list(wanted.values()), round(0.1 * sum(map(len, wanted.values()))))
    for (name, patch), chosen in zip(target.items(), best, strict=True):
        assert sorted(set(patch.outputs()[at[name]].tolist())) == chosen.tolist(), name


def test_two_stage_changes_norms_and_whole_channels(encoder, task):
    adapter = pt.learn(encoder, task, form=pt.TwoStage(density=0.1), **QUICK)
    there = changed(encoder, adapter)
    for name, c in there.items():
        if "LayerNorm" in name:
            continue
        site, _, kind = name.rpartition(".")
        if site not in adapter.patches:
            assert not c.any(), name
        elif kind == "weight":
            rows = set(adapter.patches[site].outputs()[adapter.patches[site].at.long()].tolist())
            assert set(c.any(1).nonzero().flatten().tolist()) <= rows
    assert any(c.any() for name, c in there.items() if "LayerNorm" in name)
    rows = {n: p.outputs()[p.at.long()].unique() for n, p in adapter.patches.items() if isinstance(p, SparsePatch)}
    outputs = sum(s.d_out for s in encoder.select("linear"))
    assert sum(map(len, rows.values())) == round(0.1 * outputs)


# Masks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_come_back(flags):
    packed = pack(torch.tensor(flags))
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(flags) // 8)
    assert unpack(packed, len(flags)).tolist() == flags


def test_a_mask_takes_a_bit_per_weight_and_switches_weights_off(tmp_path):
    model, batch = net()
    adapter = moved(pt.Adapter.new(model, "mask"))
    adapter.save(tmp_path)
    weights = sum(patch.total for patch in adapter.patches.values())
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(t.dtype == torch.uint8 for t in tensors.values())
    header = 8 + int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (tmp_path / WEIGHTS).stat().st_size <= header + weights // 8 + len(tensors)
    again = pt.Adapter.load(tmp_path)
    assert sum(p.numel() * p.element_size() for p in again.parameters()) <= weights // 8 + len(tensors)
    model.attach(again, "a")
    off, state = 0, {n: v.clone() for n, v in model.module.state_dict().items()}
    for name, patch in adapter.patches.items():
        on = patch.scores > adapter.form.threshold
        state[f"{name}.weight"] *= on
        off += int((~on).sum())
    assert 0 < off < weights
    plain, _ = tiny("bert")
    plain.load_state_dict(state)
    assert torch.equal(run(model, batch, "a"), run(pt.Model(plain), batch))
    again.trainable()
    assert all(torch.equal(p.on, adapter.patches[n].on) for n, p in again.patches.items())
    assert again.hash == adapter.hash


def test_a_mask_learns_straight_through_and_leaves_the_base(encoder, task):
    before = copy.deepcopy(encoder.module.state_dict())
    adapter = pt.learn(encoder, task, form="mask", **QUICK)
    assert same_state(before, encoder.module) and any(not p.on.all() for p in adapter.patches.values())
    model, batch = net()
    one = pt.Adapter.new(model, "mask")
    full = pt.Adapter.new(model, pt.Full(parameters="weight"), sites="attention")
    for name, adapter in (("mask", one), ("full", full)):
        model.attach(adapter, name)
        losses(model, batch, name, 1)[0]().backward()
    for name, patch in one.patches.items():
        stored = model.module.get_submodule(name)._parameters["weight"]
        assert torch.allclose(patch.scores.grad, full.patches[name].weight.grad * stored, atol=1e-7)


def test_gradients_are_kept_as_often_as_they_agree():
    a = torch.tensor([1.0, 3.0, 2.0, -2.0, 1.0, 0.0])
    b = torch.tensor([-3.0, -1.0, 5.0, -1.0, 0.0, 0.0])
    assert torch.allclose(agreement(a, b), torch.tensor([0.25, 0.75, 1.0, 1.0, 1.0, 0.5]))
    objective = GradientDropout(pt.Model(torch.nn.Linear(1, 1)))
    parameter = torch.nn.Parameter(torch.zeros(6))
    objective._once(parameter, b)
    (parameter * a).sum().backward()
    parameter.grad = None
    (parameter * a).sum().backward()
    assert torch.equal(parameter.grad, a)  # the second backward has no conflict to look at
    parameter.grad = None
    total = torch.zeros(6)
    for _ in range(2000):
        objective._once(parameter, b)
        (parameter * a).sum().backward()
        total += parameter.grad
        parameter.grad = None
    assert torch.allclose(total / 2000, a * agreement(a, b), atol=0.15)


def test_gradient_dropout_is_an_objective(encoder, task):
    plain = pt.learn(encoder, task, form="mask", **QUICK)
    weakened = pt.learn(encoder, task, form="mask", objective=GradientDropout(encoder, level=0.0), **QUICK)
    assert all(torch.equal(p.scores, weakened.patches[n].scores) for n, p in plain.patches.items())
    dropped = pt.learn(encoder, task, form="mask", objective=GradientDropout(encoder), **QUICK)
    again = pt.learn(encoder, task, form="mask", objective=GradientDropout(encoder), **QUICK)
    assert dropped.state().keys() == again.state().keys()
    assert all(torch.equal(v, again.state()[k]) for k, v in dropped.state().items())
    assert any(not torch.equal(p.scores, dropped.patches[n].scores) for n, p in plain.patches.items())


# Switched layers


def test_taps_leaves_layers_that_are_off_and_does_not_store_them(tmp_path):
    model, batch = net()
    adapter = moved(pt.Adapter.new(model, "taps"))
    names = list(adapter.patches)
    with torch.no_grad():
        for i, patch in enumerate(adapter.patches.values()):
            patch.score.fill_(0.2 if i % 2 else 0.05)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for i, name in enumerate(names):
        assert (f"base_model.model.{name}.delta.weight" in tensors) == bool(i % 2)
    again = pt.Adapter.load(tmp_path)
    there = {name.rpartition(".")[0] for name, c in changed(model, again).items() if c.any()}
    assert there == set(names[1::2])
    model.attach(adapter, "a")
    model.attach(again, "b")
    assert torch.equal(run(model, batch, "a"), run(model, batch, "b"))


def test_taps_scores_take_the_gradient_of_a_factor_and_layers_come_back():
    model, batch = net()
    adapter = moved(pt.Adapter.new(model, "taps"))
    patch = next(iter(adapter.patches.values()))
    with torch.no_grad():
        for other in adapter.patches.values():
            other.score.fill_(0.05 if other is patch else 0.15)
    full = pt.Adapter.new(model, "full")
    for name, other in full.patches.items():
        values = {n: p for n, p in adapter.patches[name].named_parameters() if n != "score"}
        other.load({n: p.detach() * (name != patch.site.name) for n, p in values.items()})
    model.attach(adapter, "a")
    model.attach(full.trainable(), "full")
    losses(model, batch, "a", 1)[0]().backward()
    losses(model, batch, "full", 1)[0]().backward()
    for name, other in full.patches.items():
        mine = adapter.patches[name]
        inner = sum(float((p.grad * mine._parameters[n].detach()).sum()) for n, p in other.named_parameters())
        assert float(mine.score.grad) == pytest.approx(inner, rel=1e-3, abs=1e-7)
    assert not patch.weight.grad.any() and float(patch.score.grad) != 0


def test_more_penalty_leaves_fewer_layers_of_taps_active(encoder, task):
    active = []
    for rate in (0.0, 3.0, 1000.0):
        form = pt.TAPS(penalty_rate=rate, start_at=0.1005)
        adapter = pt.learn(encoder, task, form=form, **{**QUICK, "lr": 1e-3, "epochs": 4, "head_start": "random"})
        active.append(sum(p.active for p in adapter.patches.values()))
    assert active[0] >= active[1] >= active[2] and active[0] > active[2] == 0, active


# Written by a network


@pytest.mark.parametrize("width", [16, 256])
def test_generated_patches_equal_the_lora_that_they_are(width):
    model, batch = net()
    adapter = moved(pt.Adapter.new(model, pt.Hyper(rank=3, width=width, tasks=("red", "blue"))))
    model.attach(adapter, "hyper")
    alone = []
    for task in ("red", "blue", None):
        model.attach(pt.Hyper.materialise(adapter, task), f"lora-{task}")
        said = {} if task is None else {"tasks": [task] * 3}
        alone.append(run(model, batch, "hyper", **said))
        assert torch.allclose(alone[-1], run(model, batch, f"lora-{task}"), atol=1e-6)
    mixed = run(model, batch, "hyper", tasks=["red", "blue", "blue"])
    assert torch.allclose(mixed, torch.stack([alone[0][0], alone[1][1], alone[1][2]]), atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    with pytest.raises(pt.PolytaskError, match="no prototype of the task 'rad'; did you mean 'red'|no prototype"):
        run(model, batch, "hyper", tasks=["rad"] * 3)


def test_a_kernel_says_which_templates_make_which_columns():
    model, _ = net()
    adapter = pt.Adapter.new(model, pt.Hyper(rank=2, width=16), sites="layer==0 & query")
    (patch,) = adapter.patches.values()
    with torch.no_grad():
        separate, _ = patch.factors()  # the kernel is the identity
        patch.kernel_in.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
        A, B = patch.factors()
    assert torch.allclose(A[:, :16], 2 * separate[:, 16:]) and separate.any() and not A[:, 16:].any() and not B.any()


def test_gradients_reach_the_hypernetwork_and_each_task_only_its_prototype():
    model, batch = net()
    adapter = moved(pt.Adapter.new(model, pt.Hyper(tasks=("red", "blue"), width=16)))
    model.attach(adapter, "a")
    with model.using("a", tasks=["blue"] * 3):
        output(model.module(**batch)).square().mean().backward()
    network = adapter.shared
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert not network.prototypes.grad[0].any() and network.prototypes.grad[1].any()


def test_a_hypernetwork_is_smaller_than_its_patches_and_forgets_what_it_wrote():
    model, batch = net()
    form = pt.Hyper(width=32, embedding=4, hidden=8, rank=8)
    adapter = moved(pt.Adapter.new(model, form))
    assert adapter.size < pt.Adapter.new(model, pt.LoRA(rank=8)).size / 2
    model.attach(adapter, "a")
    before = run(model, batch, "a")
    assert torch.equal(before, run(model, batch, "a"))
    with torch.no_grad():
        adapter.shared.up.mul_(2)
    assert not torch.allclose(before, run(model, batch, "a"), atol=1e-4)


# Beside the base


def saved_bytes(model, batch, name):
    """What a forward keeps for its backward, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in [*model.module.parameters(), *model.adapters[name].parameters()]}
    kept = {}

    def keep(tensor):
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            kept[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), model.using(name):
        out = output(model.module(**batch))
    return sum(kept.values()), out


@pytest.mark.parametrize("form", [pt.Side(rank=8), pt.LEVI(rank=8, width=16)], ids=["side", "levi"])
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
def test_a_side_network_keeps_less_for_its_backward_than_lora(family, form):
    model, batch = net(family)
    model.attach(moved(pt.Adapter.new(model, form)), "side")
    model.attach(moved(pt.Adapter.new(model, pt.LoRA(rank=8))), "lora")
    side, out = saved_bytes(model, batch, "side")
    lora, _ = saved_bytes(model, batch, "lora")
    assert 0 < side < lora / 2, (side, lora)
    reached = []
    middle = next(m for n, m in model.module.named_modules() if n.endswith(("self_attn", "attention", "mlp")))
    middle.register_forward_hook(lambda m, i, o: reached.append(o[0] if isinstance(o, tuple) else o))
    with model.using("side"):
        output(model.module(**batch)).square().mean().backward()
    assert reached and not any(r.requires_grad for r in reached)
    assert all(p.grad is None for p in model.module.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.adapters["side"].parameters())


@pytest.mark.parametrize("form", ["side", "levi"])
def test_no_gradient_enters_the_base_even_where_it_is_asked_for(form):
    model, _ = net("llama")
    adapter = moved(pt.Adapter.new(model, form, sites="model.layers.0.input_layernorm | model.norm"))
    first, last = adapter.patches.values()
    y = torch.randn(2, 3, 32, requires_grad=True)
    first.add(y, y, y)
    out = last.contribute(y, y)
    assert out.requires_grad and torch.autograd.grad(out.sum(), y, allow_unused=True) == (None,)


def test_a_side_network_attends_to_real_tokens_only():
    model, batch = net()
    model.attach(moved(pt.Adapter.new(model, pt.Side(attend=True))), "a")
    model.attach(moved(pt.Adapter.new(model, pt.Side())), "plain")
    whole = run(model, batch, "a")
    assert not torch.allclose(whole, run(model, batch, "plain"), atol=1e-4)
    length = int(batch["attention_mask"][2].sum())
    alone = run(model, {k: v[2:, :length] for k, v in batch.items()}, "a")
    assert torch.allclose(whole[2, :length], alone[0], atol=1e-5)


def test_a_side_network_is_causal_and_refuses_other_rows_on_the_way():
    model, batch = net("llama")
    adapter = moved(pt.Adapter.new(model, "side"))
    model.attach(adapter, "a")
    whole = run(model, batch, "a")
    cut = run(model, {k: v[:, :3] for k, v in batch.items()}, "a")
    assert torch.allclose(whole[:, :3], cut, atol=1e-5)
    assert not adapter.shared.seen  # nothing is kept after the forward
    last = next(n for n, (_, _, end) in adapter.shared.places.items() if end)
    with torch.no_grad(), model.using(["a", None, "a"]):
        model.module.get_submodule("model.layers.0.input_layernorm")(torch.randn(3, 7, 32))
        with pytest.raises(pt.PolytaskError, match="the same rows at every site"):
            adapter.patches[last].contribute(torch.randn(3, 7, 32), torch.randn(3, 7, 32))


def test_levi_weighs_the_depths_of_each_stack():
    model, batch = net("t5")
    adapter = moved(pt.Adapter.new(model, "levi"))
    model.attach(adapter, "a")
    weights = adapter.shared.weights()
    assert list(weights) == [site.name for stack in adapter.shared.stacks for site in stack] and len(weights) == 12
    for side in ("encoder", "decoder"):
        assert sum(w for n, w in weights.items() if n.startswith(side)) == pytest.approx(1.0)
    before = run(model, batch, "a")
    loudest = adapter.patches["decoder.block.1.layer.0.layer_norm"]
    with torch.no_grad():
        adapter.shared.depth1.copy_(torch.tensor([0.0] * 3 + [40.0] + [0.0] * 3))
    only = run(model, batch, "a")
    with torch.no_grad():
        for name, patch in adapter.patches.items():
            if name.startswith("decoder") and patch is not loudest:
                patch.own.mul_(2.0)
    assert torch.allclose(run(model, batch, "a"), only, atol=1e-5)
    assert not torch.allclose(only, before, atol=1e-4)
    with torch.no_grad(), model.using("a"), pytest.raises(pt.PolytaskError, match="before the first site of its stack"):
        model.module.get_submodule("decoder.final_layer_norm")(torch.randn(3, 2, 32))


@pytest.mark.parametrize("form", ["side", "levi"])
@pytest.mark.parametrize("family", ["swin", "resnet", "t5"])
def test_networks_beside_the_base_join_stages_of_other_shapes(family, form):
    model, batch = net(family)
    adapter = moved(pt.Adapter.new(model, form))
    model.attach(adapter, "a")
    whole = run(model, batch, "a")
    assert not torch.allclose(whole, run(model, batch), atol=1e-4)
    one = run(model, {k: v[1:2] for k, v in batch.items()}, "a")
    assert torch.allclose(whole[1:2], one, atol=1e-5)
    with model.using("a"):
        output(model.module(**batch)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_settings_out_of_range_are_refused():
    for form, message in (
        (lambda: pt.APET(density=0.0), "density must be above 0"),
        (lambda: pt.APET(count=0), "count must be"),
        (lambda: pt.LTSFT(pull=-1.0), "pull not negative"),
        (lambda: pt.TRPTS(fewest=0), "must be at least 1"),
        (lambda: pt.Mask(start_at=0.0), "start_at must be above threshold"),
        (lambda: pt.TAPS(start_at=0.05), "start_at must be at least threshold"),
        (lambda: pt.Surgical(keep=1.5), "keep must be a fraction"),
        (lambda: pt.TwoStage(density=2.0), "density must be above 0"),
        (lambda: pt.Hyper(rank=0), "rank must be a whole number"),
        (lambda: pt.Hyper(tasks=("a", "a")), "a name of its own"),
        (lambda: pt.Side(rank=1), "rank must be a whole number"),
        (lambda: pt.LEVI(width=0), "width must be a whole number"),
        (lambda: GradientDropout(None, level=2.0), "level must be between"),
    ):
        with pytest.raises(pt.PolytaskError, match=message):
            form()
