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
from dataclasses import replace
from typing import Any, NamedTuple

from .inspect_package import inspect_ai
from .prompts import Prompt
from .subject import Subject

METADATA_KEY = "fastdistill"
_TEXT, _USER_TURN, _COMPLETION = "text", "user turn", "completion"
_ROLES = ("system", "user", "assistant")


class EncodedInput(NamedTuple):
    """Token ids of an input, and the start of the completion to score."""

    ids: list[int]
    begin: int | None
    at: tuple[int, ...]  # position in the audit; () outside of an audit


def messages_of(prompt: Prompt, completion: str | None = None, at: Sequence[int] = ()) -> list[Any]:
    """Returns a prompt as messages, with the completion whose log-probability is requested."""
    position: dict[str, Any] = {"at": list(at)} if at else {}
    turns: list[tuple[str, str, dict[str, Any]]]
    if prompt.text is not None:
        turns = [("user", prompt.text, {"kind": _TEXT})]
    elif prompt.user is None:
        turns = [(t["role"], t["content"], {}) for t in prompt.messages()]
        turns.append(("user", "", {"kind": _USER_TURN}))
    else:
        turns = [(t["role"], t["content"], {}) for t in prompt.messages()]
    if completion is not None:
        turns.append(("assistant", completion, {"kind": _COMPLETION}))
    role, content, metadata = turns[-1]
    turns[-1] = (role, content, {**metadata, **position})
    return [_message(*turn) for turn in turns]


def _message(role: str, content: str, metadata: dict[str, Any]) -> Any:
    kinds = {
        "system": inspect_ai.model.ChatMessageSystem,
        "user": inspect_ai.model.ChatMessageUser,
        "assistant": inspect_ai.model.ChatMessageAssistant,
    }
    return kinds[role](content=content, metadata={METADATA_KEY: metadata} if metadata else None)


def encode(messages: Sequence[Any], subject: Subject) -> EncodedInput:
    """Returns the token ids of a conversation.

    Raises:
        ValueError: turns that the chat template does not support, or that are not text.
    """
    turns = [(_role(m), _text(m), (m.metadata or {}).get(METADATA_KEY, {})) for m in messages]
    if not turns:
        raise ValueError("input: expected one message or more, got none")
    at = tuple(turns[-1][2].get("at", ()))
    completion = turns.pop()[1] if turns[-1][2].get("kind") == _COMPLETION else None
    prompt = _prompt(turns)
    if prompt is None:
        ids = _conversation(turns, completion or "", subject.tokenizer)
        before = _conversation(turns, "", subject.tokenizer)
        begin = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before)
        )
    else:
        ids, begin = subject.ids(prompt, completion or "")
    if not ids:
        raise ValueError("input: expected words that the tokenizer knows, got no tokens")
    return EncodedInput(ids, None if completion is None else begin, at)


def _role(message: Any) -> str:
    if message.role not in _ROLES or getattr(message, "tool_calls", None):
        raise ValueError(
            f"input: expected turns of {', '.join(_ROLES)}, without tools, got {message.role!r}"
        )
    return message.role


def _text(message: Any) -> str:
    if isinstance(message.content, str):
        return message.content
    kinds = {part.type for part in message.content}
    if kinds - {"text"}:
        raise ValueError(f"input: expected text, got {', '.join(sorted(kinds - {'text'}))}")
    return "".join(part.text for part in message.content)


def _prompt(turns: Sequence[tuple[str, str, dict[str, Any]]]) -> Prompt | None:
    """Returns the turns as a Prompt; None for a conversation with several questions."""
    kind = turns[-1][2].get("kind")
    if kind == _TEXT:
        if len(turns) > 1:
            raise ValueError(f"input: expected one message of plain text, got {len(turns)}")
        return Prompt(text=turns[0][1])
    roles = [role for role, _, _ in turns]
    if roles not in [["system"] * s + ["user"] + ["assistant"] * a for s in (0, 1) for a in (0, 1)]:
        return None
    content_by_role = {role: content for role, content, _ in turns}
    prompt = Prompt(
        user=content_by_role["user"],
        system=content_by_role.get("system"),
        prefill=content_by_role.get("assistant", ""),
    )
    return replace(prompt, user=None) if kind == _USER_TURN else prompt


def _conversation(turns: Sequence[Any], completion: str, tokenizer: Any) -> list[int]:
    """Returns the ids of several questions and answers; a final assistant turn is a prefill."""
    messages = [{"role": role, "content": content} for role, content, _ in turns]
    prefill = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    template = getattr(tokenizer, "chat_template", None)
    if template:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # an error of Jinja or raised by the template
            raise ValueError(
                "input: expected turns that the chat template of the model supports, got "
                f"{[t['role'] for t in messages]}: {error}"
            ) from None
    else:
        text = "".join(turn["content"] + "\n\n" for turn in messages)
    return tokenizer(text + prefill + completion, add_special_tokens=not template).input_ids
