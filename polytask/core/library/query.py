"""The query language: which adapters of a library.

sentiment                   a word found in the name, a tag or a task
task:sentiment  tag:ne?s*   a field that holds the text, or matches a pattern with * ? [ ]; in any case
form=lora                   a field that is the text
score>0.8  rank<=8  size>1M one of a field's numbers; k, M and G are thousands, millions and so on
score.accuracy>0.8          of the scores with that word in their name or as their metric
added>=2025-03              dates, as far as they are written
a & b   a | b   !a   (a)    and, or, not; "a b" keeps a text with spaces or signs together
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Mapping

from .. import grammar
from ..errors import ConfigError, listing, nearest
from .entry import Entry

Test = Callable[[Entry], bool]

_QUOTED = r'"[^"]*"|\'[^\']*\''
_TOKEN = re.compile(
    rf"""\s*(?:
        (?P<op>[&|()]|!(?!=)) |
        (?P<field>[A-Za-z]+(?:\.(?:{_QUOTED}|[\w./-]+))?\s*(?:>=|<=|==|!=|>|<|=|:)\s*(?:{_QUOTED}|[^\s&|()"'!<>=:]+)) |
        (?P<word>{_QUOTED}|[^\s&|()"'!<>=:]+)
    )""",
    re.VERBOSE,
)
_CONDITION = re.compile(
    rf"(?P<field>[A-Za-z]+)(?:\.(?P<sub>{_QUOTED}|[\w./-]+))?\s*(?P<sign>>=|<=|==|!=|>|<|=|:)\s*(?P<value>.+)", re.S
)
_SPOKEN = {"and": "&", "or": "|", "not": "!"}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "=": operator.eq, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_TIMES = {"k": 1e3, "m": 1e6, "g": 1e9}

NUMBERS: dict[str, Callable[[Entry], list[float]]] = {
    "rank": lambda entry: list(entry.ranks),
    "size": lambda entry: [entry.size],
    "score": lambda entry: list(entry.scores.values()),
}
TEXTS: dict[str, Callable[[Entry], list[str]]] = {
    "name": lambda entry: [entry.name],
    "tag": lambda entry: list(entry.tags),
    "task": lambda entry: [task["name"] for task in entry.tasks],
    "kind": lambda entry: [task["kind"] for task in entry.tasks],
    "form": lambda entry: [entry.form],
    "base": lambda entry: [entry.base, entry.fingerprint],
    "parent": lambda entry: list(entry.parents),
    "hash": lambda entry: [entry.hash],
    "licence": lambda entry: [entry.licence],
    "signature": lambda entry: list(entry.signatures),
    "added": lambda entry: [entry.added],
}
FIELDS = (*TEXTS, *NUMBERS)


def parse(query: str, names: Mapping[str, str] | None = None) -> Test:
    """A query as a test of one entry; the empty query takes all.

    Args:
        query: an expression, see the module.
        names: of adapters by their hash, for ``parent:NAME``.

    Raises:
        ConfigError: it cannot be read, or names an unknown field; the message says what there is.
    """

    def refuse(rest: str) -> ConfigError:
        return ConfigError(
            f"the query {query!r} cannot be read at {rest!r}; write conditions such as task:mood & score>0.8, and texts with "
            "signs in quotes"
        )

    words = [_SPOKEN.get(word.lower(), word) for word in grammar.tokens(query, _TOKEN, refuse)]
    if not words:
        return lambda entry: True
    try:
        return grammar.parse(query, words, lambda token: _atom(token, query, names or {}), ConfigError, "query")
    except RecursionError as error:
        raise ConfigError(f"the query {query[:60]!r}... has too many parentheses inside each other") from error


def _atom(token: str, query: str, names: Mapping[str, str]) -> Test:
    match = None if token[0] in "\"'" else _CONDITION.fullmatch(token)
    if match is None:
        return _word(_bare(token))
    field, sub, sign = match["field"].lower(), match["sub"], match["sign"]
    value = _bare(match["value"])
    if field not in FIELDS:
        raise ConfigError(
            f"the query {query!r} asks for {field!r}{nearest(field, FIELDS)}, and adapters have: {listing(FIELDS)}; a text with "
            "such a sign goes into quotes"
        )
    if sub is not None and field != "score":
        raise ConfigError(f"the query's {token!r}: only score has parts, as in score.accuracy>0.8")
    if sign == "!=":
        inner = _condition(field, sub, "=", value, token, names)
        return lambda entry: not inner(entry)
    return _condition(field, sub, sign, value, token, names)


def _condition(field: str, sub: str | None, sign: str, value: str, token: str, names: Mapping[str, str]) -> Test:
    if field in NUMBERS:
        bound, compare = _number(value, token), _COMPARE["=" if sign == ":" else sign]
        part = None if sub is None else _bare(sub).lower()
        numbers = NUMBERS[field] if part is None else lambda entry: _scores(entry, part)
        return lambda entry: any(compare(number, bound) for number in numbers(entry))
    if sign in ("<", "<=", ">", ">="):
        if field != "added":
            raise ConfigError(f"the query's {token!r}: {field} is a text and cannot be compared; write {field}:{value}")
        ordered: Callable[..., bool] = _COMPARE[sign]
        return lambda entry: ordered(entry.added[: len(value)], value)
    holds = _equal(value) if sign in ("=", "==") else _holds(value)
    if field == "parent" and names:  # what they are, and what they are called here
        return lambda entry: any(holds(parent) or holds(names.get(parent, parent)) for parent in entry.parents)
    return _any(TEXTS[field], holds)


def _any(texts: Callable[[Entry], list[str]], holds: Callable[[str], bool]) -> Test:
    """Whether one of a field's texts passes; each different text is looked at once."""
    seen: dict[str, bool] = {}

    def test(entry: Entry) -> bool:
        for text in texts(entry):
            found = seen.get(text)
            if found is None:
                found = seen[text] = holds(text)
            if found:
                return True
        return False

    return test


def _word(word: str) -> Test:
    holds = _holds(word)
    name, tag, task = (_any(TEXTS[field], holds) for field in ("name", "tag", "task"))
    return lambda entry: name(entry) or tag(entry) or task(entry)


def _scores(entry: Entry, part: str) -> list[float]:
    """The scores with a word in their name, or whose task is scored by the metric of that name."""
    by = {task["name"].lower() for task in entry.tasks if task["metric"].lower() == part}
    return [
        score
        for name, score in entry.scores.items()
        if part in (words := name.lower().split("/")) or part == name.lower() or not by.isdisjoint(words)
    ]


def _equal(value: str) -> Callable[[str], bool]:
    wanted = value.casefold()
    return lambda text: text.casefold() == wanted


def _holds(value: str) -> Callable[[str], bool]:
    wanted = value.casefold()
    if not any(sign in wanted for sign in "*?["):
        return lambda text: wanted in text.casefold()
    pattern = re.compile(fnmatch.translate(wanted))
    return lambda text: pattern.match(text.casefold()) is not None


def _number(text: str, token: str) -> float:
    match = re.fullmatch(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)([kmg]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"the query's {token!r} does not end in a number, as in score>0.8 or size<1M")
    return float(match[1].replace("_", "")) * _TIMES.get(match[2].lower(), 1.0)


def _bare(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0] else text
