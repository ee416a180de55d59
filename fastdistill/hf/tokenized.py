"""Tokenizes a text and finds the tokens that belong to spans of it.

A text is tokenized whole: separate parts would gain spaces and lose tokens that cross a boundary.
The position of a token is known from its offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..runtime.checks import fail
from ..runtime.printable import printable
from .columns import check_text

Span = tuple[int, int]  # characters of a text: [start, end)


class Tokens(NamedTuple):
    """A text's own tokens, and the special tokens that the tokenizer adds around it."""

    before: list[int]
    ids: list[int]
    after: list[int]
    inside: list[bool]  # whether ids[i] overlaps one of the spans
    unknown: int = 0  # characters without a token in the vocabulary


def tokenize(
    tokenizer: Any, text: str, column: str, spans: Sequence[Span], *, special: bool
) -> Tokens:
    """Return the tokens of a text.

    Args:
        tokenizer: a tokenizer of transformers. column: the name in errors.
        spans: the spans of the text whose tokens are marked. A token belongs to a span if they
            overlap.
        special: whether to add the tokenizer's tokens for the beginning and end of a text. A
            beginning that the text already has is not added.

    Raises:
        ValueError: the tokenizer rejects the text, or does not provide the positions of tokens.
    """
    check_text(column, text)
    if getattr(tokenizer, "is_fast", False):
        tokens = _by_offsets(tokenizer, text, column, spans, special)
    else:
        before, ids, after = _around(tokenizer, text, column, special)
        inside = _by_prefixes(tokenizer, text, column, spans, ids)
        tokens = Tokens(before, ids, after, inside)
    if tokens.before and tokens.ids[: len(tokens.before)] == tokens.before:
        return tokens._replace(before=[])
    return tokens


def tokenize_pair(tokenizer: Any, prompt: str, completion: str) -> Tokens:
    """Return the tokens of prompt + completion as one text; the completion's are `inside`.

    A word-level tokenizer may have no token for the word across the boundary, but tokens for its
    two parts. The two texts are then tokenized separately, so that nothing is lost.
    """
    text, column = prompt + completion, "prompt and completion"
    spans = [(len(prompt), len(text))] if completion else []
    whole = tokenize(tokenizer, text, column, spans, special=True)
    if not whole.unknown or not (prompt and completion):
        return whole
    first = tokenize(tokenizer, prompt, "prompt", (), special=True)
    second = tokenize(tokenizer, completion, "completion", (), special=False)
    if first.unknown + second.unknown >= whole.unknown:
        return whole
    inside = [False] * len(first.ids) + [True] * len(second.ids)
    return Tokens(first.before, first.ids + second.ids, first.after, inside)


def append_end(tokenizer: Any, tokens: Tokens, ends: Sequence[int] | None) -> list[int]:
    """Return a text's ids with one end token.

    Args:
        ends: ids that end a text or a turn. A text that ends with one of them, ignoring whitespace,
            is unchanged. Other texts get the tokenizer's own end tokens, or else its eos token.
            None: every text gets it.
    """
    own = set() if ends is None else {*ends, *tokens.after[:1]}
    at = max((i for i, token in enumerate(tokens.ids) if token in own), default=None)
    if at is not None:
        rest = tokens.ids[at + 1 :]
        if not rest or tokenizer.decode(rest, clean_up_tokenization_spaces=False).isspace():
            return tokens.ids
    end = getattr(tokenizer, "eos_token_id", None)
    return [*tokens.ids, *(tokens.after or ([] if end is None else [end]))]


def _call(tokenizer: Any, text: str, column: str, **options: Any) -> Any:
    try:
        return tokenizer(text, **options)
    except Exception as error:  # tokenizer libraries raise errors of any type
        got = f"{printable(repr(text), 60)}: {type(error).__name__}: {printable(error)}"
        fail(column, f"a text that {type(tokenizer).__name__} takes", got)


