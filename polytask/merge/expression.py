"""Arithmetic over models: ``base + 0.8 * (a - base) - 0.3 * (toxic - base)``."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from fractions import Fraction

from polytask.core.errors import ConfigError, listing, nearest

LARGEST = 1e30  # of a factor, well within fp32
Sum = dict[str, Fraction]  # the factor of each model, and of no model under the empty name


def parse(text: str) -> dict[str, Fraction]:
    """The factor of every model in an expression, exactly: those that cancel are left out.

    Args:
        text: names, numbers, ``+ - * /`` and parentheses. Nothing is executed.

    Returns:
        Factors by name, in the order of the names in the text.

    Raises:
        ConfigError: something else stands there (its place is given), or what is not linear in the models.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = getattr(error, "offset", None)
        raise ConfigError(
            f"{text!r} is no expression{f' (at character {place})' if place else ''}; write it like base + 0.8*(a - base)"
        ) from error
    try:
        found = _value(tree.body, text.strip())
    except RecursionError as error:
        raise ConfigError(f"the expression is nested too deeply: {text[:60]!r}...; write it as a plain sum") from error
    if found.get(""):
        raise ConfigError(
            f"{text!r} adds the number {float(found[''])} to models; numbers can only multiply or divide them"
        )
    factors = {name: factor for name, factor in found.items() if name and factor}
    large = [name for name, factor in factors.items() if abs(factor) > LARGEST]
    if large:
        raise ConfigError(
            f"in {text!r} the factor of {listing(large)} is above {LARGEST:g}; no model can be multiplied by it"
        )
    if not factors:
        raise ConfigError(f"in {text!r} everything cancels, so there is nothing to merge")
    return factors


def check_names(text: str, given: Mapping[str, object], spare: Collection[str] = ()) -> None:
    """Raises `ConfigError` for a name that is not given, or given and not used and not in ``spare``."""
    used = {node.id for node in ast.walk(ast.parse(text.strip(), mode="eval")) if isinstance(node, ast.Name)}
    for name in sorted(used - set(given)):
        raise ConfigError(
            f"the expression names {name!r}, which is not given{nearest(name, given)}; given are: {listing(given) or 'none'}"
        )
    for name in sorted(set(given) - used - set(spare)):
        raise ConfigError(f"{name!r} is given and the expression does not name it{nearest(name, used)}; leave it out")


def _value(node: ast.expr, text: str) -> Sum:
    if isinstance(node, ast.Name):
        return {node.id: Fraction(1)}
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return {"": _number(node, text)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign = -1 if isinstance(node.op, ast.USub) else 1
        return {name: sign * factor for name, factor in _value(node.operand, text).items()}
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        return _refuse(node, text)
    left, right = _value(node.left, text), _value(node.right, text)
    if isinstance(node.op, ast.Add | ast.Sub):
        sign = 1 if isinstance(node.op, ast.Add) else -1
        for name, factor in right.items():
            left[name] = left.get(name, Fraction(0)) + sign * factor
        return left
    if isinstance(node.op, ast.Mult) and not set(left) - {""}:
        left, right = right, left
    if set(right) - {""}:
        what = "multiplies models with each other" if isinstance(node.op, ast.Mult) else "divides by a model"
        raise ConfigError(f"{_said(node, text)} {what}; a model can be multiplied or divided by numbers only")
    number = right.get("", Fraction(0))
    if isinstance(node.op, ast.Div):
        if not number:
            raise ConfigError(f"{_said(node, text)} divides by zero")
        number = 1 / number
    return {name: factor * number for name, factor in left.items()}


def _number(node: ast.Constant, text: str) -> Fraction:
    """A number as it is written: 0.1 is a tenth, so that sums cancel."""
    value = float(str(node.value))
    if abs(value) > LARGEST:
        raise ConfigError(f"{_said(node, text)} is no factor of a model: it is above {LARGEST:g}")
    if not value or isinstance(node.value, int):
        return Fraction(str(node.value))
    return Fraction((ast.get_source_segment(text, node) or repr(value)).replace("_", ""))


def _said(node: ast.expr, text: str) -> str:
    segment = ast.get_source_segment(text, node) or ""
    line = text.splitlines()[node.lineno - 1] if text else ""
    return f"{segment!r} (at character {len(line.encode()[: node.col_offset].decode(errors='ignore')) + 1} of {text!r})"


def _refuse(node: ast.expr, text: str) -> Sum:
    raise ConfigError(
        f"{_said(node, text)} cannot stand in an expression; allowed are names, numbers, + - * / and parentheses"
    )
