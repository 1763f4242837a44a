"""Bad input, as a person meets it: what is said, the exit code, and that nothing half-written is left behind.

Exit codes: 0 done, 1 it could not be done, 2 the command or its settings are wrong.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import polytask as pt
from polytask.core.errors import ConfigError, DataError, LearnError, MemoryLimitError, ModelError, StorageError
from polytask.core.memory import memory_advice
from polytask.learn import learner

COLOURS = ("red", "blue")
ROWS = [{"text": f"the car number {i} is {COLOURS[i % 2]}", "label": COLOURS[i % 2]} for i in range(40)]
ALLOCATOR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"


def write(path: Path, rows: list[dict] | str | bytes) -> Path:
    """A file of JSON lines, text or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else rows
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def out(tmp_path):
    """Where adapters or reports would go. It does not exist yet."""
    return tmp_path / "out"


@pytest.fixture
def learn(run, base, out):
    """Runs ``polytask learn`` on the tiny base."""

    def go(tasks, *more):
        quick = ("--epochs", 1, "--batch-size", 8, "--form", "lora:rank=2")
        return run("learn", tasks, "--base", base, "--out", out, *quick, *more)

    return go


@pytest.fixture
def made(learn, data, out):
    """A folder with the adapters of both tasks."""
    code, _, err = learn(data)
    assert code == 0, err
    return out


def refused(result, code, *words):
    """Asserts that a command was refused as it should be, and gives what was said."""
    found, printed, err = result
    assert found == code, err
    assert "Traceback" not in err and "not expected" not in err and printed == ""
    for word in words:
        assert word in err, err
    return err


def leftovers(folder: Path) -> list[str]:
    """Temporary files that a failed write would leave."""
    return [str(p) for p in folder.rglob("*") if p.suffix in (".part", ".old", ".tmp")]


