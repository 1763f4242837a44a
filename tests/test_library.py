"""A library of adapters: what it keeps, finds and compares, and what is left of it when processes end and files break."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import colours, tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import tiny

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError, LibraryError
from polytask.core.library import Library
from polytask.core.library import index as library_index
from polytask.core.library.entry import INDEX, RECORD, Entry
from polytask.core.library.query import parse
from polytask.core.reading import inputs_of
from polytask.core.signature import Subject, signatures

FORK = multiprocessing.get_context("fork")  # the children need no imports of their own


@pytest.fixture(scope="module")
def base():
    return pt.Model(tiny("bert")[0], name="tiny")


def make(base, seed, form=None, sites="query & layer==0", **card):
    """An adapter of random values."""
    made = pt.Adapter.new(base, form or pt.LoRA(rank=2, init="random"), sites, seed=seed, name=f"a{seed}")
    for key, value in card.items():
        setattr(made.card, key, value)
    return made


@pytest.fixture
def lib(base, tmp_path):
    """Three adapters: two with tasks, the third a child of both."""
    made = Library(tmp_path / "lib")
    mood = make(base, 0, metrics={"dev/mood": 0.9}, tasks=[{"name": "mood", "kind": "classify", "metric": "accuracy"}])
    topic = make(base, 1, metrics={"dev/topic": 0.6}, tasks=[{"name": "topic", "kind": "tag", "metric": "f1"}])
    child = make(base, 2, pt.LoRA(rank=4, init="random"), parents=[mood.hash, topic.hash], licence="mit")
    for adapter, tags in ((mood, ("short",)), (topic, ("long", "short")), (child, ())):
        made.add(adapter, tags=tags)
    return made


def same(one, two):
    """Whether two libraries say the same of the same adapters."""
    return one.entries == two.entries and [one.show(n) for n in one] == [two.show(n) for n in two]


def clean(root):
    """A library that opens without findings and passes a full check."""
    again = Library(root)
    assert not again.findings and not again.check()
    return again


# What goes in comes out


def test_an_adapter_comes_out_as_it_went_in(base, lib, tmp_path):
    adapter = make(base, 7, tasks=[{"name": "mood", "labels": ["good", "bad"]}])
    assert lib.add(adapter, "mine é 1", tags=["x", "y", "x"]) == "mine é 1" and adapter.name == "a7"
    found = lib["mine é 1"]
    assert found.hash == adapter.hash == lib.hashes["mine é 1"] and found.name == "mine é 1"
    assert found is lib["mine é 1"] and "mine é 1" in lib and len(lib) == 4 and list(lib)[-1] == "mine é 1"
    entry = lib.show("mine é 1")
    assert (entry.tags, entry.ranks, entry.form) == (("x", "y"), (2,), "lora")
    assert entry.size == adapter.size and entry.fingerprint == base.fingerprint
    assert lib.get("none") is None and "none" not in lib and same(lib, clean(lib.root))
    out = lib.export("mine é 1", tmp_path / "out")
    assert (
        pt.Adapter.load(out).hash == adapter.hash and not (out / RECORD).exists() and not (out / "signatures").exists()
    )
    with pytest.raises(LibraryError, match="not empty"):
        lib.export("a0", out)


def test_peft_reads_what_a_library_holds(base, lib):
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(pt.Model(tiny("bert")[0]).module, lib.root / "a0").eval()
    batch = tiny("bert")[1]
    base.attach(lib["a0"], "own")
    with torch.no_grad(), base.using("own"):
        ours = base.module(**batch).last_hidden_state
    base.detach("own")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).last_hidden_state, ours)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_weights_are_mapped_from_the_file(lib):
    adapter = lib["a0"]
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(f"{lib.root}/a0/adapter_model.safetensors")
    ]
    assert all(any(low <= p.data_ptr() < high for low, high in spans) for p in adapter.parameters())


@pytest.mark.parametrize(
    "name", ["", ".a", "a/b", "..", "a\\b", "a\nb", "a ", "a.", "x" * 101, "index.sqlite", "a~b", "a\0"]
)
def test_names_that_cannot_be_folders_are_refused(base, lib, name):
    with pytest.raises(LibraryError, match="letters, digits"):
        lib.add(make(base, 5), name) if name else lib.show(name)
    assert len(lib) == 3


def test_a_name_is_given_once_and_a_replaced_adapter_is_kept(base, lib):
    before = lib.hashes["a0"]
    held = lib["a0"]
    with pytest.raises(LibraryError, match="has an adapter called 'a0'"):
        lib.add(make(base, 5), "a0")
    lib.add(make(base, 5), "a0", replace=True)
    assert lib.hashes["a0"] == make(base, 5).hash and lib["a0"] is not held and held.hash == before
    assert [e.hash for e in lib.removed] == [before]
    with pytest.raises(LibraryError, match="has an adapter called"):
        lib.restore("a0")
    lib.remove("a0")
    assert same(lib, clean(lib.root))


def test_removal_is_soft_until_gc(lib):
    whole = lib.show("a1")
    lib.remove("a1")
    assert "a1" not in lib and not lib.find("topic")
    with pytest.raises(LibraryError, match="restore brings it back"):
        lib["a1"]
    assert Library(lib.root).restore("a1") == "a1" and lib.show("a1") == whole
    lib.remove("a1")
    assert lib.gc() == ["a1"] and not lib.removed and not list((lib.root / ".removed").iterdir())
    with pytest.raises(LibraryError, match="no removed adapter"):
        lib.restore("a1")
    assert clean(lib.root).names == ("a0", "a2")


def test_an_adapter_for_another_base_is_refused(base, lib, tmp_path):
    other = pt.Model(tiny("bert", seed=1)[0], name="other")
    with pytest.raises(AdapterError, match="this library is for 'tiny'"):
        lib.add(make(other, 5))
    assert lib.add(make(other, 5), check_base=False) == "a5"
    with pytest.raises(AdapterError, match="open the library with that base"):
        Library(lib.root, other).model  # noqa: B018
    with pytest.raises(AdapterError, match="this library is for 'other'"):
        Library(tmp_path / "new", other).add(make(base, 0))


def test_tags_last_longer_than_the_index(lib):
    assert lib.tag("a0", "new", "short") == ("short", "new") and lib.untag("a0", "short") == ("new",)
    with pytest.raises(LibraryError, match="has no tag 'nwe'|has no tag nwe"):
        lib.untag("a0", "nwe")
    (lib.root / INDEX).unlink()
    assert Library(lib.root).show("a0").tags == ("new",)


# Other folders


def test_import_takes_all_and_names_what_is_damaged(base, lib, tmp_path):
    for place, seed in (("x/one", 11), ("x/two", 12), ("y/one", 13), ("z", 14)):
        make(base, seed).save(tmp_path / "many" / place)
    peft = tmp_path / "many" / "x" / "two"
    for ours in ("polytask.json", "README.md"):
        (peft / ours).unlink()
    broken = tmp_path / "many" / "y" / "broken"
    shutil.copytree(tmp_path / "many" / "z", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 30)
    bare = tmp_path / "many" / "y" / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "many" / "z" / "adapter_model.safetensors", bare)
    found = lib.import_(tmp_path / "many", tags=["m"])
    assert sorted(found.added.values()) == ["two", "x-one", "y-one", "z"] and len(lib.find("tag:m")) == 4
    assert set(found.skipped) == {str(broken), str(bare)} and "damaged" in found.skipped[str(broken)]
    assert torch.equal(*(next(a.parameters()) for a in (lib["two"], make(base, 12))))
    again = lib.import_(tmp_path / "many")
    assert not again.added and len(again.kept) == 4 and len(again.skipped) == 2 and "broken" in str(again)
    with pytest.raises(LibraryError, match="so there is no adapter"):
        lib.import_(lib.root / "a0" / "signatures")
    clean(lib.root)


# Several processes


def _writer(root, ready, seeds, out):
    base = pt.Model(tiny("bert")[0], name="tiny")
    lib = Library(root)
    lib.add(make(base, seeds[0]))
    ready.wait()
    problems = []
    for seed in seeds[1:]:
        try:
            lib.add(make(base, seed), tags=[f"s{seed}"])
        except Exception as error:
            problems.append(repr(error))
    try:
        lib.add(make(base, seeds[0]), "both")
        problems.append("first")
    except LibraryError as error:
        problems.append("second" if "has an adapter called 'both'" in str(error) else repr(error))
    out.put(problems)


def test_two_processes_add_at_once_and_nothing_is_lost(tmp_path):
    ready, out = FORK.Barrier(2), FORK.Queue()
    children = [FORK.Process(target=_writer, args=(tmp_path / "lib", ready, range(n, 400, 2), out)) for n in (0, 1)]
    for child in children:
        child.start()
    problems = [out.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    assert sorted(problems) == [["first"], ["second"]]
    lib = clean(tmp_path / "lib")
    assert set(lib) == {f"a{seed}" for seed in range(400)} | {"both"}
    assert [e.name for e in lib.find("tag=s17")] == ["a17"]
    assert not list(lib.root.glob(".tmp-*"))


def killed(root, act, at):
    """Runs ``act(lib)`` in a process that is killed when ``at(patch)``'s function is called."""

    def child():
        lib = Library(root)
        stop = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        at(stop)
        act(lib)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def before(module, name):
    return lambda stop: setattr(module, name, stop)


