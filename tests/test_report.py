"""The report: what it says, that it needs nothing else, and that odd tables do not break it."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask import report
from polytask.core.errors import DataError, StorageError
from polytask.report import Comparison, headline, pictures, ranks_words, render
from polytask.report.pictures import PAINT, fit, lines, rank_rows, width

TASKS: dict[str, tuple[list[str], str]] = {
    "helpdesk-intent": (
        ["account", "billing", "bug", "cancel", "delivery", "feature", "how-to", "praise"],
        "Messages that people send to an IT or customer help desk, each with what the sender wants.",
    ),
    "helpdesk-urgency": (
        ["high", "low", "medium"],
        "Messages to a help desk, each with its urgency as judged by the impact and not by the tone.",
    ),
    "review-sentiment": (
        ["mixed", "negative", "positive"],
        "Short product reviews, some of them ironic or faint in their praise.",
    ),
    "question-type": (
        ["date", "definition", "number", "person", "place", "procedure", "reason", "yes-no"],
        "Everyday questions and requests for information, many without an obvious question word.",
    ),
    "commit-type": (
        ["build", "docs", "feature", "fix", "performance", "refactor", "test"],
        "First lines of software commit messages, each with the kind of change.",
    ),
    "pair-entailment": (
        ["contradiction", "entailment", "neutral"],
        "Pairs of sentences about everyday scenes and simple facts.",
    ),
}
SCORES = {
    "majority": [0.125, 0.35, 0.4, 0.138, 0.15, 0.338],
    "base + probe": [0.762, 0.55, 0.7, 0.788, 0.525, 0.4],
    "adapter per task": [0.875, 0.663, 0.838, 0.9, 0.775, 0.512],
    "joint": [0.863, 0.65, 0.825, 0.913, 0.738, 0.475],
    "average of adapters": [0.775, 0.588, 0.725, 0.813, 0.6, 0.388],
}
WHAT = {
    "majority": "The commonest training answer, always.",
    "base + probe": "A linear classifier on the frozen features of the bare base.",
    "adapter per task": "One LoRA adapter and one head per task.",
    "joint": "One LoRA adapter for all tasks, one head per task, trained on their mixture.",
    "average of adapters": "The mean of the adapters' weights, with a probe on its features.",
}


def fake() -> dict[str, Any]:
    """What `polytask compare` writes for six small tasks, with the numbers made up."""
    names = list(TASKS)
    rows = []
    for method, values in SCORES.items():
        for task, value in zip(names, values, strict=True):
            half = round(1.96 * (value * (1 - value) / 80) ** 0.5, 4)
            row = {"method": method, "task": task, "metric": "accuracy", "value": value, "n": 80, "note": ""}
            rows.append(row | {"low": max(0.0, value - half), "high": min(1.0, value + half)})
    costs: dict[str, list[Any]] = {
        "trained_parameters": [0, 12_314, 6 * 98_304 + 12_314, 98_304 + 12_314, 12_314],
        "bytes": [None, 49_664, 2_412_018, 442_880, 442_880],
        "seconds": [0.01, 4.2, 143.2, 96.0, 6.1],
        "peak_mb": [None, 412.0, 1180.0, 1204.0, 412.0],
        "forgot": [None, 0.0, -0.043, -0.061, -0.012],
    }
    methods = []
    for place, (method, values) in enumerate(SCORES.items()):
        entry = {"method": method, "what": WHAT[method], "average": sum(values) / 6, "worst": min(values), "note": ""}
        methods.append(entry | {key: column[place] for key, column in costs.items()})
    base = SCORES["base + probe"]
    gain = [[0.11 if i == j else ((i * 7 + j * 5) % 9 - 6) / 80 for j in range(6)] for i in range(6)]
    values = [[round(b + g, 4) for b, g in zip(base, row, strict=True)] for row in gain]
    both = list(zip(names, [-0.031, -0.022, -0.05, -0.044, -0.084, -0.027], strict=True))
    return {
        "base": {"name": "minilm", "kind": "encoder", "parameters": 22_713_216, "fingerprint": "0319e2a7c4d85b10"},
        "tasks": [
            {"name": name, "kind": "classify", "metric": "accuracy", "labels": labels, "train": 180, "dev": 40}
            | {"test": 80, "description": text}
            for name, (labels, text) in TASKS.items()
        ],
        "rows": rows,
        "methods": methods,
        "cross": {
            "measure": "Accuracy of a linear probe on the frozen features of the base with one adapter.",
            "adapters": names,
            "tasks": names,
            "values": values,
            "base": base,
        },
        "forgetting": {
            "measure": "Share of masked words that the base fills in correctly, on 500 sentences of its own kind.",
            "rows": [{"adapter": n, "before": 0.612, "after": 0.612 + c, "change": c} for n, c in both],
        },
        "settings": {
            "seed": 0,
            "precision": "bf16",
            "seconds": 249.5,
            "versions": {"polytask": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "device": "cpu",
            "created": "2026-11-21",
        },
    }


def large() -> dict[str, Any]:
    """Twenty tasks of several metrics, eight methods, long and foreign names, and holes."""
    odd = ["中文情感分类任务", "задача <b>&amp; вопросы", "a" * 70, "cost in $ and $x^2$", "مهمة التصنيف", "pro & con"]
    names = [*odd, *(f"natural_instructions/task{i:04d}_long_descriptive_name_of_a_task_{i}" for i in range(14))]
    metrics = ["perplexity" if i % 7 == 3 else "pearson" if i % 7 == 5 else "accuracy" for i in range(20)]
    methods = [*SCORES, "routed by <router> & co", "sparse task arithmetic with trimmed and elected signs", "平均"]
    rows = []
    for m, method in enumerate(methods):
        for t, name in enumerate(names):
            value = ((m * 3 + t * 5) % 17) / 18 - 0.1 * (t % 7 == 5)
            value = 18.0 + t - m * 1.3 if metrics[t] == "perplexity" else value
            row = {"method": method, "task": name, "metric": metrics[t], "value": value, "low": value - 0.05, "n": 80}
            if (m + t) % 11 == 0:
                row |= {"value": None, "low": None, "note": "the base has no <head> for this & cannot answer"}
            rows.append(row | {"high": None if row["value"] is None else value + 0.06})
    cross = {"measure": "", "adapters": names, "tasks": names, "base": [0.5] * 19 + [None]}
    change = [[((i * 3 + j) % 9 - 4) / 20 for j in range(20)] for i in range(20)]
    cross["values"] = [[0.5 + c if (i + j) % 13 else None for j, c in enumerate(row)] for i, row in enumerate(change)]
    both = zip(names, metrics, strict=True)
    tasks = [{"name": name, "kind": "classify", "metric": metric, "labels": names * 3} for name, metric in both]
    return {"base": {"name": "<big> & 大"}, "tasks": tasks, "rows": rows, "cross": cross}


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps texts, tables, ids, links and pictures' alternative texts."""

    VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.seen.add(tag)
        self.attributes |= values.keys()
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[k] for k in ("href", "xlink:href", "src") if k in values]
        self.alts += [values["aria-label"]] if values.get("role") == "img" else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
            if "td" in self.open or "th" in self.open:
                self.tables[-1][-1][-1] += data