# --- the data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.jsonl", b"", ["e.jsonl is empty", "Write at least one row"]),
        ("e.csv", b"\n\n", ["e.csv is empty"]),
        ("h.csv", b"text,label\n", ["h.csv has a header (text, label) and no rows"]),
        ("junk.jsonl", bytes(range(256)) * 20, ["junk.jsonl:1: invalid JSON", "and 16 more"]),
        ("junk.csv", bytes(range(256)) * 20, ["junk.csv is not text", "UTF-8"]),
        ("picture.jsonl", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ["picture.jsonl:1: invalid JSON"]),
        ("one.jsonl", [{"text": f"t{i}", "label": "x"} for i in range(20)], ["every row has the label 'x'", "two labels"]),
        ("nan.csv", "text,score\n" + "".join(f"row {i},{i / 7}\n" for i in range(20)) + "bad,nan\n",
         ["nan.csv:22: 'score' is nan, and must be a finite number"]),
        ("inf.jsonl", [*({"text": f"t{i}", "score": i / 3} for i in range(9)), {"text": "a", "score": float("inf")}],
         ["inf.jsonl:10: 'score' is inf"]),
        ("words.csv", "text,score\n" + "".join(f"{i / 3},{i / 7}\n" for i in range(20)) + "nan,0.5\n",
         ["words.csv:22: 'text' is 'nan' in a column of numbers"]),
        ("gap.jsonl", [*ROWS, {"text": float("nan"), "label": "red"}], ["gap.jsonl:41: 'text' is missing"]),
        ("numbers.jsonl", [*ROWS, {"text": 1.5, "label": "red"}], ["numbers.jsonl:41: 'text' is float (1.5)", "must be text"]),
    ],
)  # fmt: skip
def test_files_that_are_no_task(learn, run, out, tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    refused(learn(path), 1, *words)
    assert not out.exists()
    refused(run("tasks", path), 1, *words)  # said the same before any base is loaded
    with pytest.raises(DataError) as error:
        pt.Task.read(path)
    assert all(word in str(error.value) for word in words)


def test_a_nan_in_a_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": ["a", "b", None], "score": [0.5, float("nan"), 1.0]})
    with pytest.raises(DataError, match=r"row 2: 'score' is nan.*row 3: 'text' is missing"):
        pt.Task.read(table, kind="regress")
    task = pt.Task.read(table, kind="regress", skip_bad_rows=True)
    assert sum(map(len, task.splits.values())) == 1
    with pytest.raises(DataError, match=r"'text' is float \(0.5\), and must be text"):
        pt.Task.read(pandas.DataFrame({"text": [0.5, float("nan")], "label": ["a", "b"]}))


def test_the_word_nan_is_a_text_like_any_other(tmp_path):
    text = "text,label\n" + "".join(
        f"{word},{COLOURS[i % 2]}\n" for i, word in enumerate(["nan", "bread", "roti", "4"] * 9)
    )
    assert sum(map(len, pt.Task.read(write(tmp_path / "t.csv", text)).splits.values())) == 36


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_label_that_training_has_not_seen(learn, out, tmp_path, split):
    write(tmp_path / "t" / "train.jsonl", ROWS[:20])
    write(tmp_path / "t" / "dev.jsonl", ROWS[20:30])
    write(tmp_path / "t" / "test.jsonl", ROWS[30:])
    with open(tmp_path / "t" / f"{split}.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "grass", "label": "reds"}\n')
    words = (
        f"t/{split}.jsonl:11",
        f"label 'reds' in {split} does not occur in train",
        "did you mean 'red'",
        "--skip-bad-rows",
    )
    refused(learn(tmp_path / "t"), 1, *words)
    assert not out.exists()


def test_bad_rows_are_counted_when_they_may_be_skipped(learn, run, base, made, tmp_path):
    write(tmp_path / "t" / "train.jsonl", ROWS[:20])
    write(tmp_path / "t" / "dev.jsonl", ROWS[20:30])
    write(
        tmp_path / "t" / "test.jsonl", [*ROWS[30:], {"text": "grass", "label": "green"}, {"text": "", "label": "red"}]
    )
    note = "t: left out 2 bad rows: 1 'text' missing, 1 label not in train"
    code, printed, err = learn(tmp_path / "t", "--skip-bad-rows")
    assert code == 0 and note in err and printed.startswith("t: dev/t")
    arguments = (tmp_path / "t", "--base", base, "--adapter", made / "t", "--json", "--skip-bad-rows")
    code, printed, err = run("evaluate", *arguments)
    assert code == 0 and note in err and json.loads(printed)["t"]["n"] == 10
    code, printed, err = run(
        "compare", made, tmp_path / "t", "--base", base, "--out", tmp_path / "r", "--skip-bad-rows"
    )
    assert code == 0 and note in err and (tmp_path / "r" / "report.html").is_file()


def test_a_text_of_100_000_characters_is_cut_and_a_note_says_so(learn, run, base, out, tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[0]["text"] = "word " * 20_000
    for name, part in (
        ("train", rows[:20]),
        ("dev", ROWS[20:30]),
        ("test", [*ROWS[30:], {**rows[0], "text": "red " * 25_000}]),
    ):
        write(tmp_path / "long" / f"{name}.jsonl", part)
    code, _, err = learn(tmp_path / "long", "--batch-size", 2)
    assert code == 0 and "the longest text has 100,000 characters" in err and "is cut off" in err
    code, printed, err = run("evaluate", tmp_path / "long", "--base", base, "--adapter", out / "long", "--json")
    assert code == 0 and "100,000 characters" in err and json.loads(printed)["long"]["n"] == 11


def test_training_rows_of_one_label_only(learn, run, base, made, tmp_path):
    """With the labels named, one of them may lack examples: there is something to learn, if little."""
    write(tmp_path / "t" / "task.yaml", "labels: [red, blue]\n")
    write(tmp_path / "t" / "train.jsonl", [row for row in ROWS if row["label"] == "red"])
    write(tmp_path / "t" / "test.jsonl", ROWS[:10])
    code, _, err = learn(tmp_path / "t")
    assert code == 0, err
    code, printed, err = run(
        "evaluate", tmp_path / "t", "--base", base, "--json"
    )  # a probe that can only say one thing
    assert code == 0 and json.loads(printed)["t"]["value"] == 0.5, err


def test_a_broken_image(learn, run, out, tmp_path):
    from PIL import Image

    for number in range(12):
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 90, 4)).save(file)
    whole = (tmp_path / "pets" / "dog" / "1.png").read_bytes()
    write(tmp_path / "pets" / "dog" / "broken.png", whole[: len(whole) // 2])
    refused(learn(tmp_path / "pets"), 1, "pets/dog/broken.png: not an image that can be opened", "PNG or JPEG")
    code, printed, _ = run("tasks", tmp_path / "pets", "--skip-bad-rows")
    assert code == 0 and "left out 1 bad row: 1 image not readable" in printed
    refused(learn(tmp_path / "pets", "--skip-bad-rows"), 1, "cannot read images", "image base")
    assert not out.exists()


def test_an_image_that_breaks_between_reading_and_learning(tmp_path):
    import transformers
    from PIL import Image

    for number in range(20):
        file = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 90, 4)).save(file)
    task = pt.Task.read(tmp_path / "pets")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    model = pt.Model(transformers.ViTModel(config).eval())
    bad = Path(task.train[3].image)
    bad.write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=f"{bad.parent.name}/{bad.name}: not an image"):
        pt.learn(model, task, out=tmp_path / "out", epochs=1, progress=False)
    assert model.attached == () and not (tmp_path / "out").exists()
    words = pt.Task.read([*ROWS], name="words")
    with pytest.raises(ModelError, match="cannot read texts"):
        pt.learn(model, words, epochs=1, progress=False)