def after(module, name, count=1):
    def patch(stop):
        real, calls = getattr(module, name), []

        def then(*a, **k):
            made = real(*a, **k)
            calls.append(1)
            return stop() if len(calls) == count else made

        setattr(module, name, staticmethod(then) if isinstance(vars(module)[name], staticmethod) else then)

    return patch


POINTS = {
    "files half written": (after(Path, "write_bytes", 2), False),
    "files written": (before(library_index.Index, "writing"), False),
    "renamed, not in the index": (after(os, "rename"), True),
    "row written, not committed": (after(library_index.Index, "put"), True),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_nothing_half(base, lib, point):
    at, there = POINTS[point]
    new = make(base, 9)
    killed(lib.root, lambda lib: lib.add(new), at)
    again = Library(lib.root)
    assert ("a9" in again) == there and len(again) == 3 + there
    assert [f.what for f in again.findings] == (["unindexed"] if there else [])
    assert not there or (again["a9"].hash == new.hash and again.show("a9").signatures == ("arrow", "sketch"))
    left = list(lib.root.glob(".tmp-*"))
    assert len(left) == (not there)
    assert [f.what for f in again.check() if not f.repaired] == ["leftover"] * len(left) and left == list(
        lib.root.glob(".tmp-*")
    )
    assert all(f.repaired for f in again.check(repair=True)) and not list(lib.root.glob(".tmp-*"))
    again.add(make(base, 9), replace=True)
    clean(lib.root)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_replacement_happened_or_did_not(base, lib, count):
    """After the first of two renames the old one comes back, after the second the new one is there."""
    old, new = lib.hashes["a0"], make(base, 9)
    killed(lib.root, lambda lib: lib.add(new, "a0", replace=True), after(os, "rename", count))
    again = Library(lib.root)
    assert again.hashes["a0"] == (old, new.hash)[count - 1] and len(again) == 3 and again.findings
    assert [e.hash for e in again.removed] == [[], [old]][count - 1]
    again.check(repair=True)
    clean(lib.root)


def test_killed_removals_and_restores_are_put_right(base, lib):
    whole = lib.show("a1")
    killed(lib.root, lambda lib: lib.remove("a1"), after(os, "rename"))
    assert Library(lib.root).show("a1") == whole
    Library(lib.root).remove("a1")
    killed(lib.root, lambda lib: lib.restore("a1"), after(os, "rename"))
    assert Library(lib.root).show("a1") == whole and not Library(lib.root).removed
    clean(lib.root)


def test_killed_changes_inside_a_folder_are_read_again(lib):
    killed(lib.root, lambda lib: lib.tag("a0", "late"), before(library_index.Index, "put"))
    again = Library(lib.root)
    assert again.show("a0").tags == ("short", "late") and [f.what for f in again.findings] == ["unfinished"]
    killed(lib.root, lambda lib: lib.sign("a0", "own", {"": torch.ones(2)}), after(os, "replace"))
    again = Library(lib.root)
    assert again.signature("a0", "own")[""].tolist() == [1, 1] and "own" in again.show("a0").signatures
    clean(lib.root)


def test_temporary_folders_of_living_processes_stay(lib):
    mine = lib.root / f".tmp-{os.getpid()}-1"
    mine.mkdir()
    assert not lib.check(repair=True) and lib.gc() == [] and mine.is_dir()


# Lost and damaged files


@pytest.mark.parametrize("damage", ["deleted", "text", "empty", "cut", "holes", "another"])
def test_a_lost_or_damaged_index_is_made_again(lib, tmp_path, damage):
    lib.remove("a1")
    whole, gone = {n: lib.show(n) for n in lib}, lib.removed
    lib.close()
    file = lib.root / INDEX
    data = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage == "another":
        file.unlink()
        with sqlite3.connect(file) as db:
            db.execute("CREATE TABLE other (x)")
    else:
        holes = data[:5000] + b"\xff" * (len(data) - 5000)
        file.write_bytes(
            {"text": b"no index\n" * 99, "empty": b"", "cut": data[: len(data) // 2], "holes": holes}[damage]
        )
    told = Library(lib.root, repair=False)
    assert {n: told.show(n) for n in told} == whole and [f.what for f in told.check()] == ["index"]
    assert not file.exists() if damage == "deleted" else file.read_bytes()[:8] != b"" or damage == "empty"
    again = Library(lib.root)
    assert {n: again.show(n) for n in again} == whole and again.removed == gone
    assert [(f.what, f.repaired) for f in again.findings] == [("index", True)]
    clean(lib.root)


def test_a_library_goes_on_when_its_index_is_deleted(base, lib):
    (lib.root / INDEX).unlink()
    assert len(lib) == 3
    for end in ("", "-wal", "-shm"):
        (lib.root / (INDEX + end)).unlink(missing_ok=True)
    lib.add(make(base, 9))
    assert same(lib, clean(lib.root)) and len(lib) == 4


def test_a_corrupted_adapter_is_named_and_not_given_out(lib):
    file = lib.root / "a0" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # one bit of one value, which no format notices
    file.write_bytes(data)
    (finding,) = lib.check()
    assert (finding.what, finding.name, finding.repaired) == ("damaged", "a0", False) and len(lib) == 3
    lib.check(repair=True)
    assert lib.names == ("a1", "a2") and len(Library(lib.root)) == 2
    with pytest.raises(LibraryError, match="'a0' is damaged.*changed or damaged"):
        lib["a0"]
    data[-5] ^= 1
    file.write_bytes(data)
    assert [f.what for f in lib.check(repair=True)] == ["changed"] and len(lib) == 3
    (lib.root / "a1" / "adapter_config.json").unlink()
    assert [(f.what, f.name) for f in lib.check(deep=False)] == [("damaged", "a1")]


def test_folders_and_rows_that_differ_are_told_and_repaired(base, lib):
    make(base, 9).save(lib.root / "by-hand")
    (lib.root / "junk").mkdir()
    shutil.rmtree(lib.root / "a1")
    told = Library(lib.root, repair=False)
    found = {(f.what, f.name, f.repaired) for f in told.check()}
    assert found == {("unindexed", "by-hand", False), ("unindexed", "junk", False), ("missing", "a1", False)}
    with pytest.raises(LibraryError, match="without repair"):
        told.check(repair=True)
    again = Library(lib.root)
    assert again.names == ("a0", "a2", "by-hand") and again["by-hand"].hash == make(base, 9).hash
    assert {(f.what, f.name) for f in again.findings} == {
        ("unindexed", "by-hand"),
        ("damaged", "junk"),
        ("missing", "a1"),
    }
    again.remove("junk")
    clean(lib.root)


# Ten thousand


def test_opening_ten_thousand_reads_no_adapter(tmp_path, monkeypatch):
    """What is read is the directory and the index, whatever there is in the folders."""
    lib = Library(tmp_path)
    count = 10_000
    with lib._index.writing() as db:
        for i in range(count):
            (tmp_path / f"n{i}").mkdir()
            task = {"name": f"task{i % 50}", "kind": "classify", "metric": "accuracy"}
            lib._index.put(db, Entry(f"n{i}", (), (task,), "lora", (4,), scores={"dev": i / count}, folder=f"n{i}"))
    lib.close()
    opened = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: opened.append(Path(path).name) or real(path))
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} was read"))
    monkeypatch.setattr(Path, "open", lambda self, *a: pytest.fail(f"{self} was opened"))
    again = Library(tmp_path)
    assert len(again) == count and not again.findings
    found = again.find("task:task7 & score>0.5")
    assert [e.name for e in found] == sorted(f"n{i}" for i in range(5007, count, 50)) and found
    assert opened == [tmp_path.name, ".removed"]


def test_adding_asks_for_the_base_without_reading_all_rows(tmp_path):
    from polytask.core.library.index import _FIRST

    lib = Library(tmp_path)
    with lib._index.writing() as db:
        plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {_FIRST}"))
    assert "USING INDEX first" in plan and "TEMP B-TREE" not in plan


def test_commands_that_only_look_need_no_torch(lib):
    code = (
        "import sys; from polytask.core.library import Library; lib = Library(sys.argv[1]); "
        "assert len(lib.find('tag:short')) == 2 and lib.show('a0') and lib.graph() and len(lib) == 3; "
        "lib.tag('a0', 'x'); lib.remove('a1'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(lib.root)], check=True)


# Queries


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", "a0 a1 a2"), ("mood", "a0"), ("MOOD | task:topic", "a0 a1"), ("task:moo & score>0.8", "a0"), ("score > 0.95", ""),
        ("score.accuracy>0.8", "a0"), ("score.f1>0.5", "a1"), ("score.mood>=.9", "a0"), ("score.dev<=0.6", "a1"),
        ("kind=tag", "a1"), ("kind:ta", "a1"), ("kind=ta", ""), ("tag:sh* & !long", "a0"), ("not tag:short", "a2"),
        ("tag=short and not (task:mood or task:x)", "a1"), ("rank>2", "a2"), ("rank:2", "a0 a1"), ("rank!=2", "a2"),
        ("parent:a0", "a2"), ("parent:a0 & parent:a1", "a2"), ("licence:MIT", "a2"), ("form:lora & base=tiny", "a0 a1 a2"),
        ("size<1k", "a0 a1 a2"), ("size>1M", ""), ("name:a[01]", "a0 a1"), ("'a0'", "a0"), ('task:"moo"', "a0"),
        ("added>2020", "a0 a1 a2"), ("added<2020-05", ""), ("signature:sketch", "a0 a1 a2"), ("tag!=short", "a2"),
    ],
)  # fmt: skip
def test_queries(lib, query, names):
    assert " ".join(entry.name for entry in lib.find(query)) == names


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("taks:mood", r"asks for 'taks' \(did you mean 'task'\?\), and adapters have: name, tag, task"),
        ("score>high", "does not end in a number"),
        ("form>3", "is a text and cannot be compared; write form:3"),
        ("form.x:3", "only score has parts"),
        ("(mood", "lacks a closing parenthesis"),
        ("mood topic", "goes on after it is complete, at 'topic'"),
        ("mood &", "has its end where"),
        ("mood < ", "cannot be read at"),
        ("(" * 5000 + "a" + ")" * 5000, "too many parentheses"),
    ],
)
def test_queries_that_cannot_be_read_say_why(lib, query, message):
    with pytest.raises(ConfigError, match=message):
        lib.find(query)


