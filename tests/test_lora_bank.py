"""Several LoRAs at once give what one at a time gives, however the batch is laid out."""

import random

import pytest
import torch
from torch import nn

from polytask import Adapter, Fixed, LoRA, Mix, Model, PerRow, Weights

NAMES = ("a0", "a1", "a2", "a3")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The products here are tiny: a second thread would only wait, and very long where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def model(ranks=(4, 4, 4, 4), alphas=(None, None, None, None)):
    torch.manual_seed(0)
    made = Model(Net().eval().requires_grad_(False))
    for seed, (name, rank, alpha) in enumerate(zip(NAMES, ranks, alphas, strict=True)):
        form = LoRA(rank=rank, alpha=alpha, init="random")
        made.attach(Adapter.new(made, form, "linear", seed=seed), name)
    return made


def one_at_a_time(made, rows, x):
    """Each row alone, with gradients where adapters take them."""
    outs = []
    for row, entry in enumerate(rows):
        with made.using({entry: 1.0} if isinstance(entry, str) else (entry or None)):
            outs.append(made.module(x[row : row + 1]))
    return torch.cat(outs)


LAYOUTS = {
    "all different": ["a0", "a1", "a2", "a3"],
    "runs": ["a0", "a0", "a1", "a1", "a3", "a3"],
    "scattered": ["a0", "a2", "a1", "a0", "a2", "a0", "a0"],
    "uneven": ["a3"] * 6 + ["a1"],
    "one adapter": ["a2"] * 3,
    "some bare": ["a0", None, "a1", None, "a0"],
    "all bare": [None, None],
    "weighted": [{"a0": 0.5, "a3": -1.0}, "a1", {"a2": 2.0}, {}, {"a0": 0.0, "a1": 1.0}],
    "weighted, scattered": [{"a0": 0.5, "a3": -1.0}, "a1", {"a0": 0.5, "a3": -1.0}, "a1", None, "a1"],
}


@pytest.mark.parametrize("length", [None, 1, 3, 9], ids=lambda n: f"T={n}")  # below and above the rank, and no tokens
@pytest.mark.parametrize("kind", ["equal", "ranks", "scales"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_equal_one_at_a_time(layout, kind, length):
    ranks = (2, 4, 3, 4) if kind == "ranks" else (4,) * 4
    alphas = (None, 1.0, 6.0, None) if kind == "scales" else (None,) * 4
    made, rows = model(ranks, alphas), LAYOUTS[layout]
    x = torch.randn(len(rows), 24) if length is None else torch.randn(len(rows), length, 24)
    with torch.no_grad():
        want = one_at_a_time(made, rows, x)
        with made.using(PerRow(rows)):
            for _ in range(3):  # the second forward keeps what it prepared, and the third uses it
                torch.testing.assert_close(made.module(x), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("layout", ["all different", "runs", "scattered", "some bare", "weighted, scattered"])
def test_gradients_of_rows_equal_one_at_a_time(layout, length):
    made, rows = model((2, 4, 3, 4)), LAYOUTS[layout]
    for adapter in made.adapters.values():
        adapter.trainable()
    parameters = [p for adapter in made.adapters.values() for p in adapter.parameters()]
    x = torch.randn(len(rows), length, 24)
    with made.using(PerRow(rows)):
        got = torch.autograd.grad(made.module(x).square().sum(), parameters, materialize_grads=True)
    want = torch.autograd.grad(one_at_a_time(made, rows, x).square().sum(), parameters, materialize_grads=True)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("mix", [PerRow(["a0", "a1", "a0"]), Fixed({"a0": 0.5, "a1": 0.5})], ids=["rows", "fixed"])
def test_a_change_of_an_adapter_is_seen_at_once(mix, length):
    made, x = model(), torch.randn(3, length, 24)
    adapter = made.adapters["a0"]
    with torch.no_grad(), made.using(mix):
        before = [made.module(x) for _ in range(3)][-1]
        adapter.load_state({name: value * 2 for name, value in adapter.state().items()})
        after = made.module(x)
    with torch.no_grad(), made.using(mix):  # nothing kept
        want = made.module(x)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, want)


@pytest.mark.parametrize("length", [1, 9])
def test_an_adapter_of_other_rows_is_never_read(length):
    made = model()
    with torch.no_grad():
        for parameter in made.adapters["a0"].parameters():
            parameter.fill_(float("nan"))
        x = torch.randn(6, length, 24)
        bare = made.module(x)
        with made.using(["a0", "a1", None, "a1", None, {"a1": 0.5, "a0": 0.0}]):
            for _ in range(3):
                out = made.module(x)
                assert out.isnan().flatten(1).any(1).tolist() == [True, False, False, False, False, False]
                assert torch.equal(out[[2, 4]], bare[[2, 4]])


class Routed(Mix):
    """Weights by index, as a router gives them."""

    def __init__(self, index, values):
        self.index, self.values = index, values

    def names(self):
        return NAMES

    def weigh(self, site, names, x, y, call):
        return Weights(names, self.values, self.index)


@pytest.mark.parametrize("grad", [False, True])
def test_rows_by_index_equal_rows_by_name(grad):
    generator = random.Random(0)
    chosen = [generator.sample(range(4), 2) for _ in range(5)]
    values = torch.rand(5, 2)
    made, x = model((2, 4, 3, 4)), torch.randn(5, 3, 24)
    rows = [
        {NAMES[i]: float(w) for i, w in zip(pair, value, strict=True)}
        for pair, value in zip(chosen, values, strict=True)
    ]
    with torch.set_grad_enabled(grad), made.using(Routed(torch.tensor(chosen), values)):
        got = made.module(x)
    torch.testing.assert_close(got, one_at_a_time(made, rows, x), rtol=0, atol=1e-5)


def test_weights_by_index_take_gradients():
    made, x = model(), torch.randn(2, 3, 24)
    index, values = torch.tensor([[0, 1], [3, 2]]), torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    module = made.module.double()
    for adapter in made.adapters.values():
        for parameter in adapter.parameters():
            parameter.data = parameter.data.double()
    x = x.double()

    def run(weights):
        with made.using(Routed(index, weights)):
            return module(x)

    assert torch.autograd.gradcheck(run, (values,))


@pytest.mark.parametrize("mix", ["a0", ["a0", "a1", "a2"], ["a0", None, "a0"], {"a0": 0.5, "a1": 0.5}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_type_of_the_output_is_the_bases(dtype, grad, autocast, mix):
    made = model()
    x = torch.randn(3, 5, 24)
    with torch.no_grad(), made.using(mix):
        exact = made.module(x)
    made.module.to(dtype)
    x = x.to(dtype)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bare = made.module(x)
        with made.using(mix):
            for _ in range(3):
                out = made.module(x)
    assert out.dtype == bare.dtype
    assert (out.float() - exact).abs().max() < 0.05 < (bare.float() - exact).abs().max()


def test_what_inference_mode_prepared_does_not_meet_a_backward():
    made, x = model(), torch.randn(4, 1, 24)
    for adapter in made.adapters.values():
        adapter.trainable(False)
    made.use(["a0", "a1", "a2", "a3"])
    with torch.inference_mode():
        for _ in range(3):
            made.module(x)
    x.requires_grad_()
    made.module(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
