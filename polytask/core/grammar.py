"""Expressions of conditions joined by ``&``, ``|``, ``!`` and parentheses: the frame that selectors and queries share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from .errors import PolytaskError

T = TypeVar("T")


def tokens(expression: str, token: re.Pattern[str], refuse: Callable[[str], PolytaskError]) -> list[str]:
    """The expression cut into tokens.

    Args:
        expression: the text.
        token: what a token is, with the spaces before it.
        refuse: makes the error for a text that is no token, from that text.
    """
    found, at = [], 0
    text = expression.rstrip()
    while at < len(text):
        match = token.match(text, at)
        if match is None:
            raise refuse(text[at:])
        found.append(match.group(0).strip())
        at = match.end()
    return found


def parse(
    expression: str, words: list[str], atom: Callable[[str], Callable[[T], bool]], error: type[PolytaskError], what: str
) -> Callable[[T], bool]:
    """The test that an expression says: ``!`` binds tighter than ``&``, and that tighter than ``|``.

    Args:
        expression: as it was written, for messages.
        words: its tokens.
        atom: the test of a token that joins nothing.
        error: what is raised.
        what: what the expression is called: ``selector``.

    Raises:
        PolytaskError: of the type ``error``; the message points at the place.
    """
    position = 0

    def peek() -> str:
        return words[position] if position < len(words) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return words[position - 1] if position <= len(words) else ""

    def either() -> Callable[[T], bool]:
        tests = [both()]
        while peek() == "|":
            take()
            tests.append(both())
        return tests[0] if len(tests) == 1 else lambda item: any(test(item) for test in tests)

    def both() -> Callable[[T], bool]:
        tests = [one()]
        while peek() == "&":
            take()
            tests.append(one())
        return tests[0] if len(tests) == 1 else lambda item: all(test(item) for test in tests)

    def one() -> Callable[[T], bool]:
        token = take()
        if token == "!":
            inner = one()
            return lambda item: not inner(item)
        if token == "(":
            inner = either()
            if take() != ")":
                raise error(f"the {what} {expression!r} lacks a closing parenthesis")
            return inner
        if token in ("", "&", "|", ")"):
            got = repr(token) if token else "its end"
            raise error(f"the {what} {expression!r} has {got} where a name, a comparison or '(' is needed")
        return atom(token)

    test = either()
    if position < len(words):
        raise error(f"the {what} {expression!r} goes on after it is complete, at {peek()!r}; join with & or |")
    return test