# --- task.yaml and --config


@pytest.mark.parametrize(
    ("yaml", "code", "words"),
    [
        ("inputs: text\ntarget: lable\n", 1, ["t has no column 'lable' (did you mean 'label'?)", "its columns are label, text"]),
        ("kind: clasify\n", 2, ["t/task.yaml: kind must be one of classify", "(did you mean 'classify'?)"]),
        ("metric: acuracy\n", 2, ["t/task.yaml: metric must be one of accuracy", "(did you mean 'accuracy'?)"]),
        ("metric: pearson\n", 2, ["Task 't'", "'pearson' scores regress, not classify", "the metrics for classify are accuracy"]),
        ("kindd: classify\n", 2, ["t/task.yaml: unknown key 'kindd' (did you mean 'kind'?)"]),
        ("- a\n- b\n", 2, ["t/task.yaml must hold `key: value` lines, and holds ['a', 'b']"]),
        ("kind: classify\nlabels: [red\n", 2, ["t/task.yaml:3: this is not valid YAML"]),
        ("kind: regress\n", 1, ["t has 40 bad rows", "t/train.jsonl:1: 'label' is 'red', and must be a number"]),
    ],
)  # fmt: skip
def test_a_task_yaml_that_is_wrong(learn, run, out, tmp_path, yaml, code, words):
    write(tmp_path / "t" / "train.jsonl", ROWS)
    write(tmp_path / "t" / "task.yaml", yaml)
    refused(learn(tmp_path / "t"), code, *words)
    refused(run("tasks", tmp_path / "t"), code, *words)
    assert not out.exists()
    with pytest.raises(ConfigError if code == 2 else DataError):
        pt.Task.read(tmp_path / "t")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        (b"epoch: 3\n", ["unknown setting 'epoch' (did you mean 'epochs'?)", "there are: "]),
        (b"skip-bad-row: true\n", ["unknown setting 'skip-bad-row' (did you mean 'skip_bad_rows'?)"]),
        (b"- epochs\n- 3\n", ["must hold `key: value` lines", "['epochs', 3]"]),
        (b"epochs 3\n", ["must hold `key: value` lines", "'epochs 3'"]),
        (b"epochs: 3\nlr: [1\nseed: 2\n", ["c.yaml:3: this is not valid YAML", "expected ',' or ']'"]),
        (b"epochs: 3\n\tlr: 1\n", ["c.yaml:2: this is not valid YAML"]),
        (b"\xff\x00\x80", ["c.yaml: this is not valid YAML"]),
        (b"start: 2001-99-99\n", ["c.yaml: this is not valid YAML"]),
        (b"epochs: many\nseed: x\n", ["epochs: ", "seed: ", "'many'", "'x'"]),
        (b"form: {name: lora, rnak: 3}\n", ["no setting 'rnak' (did you mean 'rank'?)"]),
        (b"form: {name: lroa}\n", ["no form is called 'lroa' (did you mean 'lora'?)"]),
    ],
)  # fmt: skip
def test_a_config_file_that_is_wrong(run, base, data, out, tmp_path, yaml, words):
    file = write(tmp_path / "c.yaml", yaml)
    refused(run("learn", data / "one", "--base", base, "--out", out, "--config", file), 2, *words)
    assert not out.exists()


