"""The selector language: which sites, said apart from what acts there.

linear                      every linear layer of the blocks (not heads, poolers, routers)
query | value               roles;  attention, mlp  are groups of roles
kind:linear  role:up        one of the two, where a word could be both
depth>=0.5                  fraction of the stack;  layer in 0..3,  layer==2  count blocks
re:layer\\.[01]\\..*dense     a regular expression found in the site's name (ends at a space, or quote it)
encoder.layer.0             a path and all below it;  q_proj  the end of a path
a & b   a | b   !a   (a)    and, or, not
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from . import grammar
from .errors import SiteError, listing, nearest
from .site import GROUPS, KINDS, NOT_IN_STACK, ROLES, Site

Test = Callable[[Site], bool]
Selector = str | Iterable[str] | Test

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<op>[&|!()]) |
        (?P<range>layer\s+in\s+\d+\s*\.\.\s*\d+) |
        (?P<compare>(?:depth|layer)\s*(?:>=|<=|==|!=|>|<)\s*[\d.]+) |
        (?P<regex>re:(?:"[^"]*"|'[^']*'|\S+)) |
        (?P<word>[\w.:\-*/]+)
    )""",
    re.VERBOSE,
)
_GRAMMAR = {"depth", "layer", "in", "kind", "role", "re"}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def select(sites: Sequence[Site], selector: Selector) -> list[Site]:
    """The sites that a selector picks, in their order.

    Args:
        sites: what there is.
        selector: an expression (see the module), several of them (any may match), or a function of a site.

    Raises:
        SiteError: the expression cannot be read, or nothing matches; the message lists what there is.
    """
    if callable(selector):
        picked = [site for site in sites if selector(site)]
        text = getattr(selector, "__name__", "the given function")
    else:
        expressions = [selector] if isinstance(selector, str) else list(selector)
        tests = [parse(expression) for expression in expressions]
        picked = [site for site in sites if any(test(site) for test in tests)]
        text = " | ".join(expressions)
    if not picked:
        raise SiteError(f"no site matches {text!r}{_hint(text, sites)}; this model has {describe(sites)}")
    return picked


def _hint(text: str, sites: Sequence[Site]) -> str:
    """The word nearest to the first one of an expression that is no word of this model."""
    words = {w for site in sites for w in (site.role, site.kind, site.name.rsplit(".", 1)[-1])} | set(GROUPS)
    said = [word for word in re.findall(r"(?<![\w:])[\w.]+", text) if word not in words | _GRAMMAR]
    return next((hint for hint in (nearest(word, words) for word in said) if hint), "")


def describe(sites: Sequence[Site]) -> str:
    """What there is to match, in one line for a message."""
    roles = Counter(site.role for site in sites)
    kinds = Counter(site.kind for site in sites)
    layers = [site.layer for site in sites if site.layer is not None]
    stack = f"; layers 0..{max(layers)}" if layers else ""
    return (
        f"roles {listing(f'{r} ({n})' for r, n in roles.most_common())}; "
        f"kinds {listing(f'{k} ({n})' for k, n in kinds.most_common())}{stack}"
    )


def parse(expression: str) -> Test:
    """An expression of the selector language as a test of one site.

    Raises:
        SiteError: the expression cannot be read; the message points at the place.
    """

    def refuse(rest: str) -> SiteError:
        return SiteError(f"the selector {expression!r} cannot be read at {rest!r}; see `polytask sites --help`")

    words = grammar.tokens(expression, _TOKEN, refuse)
    return grammar.parse(expression, words, _atom, SiteError, "selector")


def _atom(token: str) -> Test:
    if token.startswith("re:"):
        return _regex(token[3:].strip("\"'"))  # quotes only protect spaces
    if match := re.fullmatch(r"layer\s+in\s+(\d+)\s*\.\.\s*(\d+)", token):
        low, high = int(match[1]), int(match[2])
        return lambda site: site.layer is not None and low <= site.layer <= high
    if match := re.fullmatch(r"(depth|layer)\s*(>=|<=|==|!=|>|<)\s*([\d.]+)", token):
        return _comparison(match[1], _COMPARE[match[2]], _number(match[3], token))
    prefix, colon, word = token.partition(":")
    if not colon:
        return _word(token)
    allowed = {"kind": KINDS, "role": (*ROLES, "attention", "block", "input")}.get(prefix)
    if allowed is None:
        raise SiteError(f"the selector's {token!r} has an unknown prefix; there are: kind:, role:, re:")
    if word not in allowed:
        raise SiteError(f"no {prefix} is called {word!r}{nearest(word, allowed)}; there are: {listing(allowed, 40)}")
    return lambda site: getattr(site, prefix) == word


def _number(text: str, token: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise SiteError(f"the selector's {token!r} does not end in a number") from error


def _comparison(field: str, compare: Callable[[float, float], bool], bound: float) -> Test:
    def test(site: Site) -> bool:
        value = getattr(site, field)
        return value is not None and compare(value, bound)

    return test


def _regex(pattern: str) -> Test:
    if not pattern:
        raise SiteError("the selector has 're:' without a regular expression; write re:query or re:\"a b\"")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SiteError(f"the regular expression {pattern!r} cannot be read: {error}") from error
    return lambda site: compiled.search(site.name) is not None


def _word(word: str) -> Test:
    if word == "all":
        return lambda site: True
    if word == "linear":  # the common meaning; ``kind:linear`` takes the head and the pooler as well
        return lambda site: site.kind == "linear" and site.role not in NOT_IN_STACK
    roles = GROUPS.get(word, (word,) if word in ROLES else ())
    if roles or word in KINDS:
        return lambda site: site.role in roles or site.kind == word
    return lambda site: (
        site.name == word or site.path == word or site.name.endswith("." + word) or site.name.startswith(word + ".")
    )
