"""Reading tasks: every source, every guess, every message."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.core.errors import ConfigError, DataError, PolytaskError
from polytask.core.task import Example, Task, read_tasks

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

ROWS = [{"text": f"text {i}", "label": "good" if i % 2 else "bad"} for i in range(60)]


def write(path: Path, content: Any) -> Path:
    """A file of rows in the format of its name; text and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif ".jsonl" in path.name:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode()
        packers: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.compress, ".gz": gzip.compress}
        path.write_bytes(packers.get(path.suffix, bytes)(data))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(content[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    return path


def picture(path: Path, shade: int) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (shade, 2 * shade % 256, 7)).save(path)
    return path


def message(error: type[Exception], source: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        Task.read(source, **options)
    return str(caught.value)


def has_note(task: Task, *words: str) -> bool:
    return any(all(word in note for word in words) for note in task.notes)


# --- sources


@pytest.mark.parametrize(
    "name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.jsonl.xz", "t.jsonl.gz"], ids=lambda n: n
)
def test_every_file_format_gives_the_same_task(tmp_path: Path, name: str) -> None:
    task = Task.read(write(tmp_path / name, ROWS))
    expected = Task.read(ROWS)
    assert task.name == "t"
    assert (task.kind, task.labels, task.metric) == ("classify", ("bad", "good"), "accuracy")
    assert task.splits == expected.splits
    assert task.hash == expected.hash
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert Task.read(write(tmp_path / "other" / name, shuffled)).hash == task.hash


def test_where_examples_come_from(tmp_path: Path) -> None:
    task = Task.read(write(tmp_path / "a.csv", ROWS))
    assert {e.where for part in task.splits.values() for e in part} == {f"a.csv:{i}" for i in range(2, 62)}
    task = Task.read(write(tmp_path / "a.jsonl", ROWS))
    assert {e.where for part in task.splits.values() for e in part} == {f"a.jsonl:{i}" for i in range(1, 61)}
    long = "text,label\n" + '"one\ntwo",a\n' * 2 + "three,b\n" * 2
    task = Task.read(write(tmp_path / "b.csv", long))
    assert sorted(e.where for part in task.splits.values() for e in part) == [
        "b.csv:2",
        "b.csv:4",
        "b.csv:6",
        "b.csv:7",
    ]


def test_hash_sees_content_and_split() -> None:
    task = Task.read(ROWS)
    changed = [*ROWS[:-1], {**ROWS[-1], "label": "bad"}]
    assert Task.read(changed).hash != task.hash
    moved = Task.read({"train": ROWS[:50], "test": ROWS[50:], "dev": ROWS[:1]})
    assert moved.hash != Task.read({"train": ROWS[:49], "test": ROWS[49:], "dev": ROWS[:1]}).hash


def test_folder_with_split_files(tmp_path: Path) -> None:
    write(tmp_path / "mood" / "train.csv", ROWS[:40])
    write(tmp_path / "mood" / "validation.jsonl", ROWS[40:50])
    write(tmp_path / "mood" / "test.tsv", ROWS[50:])
    task = Task.read(tmp_path / "mood")
    assert task.name == "mood"
    assert task.summary()["sizes"] == {"train": 40, "dev": 10, "test": 10}
    assert task.dev[0].where == "mood/validation.jsonl:1"
    write(tmp_path / "mood" / "dev.csv", ROWS[40:50])
    assert "two files for 'dev'" in message(DataError, tmp_path / "mood")


def test_folder_with_task_yaml(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "extra": "e", "grade": i % 2} for i in range(40)]
    write(tmp_path / "t" / "rows.csv", rows)
    yaml = "name: grades\nkind: classify\ninputs: q\ntarget: grade\nlabels: [low, high]\ninstruction: Grade it.\n"
    write(tmp_path / "t" / "task.yaml", yaml + "metric: macro-f1\nlicence: CC0-1.0\ndescription: Grades.\n")
    task = Task.read(tmp_path / "t")
    assert (task.name, task.labels, task.inputs, task.target) == ("grades", ("low", "high"), ("q",), "grade")
    assert (task.instruction, task.metric, task.licence) == ("Grade it.", "macro-f1", "CC0-1.0")
    assert {e.target for e in task.train} == {"low", "high"}
    assert has_note(task, "stand for low, high")
    over = Task.read(tmp_path / "t", name="other", kind="regress", labels=["low", "high"], metric="spearman")
    assert (over.name, over.kind, over.metric) == ("other", "regress", "spearman")


