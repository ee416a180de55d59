"""Conversion between prompts and messages of Inspect.

The system message, the user turn and the prefill are one message each. The metadata of the last
message holds what chats cannot express, under "fastdistill":

    {"kind": "text"}         plain text to continue, without a chat template
    {"kind": "user turn"}    the model writes the user turn
    {"kind": "completion"}   text whose log-probability after all previous messages is requested
    {"at": [i, …]}           the position of the question in its audit
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ....runtime.checks import fail
from ..prompts import Prompt, render_turns
from ..subject import Subject, common_length
from .package import inspect_ai

METADATA_KEY = "fastdistill"
_TEXT, _USER_TURN, _COMPLETION = "text", "user turn", "completion"
_ROLES = ("system", "user", "assistant")


class _Turn(NamedTuple):
    role: str
    content: str
    metadata: dict[str, Any]


class EncodedInput(NamedTuple):
    """Token ids of an input, and the start of the completion to score."""

    ids: list[int]
    begin: int | None
    at: tuple[int, ...]  # position in the audit; () outside of an audit


def messages_of(prompt: Prompt, completion: str | None = None, at: Sequence[int] = ()) -> list[Any]:
    """Returns a prompt as messages, with the completion whose log-probability is requested."""
    turns = [_Turn(t["role"], t["content"], {}) for t in prompt.messages()]
    if prompt.text is not None:
        turns.append(_Turn("user", prompt.text, {"kind": _TEXT}))
    elif prompt.user is None:
        turns.append(_Turn("user", "", {"kind": _USER_TURN}))
    if completion is not None:
        turns.append(_Turn("assistant", completion, {"kind": _COMPLETION}))
    if at:
        turns[-1].metadata["at"] = list(at)
    kinds = {
        "system": inspect_ai.model.ChatMessageSystem,
        "user": inspect_ai.model.ChatMessageUser,
        "assistant": inspect_ai.model.ChatMessageAssistant,
    }
    return [
        kinds[role](content=content, metadata={METADATA_KEY: metadata} if metadata else None)
        for role, content, metadata in turns
    ]


def encode(messages: Sequence[Any], subject: Subject) -> EncodedInput:
    """Returns the token ids of a conversation.

    Raises:
        ValueError: turns that the chat template does not support, or that are not text.
    """
    turns = [_turn(message) for message in messages]
    if not turns:
        fail("input", "one message or more", "none")
    at = tuple(turns[-1].metadata.get("at", ()))
    is_scored = turns[-1].metadata.get("kind") == _COMPLETION
    completion = turns.pop().content if is_scored else None
    prompt = _prompt(turns)
    if prompt is None:
        ids = _conversation(turns, completion or "", subject.tokenizer)
        begin = common_length(_conversation(turns, "", subject.tokenizer), ids)
    else:
        ids, begin = subject.ids(prompt, completion or "")
    if not ids:
        fail("input", "words that the tokenizer knows", "no tokens")
    return EncodedInput(ids, None if completion is None else begin, at)


def _turn(message: Any) -> _Turn:
    if message.role not in _ROLES or getattr(message, "tool_calls", None):
        fail("input", f"turns of {', '.join(_ROLES)}, without tools", repr(message.role))
    content = message.content
    if not isinstance(content, str):
        if kinds := {part.type for part in content} - {"text"}:
            fail("input", "text", ", ".join(sorted(kinds)))
        content = "".join(part.text for part in content)
    return _Turn(message.role, content, (message.metadata or {}).get(METADATA_KEY, {}))


def _prompt(turns: Sequence[_Turn]) -> Prompt | None:
    """Returns the turns as a Prompt; None for a conversation with several questions."""
    kind = turns[-1].metadata.get("kind")
    if kind == _TEXT:
        if len(turns) > 1:
            fail("input", "one message of plain text", len(turns))
        return Prompt(text=turns[0].content)
    roles = [turn.role for turn in turns]
    if roles not in [["system"] * s + ["user"] + ["assistant"] * a for s in (0, 1) for a in (0, 1)]:
        return None
    content = {turn.role: turn.content for turn in turns}
    user = None if kind == _USER_TURN else content["user"]
    return Prompt(user=user, system=content.get("system"), prefill=content.get("assistant", ""))


def _conversation(turns: Sequence[_Turn], completion: str, tokenizer: Any) -> list[int]:
    """Returns the ids of several questions and answers; a final assistant turn is a prefill."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    prefill = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    text = render_turns("input", messages, tokenizer) + prefill + completion
    special = not getattr(tokenizer, "chat_template", None)
    ids: list[int] = tokenizer(text, add_special_tokens=special).input_ids
    return ids
