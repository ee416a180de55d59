"""The forms in which chat templates read messages, and whether a rendered text has all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NoReturn

from ..runtime.checks import fail
from ..runtime.json_text import JSONError, parse_json
from ..runtime.printable import printable

Message = Mapping[str, Any]
Messages = Sequence[Message]
_Rewrite = Callable[[Message], dict[str, Any]]

_INPUT_ROLES = ("system", "developer", "user")  # roles whose contents a template does not rewrite
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's message


def forms(messages: Messages) -> Iterator[Messages]:
    """Yield a conversation in each form that templates read, first as it is.

    Contents are texts or lists of parts; the arguments of a tool call are a dict or JSON; a message
    with tool calls alone has an empty content or none.
    """
    in_parts = any(isinstance(message.get("content"), list) for message in messages)
    contents: tuple[_Rewrite, ...] = (dict, joined if in_parts else as_parts)
    calls: tuple[_Rewrite, ...] = (dict, _other_arguments)
    empties: tuple[_Rewrite, ...] = (dict, _with_empty_content, _without_content)
    seen: list[Messages] = []
    for content, arguments, empty in product(contents, calls, empties):
        form = [content(arguments(empty(message))) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def joined(message: Message) -> dict[str, Any]:
    """Return a message whose content is a text."""
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    return dict(message)


def as_parts(message: Message) -> dict[str, Any]:
    """Return a message whose content is a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def _other_arguments(message: Message) -> dict[str, Any]:
    if not isinstance(message.get("tool_calls"), (list, tuple)):
        return dict(message)
    return {**message, "tool_calls": [_other_call(call) for call in message["tool_calls"]]}


def _other_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _other_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if isinstance(arguments, str):
        try:
            return {**call, "arguments": parse_json(arguments, "arguments", dict)}
        except JSONError:  # not every tool takes JSON
            return call
    return call


def _with_empty_content(message: Message) -> dict[str, Any]:
    return {**message, "content": ""} if _only_calls(message) else dict(message)


def _without_content(message: Message) -> dict[str, Any]:
    others = {key: value for key, value in message.items() if key != "content"}
    return others if _only_calls(message) else dict(message)


def _only_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message.get("content")


def is_mangled(text: str, messages: Messages) -> bool:
    """Whether a template printed the repr of a list, or quoted JSON as a string."""
    for message in messages:
        content = message.get("content")
        if content and isinstance(content, list) and str(content) in text:
            return True
        for function in _functions(message.get("tool_calls")):
            arguments = function.get("arguments")
            if arguments and isinstance(arguments, str):
                quoted = (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False))
                if any(json_text in text for json_text in quoted):
                    return True
    return False


def is_whole(text: str, messages: Messages, tools: Any) -> bool:
    """Whether a text has the contents and the tool calls of all messages."""
    named = [name for message in messages for name in names(message.get("tool_calls"))]
    listed = [*named, *names(tools)]
    return all(_has(text, message.get("content")) for message in messages) and all(
        text.count(name) >= listed.count(name) for name in set(named)
    )


def check_inputs(text: str, messages: Messages, column: str) -> None:
    """Raise ValueError if the text lacks a system or user turn."""
    for turn, message in enumerate(messages):
        if message.get("role") in _INPUT_ROLES and not _has(text, message.get("content")):
            _fail_lost(f"{column}[{turn}].content", message["content"])


def check_turn(text: str, message: Message, name: str) -> None:
    """Raise ValueError if the text of an assistant turn lacks a part of its message."""
    for key in ("content", *_THOUGHTS):
        if not _has(text, message.get(key)):
            _fail_lost(f"{name}.{key}", message[key])
    for function in names(message.get("tool_calls")):
        if function not in text:
            _fail_lost(f"{name}.tool_calls", function)


def names(calls: Any) -> list[str]:
    """Return the function names in a list of tools or tool calls."""
    values = [function.get("name") for function in _functions(calls)]
    return [name for name in values if isinstance(name, str)]


def _functions(calls: Any) -> list[Mapping[str, Any]]:
    functions = [c.get("function", c) for c in calls or () if isinstance(c, Mapping)]
    return [function for function in functions if isinstance(function, Mapping)]


def _has(text: str, content: Any) -> bool:
    """Whether a text contains a message's content, ignoring whitespace."""
    if isinstance(content, list):
        return all(_has(text, part["text"]) for part in content)
    if not isinstance(content, str) or content.strip() in text:
        return True
    return "".join(content.split()) in "".join(text.split())


def _fail_lost(name: str, content: Any) -> NoReturn:
    fail(
        name,
        "a chat template that renders it whole",
        f"one that leaves out a part of {printable(repr(content), 60)}",
        "some templates drop reasoning or tools: remove what the student should not learn, "
        "pass prompt and completion as texts, or use another chat template",
    )