def test_task_yaml_files_and_where(tmp_path: Path) -> None:
    write(tmp_path / "t" / "a.jsonl", [{**row, "task": task} for task in ("m", "n") for row in ROWS[:40]])
    write(tmp_path / "t" / "b.jsonl", [{**row, "task": "m"} for row in ROWS[40:]])
    write(tmp_path / "t" / "task.yaml", "files: {train: a.jsonl, test: b.jsonl}\nwhere: {task: m}\n")
    task = Task.read(tmp_path / "t")
    assert len(task.train) + len(task.dev) == 40 and len(task.test) == 20 and task.name == "m"
    write(tmp_path / "t" / "task.yaml", "files: {train: aa.jsonl}\n")
    assert "did you mean 'a.jsonl'?" in message(DataError, tmp_path / "t")


def test_datasets_objects() -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = {"text": [row["text"] for row in ROWS], "label": [i % 2 for i in range(60)]}
    table = Dataset.from_dict(data, features=features)
    task = Task.read(table, name="d")
    assert (task.name, task.kind, task.labels) == ("d", "classify", ("neg", "pos"))
    splits = {"train": table.select(range(40)), "validation": table.select(range(40, 50)), "unsupervised": table}
    task = Task.read(DatasetDict(splits), name="d")
    assert len(task.dev) == 10 and len(task.train) + len(task.test) == 40
    assert has_note(task, "splits not used: unsupervised")
    hidden = Dataset.from_dict({"text": ["a", "b"], "label": [-1, 0]}, features=features)
    assert "'label' is missing" in message(DataError, DatasetDict({"train": table, "test": hidden}), name="d")
    tags = Features({"text": Value("string"), "tags": Sequence(ClassLabel(names=["x", "y"]))})
    several = Dataset.from_dict({"text": ["a", "b", "c"], "tags": [[0, 1], [], [1]]}, features=tags)
    task = Task.read(several)
    assert (task.kind, task.labels, task.metric) == ("multilabel", ("x", "y"), "macro-f1")
    with pytest.raises(DataError, match="at least one must be named train"):
        Task.read(DatasetDict({"one": table, "two": table}))


def test_parquet_of_datasets_keeps_label_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    table = Dataset.from_dict({"text": list("abcdef"), "label": [0, 1] * 3}, features=features)
    table.to_parquet(str(tmp_path / "p.parquet"))
    assert Task.read(tmp_path / "p.parquet").labels == ("neg", "pos")


def test_data_frame() -> None:
    import pandas as pd

    assert Task.read(pd.DataFrame(ROWS)).hash == Task.read(ROWS).hash


def test_natural_instructions(tmp_path: Path) -> None:
    instances = [{"id": f"i{i}", "input": f"in {i}", "output": [["yes", "no"][i % 2], "also"]} for i in range(30)]
    content = {"Definition": ["Say yes", "or no."], "Positive Examples": [], "Instances": instances}
    task = Task.read(write(tmp_path / "task1.json", content))
    assert (task.name, task.kind, task.instruction) == ("task1", "generate", "Say yes\nor no.")
    assert {e.target for e in task.train} == {"yes", "no"} and task.labels == ()
    assert Task.read(content, kind="classify").labels == ("no", "yes")
    assert "Instances must be a list" in message(DataError, {"Definition": "d", "Instances": []})
    assert "Definition must be a text" in message(DataError, {"Definition": [1], "Instances": instances})
    broken = {"Definition": "d", "Instances": [*instances, {"input": "x", "output": []}]}
    assert "task1.json, instance 31: 'output' is missing" in message(DataError, write(tmp_path / "task1.json", broken))