def row(
    method: str, task: str, value: float | None, half: float | None = 0.05, metric: str = "accuracy"
) -> dict[str, Any]:
    ends = {} if half is None or value is None else {"low": value - half, "high": value + half}
    return {"method": method, "task": task, "metric": metric, "value": value, "n": 80} | ends


def said(*rows: dict[str, Any]) -> str:
    return " ".join(headline(Comparison.read({"rows": list(rows)})))


@pytest.fixture(scope="module")
def page() -> str:
    return render(fake())


@pytest.fixture(scope="module")
def large_page() -> str:
    return render(large())


def test_page_needs_nothing_from_elsewhere(page: str) -> None:
    parsed = Page(page)
    assert parsed.links and all(link.startswith("#") for link in parsed.links)
    assert not parsed.seen & {"script", "link", "iframe", "img", "object"}
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page and re.findall(r"url\([^#]", page) == []


def test_ids_are_unique_and_every_link_has_its_target(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)


def test_parts_come_in_order(page: str) -> None:
    order = ["scores", "cost", "cross", "forgetting", "tasks", "reading", "settings"]
    assert re.findall(r'<h2 id="([a-z]+)"', page) == order


def test_headline_of_the_fake_table() -> None:
    assert headline(Comparison.read(fake())) == [
        "\u201cadapter per task\u201d is best on average over 6 tasks: 0.761, 0.140 above the bare base (0.621).",
        "Against the bare base it is clearly better on commit-type; on helpdesk-intent, helpdesk-urgency, "
        "review-sentiment, question-type and pair-entailment the two 95% intervals overlap, so the difference is not clear.",
        "Next comes \u201cjoint\u201d with 0.744; the intervals overlap on every task, "
        "so which of the two is better is not clear.",
    ]