def _by_offsets(
    tokenizer: Any, text: str, column: str, spans: Sequence[Span], special: bool
) -> Tokens:
    read = _call(
        tokenizer,
        text,
        column,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, offsets = list(read["input_ids"]), [tuple(at) for at in read["offset_mapping"]]
    # The mask marks tokens that the tokenizer added, not special tokens that the text contains.
    added = read["special_tokens_mask"] if special else [0] * len(ids)
    own = [i for i in range(len(ids)) if not added[i]]
    if not own:
        before = [i for i in ids if i in _beginnings(tokenizer)]
        return Tokens(before, [], [i for i in ids if i not in before], [])
    first, last = own[0], own[-1] + 1
    inside = _inside(tokenizer, text, ids[first:last], offsets[first:last], spans)
    nothing = _unknown(tokenizer)
    unknown = sum(end - start for i, (start, end) in zip(ids, offsets, strict=True) if i in nothing)
    return Tokens(ids[:first], ids[first:last], ids[last:], inside, unknown)


def _inside(
    tokenizer: Any, text: str, ids: list[int], offsets: list[Span], spans: Sequence[Span]
) -> list[bool]:
    """Return which tokens overlap a span; an empty token (trimmed spaces) is after its position."""
    inside = [False] * len(ids)
    for low, high in spans:
        last = None  # the last token before the span
        for i, (start, end) in enumerate(offsets):
            if end <= low:
                last = i
            elif start < high or (start == end and end <= high):
                inside[i] = True
        if last is not None and _untrimmed(tokenizer, text, ids[last], offsets[last]) > low:
            inside[last] = True
    return inside


def _untrimmed(tokenizer: Any, text: str, token: int, at: Span) -> int:
    """Return the end of a token, including trailing spaces that the tokenizer trimmed."""
    start, end = at
    if start == end or text[end - 1].isspace():
        return end
    piece = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return end + len(piece) - len(piece.rstrip())


def _around(
    tokenizer: Any, text: str, column: str, special: bool
) -> tuple[list[int], list[int], list[int]]:
    """Return (before, ids, after) without offsets, by comparing with and without special tokens."""
    plain = list(_call(tokenizer, text, column, add_special_tokens=False)["input_ids"])
    if not special:
        return [], plain, []
    whole = list(_call(tokenizer, text, column, add_special_tokens=True)["input_ids"])
    if not plain:
        before = [i for i in whole if i in _beginnings(tokenizer)]
        return before, [], [i for i in whole if i not in before]
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return whole[:at], plain, whole[at + len(plain) :]
    return fail(
        "processing_class",
        "a tokenizer that puts special tokens around a text",
        f"{type(tokenizer).__name__}, which changes the text's tokens with them ({column})",
    )


def _by_prefixes(
    tokenizer: Any, text: str, column: str, spans: Sequence[Span], ids: list[int]
) -> list[bool]:
    """Return which tokens overlap a span, without offsets, by tokenizing prefixes of the text."""
    inside = [False] * len(ids)
    for span in spans:
        low, high = (_length(tokenizer, text, column, at, ids) for at in span)
        inside[low:high] = [True] * (high - low)
    return inside


def _length(tokenizer: Any, text: str, column: str, at: int, ids: list[int]) -> int:
    if at in (0, len(text)):
        return 0 if at == 0 else len(ids)
    part = list(_call(tokenizer, text[:at], column, add_special_tokens=False)["input_ids"])
    if ids[: len(part)] != part:
        fail(
            "processing_class",
            "a fast tokenizer, which knows where in a text a token is",
            f"{type(tokenizer).__name__}, and {column} has a token on both sides of a boundary "
            f"({printable(repr(text[max(at - 20, 0) : at + 20]), 60)})",
        )
    return len(part)


def _beginnings(tokenizer: Any) -> set[int]:
    names = ("bos_token_id", "cls_token_id")
    return {i for i in (getattr(tokenizer, name, None) for name in names) if i is not None}


def _unknown(tokenizer: Any) -> set[int]:
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    token = getattr(model, "unk_token", None)
    ids = {getattr(tokenizer, "unk_token_id", None)}
    if isinstance(token, str):
        ids.add(tokenizer.backend_tokenizer.token_to_id(token))
    return {i for i in ids if i is not None}


def added_ends(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer appends to every text."""
    return _around(tokenizer, "a", "text", True)[2]