def test_a_folder_of_images_is_read_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (4, 4), (i * 10, 0, 0)).save(tmp_path / "pets" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    task = Task.read("pets")
    monkeypatch.chdir("/")  # and used from elsewhere
    assert task.labels == ("cat", "dog") and task.train[0].pixels().size == (4, 4)


def test_image_folders_and_arrays(tmp_path: Path) -> None:
    import numpy as np

    for i in range(12):
        picture(tmp_path / "pets" / ("cat" if i % 2 else "dog") / f"{i}.png", i)
    (tmp_path / "pets" / "cat" / "readme.txt").write_text("no image")
    task = Task.read(tmp_path / "pets")
    assert (task.kind, task.modality, task.labels, task.inputs) == ("classify", "image", ("cat", "dog"), ("image",))
    assert has_note(task, "1 files that are not images")
    example = task.train[0]
    assert example.inputs == () and example.pixels().size == (4, 3) and example.pixels().mode == "RGB"
    arrays = [np.zeros((3, 4, 3), np.uint8) + np.array([i, 2 * i, 7], np.uint8) for i in range(12)]
    same = Task.from_arrays("pets", arrays, ["cat" if i % 2 else "dog" for i in range(12)])
    assert same.hash == task.hash and len(same.train) == len(task.train)
    for split in ("train", "val", "test"):
        for i in range(2):
            picture(tmp_path / "split" / split / "ab"[i] / "1.jpg", 40 + i)
    task = Task.read(tmp_path / "split")
    assert task.summary()["sizes"] == {"train": 2, "dev": 2, "test": 2} and task.duplicates == 4
    (tmp_path / "split" / "test" / "a" / "1.jpg").write_bytes(b"not a picture")
    assert "split/test/a/1.jpg: not an image" in message(DataError, tmp_path / "split")
    assert len(Task.read(tmp_path / "split", skip_bad_rows=True).test) == 1


def test_from_arrays() -> None:
    import numpy as np

    images = np.arange(6 * 4, dtype=np.uint8).reshape(6, 2, 2)
    task = Task.from_arrays("t", images, np.arange(6) % 2, ["train"] * 4 + ["dev", "test"], label_names=["even", "odd"])
    assert task.summary()["sizes"] == {"train": 4, "dev": 1, "test": 1}
    assert task.labels == ("even", "odd") and task.test[0].target == "odd" and task.test[0].pixels().mode == "RGB"
    with pytest.raises(DataError, match="6 in image, 5 in label"):
        Task.from_arrays("t", images, [0, 1, 0, 1, 0])
    with pytest.raises(DataError, match="t, row 1: the image array is float64; pixels must be uint8"):
        Task.from_arrays("t", images / 255.0, [0, 1] * 3)
    with pytest.raises(DataError, match="channels last"):
        Task.from_arrays("t", np.zeros((2, 3, 8, 8), np.uint8), [0, 1])
    with pytest.raises(DataError, match="is NoneType; give a path"):
        Example((), "a").pixels()


def test_table_of_image_paths(tmp_path: Path) -> None:
    rows = [{"image": picture(tmp_path / f"{i}.png", i).name, "label": "ab"[i % 2]} for i in range(6)]
    write(tmp_path / "t.csv", rows)
    task = Task.read(tmp_path / "t.csv", modality="image")
    assert task.inputs == ("image",) and task.train[0].pixels().size == (4, 3)
    (tmp_path / "3.png").unlink()
    assert "t.csv:5: not an image that can be opened" in message(DataError, tmp_path / "t.csv", modality="image")


def test_datasets_images() -> None:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow

    pictures = [Pillow.fromarray(np.full((2, 2, 3), i, np.uint8)) for i in range(8)]
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    task = Task.read(Dataset.from_dict({"img": pictures, "label": [0, 1] * 4}, features=features))
    assert (task.modality, task.labels) == ("image", ("a", "b")) and task.train[0].pixels().size == (2, 2)


def test_split_column_and_undivided_rows() -> None:
    names = ["train"] * 40 + ["validation"] * 10 + ["test"] * 10
    task = Task.read([{**row, "split": split} for row, split in zip(ROWS, names, strict=True)])
    assert task.summary()["sizes"] == {"train": 40, "dev": 10, "test": 10}
    assert Task.read([{**row, "split": "all"} for row in ROWS]).hash == Task.read(ROWS).hash
    only = Task.read([{**row, "split": "test"} for row in ROWS])
    assert len(only.test) == 60 and has_note(only, "evaluated, not learnt")
    names[5] = "trian"
    rows = [{**row, "split": split} for row, split in zip(ROWS, names, strict=True)]
    assert "row 6: 'split' is 'trian' (did you mean 'train'?)" in message(DataError, rows)


def test_jsonl_is_cut_at_newlines_only(tmp_path: Path) -> None:
    texts = [f"one\x85two\u2028three\x0bfour {i}\r" for i in range(20)]
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(texts)]
    for name in ("t.jsonl", "t.csv", "t.tsv"):
        task = Task.read(write(tmp_path / name, rows))
        assert sorted(e.inputs[0] for part in task.splits.values() for e in part) == sorted(texts)