def test_headline_says_where_it_is_worse_and_when_nothing_helps() -> None:
    text = said(row("base", "a", 0.5), row("base", "b", 0.8), row("new", "a", 0.9), row("new", "b", 0.6))
    assert "clearly better on a and clearly worse on b." in text
    text = said(row("base", "a", 0.9), row("new", "a", 0.6))
    assert "Nothing that was learned beats the bare base" in text and "Next comes \u201cnew\u201d with 0.600." in text


def test_headline_without_base_without_intervals_and_without_scores() -> None:
    assert said(row("x", "a", 0.7)) == "\u201cx\u201d is best on a: 0.700."
    assert "Without intervals" in said(row("base", "a", 0.5, None), row("x", "a", 0.7, None))
    assert said(row("x", "a", None)) == "No method has a score on any task."


def test_a_method_that_cannot_do_every_task_does_not_win_by_its_easy_ones() -> None:
    rows = [row("half", "a", 0.99), row("half", "b", None), row("whole", "a", 0.8), row("whole", "b", 0.4)]
    assert Comparison.read({"rows": rows}).ranking == ["whole"]
    assert "of 1 tasks" in Page(render({"rows": rows})).text


def test_lower_perplexity_is_better() -> None:
    rows = [row("base", "a", 20.0, 1.0, "perplexity"), row("tuned", "a", 11.0, 1.0, "perplexity")]
    data = Comparison.read({"rows": rows})
    assert data.ranking == ["tuned", "base"] and data.best(data.tasks[0]) == {"tuned"}
    assert data.worst("tuned") == (11.0, "a")
    assert "clearly better on a" in " ".join(headline(data)) and "9.000 below the bare base" in headline(data)[0]


def test_metrics_of_two_directions_have_no_average() -> None:
    rows = [
        row(m, t, v, 0.01, k)
        for m, t, v, k in [
            ("base", "a", 0.5, "accuracy"),
            ("base", "b", 30.0, "perplexity"),
            ("new", "a", 0.6, "accuracy"),
            ("new", "b", 20.0, "perplexity"),
        ]
    ]
    data = Comparison.read({"rows": rows})
    assert data.average("new") is None and data.worst("new") is None and data.ranking == ["new", "base"]
    assert headline(data)[0].startswith("\u201cnew\u201d is best on 2 of 2 tasks")


@pytest.mark.parametrize(
    "metric, lower",
    [
        ("perplexity", True),
        ("dev_loss", True),
        ("WER", True),
        ("error rate", True),
        ("accuracy", False),
        ("error-free share (higher is better)", False),
        ("seconds, lower is better", True),
        ("macro_f1", False),
        ("chrf", False),
        ("letter_match", False),
        ("rouge-l", False),
    ],
)
def test_direction_of_metrics(metric: str, lower: bool) -> None:
    assert report.lower_is_better(metric) is lower


def test_table_of_scores(page: str) -> None:
    table = Page(page).tables[0]
    assert table[0][0] == "Method" and table[0][-2:] == ["Average", "Worst"] and len(table) == 6
    assert table[3][:2] == ["adapter per task", "0.8750.80\u20130.95"] and table[3][-2:] == [
        "0.761",
        "0.512pair-entailment",
    ]
    bold = re.findall(r"<strong>([^<]*)</strong>", page)
    assert bold == ["0.875", "0.663", "0.838", "0.775", "0.512", "0.761", "0.913"]  # row by row


def test_scores_equal_to_three_digits_are_both_best() -> None:
    data = Comparison.read({"rows": [row("a", "t", 0.50001), row("b", "t", 0.49999), row("c", "t", 0.4)]})
    assert data.best(data.tasks[0]) == {"a", "b"}


def test_many_tasks_turn_the_table(large_page: str) -> None:
    table = Page(large_page).tables[0]
    assert table[0][0] == "Task" and len(table[0]) == 9
    assert [line[0] for line in table[-2:]] == ["Average", "Worst"] and len(table) == 23