ENTRIES = [
    Entry(
        "red", ("x", "Y"), ({"name": "colour", "kind": "classify", "metric": "f1"},), "lora", (2, 8), 100, {"dev": 0.5}
    ),
    Entry("blue-1", ("y",), (), "ia3", (), 2000, {}),
    Entry("Grün", (), ({"name": "tone", "kind": "tag", "metric": ""},), "lora", (4,), 5, {"dev": 0.1, "test": 0.9}),
]
ATOMS = st.one_of(
    st.sampled_from(["red", "y", "o", "ün", "zz"]).map(
        lambda w: (w, lambda e: any(w in t.lower() for t in (e.name, *e.tags, *(k["name"] for k in e.tasks))))
    ),
    st.sampled_from(["lora", "ia3", "or"]).map(lambda w: (f"form:{w}", lambda e: w in e.form)),
    st.sampled_from(["lora", "IA3", "or"]).map(lambda w: (f"form = {w}", lambda e: w.lower() == e.form)),
    st.sampled_from(["X", "y"]).map(lambda w: (f"tag!='{w}'", lambda e: w.lower() not in [t.lower() for t in e.tags])),
    st.tuples(*map(st.sampled_from, (["rank", "score", "size"], [">", ">=", "<", "<="], [0, 0.5, 4, 100])))
    .map(lambda c: (f"{c[0]}{c[1]} {c[2]}", lambda e: any(eval(f"{v}{c[1]}{c[2]}") for v in
         {"rank": e.ranks, "score": e.scores.values(), "size": [e.size]}[c[0]]))),
)  # fmt: skip


