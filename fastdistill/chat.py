"""Conversations as text: a tokenizer's chat template, the assistant's turns, and their end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from .checks import fail
from .runtime.printable import printable
from .tokenized import Span, added_ends, tokenize

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "Zq0"  # stands for an answer while the end of a turn is looked for
_TURN_ENDS: WeakKeyDictionary[Any, tuple[str, int | None]] = WeakKeyDictionary()
_MARK = re.compile(r"\W.*\w.*\W", re.DOTALL)  # as <end> or [/INST]


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    column: str,
    rendering: Mapping[str, Any],
    *,
    prompt: bool = False,
) -> str:
    """Return a conversation as text; with `prompt` up to where the assistant's next turn begins.

    Raises:
        ValueError: the template, or transformers, does not take the conversation.
    """
    text = _applied(tokenizer, messages, column, rendering, prompt)
    parts = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    if any(str(part) in text for part in parts):  # the template takes texts only
        text = _applied(tokenizer, [_joined(m) for m in messages], column, rendering, prompt)
    return str(text)


def _applied(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    column: str,
    rendering: Mapping[str, Any],
    prompt: bool,
    **options: Any,
) -> Any:
    options = {"tokenize": False} | options
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=prompt, **options, **rendering
        )
    except Exception as error:  # jinja's, transformers' or Python's: whatever a template raises
        roles = [str(m.get("role")) for m in messages]
        shown = roles if len(roles) <= 6 else [*roles[:3], "…", *roles[-2:]]
        fail(column, "a conversation that the tokenizer's chat template takes",
             f"roles {printable(shown)}: {type(error).__name__}: {printable(error)}")  # fmt: skip


def _joined(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    return dict(message)


def encode_conversation(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    column: str,
    rendering: Mapping[str, Any],
    first: int = 0,
) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids, and which of them the assistant says in turns from `first` on.

    A template with {% generation %} tells that itself. Stock templates have none: there the text up
    to a turn, and up to its end, tells, as long as later turns leave earlier ones as they were.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if first == 0 and _GENERATION.search(template):
        text = render(tokenizer, messages, column, rendering)
        tokenize(tokenizer, text, column, (), special=False)  # the checks that every text passes
        read = _applied(
            tokenizer, messages, column, rendering, False, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        return list(read["input_ids"]), [bool(said) for said in read["assistant_masks"]]
    text = render(tokenizer, messages, column, rendering)
    spans = [
        _turn(tokenizer, text, messages, i, column, rendering)
        for i, message in enumerate(messages)
        if i >= first and message.get("role") == "assistant"
    ]
    read = tokenize(tokenizer, text, column, spans, special=False)
    return read.ids, read.inside


def _turn(
    tokenizer: Any,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    turn: int,
    column: str,
    rendering: Mapping[str, Any],
) -> Span:
    """Return the characters of `text` that the assistant says in one turn, its end included."""
    behind = render(tokenizer, messages[: turn + 1], column, rendering)
    begin: int | None
    try:
        if turn == 0:
            raise ValueError("nothing precedes the first turn")
        before = render(tokenizer, messages[:turn], column, rendering, prompt=True)
        begin = len(before) if behind.startswith(before) else None
    except ValueError:  # templates that take no conversation without, say, a user's turn
        begin = _content_begin(tokenizer, behind, messages[: turn + 1], column, rendering)
    if begin is None or not text.startswith(behind):
        fail(column, "a chat template that leaves earlier turns as they are when others follow",
             f"one that renders turn {turn} differently then (as Qwen3's drops earlier thinking)",
             "the assistant's tokens cannot be told apart: Pass prompt and completion, or a chat "
             "template with {% generation %}")  # fmt: skip
    return begin, len(behind)


def _content_begin(
    tokenizer: Any,
    text: str,
    messages: Sequence[Mapping[str, Any]],
    column: str,
    rendering: Mapping[str, Any],
) -> int | None:
    """Return where the last message's content begins: up to there another content changes nothing.

    `text` is the conversation with its own content.
    """
    content = _joined(messages[-1]).get("content")
    if not content:
        return None
    other = ("b" if content.lstrip()[:1] == "a" else "a") + _ANSWER
    changed = [*messages[:-1], {**messages[-1], "content": other}]
    rendered = render(tokenizer, changed, column, rendering)
    same = 0
    while same < min(len(text), len(rendered)) and text[same] == rendered[same]:
        same += 1
    return same


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends an assistant's turn, if there is one.

    It is measured: the first token behind the answer of a rendered conversation, if it is a special
    or an added token, or a mark such as <end>. Spaces, and words that a text could have too, end
    nothing.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    known = _TURN_ENDS.get(tokenizer)
    if known is None or known[0] != str(template):
        known = _TURN_ENDS[tokenizer] = (str(template), _turn_end(tokenizer))
    return known[1]


def _turn_end(tokenizer: Any) -> int | None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(tokenizer, turns, "chat_template", {})
    except ValueError:  # it takes no such conversation
        return None
    at = text.rfind(_ANSWER)
    behind = text[at + len(_ANSWER) :].strip() if at >= 0 else ""
    if not behind:
        return None
    ids = list(tokenizer(behind, add_special_tokens=False)["input_ids"])
    # Some tokenizers begin every text with a space of their own.
    words = [tokenizer.decode([i], clean_up_tokenization_spaces=False).strip() for i in ids]
    token, word = next(((i, w) for i, w in zip(ids, words, strict=True) if w), (None, ""))
    special = {
        *getattr(tokenizer, "all_special_ids", ()),
        *getattr(tokenizer, "added_tokens_decoder", ()),
    }
    is_end = token in special or (behind.startswith(word) and is_mark(word))
    return token if is_end else None


def is_mark(word: str) -> bool:
    """Return whether a token's text is a mark of a template, such as <end> or [/INST]."""
    return _MARK.fullmatch(word.strip()) is not None


def end_ids(tokenizer: Any) -> list[int]:
    """Return every id that ends what the tokenizer writes: a text, or an assistant's turn."""
    if tokenizer is None:
        return []
    ids = [getattr(tokenizer, "eos_token_id", None), turn_end(tokenizer)]
    if callable(tokenizer):
        ids += added_ends(tokenizer)[:1]
    return sorted({i for i in ids if i is not None})
