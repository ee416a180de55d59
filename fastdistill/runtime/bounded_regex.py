"""Match untrusted regular expressions in bounded time.

The engine of `re` backtracks: a short expression can take unbounded time. Here each part of the
expression maps the set of possible start positions to the set of end positions, as the bits of an
integer. No position is tried twice, and the steps are counted.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser

LONGEST, DEEPEST, MOST_STEPS = 1 << 16, 50, 10_000_000
_SINGLE = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)
_PLACES = (
    ops.AT_BEGINNING,
    ops.AT_BEGINNING_STRING,
    ops.AT_END,
    ops.AT_END_STRING,
    ops.AT_BOUNDARY,
    ops.AT_NON_BOUNDARY,
)
_CLASSES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    ops.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    ops.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    ops.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


class PatternError(ValueError):
    """An invalid or unsupported regular expression; the message says why."""


class BoundedPattern:
    """A regular expression with a budget of `steps` steps over all texts.

    Raises:
        PatternError: it is invalid, too long or too deep, or has flags, a back-reference, a
            condition, a lookbehind, an atomic or possessive part, or an unbounded repeat in another
            repeat.
    """

    def __init__(self, pattern: str, steps: int = MOST_STEPS) -> None:
        if len(pattern) > LONGEST:
            raise PatternError(f"it has {len(pattern):,} characters, more than {LONGEST:,}")
        try:
            self._tree = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"it cannot be parsed: {error}") from None
        if self._tree.state.flags & ~re.UNICODE:
            raise PatternError("it has flags")
        _check(self._tree, 0)
        self._steps = steps

    def matches(self, text: str) -> bool:
        """Return whether the whole text matches, as re.fullmatch does."""
        return bool(_Text(text, self).ends(self._tree, 1) >> len(text) & 1)

    def spend(self) -> None:
        """Count a step; raise PatternError where none are left."""
        self._steps -= 1
        if self._steps < 0:
            raise PatternError("it takes too many steps")


class _Text:
    """One text. Sets of positions 0..n are integers: bit p stands for position p."""

    def __init__(self, text: str, pattern: BoundedPattern) -> None:
        self._text, self._pattern = text, pattern
        self._all = (2 << len(text)) - 1
        self._where: dict[tuple[Any, Any], int] = {}  # node of one character -> where it matches

    def ends(self, nodes: Iterable[Any], starts: int) -> int:
        """Return the end positions of a sequence of nodes that begins at `starts`."""
        for operator, argument in nodes:
            if not starts:
                return 0
            self._pattern.spend()
            starts = self._after(operator, argument, starts)
        return starts

    def _after(self, operator: Any, argument: Any, starts: int) -> int:
        if operator in _SINGLE:
            return (starts & self._places(operator, argument)) << 1
        if operator in _REPEATS:
            least, most, body = argument
            return self._repeated(least, most, body, starts)
        if operator is ops.BRANCH:
            reached = 0
            for branch in argument[1]:
                reached |= self.ends(branch, starts)
            return reached
        if operator is ops.SUBPATTERN:
            return self.ends(argument[3], starts)
        if operator is ops.AT:
            return starts & self._at(argument)
        # A lookahead, evaluated at each position.
        reached, expected = 0, operator is ops.ASSERT
        for at in range(len(self._text) + 1):
            if starts >> at & 1 and bool(self.ends(argument[1], 1 << at)) == expected:
                reached |= 1 << at
        return reached

    def _repeated(self, least: int, most: int, body: Any, starts: int) -> int:
        """Match a repeat; after n + 1 rounds the set no longer changes."""
        rounds = len(self._text) + 1
        for _ in range(min(least, rounds)):
            starts = self.ends(body, starts)
        if most == ops.MAXREPEAT and len(body) == 1 and body[0][0] in _SINGLE:
            # All runs of places that begin at a start: the carry of one addition fills them.
            places = self._places(*body[0])
            return (((starts & places) + places) ^ places | starts) & self._all
        reached = new = starts
        for _ in range(min(most - least, rounds)):
            new = self.ends(body, new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def _places(self, operator: Any, argument: Any) -> int:
        """Return the positions of the characters that a single-character node matches."""
        key = (operator, argument) if operator is not ops.IN else (operator, id(argument))
        if key not in self._where:
            matching = {c for c in set(self._text) if _is_of(c, operator, argument)}
            self._where[key] = sum(1 << i for i, c in enumerate(self._text) if c in matching)
        return self._where[key]

    def _at(self, place: Any) -> int:
        end = 1 << len(self._text)
        if place in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return 1
        if place in (ops.AT_END, ops.AT_END_STRING):
            before_newline = place is ops.AT_END and self._text.endswith("\n")
            return end | (end >> 1 if before_newline else 0)
        words = self._places(ops.IN, _WORD)
        boundaries = (words ^ words << 1) & self._all
        return boundaries if place is ops.AT_BOUNDARY else ~boundaries & self._all


_WORD = [(ops.CATEGORY, ops.CATEGORY_WORD)]


def _is_of(character: str, operator: Any, argument: Any) -> bool:
    code = ord(character)
    if operator in (ops.LITERAL, ops.NOT_LITERAL):
        return bool(code == argument) == (operator is ops.LITERAL)
    if operator is ops.ANY:
        return character != "\n"
    negated: bool = argument[0][0] is ops.NEGATE
    for kind, value in argument[negated:]:
        if (
            (kind is ops.LITERAL and code == value)
            or (kind is ops.RANGE and value[0] <= code <= value[1])
            or (kind is ops.CATEGORY and _CLASSES[value](character))
        ):
            return not negated
    return negated


def _check(nodes: Iterable[Any], depth: int, in_repeat: bool = False) -> None:
    """Raise PatternError for a part that is not matched here.

    A repeat without a bound in another one is no hard part here, but it is for the engine of `re`,
    which reads the expression in other programs.
    """
    if depth > DEEPEST:
        raise PatternError(f"its parts lie more than {DEEPEST} deep in each other")
    for operator, argument in nodes:
        if operator in _REPEATS:
            endless = argument[1] == ops.MAXREPEAT
            if in_repeat and endless:
                raise PatternError("it has a repeat without a bound in another repeat")
            _check(argument[2], depth + 1, in_repeat or argument[1] > 1)
        elif operator is ops.BRANCH:
            for branch in argument[1]:
                _check(branch, depth + 1, in_repeat)
        elif operator is ops.SUBPATTERN and not argument[1] and not argument[2]:
            _check(argument[3], depth + 1, in_repeat)
        elif operator in (ops.ASSERT, ops.ASSERT_NOT) and argument[0] > 0:
            _check(argument[1], depth + 1, in_repeat)
        elif operator not in _SINGLE and not (operator is ops.AT and argument in _PLACES):
            raise PatternError(f"it has a part that is not matched here ({operator})".lower())