def joined(pair):
    return st.one_of(
        st.tuples(pair, pair).map(lambda p: (f"({p[0][0]} | {p[1][0]})", lambda e: p[0][1](e) or p[1][1](e))),
        st.tuples(pair, pair).map(lambda p: (f"{p[0][0]} & {p[1][0]}", lambda e: p[0][1](e) and p[1][1](e))),
        pair.map(lambda p: (f"not ({p[0]})", lambda e: not p[1](e))),
    )


@given(st.recursive(ATOMS, joined, max_leaves=8), st.recursive(ATOMS, joined, max_leaves=4))
@settings(deadline=None)
def test_random_queries_agree_with_python(left, right):
    for text, test in (left, (f"{left[0]} or {right[0]}", lambda e: left[1](e) or right[1](e))):
        assert [parse(text)(e) for e in ENTRIES] == [bool(test(e)) for e in ENTRIES], text


@given(st.text("tagscore:=<>!&|()\"' .*[]0ü", max_size=16))
@settings(deadline=None)
def test_any_query_is_read_or_refused(text):
    try:
        test = parse(text)
    except ConfigError:
        return
    assert all(isinstance(test(entry), bool) for entry in ENTRIES)


# Comparing


def test_diff_is_that_of_the_dense_changes(base, tmp_path):
    """The oracle: numpy on the dense matrices, site by site."""
    import numpy as np

    lib = Library(tmp_path)
    lib.add(make(base, 0, sites="query | up"))
    lib.add(make(base, 1, pt.LoRA(rank=3, init="random"), sites="query"))
    full = make(base, 2, pt.Form.of("full"), sites="query & layer==1")
    with torch.no_grad():
        for p in full.parameters():
            p.normal_(generator=torch.Generator().manual_seed(3))
    lib.add(full)
    for one, two in (("a0", "a1"), ("a1", "a0"), ("a0", "a2"), ("a0", "a0")):
        found = lib.diff(one, two)
        dense = [{n: p.delta().detach().double().numpy() for n, p in lib[name].patches.items()} for name in (one, two)]
        both = dense[0].keys() & dense[1].keys()
        dot = sum((dense[0][n] * dense[1][n]).sum() for n in both)
        norms = [sum((d**2).sum() for d in side.values()) ** 0.5 for side in dense]
        assert found.whole.cosine == pytest.approx(dot / norms[0] / norms[1], abs=1e-9)
        overlaps = []
        for name in sorted(both):
            spaces = []
            for side in dense:
                u, s, _ = np.linalg.svd(side[name])
                spaces.append(u[:, : (s > 1e-5 * s[0]).sum()])
            cosines = np.linalg.svd(spaces[0].T @ spaces[1], compute_uv=False)  # of the principal angles
            overlaps.append((cosines[: min(s.shape[1] for s in spaces)] ** 2).mean())
        assert found.whole.columns == pytest.approx(np.mean(overlaps), abs=1e-6)
        assert found.only == ([n for n in dense[0] if n not in both], [n for n in dense[1] if n not in both])
    assert [layer.name for layer in found.layers] == ["layer 0", "layer 1"]
    whole = found.whole
    assert (whole.cosine, whole.columns, whole.rows) == pytest.approx((1, 1, 1))
    lib.add(make(base, 4, pt.Form.of("bottleneck"), sites=None))
    with pytest.raises(LibraryError, match="has no dense change"):
        lib.diff("a0", "a4")


