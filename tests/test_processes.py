"""Several processes learn the adapter that one learns."""

from __future__ import annotations

import os
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
pt.learn(model, colours(40), form=pt.LoRA(rank=4), epochs=2, batch_size=5, progress=False, precision="fp32",
         out=sys.argv[1]{more})
from accelerate import PartialState
from pathlib import Path
state = PartialState()
Path(sys.argv[1] + f".{{state.process_index}}of{{state.num_processes}}").touch()
"""


# each process has another start, and all must go on from the first one's
OTHER = ", start=pt.Adapter.new(model, pt.LoRA(rank=4), seed=int(__import__('os').environ.get('RANK', 0)))"


def launch(count: int, script: Path, *arguments: str) -> None:
    """Runs a script in several processes. accelerate's own launcher needs MPI for that on CPUs; torchrun needs nothing."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", ', budget="increlora"', OTHER])
def test_two_processes_learn_what_one_learns(encoder, tmp_path, more):
    base = tmp_path / "base"
    encoder.module.save_pretrained(base)
    encoder.processor.save_pretrained(base)
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), base=str(base), more=more))
    for count in (1, 2):
        launch(count, script, str(tmp_path / f"out{count}"))
        assert len(list(tmp_path.glob(f"out{count}.*of{count}"))) == count  # each process said how many there are
    one, two = (pt.Adapter.load(tmp_path / f"out{n}") for n in (1, 2))
    assert one.card.training.get("ranks") == two.card.training.get("ranks")
    assert all(
        torch.allclose(value, two.state()[k], atol=1e-4 if "budget" in more else 1e-5)
        for k, value in one.state().items()
    )
    assert one.hash != two.hash  # the sums were taken in another order: it did run as two
