"""Forms that learn from more than the answers: from teachers, and from which task a row is of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import colours

import polytask as pt
from polytask.core.errors import AdapterError, ConfigError
from polytask.core.head import Seen, collate
from polytask.forms import _retriever
from polytask.forms._teacher import apart

QUICK = {"epochs": 2, "batch_size": 4, "lr": 1e-2, "progress": False, "precision": "fp32", "head_start": "random"}


def same(a, b):
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def as_teacher(model, student, task, name):
    """A prompt that says exactly what an MPT says of a task, with the same head."""
    (patch,) = student.patches.values()
    teacher = pt.Adapter.new(model, pt.Prompt(length=student.form.length), name=name)
    teacher.load_state({n: patch.prompt(student.form.tasks.index(task)).detach().clone() for n in teacher.state()})
    teacher.heads = {t: h for t, h in student.copy().heads.items() if t == task}
    return teacher


def seen_of(model, student, task, name="student"):
    """What a step sees of a few rows."""
    head = student.heads[task.name]
    rows = head.rows(model, task.train[:5])
    seen = Seen(model, name, student, task.name, rows, None)
    with model.using(name, tasks=task.name):
        out = head.run(model, seen.batch)
    return dataclasses.replace(seen, out=out)


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_a_teacher_who_says_the_same_teaches_nothing(base, request):
    model = request.getfixturevalue(base)
    task = colours()
    student = pt.learn(model, task, form=pt.MPT(length=3, tasks=(task.name,)), **QUICK)
    model.attach(student, "student")
    model.attach(as_teacher(model, student, task.name, "twin"), "twin")
    assert apart(seen_of(model, student, task), "twin").abs().max() < 1e-5
    other = as_teacher(model, student, task.name, "other")
    with torch.no_grad():
        for parameter in other.patches[next(iter(other.patches))].parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.attach(other, "other")
    distances = apart(seen_of(model, student, task), "other")
    assert distances.shape == (5,) and (distances > 1e-6).all()


def test_what_a_teacher_adds_by_hand(encoder):
    task = colours()
    student = pt.learn(encoder, task, form=pt.MPT(length=3, tasks=(task.name,)), **QUICK)
    teacher = pt.learn(encoder, task, form=pt.Prompt(length=2), seed=3, **QUICK)
    encoder.attach(student, "student")
    encoder.attach(teacher, "teacher")
    seen = seen_of(encoder, student, task)
    with torch.no_grad(), encoder.using("teacher"):
        h = seen.head.run(encoder, seen.batch)
        p = teacher.heads[task.name].linear(h).softmax(1)
        q = student.heads[task.name].linear(seen.out).softmax(1)
        wanted = (p * (p / q).log()).sum(1) + (h - seen.out).square().mean(1)
    assert torch.allclose(apart(seen, "teacher"), wanted, atol=1e-5)
    form = pt.MPT(length=3, tasks=(task.name,), teachers=("teacher",), distil=0.5)
    values = torch.arange(5.0)
    assert torch.allclose(form.loss(seen, values), values + 0.5 * wanted, atol=1e-5)
    assert form.loss(dataclasses.replace(seen, task="another"), values) is values


def test_lambda_0_is_learning_without_teachers_and_more_brings_the_student_nearer(encoder, tmp_path):
    tasks = [colours(40, "one"), colours(40, "two", 200)]
    names = tuple(task.name for task in tasks)
    folders = []
    for number, task in enumerate(tasks):
        made = pt.learn(encoder, task, form=pt.Prompt(length=3), seed=number + 5, **QUICK)
        folders.append(str(made.save(tmp_path / task.name)))
    plain = pt.learn(encoder, tasks, form=pt.MPT(length=3, tasks=names), joint=True, **QUICK)
    none = pt.learn(
        encoder, tasks, form=pt.MPT(length=3, tasks=names, teachers=tuple(folders), distil=0.0), joint=True, **QUICK
    )
    assert same(plain, none) and not encoder.attached
    assert (
        none.form.teachers == ()
        and len(none.card.parents) == 2
        and none.form == dataclasses.replace(plain.form, distil=0.0)
    )
    form = pt.MPT(length=3, tasks=names, teachers=tuple(folders), distil=5.0)
    taught = pt.learn(encoder, tasks, form=form, joint=True, **QUICK)
    assert not encoder.attached
    for name, folder in zip(names, folders, strict=True):
        encoder.attach(pt.Adapter.load(folder), f"teacher {name}")

    def distance(adapter):
        encoder.attach(adapter, "student")
        with torch.no_grad():
            found = [apart(seen_of(encoder, adapter, task), f"teacher {task.name}").mean() for task in tasks]
        encoder.detach("student")
        return float(sum(found))

    assert distance(taught) < distance(plain)


def test_a_decoder_learns_from_teachers(decoder, tmp_path):
    task = colours(12, "one")
    made = pt.learn(decoder, task, form=pt.Prompt(length=3), seed=5, **QUICK)
    decoder.attach(made, "teacher")
    form = pt.MPT(length=3, tasks=("one",), teachers=("teacher",))
    taught = pt.learn(decoder, task, form=form, **QUICK)
    assert decoder.attached == ("teacher",) and taught.form.teachers == ()
    assert not same(taught, pt.learn(decoder, task, form=pt.MPT(length=3, tasks=("one",)), **QUICK))


def test_wrong_teachers_are_refused_by_name(encoder, decoder):
    task = colours()
    with pytest.raises(ConfigError, match="1 teachers .*for 2 tasks"):
        pt.MPT(tasks=("a", "b"), teachers=("t",))
    form = pt.MPT(length=3, tasks=(task.name,), teachers=("nobody",))
    with pytest.raises(AdapterError, match="'nobody' is neither a folder nor attached"):
        pt.learn(encoder, task, form=form, **QUICK)
    encoder.attach(pt.Adapter.new(encoder, pt.Prompt(length=3)), "headless")
    form = dataclasses.replace(form, teachers=("headless",))
    with pytest.raises(AdapterError, match="'headless' cannot teach the task 'colours'"):
        pt.learn(encoder, task, form=form, **QUICK)
    assert encoder.attached == ("headless",)


def test_a_teacher_for_another_base_is_refused(encoder, decoder, tmp_path):
    folder = pt.Adapter.new(decoder, pt.Prompt(length=3), name="far").save(tmp_path / "far")
    form = pt.MPT(length=3, tasks=("colours",), teachers=(str(folder),))
    with pytest.raises(AdapterError, match="far.*was made for the base"):
        pt.learn(encoder, colours(), form=form, **QUICK)


def test_a_new_task_starts_from_the_mean_of_the_factors(encoder):
    student = pt.Adapter.new(encoder, pt.MPT(length=3, tasks=("a", "b")))
    (own,) = student.patches.values()
    with torch.no_grad():
        own.u.copy_(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
        own.v[0] += 1.0
    start = pt.MPT.target(student, "colours", task_lr=0.1)
    (new,) = start.patches.values()
    assert torch.equal(new.P, own.P) and torch.equal(new.u, torch.full((1, 3), 2.0))
    assert torch.allclose(new.v, torch.full_like(new.v, 1.5))
    assert start.form.tasks == ("colours",) and start.card.parents == [student.hash]
    with pytest.raises(AdapterError, match="MPT.target takes 'mpt'"):
        pt.MPT.target(pt.Adapter.new(encoder, "lora"), "x")
    # AdamW's first step moves each number by its own rate
    one = pt.learn(encoder, colours(), start=start, **{**QUICK, "epochs": 0.1, "schedule": "constant", "warmup": 0.0})
    (after,) = one.patches.values()
    assert one.form.task_lr == 0.1
    moved = {n: (getattr(after, n) - getattr(new, n)).abs().max() for n in "Puv"}
    assert moved["P"] == pytest.approx(1e-2, rel=0.05) and moved["u"] == pytest.approx(1e-3, rel=0.05)


def test_teachers_from_the_command_line(run, base, data, tmp_path):
    for name in ("one", "two"):
        code, _, err = run("learn", data / name, "--base", base, "--form", "prompt:length=2", "--epochs", 1, "--out",
                           tmp_path / name)  # fmt: skip
        assert code == 0, err
    form = f"mpt:length=2,tasks=[one,two],teachers=[{tmp_path / 'one' / 'one'},{tmp_path / 'two' / 'two'}],distil=0.5"
    code, _, err = run(
        "learn", data, "--base", base, "--joint", "--form", form, "--epochs", 1, "--out", tmp_path / "all"
    )
    assert code == 0, err
    found = next((tmp_path / "all").rglob("adapter_config.json")).parent
    assert pt.Adapter.load(found).form == pt.MPT(length=2, tasks=("one", "two"), distil=0.5)


# Which task a row is of


def plain_instances(r, task, temperature):
    unit = r / r.norm(dim=1, keepdim=True)
    found = []
    for i in range(len(r)):
        alike = [j for j in range(len(r)) if j != i and task[j] == task[i]]
        if alike:
            scores = [float(unit[i] @ unit[j]) / temperature for j in range(len(r)) if j != i]
            below = torch.tensor(scores, dtype=torch.float64).exp().sum().log()
            found.append(sum(below - float(unit[i] @ unit[j]) / temperature for j in alike) / len(alike))
    return sum(found) / len(found)


def plain_prototypes(r, z, task, temperature, exclude):
    found = []
    for i in range(len(r)):
        scores = [float(torch.cosine_similarity(r[i], z[t], dim=0)) / temperature for t in range(len(z))]
        below = [s for t, s in enumerate(scores) if not (exclude and t == task[i])]
        found.append(torch.tensor(below, dtype=torch.float64).exp().sum().log() - scores[task[i]])
    return sum(found) / len(found)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_losses_against_a_plain_loop(temperature):
    generator = torch.Generator().manual_seed(0)
    r, z = torch.randn(7, 5, generator=generator), torch.randn(4, 5, generator=generator)
    task = torch.tensor([0, 1, 0, 3, 3, 0, 1])
    found = _retriever.instances(r, task, temperature)
    assert float(found) == pytest.approx(float(plain_instances(r, task, temperature)), rel=1e-4)
    for exclude in (True, False):
        found = _retriever.prototypes(r, z, task, temperature, exclude)
        assert float(found) == pytest.approx(float(plain_prototypes(r, z, task, temperature, exclude)), rel=1e-4)


def test_contrastive_losses_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    r, task = torch.tensor([[3.0, 0.0]]), torch.tensor([0])  # cosines of 1 and 0
    assert 0.1 * float(_retriever.prototypes(r, z, task, 0.1)) == pytest.approx(-1.0)
    with_own = float(_retriever.prototypes(r, z, task, 0.1, exclude=False))
    assert with_own == pytest.approx(4.54e-5, rel=1e-2)  # log(1 + exp(-10))
    alone = torch.randn(2, 3, requires_grad=True)
    loss = _retriever.instances(alone, torch.tensor([0, 1]), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not alone.grad.any()  # nobody to compare with, and no nan


def apart_by_words():
    """Two tasks whose texts share no word."""
    made = []
    for name, words in (("cars", ["engine", "wheel", "road"]), ("birds", ["feather", "wing", "nest"])):
        rows = [
            pt.Example((f"{words[i % 3]} {words[(i // 3) % 3]} {words[i % 2]}",), "ab"[i % 2], where=f"{name}:{i}")
            for i in range(36)
        ]
        made.append(pt.Task(name=name, kind="classify", train=rows[:24], dev=[], test=rows[24:], labels=("a", "b")))
    return made


@pytest.mark.parametrize("exclude", [True, False])
def test_the_nearest_prototype_is_of_the_right_task(encoder, exclude, tmp_path):
    tasks = apart_by_words()
    form = pt.Hyper(rank=2, tasks=("cars", "birds"), retriever=16, embedding=8, hidden=8, contrast=1.0, exclude=exclude)
    quick = {**QUICK, "epochs": 5, "batch_size": 8}
    adapter = pt.learn(encoder, tasks, form=form, sites="query", joint=True, **quick)
    adapter.save(tmp_path / "a")
    again = pt.Adapter.load(tmp_path / "a")
    assert again.hash == adapter.hash
    for task in tasks:
        head = adapter.heads[task.name]
        batch = collate(encoder, head, head.rows(encoder, task.test))
        for made in (adapter, again):
            found = pt.Hyper.retrieve(encoder, made, batch)
            assert found.count(task.name) >= 0.9 * len(found)
    # a new task starts from the nearest prototype
    new = dataclasses.replace(tasks[1], name="nests")
    grown, near = pt.Hyper.extend(encoder, adapter, new)
    assert near == "birds" and grown.form.tasks == ("cars", "birds", "nests")
    assert torch.equal(grown.shared.prototypes[2], adapter.shared.prototypes[1])
    encoder.attach(adapter, "a")
    encoder.attach(grown, "g")
    batch = collate(encoder, adapter.heads["birds"], adapter.heads["birds"].rows(encoder, new.test))
    with torch.no_grad():
        with encoder.using("a", tasks="birds"):
            wanted = encoder.features(batch)
        with encoder.using("g", tasks="nests"):
            assert torch.equal(encoder.features(batch), wanted)
    encoder.detach()
    further = pt.learn(encoder, new, start=grown, **QUICK)
    assert not torch.equal(further.shared.prototypes[2], grown.shared.prototypes[2])


@pytest.mark.parametrize("base", ["decoder", "seq2seq"])
def test_inputs_are_described_without_their_answers(base, request):
    model = request.getfixturevalue(base)
    words, other = colours(8), colours(8)
    other = dataclasses.replace(other, train=[dataclasses.replace(e, target="blue") for e in other.train])
    form = pt.Hyper(rank=2, tasks=("colours", "x"), retriever=8)
    adapter = pt.learn(model, words, form=form, **QUICK)
    head = adapter.heads["colours"]
    seen = [_retriever.described(model, collate(model, head, head.rows(model, t.train))) for t in (words, other)]
    assert torch.allclose(*seen, atol=1e-5) and seen[0].shape == (len(words.train), model.width)


def test_a_task_that_is_told_is_as_without_a_retriever(encoder):
    tasks = apart_by_words()
    settings = {"rank": 2, "tasks": ("cars", "birds"), "embedding": 8}
    plain = pt.learn(encoder, tasks, form=pt.Hyper(**settings), sites="query", joint=True, **QUICK)
    none = pt.learn(
        encoder, tasks, form=pt.Hyper(**settings, retriever=16, contrast=0.0), sites="query", joint=True, **QUICK
    )
    with_it = dict(none.named_parameters())
    assert all(torch.equal(with_it[name], value) for name, value in plain.named_parameters())
    some = pt.learn(encoder, tasks, form=pt.Hyper(**settings, retriever=16), sites="query", joint=True, **QUICK)
    assert not torch.equal(some.shared.prototypes, plain.shared.prototypes)


def test_what_a_retriever_needs(encoder):
    with pytest.raises(ConfigError, match="at least two tasks"):
        pt.Hyper(retriever=16, tasks=("one",))
    with pytest.raises(ConfigError, match="temperature positive"):
        pt.Hyper(temperature=0.0)
    with pytest.raises(AdapterError, match="no retriever"):
        pt.Hyper.retrieve(encoder, pt.Adapter.new(encoder, pt.Hyper()), {})
    known = pt.Adapter.new(encoder, pt.Hyper(tasks=("cars", "birds"), retriever=4))
    with pytest.raises(AdapterError, match="of the task 'cars' already"):
        pt.Hyper.extend(encoder, known, apart_by_words()[0])