def test_diff_by_hand(base, tmp_path):
    """D = e1 e1^T and E = e1 (e1 + e2)^T / sqrt 2 at one site: cosine 1/sqrt 2, the same columns, half of the rows."""
    lib = Library(tmp_path)
    for seed, row in ((0, [1.0, 0.0]), (1, [0.5**0.5, 0.5**0.5])):
        adapter = make(base, seed, pt.LoRA(rank=1, alpha=1.0))
        (patch,) = adapter.patches.values()
        with torch.no_grad():
            patch.A.zero_()[0, :2] = torch.tensor(row)
            patch.B.zero_()[0, 0] = 1.0
        lib.add(adapter)
    found = lib.diff("a0", "a1").whole
    assert (found.cosine, found.columns, found.rows) == pytest.approx((0.5**0.5, 1.0, 0.5), abs=1e-6)


def test_the_family(lib, tmp_path):
    lib.remove("a1")
    found = lib.graph()
    names = [node.name for node in found.nodes]
    assert {(names[a], names[b]) for a, b in found.edges} == {("a0", "a2"), ("a1", "a2")}
    assert {n.name: (n.level, n.state) for n in found.nodes} == {
        "a0": (0, "there"),
        "a1": (0, "removed"),
        "a2": (1, "there"),
    }
    assert str(found) == "a0 (lora)\n  a2 (lora)\na1 (lora,removed)\n  a2 (lora)"
    lib.gc()
    assert [n.state for n in lib.graph().nodes] == ["unknown", "there", "there"]
    from PIL import Image

    from polytask.report.family import draw

    with Image.open(draw(found.as_dict(), tmp_path / "f.png")) as image:
        assert len(set(image.convert("RGB").getdata())) > 10
    text = draw(found.as_dict(), tmp_path / "f.svg").read_text()
    assert all(f">{name}<" in text for name in names) and "var(" not in text
    with pytest.raises(ConfigError, match="ends in .gif"):
        draw(found.as_dict(), tmp_path / "f.gif")


