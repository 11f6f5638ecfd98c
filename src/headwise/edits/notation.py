"""Changes written as text, for the command line and for records.

    window(64)                     a pattern; & | ~ combine patterns: window(64) | sinks(4)
    window(64) + temperature(1.2)  one change after the other
    positions(yarn(4, original=2048))

Names are those of the classes, in lower case: of patterns (window, sinks, causal, dilated ...) and
of changes (silence, uniform, scale, scalesink, temperature, loglength, usepattern, scaletokens,
movemass, calibratesinks, towardsself). `positions(4)`
is ScalePositions with a number, linear(4), ntk(4), yarn(...) or llama3(...); `alibi(0.1)` one slope
for all heads. Arguments are numbers, None, True, False, patterns, or several
of these in parentheses. Nothing else is evaluated.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from headwise import maps
from headwise.edits import blending, changes, reweighing, rotary
from headwise.edits.change import Change
from headwise.maps import Pattern
from headwise.parts.position import scaling

_OF_OBJECTS = ("Tensor", "Callable", "Bias")
_COMBINED = (maps.And, maps.Or, maps.Not)


def names() -> dict[str, Callable[..., Any]]:
    """Name -> what makes it, of everything that can be written."""
    patterns = _writable(vars(maps), Pattern)
    homes = (changes, reweighing, blending)
    own = {k: v for home in homes for k, v in _writable(vars(home), Change).items()}
    stretched = {kind.__name__.lower(): kind for kind in _scalings()}
    positions = {"positions": rotary.ScalePositions, "scalepositions": rotary.ScalePositions}
    return {**patterns, **own, **positions, **stretched, "alibi": lambda *s: maps.Alibi(s)}


def _writable(known: dict[str, Any], kind: type) -> dict[str, Callable[..., Any]]:
    """The classes of a kind that can be made of numbers and patterns."""
    return {
        name.lower(): made
        for name, made in known.items()
        if isinstance(made, type)
        and issubclass(made, kind)
        and is_dataclass(made)
        and made not in _COMBINED
        and not any(word in str(f.type) for f in fields(made) for word in _OF_OBJECTS)
    }


def _scalings() -> list[type]:
    return [scaling.Linear, scaling.NTK, scaling.YaRN, scaling.Llama3]


def read_changes(text: str) -> Any:
    """The change, or list of changes, that `text` writes. Raises ValueError with what is wrong."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no change: {error.msg}; expected e.g. window(64)") from None
    known = names()
    made = [_read(node, text, known) for node in _sum(tree)]
    for one in made:
        if isinstance(one, scaling.Scaling | int | float | tuple) or one is None:
            raise ValueError(
                f"{text!r} is no change; expected e.g. window(64), silence(), positions(4)"
            )
    return made[0] if len(made) == 1 else made


def _sum(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _sum(node.left) + _sum(node.right)
    return [node]


def _read(node: ast.expr, text: str, known: dict[str, Callable[..., Any]]) -> Any:
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, bool | int | float)
    ):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_read(one, text, known) for one in node.elts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _read(node.operand, text, known)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, text, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        a, b = (_pattern(side, text, known) for side in (node.left, node.right))
        return a & b if isinstance(node.op, ast.BitAnd) else a | b
    if isinstance(node, ast.Name):
        return _made(node.id, [], {}, text, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_read(one, text, known) for one in node.args]
        named = {one.arg: _read(one.value, text, known) for one in node.keywords if one.arg}
        if len(named) == len(node.keywords):
            return _made(node.func.id, arguments, named, text, known)
    raise ValueError(
        f"{ast.unparse(node)!r} in {text!r} is not understood; expected names with numbers, such "
        "as window(64) | sinks(4), and + between changes"
    )


def _pattern(node: ast.expr, text: str, known: dict[str, Callable[..., Any]]) -> Pattern:
    found = _read(node, text, known)
    if not isinstance(found, Pattern):
        raise ValueError(f"{text!r}: & | ~ combine patterns, {ast.unparse(node)!r} is none")
    return found


def _made(
    name: str,
    arguments: list[Any],
    named: dict[str, Any],
    text: str,
    known: dict[str, Callable[..., Any]],
) -> Any:
    kind = known.get(name.lower())
    if kind is None:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
        raise ValueError(f"{text!r}: no change or pattern is named {name!r}; {hint}")
    try:
        return kind(*arguments, **named)
    except TypeError:
        takes = ", ".join(str(one) for one in inspect.signature(kind).parameters.values())
        given = ", ".join([*map(repr, arguments), *(f"{k}={v!r}" for k, v in named.items())])
        raise ValueError(
            f"{text!r}: {name}({given}) is not understood; it takes ({takes})"
        ) from None