def test_csv_dialects(tmp_path: Path) -> None:
    assert Task.read(write(tmp_path / "a.csv", "\ufefftext;label\none;a\ntwo;b\none more;a\n five;b\n")).inputs == (
        "text",
    )
    stray = "text\tlabel\n" + '"quoted start\ta\nplain\tb\n' * 3
    task = Task.read(write(tmp_path / "b.tsv", stray), kind="classify")
    assert sum(map(len, task.splits.values())) == 6 and has_note(task, "ordinary characters")
    huge = "x" * 300_000
    assert has_note(Task.read(write(tmp_path / "c.csv", f"text,label\n{huge},a\nb,b\n"), kind="classify"), "300,000")
    assert csv.field_size_limit() == 131072


def test_json_lines_named_json(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert Task.read(write(tmp_path / "a.json", lines)).hash == Task.read(ROWS).hash


# --- guesses


@pytest.mark.parametrize(
    ("rows", "kind", "inputs", "target"),
    [
        ([{"sentence1": f"a{i}", "sentence2": "b", "label": i % 3} for i in range(12)], "classify", 2, "label"),
        (
            [{"premise": f"a{i}", "hypothesis": "b", "label": ["yes", "no"][i % 2]} for i in range(8)],
            "classify",
            2,
            "label",
        ),
        ([{"sentence1": f"a{i}", "sentence2": "b", "score": i / 2} for i in range(9)], "regress", 2, "score"),
        ([{"text": f"a{i}", "score": i} for i in range(30)], "regress", 1, "score"),
        ([{"text": f"a{i}", "label": i % 40} for i in range(400)], "classify", 1, "label"),
        ([{"text": f"a{i}", "label": i % 2 == 0} for i in range(10)], "classify", 1, "label"),
        ([{"text": f"a{i}", "tags": ["x"] * (i % 2)} for i in range(10)], "multilabel", 1, "tags"),
        ([{"x": f"a{i}", "y": f"b{i}"} for i in range(10)], "generate", 1, "y"),
        ([{"x": f"a{i}", "y": str(i % 150)} for i in range(750)], "classify", 1, "y"),
        ([{"x": f"a{i}", "y": str(i % 150)} for i in range(600)], "generate", 1, "y"),
        ([{"text": f"a{i}"} for i in range(10)], "lm", 1, ""),
        ([{"text": f"a{i}", "label": None} for i in range(10)], "lm", 1, ""),
        ([{"Text": f"a{i}", "id": i, "weird": "uv"[i % 2]} for i in range(10)], "classify", 1, "weird"),
        ([{"odd": f"a{i}", "Label": "uv"[i % 2]} for i in range(10)], "classify", 1, "Label"),
        ([{"question": f"a{i}", "choices": ["p", "q"], "answer": i % 2} for i in range(9)], "choose", 1, "answer"),
        (
            [{"context": f"c{i}", "question": "q", "options": ["p", "q"], "answer": "q"} for i in range(9)],
            "choose",
            2,
            "answer",
        ),
    ],
)
def test_guesses(rows: list[dict[str, Any]], kind: str, inputs: int, target: str) -> None:
    task = Task.read(rows)
    assert (task.kind, len(task.inputs), task.target) == (kind, inputs, target)
    assert has_note(task, f"kind: {kind}") and has_note(task, "inputs:", "guessed")
    json.dumps(task.summary())


def test_targets_by_kind(tmp_path: Path) -> None:
    choose = [{"question": f"a{i}", "choices": ["p", "q"], "answer": ["q", 1, "1", "p"][i % 4]} for i in range(40)]
    task = Task.read(choose)
    assert {e.target for e in task.train} == {0, 1} and task.train[0].choices == ("p", "q")
    columns = [{"q": f"q{i}", "c1": "left", "c2": f"right {i}", "label": i % 2} for i in range(9)]
    task = Task.read(columns, kind="choose", inputs="q", choices=["c1", "c2"])
    assert task.train[0].choices[0] == "left" and task.metric == "accuracy"
    text = "text,tags\n" + "a,x|y\nb,x\nc,y|x\n" + 'd,"[""x""]"\n'
    task = Task.read(write(tmp_path / "m.csv", text), kind="multilabel")
    assert task.labels == ("x", "y")
    assert sorted(e.target for part in task.splits.values() for e in part) == [["x"], ["x"], ["x", "y"], ["y", "x"]]
    listed = Task.read(write(tmp_path / "n.csv", "text,tags\n" + 'a,"[""x"", ""y""]"\nb,[]\n'))
    assert listed.kind == "multilabel"
    regress = Task.read(write(tmp_path / "r.csv", "text,score\na,1\nb,2.50\nc,3e0\n"))
    assert regress.kind == "regress"
    assert {type(e.target) for part in regress.splits.values() for e in part} == {float}
    assert regress.hash == Task.read([{"text": t, "score": s} for t, s in zip("abc", (1, 2.5, 3), strict=True)]).hash
    generate = Task.read([{"x": "a", "y": 1}, {"x": "b", "y": ["c", "d"]}], kind="generate")
    assert sorted(e.target for part in generate.splits.values() for e in part) == ["1", "c"]
    lm = Task.read(ROWS, kind="lm")
    assert lm.target == "" and lm.train[0].target is None and lm.metric == "perplexity"


def test_open_ended_answers_are_not_classes() -> None:
    train = [{"x": f"a{i}", "y": str(i % 10)} for i in range(100)]
    test = [{"x": f"b{i}", "y": f"new {i}"} for i in range(10)]
    assert Task.read({"train": train, "test": test}).kind == "generate"
    listed = {split: [{**row, "y": [row["y"]]} for row in rows] for split, rows in (("train", train), ("test", test))}
    task = Task.read(listed)
    assert task.kind == "generate" and task.test[0].target == "new 0"
    assert has_note(task, "kind: generate", "are not in train")


def test_labels_keep_the_order_given() -> None:
    assert Task.read(ROWS).labels == ("bad", "good")
    assert Task.read(ROWS, labels=["good", "bad", "unused"]).labels == ("good", "bad", "unused")
    assert Task.read([{"text": f"{i}", "label": i % 12} for i in range(60)]).labels[:3] == ("0", "1", "10")


def test_task_column_gets_a_note_and_names_the_task() -> None:
    rows = [{"task": task, **row} for task in ("one", "two") for row in ROWS]
    assert has_note(Task.read(rows), "column 'task' holds 2 values")
    task = Task.read(rows, where={"task": "one"})
    assert task.name == "one" and sum(map(len, task.splits.values())) == 60
    both = Task.read(rows, where={"task": ["one", "two"], "label": "good"}, kind="lm")
    assert sum(map(len, both.splits.values())) == 60
    assert "the values of 'task' are one, two" in message(DataError, rows, where={"task": "onee"})
    assert "no column 'tsk' (did you mean 'task'?)" in message(DataError, rows, where={"tsk": "one"})


# --- splits and duplicates

texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), min_size=1, max_size=30)