def test_a_config_file_may_use_the_name_of_every_flag(run, data, tmp_path):
    file = write(
        tmp_path / "c.yaml", f"tasks: {data / 'one'}\njson: true\nskip-bad-rows: true\nbase: {tmp_path / 'none'}\n"
    )
    refused(run("evaluate", "--config", file), 1, "none' does not exist")
    refused(run("learn", "--config", tmp_path / "no.yaml"), 2, "cannot read", "no.yaml")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--metric", "acuracy"], 2, ["no metric 'acuracy' (did you mean 'accuracy'?)"]),
        (["--metric", "pearson"], 2, ["'pearson' scores regress, not classify"]),
        (["--split", "tset"], 2, ["no split 'tset'", "train, dev, test"]),
        (["--mix", "one"], 2, ["--mix 'one' needs the adapters", "--adapter"]),
        (["--batch-size", "0"], 2, ["--batch-size"]),
        (["--adapter", "./nothing"], 1, ["there is no adapter at './nothing'"]),
    ],
)  # fmt: skip
def test_evaluate_with_flags_that_are_wrong(run, base, data, arguments, code, words):
    refused(run("evaluate", data / "one", "--base", base, *arguments), code, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--form", "lora:rank=["], ["'[' is no value"]),
        (["--form", "lora:rnak=3"], ["no setting 'rnak' (did you mean 'rank'?)"]),
        (["--joint", "--together"], ["exclude each other"]),
        (["--joint", "--sampling", "proportionate"], ["sampling: ", "'proportional'"]),
        (["--tracker", "tensorbord"], ["the tracker 'tensorbord' cannot be used"]),
        (["--epochs", "-1"], ["epochs: ", "greater than 0", "-1.0"]),
        (["--epoch", "1"], ["No such option: --epoch", "--epochs"]),
    ],
)  # fmt: skip
def test_learn_with_flags_that_are_wrong(run, base, data, out, arguments, words):
    refused(run("learn", data / "one", "--base", base, "--out", out, *arguments), 2, *words)
    assert not out.exists()


# --- the base


def test_a_base_that_does_not_exist(run, data, base, out, tmp_path):
    def tried(name):
        return run("learn", data / "one", "--base", name, "--out", out)

    refused(
        tried("no-such-org/no-such-model"), 1, "'no-such-org/no-such-model' could not be loaded", "network", "minilm"
    )
    refused(tried("minlim"), 1, "'minlim' could not be loaded (did you mean 'minilm'?)", "a folder with config.json")
    refused(tried(tmp_path / "bas"), 1, "does not exist (did you mean 'base'?)", "a hub name such as 'org/model'")
    refused(tried(data), 1, "has no config.json, so it is not a model folder", "save_pretrained")
    assert not out.exists()
    with pytest.raises(ModelError, match="did you mean 'minilm'"):
        pt.Model.load("minlim")


