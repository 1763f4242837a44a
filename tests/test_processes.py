"""Several processes learn the adapter that one learns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polytask as pt

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch, transformers
import polytask as pt
from conftest import colours

model = pt.Model(transformers.AutoModel.from_pretrained({base!r}).eval(), transformers.AutoTokenizer.from_pretrained({base!r}),
                 name="tiny", pooling="mean")
pt.learn(model, colours(40), form=pt.LoRA(rank=4), epochs=2, batch_size=5, progress=False, precision="fp32", out=sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(encoder, tmp_path):
    base = tmp_path / "base"
    encoder.module.save_pretrained(base)
    encoder.processor.save_pretrained(base)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), base=str(base)))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    launch += ["--dynamo_backend", "no"]
    for count in (1, 2):
        command = [*launch, "--num_processes", str(count), str(script), str(tmp_path / f"out{count}")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (pt.Adapter.load(tmp_path / f"out{n}").state() for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    assert any(not torch.equal(one[k], two[k]) for k in one)  # the sums were taken in another order: it did run as two