def place(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], set[str]]:
    where: dict[tuple[str, ...], set[str]] = {}
    for split, examples in Task.read(rows, inputs="text", kind="lm").splits.items():
        for example in examples:
            where.setdefault(example.inputs, set()).add(split)
    return where


@settings(max_examples=40, deadline=None)
@given(base=texts, added=texts)
def test_hash_splits_are_stable(base: list[str], added: list[str]) -> None:
    rows, more = ([{"text": f"t {text}"} for text in part] for part in (base, added))
    before, after = place(rows), place(more + rows)
    assert all(len(splits) == 1 for splits in after.values())
    assert all(after[inputs] == splits for inputs, splits in before.items())


def test_split_sizes_and_given_splits_stay() -> None:
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(2000)]
    sizes = Task.read(rows).summary()["sizes"]
    assert 1540 < sizes["train"] < 1660 and 150 < sizes["dev"] < 250 and sum(sizes.values()) == 2000
    whole = Task.read(rows)
    for split in ("dev", "test"):
        extra = [{"text": f"{split} {i}", "label": i % 2} for i in range(5)]
        task = Task.read({"train": rows, split: extra})
        assert len(task.splits[split]) == 5
        other = "test" if split == "dev" else "dev"
        assert task.splits[other] == whole.splits[other]
        assert len(task.train) + len(task.splits[other]) == 2000
    full = Task.read({"train": rows, "dev": rows[:3], "test": rows[:2]})
    assert len(full.train) == 2000 and not has_note(full, "splits:")


def test_duplicates_are_counted_and_kept() -> None:
    rows = {"train": ROWS[:40], "dev": [*ROWS[40:44], ROWS[0]], "test": [ROWS[0], ROWS[41], ROWS[59]]}
    task = Task.read(rows)
    assert task.duplicates == 3 and len(task.test) == 3
    assert has_note(task, "duplicates: 3")
    assert Task.read(ROWS + ROWS).duplicates == 0