def test_a_base_that_is_damaged(run, base):
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(run("sites", base), 1, f"the base {str(base)!r} could not be loaded")
    (base / "config.json").write_text("{bad")
    refused(run("sites", base), 1, "could not be loaded", "JSON")


def test_an_adapter_of_another_base(run, base, encoder, data, made, out, tmp_path):
    with torch.no_grad():
        next(iter(encoder.module.parameters())).add_(0.5)
    other = tmp_path / "other"
    encoder.module.save_pretrained(other)
    encoder.processor.save_pretrained(other)
    words = ("the adapter 'one' was made for the base", "load that base")
    refused(run("evaluate", data / "one", "--base", other, "--adapter", made / "one"), 1, *words)
    refused(run("compare", made, data, "--base", other, "--out", tmp_path / "r"), 1, *words)
    assert not (tmp_path / "r").exists()
    again = run("learn", data / "one", "--base", other, "--out", tmp_path / "more", "--start", made / "one")
    refused(again, 1, *words)
    assert not (tmp_path / "more").exists()


# --- memory


@pytest.fixture
def small_memory(monkeypatch):
    """A machine on which more than 8 sequences at once do not fit."""
    from transformers.models.bert.modeling_bert import BertEmbeddings

    forward = BertEmbeddings.forward

    def cramped(self, input_ids=None, **rest):
        if len(input_ids) > 8:
            raise RuntimeError(ALLOCATOR)
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(BertEmbeddings, "forward", cramped)


def test_a_batch_too_large_for_memory(run, base, data, made, tmp_path, small_memory):
    """What is advised helps: the same commands go through with a smaller batch."""
    one, lib = data / "one", tmp_path / "lib"
    for start, rows in (("probe", 20), ("random", 16)):  # in the regression that a head starts from, and in a step
        arguments = ("learn", one, "--base", base, "--out", lib, "--epochs", 1, "--head-start", start)
        words = (f"a batch of {rows} does not fit into the memory of cpu", "lower batch_size (--batch-size)")
        err = refused(run(*arguments, "--batch-size", 16), 1, *words)
        assert not (lib / "one" / "adapter_config.json").exists() and leftovers(tmp_path) == []
    assert "raise accumulate (--accumulate)" in err and "--precision bf16" in err
    code, _, err = run(*arguments, "--head-start", "probe", "--batch-size", 2, "--accumulate", 8)
    assert code == 0, err

    for acting in (("--adapter", made / "one"), ()):  # a head, and a probe of the bare base
        arguments = ("evaluate", one, "--base", base, *acting)
        refused(run(*arguments), 1, "a batch of 10 does not fit" if acting else "a batch of 20", "--batch-size")
        code, _, err = run(*arguments, "--batch-size", 8)
        assert code == 0, err

    arguments = ("compare", made, data, "--base", base, "--out", tmp_path / "r")
    refused(run(*arguments), 1, "does not fit into the memory of cpu", "lower batch_size (--batch-size)")
    # the batches of joint training are those that the adapters were learned with
    refused(
        run(*arguments, "--batch-size", 4), 1, "joint training with the settings of the adapter 'one'", "--no-joint"
    )
    assert not (tmp_path / "r").exists()
    code, _, err = run(*arguments, "--batch-size", 4, "--no-joint", "--no-cross")
    assert code == 0 and (tmp_path / "r" / "report.html").is_file(), err


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(ALLOCATOR)]
)
def test_every_allocator_is_understood(encoder, decoder, task, monkeypatch, error):
    with (
        pytest.raises(MemoryLimitError, match="a batch of 3 does not fit into the memory of cuda:1; lower batch_size"),
        memory_advice(torch.device("cuda:1"), 3),
    ):
        raise error
    with (
        pytest.raises(MemoryLimitError, match="a single row does not fit.* cannot be lowered further"),
        memory_advice(torch.device("cpu"), 1),
    ):
        raise error
    assert issubclass(MemoryLimitError, LearnError)  # what `learn` promises to raise

    def hungry(*args, **kwargs):
        raise error

    monkeypatch.setattr(type(decoder.module), "forward", hungry)
    with pytest.raises(MemoryLimitError):  # label words
        pt.evaluate(decoder, task)
    words = pt.Task(name="w", kind="generate", train=[], dev=[], test=task.test)
    with pytest.raises(MemoryLimitError):  # written answers
        pt.evaluate(decoder, words)
    assert decoder.mix is None


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_advice(torch.device("cpu"), 3):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_base_too_large_for_memory(run, base, monkeypatch):
    import transformers

    def hungry(*args, **kwargs):
        raise RuntimeError(ALLOCATOR)

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", hungry)
    refused(run("sites", base), 1, "does not fit into memory", "choose a smaller one")