# Signatures


def test_sketches_stand_to_each_other_as_the_changes_do(base, tmp_path):
    lib = Library(tmp_path)
    first, other = make(base, 0, sites="linear"), make(base, 1, sites="linear")
    near = first.copy("near")
    with torch.no_grad():
        for own, far in zip(near.parameters(), other.parameters(), strict=True):
            own.add_(far, alpha=0.5)
    for adapter in (first, other, near):
        lib.add(adapter)
    sketch = {name: found[""] for name, found in lib.signatures("sketch").items()}
    for one, two in (("a0", "a1"), ("a0", "near"), ("a1", "near")):
        assert torch.cosine_similarity(sketch[one], sketch[two], 0) == pytest.approx(
            lib.diff(one, two).whole.cosine, abs=0.2
        )
    assert lib.diff("a0", "near").whole.cosine > 0.4
    assert sketch["a0"].norm() ** 2 == pytest.approx(
        sum(p.delta().square().sum().item() for p in first.patches.values()), rel=0.3
    )
    kind = signatures.make("sketch")
    again, _ = kind.sign(Subject(first))
    assert torch.equal(again[""], sketch["a0"])
    dense = make(base, 5, pt.Form.of("full"), sites="linear")
    with torch.no_grad():
        for name, patch in dense.patches.items():
            patch.get_parameter("weight" if "weight" in patch._parameters else next(iter(patch._parameters))).copy_(
                first.patches[name].delta()
            )
    torch.testing.assert_close(kind.sign(Subject(dense))[0][""], sketch["a0"], rtol=1e-3, atol=1e-4)