# --- bad rows


def csv_with(line: str) -> str:
    return "text,label\n" + "a,x\nb,y\n" * 8 + line + "\n" + "c,x\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("d,", "'label' is missing"),
        (",x", "'text' is empty"),
        ("d", "has 1 fields where the header has 2"),
        ("d,x,y", "has 3 fields where the header has 2"),
        ("d\x00,x", "'text' holds a NUL character"),
    ],
)
def test_bad_csv_rows_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "intent.csv", csv_with(line))
    text = message(DataError, path, kind="classify")
    assert text.startswith(f"intent.csv:18: {words}")
    assert text.endswith("Fix the row, or pass skip_bad_rows=True / --skip-bad-rows to leave it out.")
    task = Task.read(path, kind="classify", skip_bad_rows=True)
    assert sum(map(len, task.splits.values())) == 17 and has_note(task, "left out 1 bad row: 1 ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "d", "label": null}', "'label' is missing"),
        ('{"text": "d"}', "'label' is missing"),
        ('{"text": "d", "label": NaN}', "'label' is missing"),
        ('{"text": 5, "label": "x"}', "'text' is int (5), and must be text"),
        ('{"text": ["d"], "label": "x"}', "'text' is list (['d']), and must be text"),
        ('{"text": "d", "label": {"a": 1}}', "'label' is dict"),
        ('{"text": "d" "label": "x"}', "invalid JSON (Expecting ',' delimiter, column 14)"),
        ('["d", "x"]', "is list, and a row must be an object"),
        ('{"text": "\\ud800", "label": "x"}', "'text' is not valid UTF-8"),
        ('{"text": "d\\u0000", "label": "x"}', "'text' holds a NUL character"),
        ("[" * 100_000, "JSON that cannot be read"),
    ],
)
def test_bad_jsonl_rows_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": "xy"[i % 2]}) for i in range(16)]
    path = write(tmp_path / "t.jsonl", "\n".join([*lines, line, lines[0]]))
    assert message(DataError, path).startswith(f"t.jsonl:17: {words}")
    task = Task.read(path, skip_bad_rows=True)
    assert sum(map(len, task.splits.values())) == 17 and has_note(task, "left out 1 bad row")


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", csv_with("caf\u00e9,x").encode("latin-1"))
    assert "t.csv:18: 'text' is not valid UTF-8 (character 4)" in message(DataError, path)
    assert "UTF-16" in message(DataError, write(tmp_path / "u.csv", "text,label\na,b\n".encode("utf-16")))
    junk = random.Random(1).randbytes(4000)
    for name in ("j.csv", "j.jsonl", "j.json", "j.parquet", "j.tsv", "j.jsonl.xz", "j.jsonl.gz"):
        assert name in message(DataError, write(tmp_path / name, b"\x89PNG\r\n\x1a\n\x00" + junk))
    assert "is not text" in message(DataError, tmp_path / "j.csv")
    assert "damaged or not .xz" in message(DataError, tmp_path / "j.jsonl.xz")
    assert "damaged or not Parquet" in message(DataError, tmp_path / "j.parquet")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "'score' is nan, and must be a finite number"),
        (float("inf"), "'score' is inf, and must be a finite number"),
        ("high", "'score' is 'high', and must be a number"),
        (True, "'score' is True, and must be a number"),
        pytest.param(10**400, "'score' is too large a number", id="huge"),
        (None, "'score' is missing"),
    ],
)
def test_bad_numbers(value: Any, words: str) -> None:
    rows = [{"text": f"t{i}", "score": i / 4} for i in range(10)]
    rows.insert(3, {"text": "bad", "score": value})
    assert f"row 4: {words}" in message(DataError, rows)
    assert has_note(Task.read(rows, skip_bad_rows=True), "left out 1 bad row")


def test_bad_choices() -> None:
    good = [{"question": f"q{i}", "choices": ["a", "b"], "answer": 0} for i in range(9)]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"choices": ["a"], "answer": 0}, "must be a list of two texts or more"),
        ({"choices": "a", "answer": 0}, "must be a list of two texts or more"),
        ({"choices": ["a", "b"], "answer": 2}, "must be an index from 0 to 1"),
        ({"choices": ["a", "b"], "answer": "c"}, "none of the choices (a, b)"),
        ({"choices": ["a", 3], "answer": 0}, "must be text"),
    ]
    for row, words in bad:
        assert words in message(DataError, [*good, {"question": "q", **row}])


