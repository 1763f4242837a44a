"""What attaching does to a model, and what it leaves alone."""

import copy
import pickle
import shutil
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError
from zoo import output, tiny

import polytask as pt
from polytask.core.errors import AdapterError, MixError, ModelError
from polytask.core.form import NO_CALL, Form, Patch
from polytask.core.hub import InactiveSiteWarning

torch.set_num_threads(1)

RANDOM = pt.LoRA(rank=2, init="random")


def adapter_for(model, form=RANDOM, sites=None, seed=0, scale=0.5):
    """An adapter that changes something, and is not trainable."""
    adapter = pt.Adapter.new(model, form, sites, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(scale * p if isinstance(form, pt.LoRA) else 0.1 * scale * torch.randn(p.shape, generator=generator))
    return adapter.trainable(False)


def with_adapters(family, names="ab", form=RANDOM, sites=None):
    """A tiny model with an adapter for each letter, and its batch."""
    module, batch = tiny(family)
    model = pt.Model(module)
    for seed, name in enumerate(names):
        model.attach(adapter_for(model, form, sites, seed), name)
    return model, batch


def run(model, batch, mix=None):
    module = model.module
    with torch.no_grad(), model.using(mix):
        return output(module(**batch))


def row(batch, i):
    return {k: v[i : i + 1] for k, v in batch.items()}


def polytask_attributes(module):
    return [f"{name}.{key}" for name, m in module.named_modules() for key in vars(m) if key.startswith("_polytask")]


@dataclass(frozen=True)
class Gate(Form):
    """c = g * y: what it adds depends on the base's own output."""

    name = "gate"

    def patch(self, site):
        return GatePatch(self, site)


class GatePatch(Patch):
    def __init__(self, form, site):
        super().__init__(form, site)
        self.g = nn.Parameter(torch.zeros(site.d_out))

    def start(self, generator):
        with torch.no_grad():
            self.g.normal_(std=0.2, generator=generator)

    def contribute(self, x, y, call=NO_CALL):
        return self.g * y


# The module stays what it was


@pytest.mark.parametrize("form", [RANDOM, pt.Full()], ids=["lora", "full"])
def test_names_classes_and_state_stay(form):
    module, batch = tiny("bert")
    cls, keys, parameters = type(module), list(module.state_dict()), list(module.parameters())
    repr_before, classes = repr(module), [type(m) for m in module.modules()]
    model = pt.Model(module)
    model.attach(adapter_for(model, form), "a")
    with model.using("a"):
        state = module.state_dict()
        assert list(state) == keys
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
        assert all(torch.equal(state[k], p) for k, p in module.named_parameters())
        assert isinstance(module, cls) and type(module).__name__ == "BertModel"
        query = module.encoder.layer[0].attention.self.query
        assert isinstance(query, nn.Linear) and type(query) is not nn.Linear and type(query).__name__ == "Linear"
        assert type(query).__module__ == nn.Linear.__module__ and repr(module) == repr_before
        assert [name for name, _ in module.named_modules()] == [name for name, _ in tiny("bert")[0].named_modules()]
    model.detach()
    assert [type(m) for m in module.modules()] == classes and not polytask_attributes(module)


def test_loading_a_state_dict_while_attached():
    model, batch = with_adapters("bert", "a")
    other = tiny("bert", seed=1)[0]
    want = pt.Model(copy.deepcopy(other))
    want.attach(model.adapters["a"], "a", check_base=False)
    model.module.load_state_dict(other.state_dict())
    assert torch.equal(run(model, batch, "a"), run(want, batch, "a"))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("form", [RANDOM, pt.Full()], ids=["lora", "full"])
def test_tied_weights_stay_tied_and_files_are_the_base(family, form, tmp_path):
    module, batch = tiny(family)
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    assert embedding.weight is head.weight
    model = pt.Model(module)
    bare = run(model, batch)
    model.attach(adapter_for(model, form, "kind:linear | kind:embedding"), "a")
    assert embedding.weight is head.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InactiveSiteWarning)
        changed = run(model, batch, "a")
    model.use("a")
    module.save_pretrained(tmp_path)
    model.use(None)
    assert module.config.architectures == [type(tiny(family)[0]).__name__]
    loaded = type(tiny(family)[0]).from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert torch.equal(run(pt.Model(loaded.eval()), batch), bare) and not torch.equal(changed, bare)
    module.tie_weights()
    assert embedding._parameters["weight"] is head._parameters["weight"]
    model.detach()
    assert embedding.weight is head.weight and torch.equal(run(model, batch), bare)


