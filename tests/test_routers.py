"""The contract of every registered router: as a mix over attached adapters, and in a mixture that learns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import colours, same_state
from zoo import output, tiny

import polytask as pt
from polytask.core.adapter import Adapter
from polytask.core.errors import AdapterError, ConfigError, MixError
from polytask.core.gate import Router, routers
from polytask.core.routing import Routing
from polytask.forms.mixture import Mixture, experts_of
from polytask.forms.mixtures import mixture_of, routing_of

NAMES = ("a", "b", "c")
FREE = [name for name in routers if routers[name].trains == "nothing"]
LEARNED = [name for name in routers if routers[name].trains != "nothing"]


def excused(router: str, check: str) -> None:
    if check in routers[router].exceptions:
        pytest.skip(routers[router].exceptions[check])


def made(model: pt.Model, names=NAMES, form="lora", same=False, sites=None) -> dict[str, Adapter]:
    """Adapters that change something, each of its own task."""
    spec = {"name": "lora", "rank": 4, "init": "random"} if form == "lora" else form
    found = {}
    for i, name in enumerate(names):
        adapter = found[name] = Adapter.new(model, spec, sites, seed=0 if same else i, name=name)
        adapter.card.tasks = [{"name": name}]
        adapter.trainable(False)
    return found


def task_of(model: pt.Model, name: str) -> pt.Task:
    """A task that the base can read, with examples of its own."""
    if model.kind != "image":
        return colours(name=name, start=5 * ord(name[0]))
    generator = torch.Generator().manual_seed(ord(name[0]))
    pixels = torch.randint(0, 255, (12, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    return pt.Task.from_arrays(name, list(pixels), ["red", "blue"] * 6, ["train"] * 8 + ["dev"] * 2 + ["test"] * 2)


def mix_of(router: str, model: pt.Model, adapters: dict[str, Adapter], **settings) -> Routing:
    """A mix with gates that have values, attached."""
    quick = {"steps": 3} if "steps" in routers[router].knobs() else {}
    chosen = Router.of({"name": router, **quick, **settings})
    if chosen.trains == "nothing":
        return pt.route(adapters, chosen, model=model, data=[task_of(model, name) for name in adapters])
    mixture = mixture_of(chosen.told(list(adapters)), adapters, seed=1, name="mixture")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for patch in mixture.patches.values():
            for name, value in patch.gate.named_parameters():
                if name not in patch.gate.frozen:
                    value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return routing_of(mixture.trainable(False), adapters).attach(model)


BATCH = {
    "input_ids": torch.tensor([[101, 2023, 2003, 1037, 102], [101, 7592, 2088, 102, 0], [101, 3231, 102, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
}
TASKS = ["a", "b", "c"]


@torch.no_grad()
def run(model: pt.Model, mix, batch=BATCH, tasks=TASKS):
    """The last hidden states [B, T, d], zero at padding."""
    with model.using(mix, tasks=tasks):
        out = model.module(**batch).last_hidden_state
    return out * batch["attention_mask"][..., None]


@pytest.mark.parametrize("router", list(routers))
class TestEvery:
    def test_one_adapter_is_that_adapter(self, router, encoder):
        excused(router, "one")
        adapters = made(encoder, ("a",))
        mix = mix_of(router, encoder, adapters)
        torch.testing.assert_close(run(encoder, mix, tasks=["a"] * 3), run(encoder, "a"), rtol=1e-4, atol=1e-5)

    def test_identical_adapters_are_any_of_them(self, router, encoder):
        excused(router, "identical")
        adapters = made(encoder, same=True)
        mix = mix_of(router, encoder, adapters)
        torch.testing.assert_close(run(encoder, mix), run(encoder, "b"), rtol=1e-4, atol=1e-5)

    def test_padding_and_the_batch_change_nothing(self, router, encoder):
        excused(router, "padding")
        mix = mix_of(router, encoder, made(encoder))
        whole = run(encoder, mix)
        longer = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in BATCH.items()}
        torch.testing.assert_close(run(encoder, mix, longer)[:, :5], whole, rtol=1e-4, atol=1e-5)
        order = [2, 0, 1]
        turned = run(encoder, mix, {k: v[order] for k, v in BATCH.items()}, [TASKS[i] for i in order])
        torch.testing.assert_close(turned, whole[order], rtol=1e-4, atol=1e-5)
        for i in range(3):
            alone = run(encoder, mix, {k: v[i : i + 1] for k, v in BATCH.items()}, TASKS[i : i + 1])
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)

    def test_the_order_of_the_adapters_does_not_matter(self, router, encoder):
        excused(router, "order")
        if routers[router].trains != "nothing":
            pytest.skip("its gates start at random in the order of the adapters")
        adapters = made(encoder)
        mix = mix_of(router, encoder, adapters)
        there = run(encoder, mix)
        mix.detach(encoder)
        turned = mix_of(router, encoder, {n: adapters[n] for n in ("c", "a", "b")})
        torch.testing.assert_close(run(encoder, turned), there, rtol=1e-4, atol=1e-5)

    def test_saved_and_loaded_it_is_the_same(self, router, encoder, tmp_path):
        adapters = made(encoder)
        mix = mix_of(router, encoder, adapters)
        there = run(encoder, mix)
        file = mix.save(tmp_path / "mix.safetensors")
        mix.detach(encoder)
        renamed = {f"other-{n}": a for n, a in adapters.items()}
        again = Routing.load(file, renamed).attach(encoder)
        assert torch.equal(run(encoder, again), there)
        assert again.names() == NAMES
        assert file.read_bytes() == again.save(tmp_path / "again.safetensors").read_bytes()
        changed = {**adapters, "b": made(encoder, ("x", "y", "z", "b"))["b"]}
        with pytest.raises(AdapterError, match="'b' is there, but was changed"):
            Routing.load(file, changed)

    def test_detached_it_leaves_the_base_as_it_was(self, router, encoder):
        before = {k: v.clone() for k, v in encoder.module.state_dict().items()}
        bare = run(encoder, None)
        adapters = made(encoder)
        values = {n: a.state() for n, a in adapters.items()}
        mix = mix_of(router, encoder, adapters)
        run(encoder, mix)
        mix.detach(encoder)
        assert encoder.attached == ()
        assert torch.equal(run(encoder, None), bare)
        assert same_state(before, encoder.module)
        for name, adapter in adapters.items():
            assert all(torch.equal(v, adapter.state()[k]) for k, v in values[name].items())

    def test_some_sites_have_some_of_the_adapters(self, router, encoder):
        excused(router, "some")
        few = made(encoder, ("a", "b"), sites="attention & linear")
        more = made(encoder, ("c",), sites="linear")
        mix = mix_of(router, encoder, {**few, **more})
        assert torch.isfinite(run(encoder, mix)).all()

    def test_gradients_reach_what_learns(self, router, encoder):
        adapters = made(encoder)
        mix = mix_of(router, encoder, adapters)
        own = [p for n, p in mix.named_parameters() if n.split(":")[1] not in mix.parts[n.split(":")[0]].frozen]
        for p in own:
            p.requires_grad_()
        if not own:
            assert routers[router].trains in ("nothing", "adapters")
            return
        with encoder.using(mix, tasks=TASKS):
            loss = (encoder.module(**BATCH).last_hidden_state * torch.randn(32)).sum()
        loss.backward()
        assert sum(p.grad is not None and bool(p.grad.any()) for p in own) >= 1


@pytest.mark.parametrize("router", [n for n in routers if routers[n].reads == "token"])
def test_all_chosen_is_dense(router, encoder):
    adapters = made(encoder)
    first = run(encoder, mix_of(router, encoder, adapters, top_k=0))
    encoder.detach()
    torch.testing.assert_close(run(encoder, mix_of(router, encoder, adapters, top_k=3)), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", list(routers))
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_while_writing(router, family, request):
    """With a cache and beams the text is that of forwards without a cache, where the router reads what is there so far."""
    excused(router, "writing")
    model = request.getfixturevalue({"llama": "decoder", "t5": "seq2seq"}[family])
    mix = mix_of(router, model, made(model))
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]])
    with torch.no_grad(), model.using(mix, tasks=["a", "b"]):
        one = model.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        beams = model.module.generate(ids, max_new_tokens=4, do_sample=False, num_beams=2)
        if routers[router].reads == "token":
            again = model.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
            assert torch.equal(one, again)
    assert len(beams) == 2


@pytest.mark.parametrize("router", list(routers))
def test_on_images(router):
    excused(router, "images")
    module, batch = tiny("vit")
    model = pt.Model(module)
    adapters = made(model, ("a",))
    mix = mix_of(router, model, adapters)
    rows = len(batch["pixel_values"])
    with torch.no_grad():
        with model.using(mix, tasks=["a"] * rows):
            there = output(model.module(**batch))
        with model.using("a"):
            torch.testing.assert_close(there, output(model.module(**batch)), rtol=1e-4, atol=1e-5)


def test_two_routers_of_one_folder_share_what_is_attached(encoder, tmp_path):
    for name, adapter in made(encoder).items():
        adapter.save(tmp_path / name)
    one = pt.route(tmp_path, "arrow", model=encoder)
    two = pt.route(tmp_path, "uniform", model=encoder)
    assert all(one.adapters[n] is two.adapters[n] is encoder.adapters[n] for n in NAMES)
    other = made(encoder, same=True)
    with pytest.raises(AdapterError, match="'b' is attached already"):
        pt.route(other, "uniform", model=encoder)
    two.detach(encoder)
    assert not encoder.adapters


def test_what_adapters_come_from(encoder):
    with pytest.raises(MixError, match="from a library, a mapping, a list or a folder, not from 5"):
        pt.route(5, "uniform", model=encoder)


@pytest.mark.parametrize("router", LEARNED)
class TestLearned:
    def test_it_learns_and_leaves_what_it_should(self, router, encoder, tmp_path):
        adapters = made(encoder)
        values = {n: a.hash for n, a in adapters.items()}
        data = [colours(name="a"), colours(name="b")]
        mix = pt.route(adapters, router, model=encoder, data=data, epochs=1, lr=1e-2, batch_size=4)
        assert {n: a.hash for n, a in adapters.items()} == values
        if routers[router].trains == "gates":
            assert all(mix.adapters[n] is a for n, a in adapters.items())
        assert set(mix.heads) == {"a", "b"}
        score = pt.evaluate(encoder, data[0], mix, head=mix.heads["a"], resamples=0)
        assert 0.0 <= score.value <= 1.0

    def test_as_an_adapter(self, router, encoder, tmp_path):
        """A mixture is saved, loaded and acts as the mix made of it."""
        adapters = made(encoder)
        mixture = mixture_of(Router.of(router).told(list(adapters)), adapters, name="mixture").trainable(False)
        encoder.attach(mixture)
        there = run(encoder, "mixture")
        again = Adapter.load(mixture.save(tmp_path / "mixture"))
        encoder.attach(again, "again")
        assert torch.equal(run(encoder, "again"), there)
        mix = routing_of(again).attach(encoder)
        torch.testing.assert_close(run(encoder, mix), there, rtol=1e-4, atol=1e-5)
        assert list(experts_of(again)) == list(NAMES)


def test_experts_with_tensors_that_all_their_sites_share(encoder, tmp_path):
    """Also where a site has only some of the experts: each keeps its own."""
    few = made(encoder, ("a",), form={"name": "vera", "rank": 4}, sites="layer==0 & role:query")
    more = made(encoder, ("b",), form={"name": "vera", "rank": 4}, sites="role:query")
    for i, adapter in enumerate((*few.values(), *more.values())):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for part in adapter.parts.values():  # the frozen projections too: two adapters that share none
                for value in part.parameters():
                    value.copy_(torch.randn(value.shape, generator=generator))
        encoder.attach(adapter)
    wanted = run(encoder, {"a": 0.5, "b": 0.5})
    mixture = mixture_of(Router.of("uniform"), {**few, **more}, name="mixture").trainable(False)
    encoder.attach(mixture)
    torch.testing.assert_close(run(encoder, "mixture"), wanted, rtol=1e-4, atol=1e-5)
    again = Adapter.load(mixture.copy().save(tmp_path / "mixture"))
    encoder.attach(again, "again")
    assert torch.equal(run(encoder, "again"), run(encoder, "mixture"))


def test_what_it_refuses(encoder):
    adapters = made(encoder)
    with pytest.raises(ConfigError, match="no router is called 'arow'.*arrow"):
        pt.route(adapters, "arow")
    with pytest.raises(ConfigError, match="has no setting"):
        pt.route(adapters, "arrow", topk=2)
    with pytest.raises(ConfigError, match="top_k must be"):
        pt.route(adapters, "arrow", top_k=-1)
    with pytest.raises(ConfigError, match="learns; give the base"):
        pt.route(adapters, "molora")
    with pytest.raises(MixError, match="at least one"):
        pt.route([], "uniform")
    with pytest.raises(MixError, match="a name of its own"):
        pt.route([adapters["a"], adapters["a"]], "uniform")
    mix = pt.route(adapters, "arrow")
    with pytest.raises(MixError, match="call mix.attach"), encoder.using(mix):
        pass
    with pytest.raises(ConfigError, match="one for each"):
        Mixture(experts=3, forms=["lora", "lora"])


def test_the_router_of_the_documents_works(encoder):
    text = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.S)[-1]
    try:
        exec(compile(code, "extending.md", "exec"), {"__name__": "tests.example"})
        mix = pt.route(made(encoder), "linear", model=encoder, data=colours(name="a"), epochs=1, top_k=2)
        assert (
            mix.router.name == "linear"
            and set(mix.heads) == {"a"}
            and mix.size == sum(3 * gate.site.d_in for gate in mix.gates.values())
        )
    finally:
        routers._items.pop("linear", None)