def test_unknown_labels(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.csv", ROWS[:40])
    write(tmp_path / "t" / "test.csv", [*ROWS[40:50], {"text": "new", "label": "godo"}])
    text = message(DataError, tmp_path / "t")
    assert text.startswith("t/test.csv:12: label 'godo' in test does not occur in train (did you mean 'good'?)")
    text = message(DataError, tmp_path / "t", labels=["good", "fine"], skip_bad_rows=False)
    assert (
        "t has 26 bad rows" in text and "is not one of the labels given: good, fine" in text and "and 21 more" in text
    )
    task = Task.read(tmp_path / "t", skip_bad_rows=True)
    assert len(task.test) == 10 and has_note(task, "1 label not in train")
    many = {
        "train": [{"text": f"{i}", "tags": ["a", "b"]} for i in range(5)],
        "test": [{"text": "t", "tags": ["a", "c"]}],
    }
    assert "label 'c' in test does not occur in train" in message(DataError, many)


def test_five_bad_rows_are_told_of_nine(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(60)]
    for i in range(9):
        rows[5 * i]["label"] = ""
    text = message(DataError, write(tmp_path / "t.csv", rows))
    assert "t.csv has 9 bad rows. t.csv:2: 'label' is missing; t.csv:7:" in text and "t.csv:22" in text
    assert "t.csv:27" not in text and "and 4 more" in text and "Fix the rows" in text
    assert has_note(Task.read(tmp_path / "t.csv", skip_bad_rows=True), "left out 9 bad rows: 9 'label' missing")


def test_nothing_left(tmp_path: Path) -> None:
    assert "no usable row" in message(DataError, [{"text": "", "label": ""}], skip_bad_rows=True, kind="generate",
                                      inputs="text", target="label")  # fmt: skip
    assert "invalid JSON" in message(DataError, write(tmp_path / "a.jsonl", "nonsense\n"), skip_bad_rows=True)


# --- sources that cannot be used


def test_empty_and_one_sided_sources(tmp_path: Path) -> None:
    assert "e.csv is empty" in message(DataError, write(tmp_path / "e.csv", ""))
    assert "h.csv has a header (text, label) and no rows" in message(
        DataError, write(tmp_path / "h.csv", "text,label\n")
    )
    assert "l.json has no rows" in message(DataError, write(tmp_path / "l.json", "[]"))
    assert "must hold a list" in message(DataError, write(tmp_path / "m.json", '{"a":\n 1}'))
    assert "n.json:2: invalid JSON" in message(DataError, write(tmp_path / "n.json", '[{"a": 1},\n oops]'))
    assert "twice" in message(DataError, write(tmp_path / "d.csv", "text,text\na,b\n"))
    assert "has no rows" in message(DataError, [])
    assert "empty dict" in message(DataError, {})
    one = [{"text": f"t{i}", "label": "same"} for i in range(20)]
    assert "every row has the label 'same'" in message(DataError, one)
    assert "needs two labels" in message(DataError, one)
    assert "cannot be read from int" in message(DataError, 3)
    assert "must be an object" in message(DataError, [1, 2])


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ROWS)
    text = message(DataError, path, target="lable")
    assert text == "t.csv has no column 'lable' (did you mean 'label'?); its columns are label, text."
    assert "no column 'txt'" in message(DataError, path, inputs="txt")
    assert "kind choose needs a column" in message(DataError, path, kind="choose")
    strange = [{"a1": "x", "b2": "y", "c3": "z"}]
    assert "the input cannot be told. The columns are a1, b2, c3" in message(DataError, strange)
    assert "the target cannot be told" in message(DataError, [{"text": "x", "b2": "y", "c3": "z"}])
    assert "the target cannot be told" in message(DataError, [{"text": "x"}], kind="generate")


def test_paths(tmp_path: Path) -> None:
    write(tmp_path / "intents.csv", ROWS)
    assert "did you mean 'intents.csv'?" in message(DataError, tmp_path / "intent.csv")
    assert "does not exist" in message(DataError, tmp_path / "no" / "intent.csv")
    assert "did you mean 'csv'?" in message(DataError, write(tmp_path / "a.csvv", "text"))
    assert "format that can be read" in message(DataError, write(tmp_path / "README.md", "text"))
    with pytest.raises(PolytaskError):
        Task.read("a\x00b")
    (tmp_path / "hollow").mkdir()
    assert "no readable task" in message(DataError, tmp_path / "hollow") and "nothing" in message(
        DataError, tmp_path / "hollow"
    )
    write(tmp_path / "train.csv" / "x.txt", "text")
    assert "no readable task" in message(DataError, tmp_path / "train.csv")