# Generating


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5", "bart", "whisper"])
def test_generating_with_a_cache_equals_one_row_at_a_time(family, beams):
    module, batch = tiny(family)
    model = pt.Model(module)
    for seed, name in enumerate("ab"):
        model.attach(adapter_for(model, sites="linear", seed=seed, scale=1.0), name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 90, (3, 5), generator=generator)
    inputs = {"input_features": batch["input_features"]} if family == "whisper" else {"input_ids": ids}

    def generate(inputs, mix, **options):
        with model.using(mix):
            return module.generate(
                **inputs, max_new_tokens=6, min_new_tokens=6, num_beams=beams, do_sample=False, **options
            )

    bare = generate(inputs, None)
    single = generate(inputs, "a")
    assert not torch.equal(single, bare)
    assert torch.equal(generate(inputs, "a", use_cache=False), single)
    for i in range(3):
        assert torch.equal(generate(row(inputs, i), "a")[0], single[i])
    mixes = ["a", None, {"a": 0.5, "b": 0.7}]
    rows = generate(inputs, mixes)
    assert torch.equal(rows[0], single[0]) and torch.equal(rows[1], bare[1])
    for i, mix in enumerate(mixes):
        assert torch.equal(generate(row(inputs, i), mix)[0], rows[i])


def test_generating_checks_the_number_of_rows():
    """Four prompts are not two prompts with two beams."""
    model, _ = with_adapters("gpt2")
    ids = torch.tensor([[2, 3], [4, 5], [6, 7], [8, 9]])
    with model.using(["a", "b"]), pytest.raises(MixError, match="each of 2 rows, and the batch has 4"):
        model.module.generate(ids, max_new_tokens=2)


# Training