def test_notes_of_holes_are_printed_once_and_linked(large_page: str) -> None:
    text = large_page
    assert text.count("the base has no &lt;head&gt; for this &amp; cannot answer") == 1
    holes = sum(1 for r in large()["rows"] if r["value"] is None)
    assert holes > 5 and text.count('href="#note-1"') == holes


def test_cost_in_units_of_people(page: str) -> None:
    table = Page(page).tables[1]
    assert table[0][1:] == ["Trained parameters", "On disk", "Time", "Peak memory", "Base's own ability"]
    want = ["602\u00a0k2.7% of the base", "2.41\u00a0MB", "2\u00a0min\u00a023\u00a0s", "1.18\u00a0GB", "\u22120.043"]
    assert table[3][1:] == want
    assert table[1][2:] == ["\u2013", "<\u00a00.1\u00a0s", "\u2013", "\u2013"]


@pytest.mark.parametrize(
    "function, value, text",
    [
        ("number", 0.8416, "0.842"),
        ("number", 23.414, "23.41"),
        ("number", 1204.4, "1,204"),
        ("number", -0.5, "\u22120.500"),
        ("number", 2.5e7, "2.50e+07"),
        ("signed", 0.1514, "+0.151"),
        ("signed", -0.0001, "0"),
        ("signed", -3.0, "\u22123.000"),
        ("count", 7688, "7,688"),
        ("count", 589_824, "590\u00a0k"),
        ("count", 22_713_216, "22.7\u00a0M"),
        ("count", 999_999, "1.00\u00a0M"),
        ("size", 512, "512\u00a0B"),
        ("size", 2_359_296, "2.36\u00a0MB"),
        ("size", 0, "0\u00a0B"),
        ("duration", 0, "0.0\u00a0s"),
        ("duration", 9.97, "10\u00a0s"),
        ("duration", 59.7, "1\u00a0min\u00a00\u00a0s"),
        ("duration", 3900, "1\u00a0h\u00a05\u00a0min"),
    ],
)
def test_numbers_as_people_read_them(function: str, value: float, text: str) -> None:
    assert getattr(report, function)(value) == text


def test_sentences() -> None:
    assert report.sentence("a probe (frozen)") == "A probe (frozen)." and report.sentence("Is it?") == "Is it?"
    assert report.sentence("") == ""


def test_lists_of_names() -> None:
    assert report.listed([]) == "" and report.listed(["a"]) == "a" and report.listed("abc") == "a, b and c"
    assert report.listed("abcdefgh") == "a, b, c, d, e and 3 more"
    assert report.listed("abcdef") == "a, b, c, d, e and f"
    assert len(report.listed(["x" * 200])) == 40


def test_cross_values_can_be_read_as_text(page: str) -> None:
    parsed = Page(page)
    assert parsed.tables[2][1] == ["bare base", "0.762", "0.550", "0.700", "0.788", "0.525", "0.400"]
    assert parsed.tables[2][2][:2] == ["helpdesk-intent", "0.872"]
    assert len(parsed.alts) == 2 and all("helpdesk-" in alt for alt in parsed.alts)
    assert "The largest change is +0.110" in parsed.alts[1]


def test_own_task_is_blue_and_loss_is_red_also_where_lower_is_better() -> None:
    from polytask.report.pictures import _tones

    table = {"rows": [row("x", "a", 0.5), row("x", "b", 20.0, 1.0, "perplexity")]}
    (up, down), (none, rise) = _tones(Comparison.read(table), ["a", "b"], [[0.2, -8.0], [None, 8.0]])
    assert up[2] > up[0] and down[2] > down[0] and rise[0] > rise[2]
    assert max(none) - min(none) < 0.02


def test_forgetting_bars(page: str) -> None:
    bars = re.findall(r'<i class="lost" style="width: ([\d.]+)%; right: 50%">', page)
    assert [float(b) for b in bars] == [18.5, 13.1, 29.8, 26.2, 50.0, 16.1]
    rising = {
        "measure": "Perplexity on text of its own kind.",
        "rows": [{"adapter": "a", "before": 10.0, "after": 14.0}],
    }
    text = render({"rows": [row("x", "a", 0.5)], "forgetting": rising})
    assert 'class="lost" style="width: 50.0%; left: 50%"' in text and "+4.000" in text and "Lower is better." in text


