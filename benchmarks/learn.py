"""`learn` on one task against PEFT with the Trainer of transformers: time, peak memory, accuracy.

1,000 texts of about 64 tokens, minilm, LoRA r8 on every linear layer, 3 epochs. Each side runs in a process of its own, in turn,
so that peak memory is its own. The Trainer keeps its defaults (batches of 8, padding by collator, linear decay, dropout on)
but for the learning rate, which is ours on both sides: its 5e-5 does not move a LoRA in so few steps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "tasks" / "question-type"
EPOCHS, RATE, LONGEST = 3, 1e-3, 64


def texts(train: int) -> Any:
    """Five questions of the same kind as one text of about 64 tokens; train and test come from the task's own splits."""
    import random

    import polytask as pt
    from polytask.core.task import Example

    task = pt.Task.read(EXAMPLES)
    drawn = random.Random(0)

    def joined(examples: list[Example], count: int) -> list[Example]:
        by_label: dict[str, list[str]] = {}
        for example in examples:
            by_label.setdefault(example.target, []).append(example.inputs[0])
        made = []
        for i in range(count):
            label = task.labels[i % len(task.labels)]
            made.append(Example((" ".join(drawn.sample(by_label[label], 5)),), label))
        return made

    return pt.Task(
        name="questions",
        kind="classify",
        train=joined(task.train, train),
        dev=[],
        test=joined(task.test, 300),
        labels=task.labels,
    )


def ours(train: int, precision: str) -> dict[str, Any]:
    """One run of `polytask.learn`."""
    import polytask as pt
    from polytask.core.measure import peak_memory

    model, task = pt.Model.load("minilm"), texts(train)
    started = time.perf_counter()
    with peak_memory(model.device) as peak:
        adapter = pt.learn(
            model, task, form=pt.LoRA(rank=8, alpha=16), epochs=EPOCHS, lr=RATE, longest=LONGEST, precision=precision,
            progress=False,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    model.attach(adapter, "a")
    score = pt.evaluate(model, task, "a", longest=LONGEST, resamples=0)
    return {
        "seconds": seconds,
        "peak_mb": peak.mb,
        "accuracy": score.value,
        "precision": adapter.card.training["precision"],
    }


def peers(train: int, precision: str) -> dict[str, Any]:
    """One run of PEFT with the Trainer."""
    import tempfile

    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    from polytask.core.load import ALIASES
    from polytask.core.measure import peak_memory

    transformers.logging.set_verbosity_error()
    task, place = texts(train), ALIASES["minilm"]()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    torch.manual_seed(0)
    module = transformers.AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(task.labels))
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(module, config)

    def rows(examples: list[Any]) -> list[dict[str, Any]]:
        ids = tokenizer([e.inputs[0] for e in examples], truncation=True, max_length=LONGEST)["input_ids"]
        return [
            {"input_ids": i, "attention_mask": [1] * len(i), "labels": task.labels.index(e.target)}
            for i, e in zip(ids, examples, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with peak_memory(torch.device("cpu")) as peak:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(
                    folder, num_train_epochs=EPOCHS, learning_rate=RATE, report_to=[], disable_tqdm=True, save_strategy="no",
                    use_cpu=not torch.cuda.is_available(), bf16=precision == "bf16", logging_strategy="no",
                ),
                train_dataset=rows(task.train),
                data_collator=transformers.DataCollatorWithPadding(tokenizer),
            )  # fmt: skip
            trainer.train()
        seconds = time.perf_counter() - started
        logits = trainer.predict(rows(task.test)).predictions
    right = [task.labels[i] == e.target for i, e in zip(logits.argmax(1), task.test, strict=True)]
    return {"seconds": seconds, "peak_mb": peak.mb, "accuracy": sum(right) / len(right), "precision": precision}


def _against(mine: str, must: float, quick: bool) -> dict[str, Any]:
    train, repeats = (120, 1) if quick else (1000, 3)
    pairs = [(_once("ours", train, mine), _once("peers", train, "fp32")) for _ in range(repeats)]
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
    memory = statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in pairs)
    precision = pairs[0][0]["precision"]
    return {
        "what": f"learn in {precision} ({mine} asked for), time over PEFT with Trainer in fp32",
        "ratio": round(ratio, 3), "must": f"<= {must}", "ok": ratio <= must, "peer": {"peft + Trainer": 1.0},
        "memory_ratio": round(memory, 3), "memory_must": "<= 1", "ours": pairs[-1][0], "theirs": pairs[-1][1],
        "seconds_of_both": [[round(a["seconds"], 1), round(b["seconds"], 1)] for a, b in pairs],
    }  # fmt: skip


def learn_auto(quick: bool = False) -> dict[str, Any]:
    """`learn` as it comes, where that is bf16; without quick bf16 it is the same run as `learn_fp32` and is left out."""
    import torch

    from polytask.learn.precision import SMALLEST, quick_in_bf16

    if not quick_in_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"), SMALLEST):
        return {
            "what": "learn in bf16: this processor has no quick bf16, so learn takes fp32", "ratio": None,
            "must": "<= 0.5", "ok": None, "peer": {},
        }  # fmt: skip
    return _against("auto", 0.5, quick)


def learn_fp32(quick: bool = False) -> dict[str, Any]:
    """`learn` in fp32."""
    return _against("fp32", 0.8, quick)


BENCHMARKS = (learn_auto, learn_fp32)


def _once(side: str, train: int, precision: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.learn", side, str(train), precision],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return found


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "peers": peers}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])))