def test_texts_of_like_tasks_are_near(base, tmp_path):
    lib = Library(tmp_path)
    said = {"movie-reviews": ["good", "bad"], "film-reviews": ["bad", "good"], "planets": ["mars"]}
    for seed, (name, labels) in enumerate(said.items()):
        lib.add(make(base, seed, tasks=[{"name": name, "labels": labels}]))
    found = torch.stack([tensors[""] for tensors in lib.signatures("text").values()])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    near = found @ found.T
    assert near[0, 1] > 0.5 > near[0, 2] and lib.about("a2", "text") == {
        "adapter": lib.hashes["a2"], "by": "words 256", "text": "planets. mars",
    }  # fmt: skip

    def embed(texts):
        return [[float(len(text)), 0.0] for text in texts]

    own = Library(tmp_path / "own", embed=embed)
    own.add(make(base, 0, tasks=[{"name": "x"}]))
    own.add(make(base, 1))
    assert own.signature("a0", "text")[""].tolist() == [1.0, 0.0] and own.about("a0", "text")["by"] == "embed"
    assert own.signature("a1", "text") is None and own.about("a1", "text") is None


def test_centroids_are_masked_means_of_the_base(minilm_tokenizer, tmp_path):
    model = tiny_bert(minilm_tokenizer)
    task = colours(60)
    task.train[3] = pt.Example(("blue",), "blue")  # batches with padding
    lib = Library(tmp_path, model)
    lib.add(make(model, 0), data=task)
    found = lib.signature("a0", "data")
    sums: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for example in task.train:  # one by one there is no padding
            one = minilm_tokenizer(example.inputs[0], return_tensors="pt")
            for i, states in enumerate(model.module(**one, output_hidden_states=True).hidden_states[1:]):
                sums[i] = sums.get(i, 0) + states.mean(1)
    for i, total in sums.items():
        torch.testing.assert_close(found[f"encoder.layer.{i}"], total / len(task.train), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[""], sums[1] / len(task.train), rtol=1e-4, atol=1e-5)
    assert lib.about("a0", "data")["tasks"] == [{"task": "colours", "hash": task.hash, "examples": 30}]
    lib.add(make(model, 1))
    assert lib.signature("a1", "data") is None and not model.attached


def test_centroids_are_of_texts_as_the_adapter_read_them(minilm_tokenizer, decoder):
    """Of a text its first tokens, of a prompt its last."""

    def signed(model, text, **schedule):
        adapter = make(model, 0)
        adapter.card.training["stage"] = {"schedule": schedule}
        task = pt.Task("words", "classify", [pt.Example((text,), "a"), pt.Example((text,), "b")], [], [])
        return signatures.make("data").sign(Subject(adapter, model, [task]))[0]

    short = "red blue green"
    for model, long in ((tiny_bert(minilm_tokenizer), f"{short} black white"), (decoder, f"black white {short}")):
        batch = inputs_of(model, colours(4), [pt.Example((short,), "a")])
        cut, wanted = signed(model, long, longest=batch["input_ids"].shape[1]), signed(model, short)
        assert not torch.allclose(signed(model, long)[""], wanted[""])
        for name, tensor in cut.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq", "image"])
def test_centroids_do_not_depend_on_the_batch(request, kind):
    """One example at a time there is no padding."""
    if kind == "image":
        model = pt.Model(tiny("vit")[0], name="vit")
        side = model.module.config.image_size
        pixels = torch.randint(0, 256, (6, side, side, 3), dtype=torch.uint8).numpy()
        task = pt.Task.from_arrays("noise", pixels, ["a", "b"] * 3, ["train"] * 6)
    else:
        model, task = request.getfixturevalue(kind), colours(16)
        task.train[1] = pt.Example(("blue",), "blue")
    subject = Subject(pt.Adapter.new(model), model, [task])
    whole, single = (signatures.make({"name": "data", "batch_size": size}).sign(subject)[0] for size in (16, 1))
    blocks = [site.name for site in model.sites if site.kind == "block" and "decoder.block" not in site.name]
    assert set(whole) == {"", *blocks} and blocks
    for name, tensor in whole.items():
        assert tensor.shape == (1, model.width)
        torch.testing.assert_close(tensor, single[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "sites"), [("gpt2", "c_attn | wte"), ("resnet", "kind:conv"), ("bert", "linear")])
def test_thin_factors_are_the_change(family, sites):
    adapter = pt.Adapter.new(pt.Model(tiny(family)[0]), pt.LoRA(rank=2, init="random"), sites)
    for patch in adapter.patches.values():
        delta = patch.delta()
        turned = delta.T if patch.site.kind == "embedding" or patch.site.transposed else delta.flatten(1)
        B, A = patch.thin()
        torch.testing.assert_close(B @ A, turned)


def test_a_signature_of_ones_own_is_kept(lib):
    tensors = {"encoder.layer.0": torch.randn(3, 4), "": torch.arange(2)}
    lib.sign("a0", "own", tensors, {"data": "abc"})
    again = Library(lib.root)
    assert all(torch.equal(again.signature("a0", "own")[k], v) for k, v in tensors.items())
    assert again.about("a0", "own") == {"data": "abc", "adapter": lib.hashes["a0"]}
    assert again.signature("a1", "own") is None and list(again.signatures("own")) == ["a0"]
    assert [e.name for e in again.find("signature:own")] == ["a0"]
    lib.sign("a0", "own", {"": torch.ones(1)})
    assert again.signature("a0", "own")[""].tolist() == [1.0] and "own" in again.show("a0").signatures
    for kind in ("", "a/b", ".."):
        with pytest.raises(LibraryError, match="cannot be a kind"):
            lib.sign("a0", kind, tensors)
    with pytest.raises(LibraryError, match="has no adapter 'b0'"):
        lib.sign("b0", "own", tensors)
    clean(lib.root)


