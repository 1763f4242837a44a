"""RE-Adapt with a low rank, and the command's words of their own."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_merge_adapters import LORA, shaken
from zoo import tiny

import polytask as pt
from polytask.core.errors import ConfigError
from polytask.merge.lowrank import LowRank, svd
from polytask.merge.replay import replay
from polytask.merge.source import Checkpoint, Module


@pytest.fixture(scope="module")
def llama():
    return pt.Model(tiny("llama")[0])


@given(rows=st.integers(5, 20), columns=st.integers(5, 20), rank=st.integers(1, 4), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_low_rank_is_the_nearest_of_that_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    base, change = (torch.randn(rows, columns, generator=generator) for _ in "ab")
    tensors = {"w": base, "b": torch.zeros(3)}, {"w": base + change, "b": torch.ones(3)}
    one, two = ({k: torch.nn.Parameter(v) for k, v in held.items()} for held in tensors)
    low = LowRank(Module(torch.nn.ParameterDict(two)), Module(torch.nn.ParameterDict(one)), rank)
    found = low.read("w") - base
    singular = torch.linalg.svdvals(change)
    assert torch.linalg.matrix_rank(found, atol=1e-3) <= rank
    assert torch.allclose(torch.linalg.norm(found - change), singular[rank:].norm(), atol=1e-3)
    assert low.error == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-4)
    assert torch.equal(low.read("w", 2, 4), low.read("w")[2:4]) and torch.equal(low.read("b"), torch.ones(3))
    assert torch.equal(LowRank(low.source, low.base, min(rows, columns)).read("w"), base + change)


def test_a_large_matrix_has_a_randomised_svd_that_is_near_the_best():
    generator = torch.Generator().manual_seed(0)
    sizes = 0.9 ** torch.arange(600)
    u, v = (torch.linalg.qr(torch.randn(n, 600, generator=generator)).Q for n in (700, 600))
    matrix = (u * sizes) @ v.T
    left, s, right = svd(matrix, 8, seed=1)
    assert torch.allclose(s, sizes[:8], rtol=1e-4)
    best = float(sizes[8:].norm())
    assert best <= float(torch.linalg.norm(matrix - (left * s) @ right)) * (1 + 1e-5) <= best * 1.001
    again = svd(matrix, 8, seed=1)
    assert torch.equal(left, again[0]) and not torch.equal(left, svd(matrix, 8, seed=2)[0])


def test_readapt_of_a_low_rank_is_recorded_and_done_again(llama, tmp_path):
    tuned = tiny("llama", seed=4)[0]
    for name, module in (("base", llama.module), ("tuned", tuned)):
        module.save_pretrained(tmp_path / name)
    shaken(llama, LORA, "linear").save(tmp_path / "domain")
    paths = [tmp_path / name for name in ("base", "tuned", "domain")]
    out = pt.readapt(*paths, 0.5, 0.25, rank=3, out=tmp_path / "out")
    said = json.loads((out / "polytask_merge.json").read_text())["readapt"]
    source, base = Checkpoint(paths[1]), Checkpoint(paths[0])
    lost = every = 0.0
    for name in source.shapes:
        change = source.read(name).float() - base.read(name).float()
        if change.dim() == 2:
            squares = torch.linalg.svdvals(change).square()
            lost, every = lost + float(squares[3:].sum()), every + float(squares.sum())
    assert said["rank"] == 3 and said["error"] == pytest.approx((lost / every) ** 0.5, rel=1e-4)
    assert f"rank of the change that tuning made: 3, which loses {said['error']:.2%}" in (out / "README.md").read_text()
    again = replay(out / "polytask_merge.json", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    whole = pt.readapt(*paths, 0.5, 0.25, out=tmp_path / "whole")
    assert (whole / "model.safetensors").read_bytes() != (out / "model.safetensors").read_bytes()
    full = pt.readapt(*paths, 0.5, 0.25, rank=99, out=tmp_path / "full")
    assert (whole / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    for more, message in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2, "as_": "lora"}, "leave as_ or rank out"),
    ):
        with pytest.raises(ConfigError, match=message):
            pt.readapt(*paths, **more)


def test_the_words_of_the_command(llama, tmp_path, run):
    tiny("llama", seed=4)[0].save_pretrained(tmp_path / "tuned")
    llama.module.save_pretrained(tmp_path / "base")
    domain = shaken(llama, LORA, "linear")
    task, general = (shaken(llama, LORA, "linear", seed, name=name) for seed, name in ((5, "task"), (6, "general")))
    for adapter, name in ((domain, "domain"), (task, "task"), (general, "general")):
        adapter.save(tmp_path / name)
    paths = [tmp_path / name for name in ("base", "tuned", "domain")]
    code, _, err = run("merge", "readapt", *paths, "--weights", "0.5,2", "--rank", 3, "--out", tmp_path / "out")
    assert code == 0 and "rank 3 loses" in err, err
    wanted = pt.readapt(*paths, 0.5, 2.0, rank=3, out=tmp_path / "wanted")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()
    for mode in ("factor", "delta"):
        place = tmp_path / mode
        code, _, err = run("merge", "subtract", tmp_path / "task", tmp_path / "general", "--mode", mode, "--out", place)
        assert code == 0, err
        assert pt.Adapter.load(place).hash == pt.genknowsub(task, general, mode).hash
    for words, message in (
        (["readapt", *paths[:2]], "readapt takes three models"),
        (["readapt", *paths, "--weights", "1"], "readapt takes three models"),
        (["readapt", *paths, "--method", "ties"], "readapt takes no --method and no --base"),
        (["subtract", tmp_path / "task"], "subtract takes an adapter and general ones"),
        (["subtract", tmp_path / "task", tmp_path / "base"], "base is no folder of an adapter"),
        (["subtract", tmp_path / "task", tmp_path / "general", "--mode", "all"], "mode must be one of factor, delta"),
    ):
        code, _, err = run("merge", *words, "--out", tmp_path / "no")
        assert code in (1, 2) and message in err, err


def test_what_is_compressed_and_split_on_the_command_line_comes_back(llama, tmp_path, run):
    base = tiny("llama", seed=0)[0]
    base.save_pretrained(tmp_path / "base")
    tuned = tiny("llama", seed=0)[0]
    with torch.no_grad():
        for i, parameter in enumerate(tuned.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    tuned.save_pretrained(tmp_path / "tuned")
    task = shaken(llama, LORA, "linear", name="task")
    task.save(tmp_path / "task")

    code, _, err = run(
        "merge", "compress", tmp_path / "task", "--method", "compeft:density=0.1", "--out", tmp_path / "s"
    )
    assert code == 0, err
    small = pt.Adapter.load(tmp_path / "s")
    kept = sum(int((p != 0).sum()) for p in small.parameters())
    assert kept == round(0.1 * sum(p.numel() for p in small.parameters()))

    code, _, err = run("merge", "compress", tmp_path / "tuned", "--base", tmp_path / "base", "--out", tmp_path / "c")
    assert code == 0, err
    folder = pt.merge([tmp_path / "c"], "task_arithmetic", base=str(tmp_path / "base"), out=tmp_path / "whole")
    found, plain = (Checkpoint(folder), Checkpoint(tmp_path / "base"))
    sizes = torch.cat([(found.read(n) - plain.read(n)).abs().flatten() for n in plain.shapes])
    assert int((sizes > 0.01).sum()) == round(0.2 * sizes.numel())

    code, _, err = run("merge", "split", tmp_path / "tuned", "--base", tmp_path / "base", "--out", tmp_path / "one")
    assert code == 0, err
    place = tmp_path / "again"
    code, _, err = run("merge", "restore", tmp_path / "one", "tuned", "--base", tmp_path / "base", "--out", place)
    assert code == 0, err
    for name, value in tuned.state_dict().items():  # one model alone comes back whole
        torch.testing.assert_close(Checkpoint(place).read(name), value, rtol=1e-4, atol=1e-6)

    for words, message in (
        (["compress", tmp_path / "tuned"], "is a model, of which the difference"),
        (["compress", tmp_path / "task", "--method", "ties"], "compress has no method 'ties'"),
        (["compress", tmp_path / "task", "--method", "compeft:densiti=1"], "did you mean 'density'"),
        (["compress", tmp_path / "task", "--rank", "2"], "compress takes no --weights and no --rank"),
        (["split", tmp_path / "tuned"], "split takes models and their base"),
        (["restore", tmp_path / "one", "tunde", "--base", tmp_path / "base"], "did you mean 'tuned'"),
        (["readapt", "a", "b", "c", "--method", "ties"], "readapt takes no --method"),
    ):
        code, _, err = run("merge", *words, "--out", tmp_path / "no")
        assert code in (1, 2) and message in err, err