def test_names_are_escaped_everywhere(large_page: str) -> None:
    parsed = Page(large_page)
    assert "router" not in parsed.seen and "head" in parsed.seen and large_page.count("<b>") == 0
    assert "routed by <router> & co" in parsed.text and "задача <b>&amp; вопросы" in parsed.text
    assert "cost in $ and $x^2$" in parsed.text  # not read as a formula, in the pictures either
    evil = 'x" onload="alert(1)"><script>alert(1)</script>'
    table = {"base": {"name": evil}, "rows": [row(evil, evil, 0.5)], "settings": {evil: evil, "versions": {evil: evil}}}
    table |= {"cross": {"adapters": [evil], "tasks": [evil], "values": [[0.5]], "base": [0.4], "measure": evil}}
    text = render(table)
    parsed = Page(text)
    assert "script" not in parsed.seen and "onload" not in parsed.attributes and evil in parsed.text


def test_pictures_follow_the_pages_colours(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(drawings) == 2
    for drawing in drawings:
        assert not [light for light, _ in PAINT.values() if light in drawing]
        assert "var(--ink)" in drawing and "<metadata" not in drawing and "<image" not in drawing
    assert "var(--m0)" in drawings[0] and "var(--m2)" in drawings[0]


def test_same_table_gives_the_same_page(page: str) -> None:
    assert render(fake()) == page
    assert render(json.loads(json.dumps(fake()))) == page


def test_the_table_is_not_changed() -> None:
    table = fake()
    before = copy.deepcopy(table)
    render(table)
    assert table == before


@pytest.mark.parametrize("gone", ["base", "tasks", "methods", "cross", "forgetting", "settings"])
def test_each_part_may_be_missing(gone: str) -> None:
    table = fake()
    del table[gone]
    parsed = Page(render(table))
    assert "adapter per task" in parsed.text and "helpdesk-intent" in parsed.text


def test_null_is_as_good_as_missing() -> None:
    rows = {"rows": [row("base", "a", 0.4), row("new", "a", 0.5)]}
    nulls = dict.fromkeys(["base", "tasks", "methods", "cross", "forgetting", "settings"])
    assert render(rows | nulls) == render(rows)


def test_rows_alone_one_task_one_method() -> None:
    parsed = Page(render({"rows": [row("only", "alone", 0.5)]}))
    assert "one model on 1 task" in parsed.text and len(parsed.alts) == 1
    assert Page(render({"rows": [row("only", "alone", None)]})).tables[0][1][1] == "\u2013"


def test_cross_without_base_prints_scores() -> None:
    table = fake()
    del table["cross"]["base"]
    drawing = re.findall(r"<svg.*?</svg>", render(table), flags=re.S)[1]
    assert ">0.872<" in drawing and ">+0.110<" not in drawing


def test_characters_that_no_page_may_hold() -> None:
    text = render({"rows": [row("x\x00y\ud800", "a\x1b[0m", 0.5)], "base": {"name": "\udc80"}})
    assert "x\ufffdy\ufffd" in text and text.encode("utf-8") and not re.search(r"[\x00-\x08\x1b]", text)


def test_nan_counts_as_no_score() -> None:
    table = {"rows": [row("x", "a", 0.5), row("y", "a", float("nan"))]}
    assert "nan" not in Page(render(table)).text.lower().split()


@pytest.mark.parametrize(
    "table, message",
    [
        ({}, "no 'rows'"),
        ([], "no 'rows'"),
        ({"rows": []}, "no 'rows'"),
        ({"rows": [{"method": "x"}]}, r"rows\[0\] must have"),
        ({"rows": [row("x", "a", 0.5), row("x", "a", 0.6)]}, r"rows\[1\] is a second score of 'x' on 'a'"),
        ({"rows": [{"method": "x", "task": "a", "value": "0.5"}]}, r"rows\[0\].value is '0.5'; it must be a number"),
        (
            {"rows": [row("x", "a", 0.5)], "cross": {"adapters": ["p"], "tasks": ["a", "b"], "values": [[1.0]]}},
            "1 adapters x 2",
        ),
        (
            {
                "rows": [row("x", "a", 0.5)],
                "cross": {"adapters": ["p"], "tasks": ["a"], "values": [[1.0]], "base": [1, 2]},
            },
            "cross.base",
        ),
        (
            {"rows": [row("x", "a", 0.5)], "cross": {"adapters": ["p"], "tasks": ["a"], "values": [["1"]]}},
            "must be a number",
        ),
        ({"rows": [row("x", "a", 0.5)], "methods": [{"method": "x", "average": "high"}]}, "average of 'x' is 'high'"),
    ],
)
def test_tables_that_are_refused(table: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(table)


def test_pictures_are_written_as_png(tmp_path: Path) -> None:
    from PIL import Image

    written = pictures(fake(), tmp_path / "new" / "folder")
    assert [p.name for p in written] == ["scores.png", "cross.png"]
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 1000 and image.convert("RGB").getpixel((1, 1)) == (255,) * 3
    table = fake()
    del table["cross"]
    assert [p.name for p in pictures(table, tmp_path)] == ["scores.png"]


def test_pictures_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("here")
    with pytest.raises(StorageError, match="taken"):
        pictures(fake(), tmp_path / "taken")


@pytest.mark.parametrize("table", [fake(), large()], ids=["fake", "large"])
def test_no_text_leaves_its_picture_or_covers_another(table: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    from polytask.report.pictures import _style, cross, scores

    data = Comparison.read(table)
    for figure in (scores(data), cross(data)):
        with _style():
            FigureCanvasAgg(figure).draw()
            ticks = [  # those outside the limits are there, and not drawn
                label
                for axes in figure.axes
                if axes.axison
                for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                if axes.get_xlim()[0] <= place <= axes.get_xlim()[1]
            ]
            shown: list[Text] = [*figure.texts, *ticks, *(t for axes in figure.axes for t in axes.texts)]
            boxes = [(t, t.get_window_extent()) for t in shown if t.get_rotation() == 0]
            leaning = [t.get_window_extent() for t in shown if t.get_rotation() != 0]
        assert len(boxes) > 20
        for box in [*(b for _, b in boxes), *leaning]:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        covered = [
            (a.get_text(), b.get_text())
            for i, (a, one) in enumerate(boxes)
            for b, two in boxes[:i]
            if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
        ]
        assert covered == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120), st.floats(0.3, 4.0))
def test_a_fitted_name_fits(name: str, inches: float) -> None:
    short = fit(name, inches)
    assert width(short) <= inches and (short == " ".join(name.split()) or "\u2026" in short)


def test_fitting_keeps_beginning_and_end() -> None:
    short = fit("natural_instructions/task0001_of_many_tasks_number_17", 1.5)
    assert short.startswith("natural_") and short.endswith("_17")
    assert lines("helpdesk-urgency", 0.8) == "helpdesk-\nurgency" and lines("x" * 50, 0.8) is None
    assert width("\u6c49" * 3, 72) == pytest.approx(3.0)


def test_drawing_leaves_matplotlibs_settings_alone(page: str) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render(fake())
    assert dict(matplotlib.rcParams) == before


def test_importing_the_package_imports_no_drawing() -> None:
    code = "import sys, polytask.report as r; print([m for m in ('matplotlib', 'jinja2', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_of_pictures_does_not_hide_the_function() -> None:
    code = "import polytask.report.pictures, polytask.report as r; print(callable(r.pictures), callable(r.render))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True"


def test_a_large_page_takes_less_than_four_seconds_of_work(page: str) -> None:
    start = time.process_time()
    text = render(large())
    assert time.process_time() - start < 4 and len(text) < 2_000_000


if __name__ == "__main__":  # python tests/test_report.py FOLDER: the pages themselves, to look at
    folder = Path(sys.argv[1])
    for label, table in {"fake": fake(), "large": large()}.items():
        start = time.perf_counter()
        (folder / f"{label}.html").write_text(render(table), encoding="utf-8")
        print(label, round(time.perf_counter() - start, 2), "s")
        pictures(table, folder / label)


# --- ranks of adapters under a budget


def dealt(layers: int = 6, name: str = "question-type", steps: int = 400) -> dict[str, Any]:
    """Ranks that moved towards the upper layers, with the same total at every step."""
    roles = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    sites = [f"encoder.layer.{layer}.{role}" for layer in range(layers) for role in roles]
    history = []
    for column in range(17):
        shift = round(8 * column / 16)
        half = len(sites) // 2
        history.append([steps * column // 16, *[8 - shift] * half, *[8 + shift] * (len(sites) - half)])
    final = dict(zip(sites, history[-1][1:], strict=True))
    return {"adapter": name, "budget": "adalora", "total": sum(final.values()), "sites": final, "history": history}


def test_ranks_are_drawn_and_told() -> None:
    table = fake() | {"ranks": [dealt()]}
    page = render(table)
    assert re.findall(r'<h2 id="([a-z]+)"', page)[3:6] == ["forgetting", "ranks", "tasks"]
    words = (
        "\u201cquestion-type\u201d: 192 ranks dealt out by adalora among 24 sites, from 0 to 16 at a site, most at "
        "encoder.layer.3.attention.self.query, encoder.layer.3.attention.self.key and 10 more; 12 have none."
    )
    assert ranks_words(table["ranks"][0]) == words and page.count(words) == 2  # seen and read aloud
    assert "0.attention.self.query" in page and "optimiser step" in page
    assert ids_of(page) == len(set(re.findall(r'\bid="([^"]+)"', page)))
    assert 'id="ranks"' not in render(fake()) and 'id="ranks"' not in render(fake() | {"ranks": []})
    even = dealt()
    even["sites"] = dict.fromkeys(even["sites"], 8)
    assert ranks_words(even).endswith("among 24 sites, 8 at each.")


def ids_of(page: str) -> int:
    return len(re.findall(r'\bid="([^"]+)"', page))


def test_rows_of_the_picture_are_sites_or_layers() -> None:
    names, steps, values = rank_rows(dealt())
    assert names[:2] == ["0.attention.self.query", "0.attention.self.key"] and len(names) == 24
    assert steps[0] == 0 and steps[-1] == 400 and values[0] == [8 - round(i / 2) for i in range(17)]
    names, _, values = rank_rows(dealt(layers=32))
    assert names[0] == "layer 0, mean of 4" and len(names) == 32 and values[0][-1] == 0 and values[31][-1] == 16
    assert rank_rows(ONE) == (["head"], [0, 5], [[1, 3]])


def test_darker_is_more() -> None:
    from polytask.report.pictures import ranks

    (mesh,) = ranks(dealt()).axes[0].collections
    tones = mesh.get_array().mean(-1)
    assert tones.shape == (24, 17) and (tones[0, 1:] >= tones[0, :-1]).all() and tones[0, 0] < tones[0, -1]
    assert (tones[-1, 1:] <= tones[-1, :-1]).all() and tones[-1, -1] == tones.min()


ONE = {**dealt(), "sites": {"head": 3}, "history": [[0, 1], [5, 3]]}


@pytest.mark.parametrize("entry", [dealt(), dealt(layers=40, steps=123_456), ONE], ids=["sites", "layers", "one"])
def test_no_text_of_the_ranks_covers_another(entry: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from polytask.report.pictures import _style, ranks

    figure = ranks(entry)
    with _style():
        FigureCanvasAgg(figure).draw()
        boxes = [(t.get_text(), t.get_window_extent()) for t in [*figure.texts, *figure.axes[0].texts]]
    assert len(boxes) > 4
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text
    assert not [
        (a, b)
        for i, (a, one) in enumerate(boxes)
        for b, two in boxes[:i]
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]


def test_pictures_of_ranks_are_few(tmp_path: Path) -> None:
    table = fake() | {"ranks": [dealt(name=f"adapter {i}") for i in range(8)]}
    written = [file.name for file in pictures(table, tmp_path) if file.name.startswith("ranks")]
    assert written == [f"ranks-{i + 1}.png" for i in range(6)]
    page = render(table)
    assert page.count("dealt out by adalora") == 14  # six pictures, each with its words aloud; two sentences more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": {}}, r"ranks\[0\] must have an 'adapter' and 'sites'"),
        ({"history": []}, r"ranks\[0\]\.history must have rows of a step and 24 ranks"),
        ({"history": [[0, 1]]}, "one for each site"),
        ({"history": [[0, *["8"] * 24]]}, "has '8'; steps and ranks must be whole numbers"),
    ],
)
def test_ranks_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(fake() | {"ranks": [dealt() | change]})