# --- files


@pytest.fixture
def full_disk(monkeypatch):
    """Lets writes of files with some text in their name end halfway, as on a full disk."""
    write_bytes = Path.write_bytes

    def of(part):
        def limited(self, data):
            if part in self.name:
                write_bytes(self, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(self, data)

        monkeypatch.setattr(Path, "write_bytes", limited)

    yield of
    monkeypatch.undo()


@pytest.mark.parametrize("part", ["adapter_model", "adapter_config", "state-", "state.json"])
def test_no_space_while_learning(learn, data, out, tmp_path, full_disk, monkeypatch, part):
    full_disk(part)
    refused(learn(data / "one"), 1, f"cannot write {out / 'one'}", "No space left on device", "free some space")
    left = {p.name for p in (out / "one").iterdir()}
    assert left <= {"log.jsonl", ".learning"} and leftovers(tmp_path) == []
    monkeypatch.undo()
    code, _, err = learn(data / "one")  # the same command, with space
    assert code == 0 and not (out / "one" / ".learning").exists(), err
    assert pt.Adapter.load(out / "one").name == "one" and leftovers(tmp_path) == []


def test_no_space_leaves_the_older_adapter(learn, data, made, full_disk):
    before = pt.Adapter.load(made / "one").hash
    full_disk("heads")
    refused(learn(data / "one", "--seed", 7), 1, "No space left on device")
    assert pt.Adapter.load(made / "one").hash == before and leftovers(made) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_no_space_for_the_log(learn, data, out):
    (out / "one").mkdir(parents=True)
    (out / "one" / "log.jsonl").symlink_to("/dev/full")
    refused(learn(data / "one"), 1, f"cannot write {out / 'one'}", "No space left on device")


@pytest.mark.parametrize("part", ["table.json", "report.html"])
def test_no_space_for_the_report(run, base, data, made, tmp_path, full_disk, part):
    full_disk(part)
    found, printed, err = run(
        "compare", made, data, "--base", base, "--out", tmp_path / "r", "--no-joint", "--no-cross"
    )
    assert found == 1 and f"cannot write {tmp_path / 'r' / part}" in err and "Traceback" not in err
    assert "adapter per task" in printed  # what was measured is shown all the same
    assert not (tmp_path / "r" / part).exists() and leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_one(learn, run, base, data, made, encoder, task, tmp_path, monkeypatch):
    file = write(tmp_path / "file", "text")
    words = ("cannot write", "file where a folder is needed", "--out")
    monkeypatch.setattr(pt.Model, "load", None)  # said before anything is loaded
    for place in (file, file / "in" / "it"):
        refused(learn(data / "one", "--out", place), 1, *words)
        refused(run("compare", made, data, "--base", base, "--out", place), 1, *words)
    assert file.read_text() == "text"
    with pytest.raises(StorageError, match="cannot write .*choose a folder that you may write to"):
        pt.learn(encoder, task, out=file / "in", epochs=1, progress=False)
    assert encoder.attached == () and file.read_text() == "text"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(learn, data, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    refused(learn(data / "one", "--out", tmp_path / "shut" / "lib"), 1, "may not be written to", "--out")


def test_a_folder_that_may_not_be_written(learn, data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(learn(data / "one", "--out", tmp_path / "shut" / "lib"), 1, f"{tmp_path} may not be written to", "--out")


class StopAt(learner.Watch):
    """Sends Ctrl-C after the second step."""

    def step(self, step, loss, examples, **more):
        super().step(step, loss, examples, **more)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_of_another_configuration(learn, data, out, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(learner, "Watch", StopAt)
        refused(learn(data / "one"), 1, "stopped at step 2 of 3 and saved in", "repeat the same command to go on")
    assert not (out / "one" / "adapter_config.json").exists()
    state = {p.name: p.read_bytes() for p in (out / "one" / ".learning").iterdir()}
    words = (
        f"{out / 'one'} holds an interrupted run with other data or settings",
        "choose another folder",
        ".learning",
    )
    refused(learn(data / "one", "--lr", 0.5), 1, *words)
    assert state == {p.name: p.read_bytes() for p in (out / "one" / ".learning").iterdir()}
    code, _, err = learn(data / "one")  # the first command still goes on
    assert code == 0 and not (out / "one" / ".learning").exists(), err
    steps = [json.loads(line) for line in (out / "one" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]


# --- the output


def piped(command: str, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in which ``polytask`` is this one; its exit codes are printed by the command itself."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    program = f'polytask() {{ "{sys.executable}" -m polytask "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", program + command], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_stops_reading(tmp_path, buffered):
    labels = [f"a label of which there are many {i}" for i in range(4000)]  # more than fits into a pipe
    write(tmp_path / "t" / "task.yaml", json.dumps({"labels": [*COLOURS, *labels]}))
    write(tmp_path / "t" / "train.jsonl", ROWS)
    done = piped(f"polytask tasks {tmp_path / 't'} --json | head -1; echo ${{PIPESTATUS[0]}}", buffered)
    assert done.stderr == "" and done.stdout.startswith("[\n")
    if buffered:  # without a buffer, Python itself takes a write that was cut short for a whole one
        assert done.stdout == "[\n1\n"


def test_a_reader_that_has_gone_before_the_first_word(tmp_path):
    one = write(tmp_path / "a.jsonl", ROWS)
    done = piped(f"polytask tasks {one} | true; polytask --help | true; polytask nonsense 2>&1 | true; echo ok")
    assert done.stderr == "" and done.stdout == "ok\n"


def test_what_was_printed_before_is_written_out_or_given_up():
    code = """
from polytask.cli.streams import flush
print("a line that stays in the buffer")
try:
    flush()
except BrokenPipeError:
    raise SystemExit(7)
"""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=60
    )
    os.close(writing)
    assert done.returncode == 7 and done.stderr == b""  # and the interpreter, when it ends, has nothing left to write


def test_streams_that_are_closed(tmp_path):
    one = write(tmp_path / "a.jsonl", ROWS)
    done = piped(f"polytask tasks {one} <&- >&-; echo $?; polytask tasks nowhere 2>&-; echo $?")
    assert done.stdout == "0\n1\n" and "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("buffered", [True, False])
def test_output_to_a_full_disk(tmp_path, buffered):
    done = piped(f"polytask tasks {write(tmp_path / 'a.jsonl', ROWS)} > /dev/full; echo $?", buffered)
    assert (
        done.stdout == "1\n"
        and done.stderr.strip() == "polytask: the output cannot be written: No space left on device"
    )