# The commands


def test_the_commands(base, run, tmp_path):
    for seed in (0, 1):
        make(base, seed, metrics={"dev/mood": seed / 2}).save(tmp_path / "made" / f"a{seed}")
    shelf = tmp_path / "shelf"
    assert run("library", "add", shelf, tmp_path / "made" / "a0", "--name", "first", "--tag", "x")[0] == 0
    assert run("library", "import", shelf, tmp_path / "made")[0] == 0
    assert run("library", "tag", shelf, "a1", "fresh")[0] == 0
    code, out, _ = run("library", "find", shelf, "tag:fresh & score>0.4", "--json")
    assert code == 0 and [e["name"] for e in json.loads(out)] == ["a1"]
    assert [e["name"] for e in json.loads(run("library", "list", shelf, "--json")[1])] == ["a0", "a1", "first"]
    assert json.loads(run("library", "show", shelf, "a1", "--json")[1])["tags"] == ["fresh"]
    assert json.loads(run("library", "diff", shelf, "a0", "first", "--json")[1])["whole"]["cosine"] == pytest.approx(1)
    assert "cosine" in run("library", "diff", shelf, "a0", "a1")[1]
    assert run("library", "graph", shelf, "--out", tmp_path / "g.svg")[0] == 0 and (tmp_path / "g.svg").is_file()
    assert run("library", "export", shelf, "a1", tmp_path / "out")[0] == 0 and pt.Adapter.load(tmp_path / "out")
    assert run("library", "remove", shelf, "a0")[0] == 0 and run("library", "restore", shelf, "a0")[0] == 0
    assert run("library", "remove", shelf, "a0")[0] == 0 and "a0" in run("library", "gc", shelf)[1]
    assert run("library", "check", shelf)[:2] == (0, "all is as it should be\n")
    for end in ("", "-wal", "-shm"):
        (shelf / (INDEX + end)).unlink(missing_ok=True)
    (shelf / INDEX).write_text("nothing")
    assert run("library", "check", shelf)[0] == 1 and (shelf / INDEX).read_text() == "nothing"
    assert run("library", "check", shelf, "--repair")[0] == 0 and run("library", "check", shelf)[0] == 0
    code, _, err = run("library", "find", shelf, "taks:x")
    assert code == 2 and "did you mean 'task'" in err
    code, _, err = run("library", "show", shelf, "b1")
    assert code == 1 and "did you mean 'a1'" in err
    assert run("library", "list", tmp_path / "none")[0] == 2 and not (tmp_path / "none").exists()


def test_every_command_of_the_page_is_understood(run):
    page = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^polytask library (\w+)", page, re.M))
    from polytask.cli.library import library

    assert said == {c.name or c.callback.__name__ for c in library.registered_commands}


def test_what_routers_need_is_made_when_an_adapter_comes(encoder, tmp_path):
    """Arrow's directions from the weights, PHATGOOSE's gates from one task; the mixes made of them need no data."""
    task = colours(name="a")
    form = {"name": "lora", "rank": 2, "init": "random"}
    adapter = pt.Adapter.new(encoder, form, "layer==0 & role:query", name="a").trainable(False)
    with pt.Library(tmp_path / "lib", encoder) as lib:
        lib.add(adapter, "a", data=task)
        assert {"arrow", "phatgoose", "sketch"} <= set(lib.show("a").signatures)
        arrow, gates = lib.signature("a", "arrow"), lib.signature("a", "phatgoose")
        for router, kept in (("arrow", arrow), ("phatgoose", gates)):
            mix = pt.route(lib, router)
            for site, gate in mix.gates.items():
                torch.testing.assert_close(gate.v[0] / gate.v[0].norm(), _scaled(kept[site], router))
            mix.detach(encoder)
        again = pt.route(lib, "phatgoose", data=task)  # as it would be made now: not made again
        assert lib.about("a", "phatgoose")["task"] == task.hash and again.names() == ("a",)
    with pt.Library(tmp_path / "few", encoder, signatures=["sketch"]) as few:
        few.add(adapter, "a", data=task)
        assert few.show("a").signatures == ("sketch",)
    with pytest.raises(ConfigError, match="sketch"):
        pt.Library(tmp_path / "other", signatures=["sketches"])


def _scaled(v, router):
    v = v - v.mean() if router == "phatgoose" else v
    return v / v.norm()