def test_settings_are_validated_all_together(tmp_path: Path) -> None:
    text = message(ConfigError, ROWS, knd="classify", modality="sound", labels=["a", "a"])
    assert "unknown key 'knd' (did you mean 'kind'?)" in text and "the keys are name, kind" in text
    assert "modality must be one of text, image" in text and "names 'a' twice" in text
    write(tmp_path / "t" / "train.csv", ROWS)
    for yaml, words in [
        ("instructions: x", "t/task.yaml: unknown key 'instructions' (did you mean 'instruction'?)"),
        ("kind: clasify", "(did you mean 'classify'?)"),
        ("labels: [yes, no]", "put the label in quotes"),
        ("labels: good", "must be a list of label names"),
        ("name: 3", "name must be text"),
        ("name: a/b", "without slashes"),
        ("inputs: [a, b, c]", "one column name or a list of two"),
        ("files: {trian: a.csv}", "(did you mean 'train'?)"),
        ("files: [a.csv]", "must map splits to file names"),
        ("files: {all: a.csv, test: b.csv}", "alone"),
        ("where: sst2", "must map columns"),
        ("choices: 3", "choices must be"),
        ("- a\n- b", "must hold `key: value` lines"),
        ("a: [", "not valid YAML"),
    ]:
        write(tmp_path / "t" / "task.yaml", yaml)
        assert words in message(ConfigError, tmp_path / "t")
    write(tmp_path / "t" / "task.yaml", "")
    assert Task.read(tmp_path / "t").kind == "classify"
    with pytest.raises(ConfigError, match="did you mean 'classify'"):
        Task("t", "clasify", [], [], [])


# --- many tasks


def test_read_tasks(tmp_path: Path) -> None:
    write(tmp_path / "zeta.csv", ROWS)
    write(tmp_path / "beta" / "train.jsonl", ROWS)
    write(tmp_path / "alpha" / "task.yaml", "name: eta\n")
    write(tmp_path / "alpha" / "rows.jsonl", ROWS)
    for i in range(4):
        picture(tmp_path / "pets" / "ab"[i % 2] / f"{i}.png", i)
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".hidden.csv", "")
    (tmp_path / "notes").mkdir()
    assert [task.name for task in read_tasks(tmp_path)] == ["beta", "eta", "pets", "zeta"]
    assert [task.name for task in read_tasks(tmp_path / "beta")] == ["beta"]
    assert [task.name for task in read_tasks([tmp_path / "zeta.csv", str(tmp_path / "beta")])] == ["beta", "zeta"]
    assert [task.name for task in read_tasks(ROWS)] == ["task"]
    assert [task.name for task in read_tasks([Task.read(ROWS, name="b"), Task.read(ROWS, name="a")])] == ["a", "b"]
    write(tmp_path / "zeta.jsonl", ROWS)
    with pytest.raises(DataError, match=r"Two tasks are named 'zeta' \(.*zeta.csv and .*zeta.jsonl\)"):
        read_tasks(tmp_path)
    with pytest.raises(DataError, match="no readable task"):
        read_tasks(tmp_path / "notes")
    with pytest.raises(DataError, match="list of tasks is empty"):
        read_tasks([])
    write(tmp_path / "beta" / "test.jsonl", "{}")
    with pytest.raises(DataError, match="beta/test.jsonl:1"):
        read_tasks(tmp_path / "beta")
    assert len(read_tasks(tmp_path / "beta", skip_bad_rows=True)) == 1


def test_import_is_light() -> None:
    code = (
        "import sys, polytask.core.task, polytask.core.task_build; print([m for m in "
        + repr(HEAVY)
        + " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ["torch", "transformers", "datasets", "pandas", "pyarrow", "PIL", "numpy", "yaml"]


def test_a_slice_of_real_data() -> None:
    path = DATA / "text" / "sentcls.jsonl.xz"
    if not path.exists():
        pytest.skip("the data packs are not here")
    task = Task.read(path, where={"task": "sst2"})
    assert (task.name, task.kind, task.labels) == ("sst2", "classify", ("0", "1"))
    assert task.summary()["sizes"] == {"train": 6920, "dev": 872, "test": 1821}