@pytest.mark.parametrize("form", [RANDOM, pt.Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(family, form):
    model, batch = with_adapters(family, "a", form, "linear")
    module = model.module.train()
    adapter = model.adapters["a"].trainable()

    def gradients():
        for p in adapter.parameters():
            p.grad = None
        torch.manual_seed(0)
        with model.using("a"):
            output(module(**batch)).square().mean().backward()
        return {n: p.grad.clone() for n, p in adapter.named_parameters()}

    want = gradients()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients()
    assert any(m.gradient_checkpointing for m in module.modules() if hasattr(m, "gradient_checkpointing"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)
        assert value.any()


def test_a_checkpointed_backward_without_its_mix_is_loud():
    model, batch = with_adapters("llama", "a", sites="linear")
    model.module.train()
    model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.adapters["a"].trainable()
    with model.using("a"):
        loss = output(model.module(**batch)).square().mean()
    with pytest.raises(CheckpointError):
        loss.backward()


def test_dropout_follows_the_module():
    model, batch = with_adapters("vit", "a", pt.LoRA(rank=2, dropout=0.5, init="random"), "linear")
    module = model.module
    assert module.config.hidden_dropout_prob == 0.0
    evaluated = run(model, batch, "a")
    assert torch.equal(run(model, batch, "a"), evaluated)
    module.train()
    torch.manual_seed(0)
    first = run(model, batch, "a")
    second = run(model, batch, "a")
    assert not torch.equal(first, second) and not torch.equal(first, evaluated)
    torch.manual_seed(0)
    assert torch.equal(run(model, batch, "a"), first)
    module.eval()
    assert torch.equal(run(model, batch, "a"), evaluated)


def test_present_active_and_trainable_are_three_facts():
    module, batch = tiny("bert")
    flags = {n: i % 2 == 0 for i, (n, _) in enumerate(module.named_parameters())}
    for name, p in module.named_parameters():
        p.requires_grad_(flags[name])
    model = pt.Model(module)
    first, second = adapter_for(model).trainable(True), adapter_for(model, seed=1).trainable(False)

    def unchanged():
        return (
            {n: p.requires_grad for n, p in module.named_parameters()} == flags
            and all(p.requires_grad for p in first.parameters())
            and not any(p.requires_grad for p in second.parameters())
        )

    bare = run(model, batch)
    model.attach(first, "first")
    model.attach(second, "second")
    assert unchanged() and torch.equal(run(model, batch), bare)
    with model.using(["first", "second", None]):
        module(**batch)
        assert unchanged()
    assert not torch.equal(run(model, batch, "second"), bare) and unchanged()  # active and not trainable
    model.detach()
    assert unchanged()


def test_one_more_adapter_touches_only_its_own_modules():
    model, batch = with_adapters("bert", "abc")
    before = {name: (m.__class__, dict(vars(m))) for name, m in model.module.named_modules()}
    patches = {name: dict(slot.patches) for name, slot in model._hub.slots.items()}
    model.attach(adapter_for(model, sites="pooler", seed=9), "d")
    touched = {
        name
        for name, m in model.module.named_modules()
        if m.__class__ is not before[name][0] or vars(m).keys() != before[name][1].keys()
    }
    assert touched == {"pooler.dense"}
    assert all(model._hub.slots[name].patches == value for name, value in patches.items())
    model.detach("b")
    assert model.attached == ("a", "c", "d")
    assert all(set(slot.patches) == {"a", "c"} for name, slot in model._hub.slots.items() if name != "pooler.dense")


# Precision


@pytest.mark.parametrize("form", [RANDOM, pt.Full()], ids=["lora", "full"])
@pytest.mark.parametrize("mix", ["a", {"a": 0.5, "b": 0.5}, ["a", "b", None]], ids=["single", "fixed", "rows"])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_and_a_bf16_base(form, mix, grad):
    model, batch = with_adapters("llama", "ab", form, "linear")

    def forward():
        with torch.set_grad_enabled(grad), model.using(mix):
            return output(model.module(**batch))

    def near(got):
        return (got.float() - want).norm() / want.norm()

    with torch.no_grad():
        want = forward().detach()
        with torch.autocast("cpu", torch.bfloat16):
            bare = output(model.module(**batch))
            plain = near(bare)  # how far precision takes the bare base from the adapted output: far
            got = forward()
    assert got.dtype == bare.dtype and near(got) < 0.05 < plain
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.adapters["a"].parameters()} == {torch.float32}
    got = forward()
    assert got.dtype == torch.bfloat16 and near(got) < 0.05


# Compiling


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", [RANDOM, pt.Full()], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiled_in_one_graph_for_each_mix(family, form, fresh_compiler):
    model, batch = with_adapters(family, "ab", form, "linear")
    compiled = torch.compile(model.module, fullgraph=True, backend="eager")
    for mix in ("a", None, "b", {"a": 0.5, "b": 2.0}, "a"):  # what was compiled for one mix must not serve another
        with torch.no_grad(), model.using(mix):
            got = output(compiled(**batch))
        torch.testing.assert_close(got, run(model, batch, mix), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        next(iter(model.adapters["a"].parameters())).mul_(3.0)
        with model.using("a"):
            got = output(compiled(**batch))
    torch.testing.assert_close(got, run(model, batch, "a"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiled_to_machine_code(family, fresh_compiler):
    model, batch = with_adapters(family, "a")
    compiled = torch.compile(model.module, fullgraph=True)
    with torch.no_grad(), model.using("a"):
        got = output(compiled(**batch))
    torch.testing.assert_close(got, run(model, batch, "a"), rtol=1e-4, atol=1e-4)


# Copies


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("bert", "deepcopy"),
        ("gpt2", "deepcopy"),
        ("wav2vec2", "deepcopy"),  # has a parametrised module, which torch cannot pickle, attached or not
        ("bert", "pickle"),
        ("gpt2", "pickle"),
    ],
)
def test_copies_are_equal_and_independent(family, way):
    model, batch = with_adapters(family, "ab", sites="kind:linear | conv")
    model.attach(adapter_for(model, pt.Full(), "norm"), "c")
    model.use({"a": 0.5, "b": 0.5, "c": 1.0})
    module = model.module
    twin = copy.deepcopy(module) if way == "deepcopy" else pickle.loads(pickle.dumps(module))
    model.use(None)
    other = pt.Model(twin)
    assert other.attached == ("a", "b", "c") and repr(other.mix) == "Fixed({'a': 0.5, 'b': 0.5, 'c': 1.0})"
    assert type(twin) is type(module)
    for mix in ("a", {"a": 0.5, "b": 0.5, "c": 1.0}, ["a", None, "b"], None):
        assert torch.equal(run(other, batch, mix), run(model, batch, mix))
    own = {id(t) for t in [*module.parameters(), *(p for a in model.adapters.values() for p in a.parameters())]}
    assert not own & {
        id(t) for t in [*twin.parameters(), *(p for a in other.adapters.values() for p in a.parameters())]
    }
    before = run(model, batch, "a")
    with torch.no_grad():
        for p in other.adapters["a"].parameters():
            p.mul_(2.0)
    assert torch.equal(run(model, batch, "a"), before) and not torch.equal(run(other, batch, "a"), before)
    other.detach()
    assert type(twin) is type(tiny(family)[0]) and model.attached == ("a", "b", "c")
    assert torch.equal(run(model, batch, "a"), before)


# Hooks


def test_forward_hooks_see_the_adapted_output():
    model, batch = with_adapters("bert", "")
    query = model.module.encoder.layer[0].attention.self.query
    seen = {}

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, out.clone())

    query.register_forward_hook(keep("before"))
    inputs = {}
    query.register_forward_pre_hook(lambda module, args: inputs.__setitem__("x", args[0].clone()))
    run(model, batch)
    bare = seen["before"]
    adapter = adapter_for(model)
    model.attach(adapter, "a")
    handle = query.register_forward_hook(keep("after"))
    run(model, batch, "a")
    want = bare + inputs["x"] @ adapter.patches["encoder.layer.0.attention.self.query"].delta().T
    for name in ("before", "after"):
        torch.testing.assert_close(seen[name], want, rtol=1e-5, atol=1e-5)
    handle.remove()
    seen.clear()
    model.detach()
    run(model, batch)
    assert set(seen) == {"before"} and torch.equal(seen["before"], bare)


class Doubles(ModelHook):
    """Doubles a module's output, so that the order of the two changes shows."""

    def post_forward(self, module, output):
        return 2 * output


def hooked(when):
    """A linear layer with a hook set on the instance, and an adapter, in this order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False))
    model = pt.Model(net)
    adapter = adapter_for(model, sites="0", scale=1.0)
    if when == "before":
        add_hook_to_module(net[0], Doubles())
        model.attach(adapter, "a")
    else:
        model.attach(adapter, "a")
        add_hook_to_module(net[0], Doubles())
    return model, net, adapter


@pytest.mark.parametrize("when", ["before", "after"])
def test_forwards_set_on_the_instance_keep_working(when):
    model, net, adapter = hooked(when)
    x = torch.randn(2, 4)
    base, change = x @ net[0].weight.T, x @ adapter.patches["0"].delta().T
    want = 2 * base + change if when == "before" else 2 * (base + change)
    with torch.no_grad():
        torch.testing.assert_close(net(x), 2 * base)
        with model.using("a"):
            torch.testing.assert_close(net(x), want)
        # another adapter at the module must not make the first one act twice
        model.attach(adapter_for(model, sites="0", seed=1), "b")
        with model.using("a"):
            torch.testing.assert_close(net(x), want)
        twin = copy.deepcopy(net)
        for p in pt.Model(twin).adapters["a"].parameters():
            p.zero_()
        with pt.Model(twin).using("a"):
            torch.testing.assert_close(twin(x), 2 * base)  # the copy's hook runs the copy
        with model.using("a"):
            torch.testing.assert_close(net(x), want)
        model.detach()
        torch.testing.assert_close(net(x), 2 * base)
        assert type(net[0]) is nn.Linear and not polytask_attributes(net)
        model.attach(adapter, "a")
        with model.using("a"):
            assert any(torch.allclose(net(x), w, atol=1e-6) for w in (2 * base + change, 2 * (base + change)))
        model.detach()
        remove_hook_from_module(net[0])
        torch.testing.assert_close(net(x), base)


def test_a_plain_function_set_on_the_instance_after_attaching():
    """No attribute tells that it calls the adapted forward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    model = pt.Model(net)
    model.attach(adapter_for(model, sites="0"), "a")
    inner = net[0].forward
    net[0].forward = lambda x: inner(x) * 3
    x = torch.randn(2, 4)
    with torch.no_grad(), model.using("a"):
        want = net(x)
        model.attach(adapter_for(model, sites="0", seed=1), "b")
        torch.testing.assert_close(net(x), want)


def test_a_hook_on_the_root_keeps_the_checks():
    model, batch = with_adapters("bert", "")
    add_hook_to_module(model.module, ModelHook())
    model.attach(adapter_for(model), "a")
    with model.using(["a", None]), pytest.raises(MixError, match="each of 2 rows, and the batch has 3"):
        model.module(**batch)
    model.detach()
    assert "_outer" not in repr(model.module.__dict__["forward"])


# Mixes


def test_eight_adapters_of_different_ranks_and_forms_in_one_batch():
    module, _ = tiny("bert")
    model = pt.Model(module)
    names = [f"task{i}" for i in range(8)]
    for i, name in enumerate(names):
        form = pt.Full() if i % 4 == 3 else Gate() if i % 4 == 2 else pt.LoRA(rank=1 + i, init="random")
        sites = "linear" if i % 2 else "attention & linear"
        model.attach(adapter_for(model, form, sites, seed=i), name)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(2, 90, (8, 6), generator=generator), "attention_mask": torch.ones(8, 6).long()}
    rows = run(model, batch, names)
    bare = run(model, batch)
    for i, name in enumerate(names):
        torch.testing.assert_close(rows[i], run(model, row(batch, i), name)[0], rtol=1e-5, atol=1e-5)
        assert (rows[i] - bare[i]).abs().max() > 1e-3


def test_rows_without_and_with_several_adapters():
    module, batch = tiny("llama")
    model = pt.Model(module)
    forms = {"a": RANDOM, "b": pt.LoRA(rank=5, init="random"), "c": pt.Full(), "d": Gate()}
    for seed, (name, form) in enumerate(forms.items()):
        model.attach(adapter_for(model, form, "linear", seed), name)
    for mixes in (
        [None, {"a": 0.5, "b": 0.25}, "b"],
        [{"a": 1.0, "c": 0.5, "d": 0.5}, {"d": 1.0, "b": -0.5}, None],
        [None, None, {"a": 2.0}],
        [None, None, None],
        [{"a": 0.0}, {}, "c"],
    ):
        got = run(model, batch, mixes)
        for i, mix in enumerate(mixes):
            torch.testing.assert_close(got[i], run(model, batch, mix)[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_fixed_weights_are_the_weighted_sum(grad):
    """At one linear layer, where the sum can be taken by hand; each contribution sees the base's own output."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    model = pt.Model(net)
    forms = {"a": RANDOM, "b": pt.LoRA(rank=3, init="random"), "full": pt.Full(), "gate": Gate()}
    for seed, (name, form) in enumerate(forms.items()):
        model.attach(adapter_for(model, form, "0", seed, scale=1.0), name)
    weights = {"a": 0.3, "b": -0.7, "full": 1.5, "gate": 0.9}
    x = torch.randn(4, 6)
    with torch.no_grad():
        y = net(x)
        patches = {name: adapter.patches["0"] for name, adapter in model.adapters.items()}
        full = x @ patches["full"].weight.T + patches["full"].bias
        parts = {"a": x @ patches["a"].delta().T, "b": x @ patches["b"].delta().T, "full": full}
        parts["gate"] = patches["gate"].g * y
        want = y + sum(weights[n] * part for n, part in parts.items())
    order = [["a", "b", "full", "gate"], ["gate", "full", "b", "a"], ["full", "a", "gate", "b"]]
    for names in order:
        for mix in ({n: weights[n] for n in names}, [{n: weights[n] for n in names}] * 4):
            with torch.set_grad_enabled(grad), model.using(mix):
                torch.testing.assert_close(net(x).detach(), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), model.using({"a": 1.0, "b": 0.0}):
        torch.testing.assert_close(net(x), y + parts["a"], rtol=1e-5, atol=1e-5)


def test_combining_parameters_is_a_lora_of_averaged_factors():
    model, batch = with_adapters("llama", "ab", pt.LoRA(rank=3, alpha=3, init="random"), "linear")
    weights = {"a": 0.25, "b": 0.75}
    averaged = model.adapters["a"].copy("averaged")
    mine = dict(averaged.named_parameters())
    with torch.no_grad():
        for p in mine.values():
            p.zero_()
        for name, weight in weights.items():
            for key, p in model.adapters[name].named_parameters():
                mine[key].add_(p, alpha=weight)
    model.attach(averaged)
    want = run(model, batch, "averaged")
    by_parameters = run(model, batch, pt.Fixed(weights, combines="parameters"))
    torch.testing.assert_close(by_parameters, want, rtol=1e-4, atol=1e-5)
    rows = run(model, batch, pt.PerRow([weights, "a", weights], combines="parameters"))
    torch.testing.assert_close(rows[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1], run(model, batch, "a")[1], rtol=1e-4, atol=1e-5)
    assert (run(model, batch, weights) - want).abs().max() > 1e-3  # the two ways differ


def test_mixes_nest_and_are_restored():
    model, batch = with_adapters("bert", "ab")
    a, b, bare = (run(model, batch, mix) for mix in ("a", "b", None))
    module = model.module

    def now():
        with torch.no_grad():
            return output(module(**batch))

    with model.using("a"):
        outer = model.mix
        assert torch.equal(now(), a)
        with model.using("b"):
            assert torch.equal(now(), b)
            with model.using(None):
                assert torch.equal(now(), bare)
            assert torch.equal(now(), b)
        assert model.mix is outer and torch.equal(now(), a)
        with pytest.raises(KeyError), model.using("b"):
            raise KeyError
        assert model.mix is outer and torch.equal(now(), a)
        with pytest.raises(MixError), model.using("c"):
            pass
        assert model.mix is outer and torch.equal(now(), a)
    assert model.mix is None and torch.equal(now(), bare)
    model.use("b")
    with model.using("a"):
        pass
    assert torch.equal(now(), b)


class Notes(pt.Mix):
    """Notes the calls it is asked with; acts as one adapter."""

    def __init__(self, name):
        self.name, self.calls = name, []

    def names(self):
        return (self.name,)

    def weigh(self, site, names, x, y, call):
        self.calls.append(call)
        return pt.Weights((self.name,), (1.0,))


def test_what_a_call_knows():
    model, batch = with_adapters("bert", "a")
    for mix, inputs in (
        (Notes("a"), lambda: model.module(**batch)),
        (Notes("a"), lambda: model.module(batch["input_ids"], batch["attention_mask"])),
    ):
        with torch.no_grad(), model.using(mix, tasks=["x", "y", "z"]):
            inputs()
        assert {(c.tasks, c.rows) for c in mix.calls} == {(("x", "y", "z"), 3)}
        assert all(c.mask is batch["attention_mask"] for c in mix.calls)
    mix = Notes("a")
    with torch.no_grad(), model.using(mix):
        model.module(**batch)
        mix.calls.clear()
        model.module.encoder.layer[0](torch.randn(2, 4, 32))  # a part alone: nothing is known about it
        assert {(c.tasks, c.rows, c.mask) for c in mix.calls} == {(None, None, None)}
    with model.using("a", tasks=["x", "y"]), pytest.raises(MixError, match="a task for each of 2 rows, .* has 3"):
        model.module(**batch)


def test_what_a_call_knows_while_generating():
    model, _ = with_adapters("t5", "a", sites="linear")
    mix = Notes("a")
    ids, mask = torch.tensor([[2, 3, 4], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with model.using(mix, tasks=["x", "y"]):
        for _ in range(2):
            model.module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, num_beams=2)
    tasks = {(c.tasks, c.rows) for c in mix.calls}
    assert tasks == {(("x", "y"), 2), (("x", "x", "y", "y"), 4)}  # the encoder's call, and the beams of the decoder
    assert all(c.mask is mask for c in mix.calls if c.rows == 2)


# One adapter, several models


def test_one_adapter_in_two_models():
    first, batch = with_adapters("bert", "a")
    adapter = first.adapters["a"]
    second = pt.Model(tiny("bert")[0])
    second.attach(adapter, "same")
    one, two = run(first, batch, "a"), run(second, batch, "same")
    assert torch.equal(one, two)
    assert all(patch.base is None for patch in adapter.patches.values())  # attaching does not change the adapter
    with torch.no_grad():
        for p in adapter.parameters():
            p.mul_(1.5)
    assert not torch.equal(run(first, batch, "a"), one)
    assert torch.equal(run(first, batch, "a"), run(second, batch, "same"))
    first.detach()
    assert torch.equal(run(second, batch, "same"), run(second, batch, "same")) and second.attached == ("same",)
    assert not torch.equal(run(second, batch, "same"), run(second, batch))


def test_an_adapter_of_the_bare_network_in_a_model_with_a_head():
    """Its sites have a prefix there."""
    bare, batch = with_adapters("bert", "a")
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(bare.module.config).eval()
    module.bert.load_state_dict(bare.module.state_dict())
    model = pt.Model(module)
    before = run(model, batch)
    model.attach(bare.adapters["a"], "a")  # the heads are no part of the fingerprint
    assert all(name.startswith("bert.encoder.") for name in model._hub.slots)
    with torch.no_grad(), model.using("a"):
        hidden = module.bert(**batch).last_hidden_state
    assert torch.equal(hidden, run(bare, batch, "a")) and not torch.equal(run(model, batch, "a"), before)
    model.detach("a")
    assert torch.equal(run(model, batch), before) and not polytask_attributes(module)


def test_one_adapter_twice_in_one_model():
    model, batch = with_adapters("bert", "a", sites="query")
    model.attach(model.adapters["a"], "again")
    with torch.no_grad():
        for p in model.adapters["a"].parameters():
            p.mul_(0.5)
    torch.testing.assert_close(
        run(model, batch, {"a": 1.0, "again": 1.0}), run(model, batch, {"a": 2.0}), rtol=1e-4, atol=1e-5
    )


def test_a_model_object_made_later_finds_what_is_attached():
    model, batch = with_adapters("bert", "a")
    later = pt.Model(model.module)
    assert later.attached == ("a",) and torch.equal(run(later, batch, "a"), run(model, batch, "a"))


# Messages


def test_errors_of_attaching_and_detaching():
    model, batch = with_adapters("bert", "")
    with pytest.raises(MixError, match="no adapter 'a' is attached; nothing is attached; call model.attach first"):
        model.use("a")
    adapter = adapter_for(model)
    with pytest.raises(AdapterError, match=r"no adapter 'a' is attached; there is: nothing"):
        model.detach("a")
    model.attach(adapter, "sentiment")
    with pytest.raises(AdapterError, match="an adapter called 'sentiment' is attached already; detach it or choose"):
        model.attach(adapter_for(model, seed=1), "sentiment")
    assert model.adapters["sentiment"] is adapter
    with pytest.raises(
        AdapterError, match=r"no adapter 'sentimnt' is attached \(did you mean 'sentiment'\?\); there is"
    ):
        model.detach("sentimnt")
    for mix in ("sentimnt", {"sentimnt": 1.0}, [None, "sentimnt", None]):
        with pytest.raises(
            MixError, match=r"no adapter 'sentimnt' is attached \(did you mean 'sentiment'\?\); attached"
        ):
            model.use(mix)
    with (
        model.using(["sentiment", None]),
        pytest.raises(MixError, match="each of 2 rows, and the batch has 3; give one"),
    ):
        model.module(**batch)
    with pytest.raises(MixError, match="PerRow needs at least one row"):
        model.use([])
    other = pt.Model(tiny("bert", seed=1)[0])
    with pytest.raises(AdapterError, match="was made for the base"):
        other.attach(adapter, "a")
    llama = pt.Model(tiny("llama")[0])
    with pytest.raises(AdapterError, match="has a patch for 'encoder.layer.0.attention.self.query', and"):
        llama.attach(adapter, "a", check_base=False)
    for untouched in (other, llama):
        assert untouched.attached == () and not polytask_attributes(untouched.module)


def test_two_models_over_one_module_are_refused():
    module, _ = tiny("bert")
    first, second = pt.Model(module), pt.Model(module)
    first.attach(adapter_for(first), "a")
    with pytest.raises(ModelError, match="another Model has adapters attached to this module"):
        second.attach(adapter_for(second), "b")


def test_a_form_that_cannot_be_averaged_says_so():
    model, batch = with_adapters("bert", "ab", Gate())
    with pytest.raises(MixError, match="the form 'gate' cannot be mixed by its parameters"):
        run(model, batch, pt.Fixed({"a": 0.5, "b": 0.5}, combines="parameters"))


def test_detaching_the_acting_adapter_leaves_the_bare_base():
    model, batch = with_adapters("bert", "ab")
    bare = run(model, batch)
    model.use({"a": 1.0, "b": 1.0})
    model.detach("a")
    assert model.mix is None and torch.equal(run(model, batch), bare)
    model.use("b")
    model.attach(adapter_for(model, seed=5), "c")
    model.detach("c")
    assert model.mix is not None  # a mix that does not name it goes on
    assert not torch.equal(output(model.module(**batch)).detach(), bare)


class Skips(nn.Module):
    """Never calls one of its layers."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.relu(self.used(x))


def test_a_site_that_is_not_reached_is_named_once():
    model = pt.Model(Skips())
    model.attach(adapter_for(model, sites="linear"), "a")
    x = torch.ones(1, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.module(x)  # nothing acts
        with model.using("a"):
            for _ in range(3):
                model.module(x)
    found = [w for w in caught if issubclass(w.category, InactiveSiteWarning)]
    assert len(found) == 1 and found[0].filename == __file__
    assert "1 site(s) of the active adapters were not reached" in str(found[0].message)
    assert "changed nothing: unused. If another module reads" in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.detach()
        model.attach(adapter_for(model, sites="used"), "b")
        with model.using("b"):
            model.module(x)
