"""Renders conversations with a chat template and finds the tokens of assistant turns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from ..runtime.checks import fail
from ..runtime.printable import printable
from .tokenized import Span, added_ends, tokenize

Message = Mapping[str, Any]
Messages = Sequence[Message]

_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_OF_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_INPUT_ROLES = ("system", "developer", "user")  # roles whose contents a template does not rewrite
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's message
_ANSWER = "Zq0"  # placeholder answer, to locate the end of a turn
_TURN_ENDS: WeakKeyDictionary[Any, tuple[str, int | None]] = WeakKeyDictionary()
_MARK = re.compile(r"\W.*\w.*\W", re.DOTALL)  # as <end> or [/INST]


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or encodes them.

    column: the name in errors. rendering: further arguments of apply_chat_template, as `tools`.

    Raises:
        ValueError: the template or transformers rejects a conversation, or the text lacks a part
        of it.
    """

    tokenizer: Any
    column: str
    rendering: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Messages, prompt: bool = False) -> tuple[str, Messages]:
        """Return a conversation as text, and its messages in the form that the template reads.

        `prompt` adds the start of the assistant's next turn. A template reads contents as strings,
        as lists of parts, or both. One that reads only strings prints a list's repr, drops it, or
        raises; one that reads only parts drops a string.
        """
        in_parts = any(isinstance(message.get("content"), list) for message in messages)
        other = [_joined(m) if in_parts else _in_parts(m) for m in messages]
        incomplete: list[tuple[str, Messages]] = []
        errors: list[ValueError] = []
        for form in (messages, other):
            try:
                text = self._apply(form, prompt)
            except ValueError as error:
                errors.append(error)
                continue
            if _prints_parts(text, form):
                continue
            if all(_has(text, message.get("content")) for message in form):
                self._check_inputs(text, form)
                return text, form
            incomplete.append((text, form))
        if incomplete:
            self._check_inputs(*incomplete[0])
            return incomplete[0]
        if errors:
            raise errors[0]
        return fail(
            self.column, "texts, or a chat template that takes lists of parts", "lists of parts"
        )

    def encode(self, messages: Messages, first: int = 0) -> tuple[list[int], list[bool]]:
        """Return a conversation's ids, and which belong to assistant turns from `first` on.

        A template with {% generation %} marks them. For other templates the span of a turn follows
        from the text up to it and from the text with another answer in its place.
        """
        text, messages = self.render(messages)
        template = self._template()
        marked = first == 0 and _GENERATION.search(template) is not None
        spans: list[Span] = []
        for turn, message in enumerate(messages):
            if turn < first or message.get("role") != "assistant":
                continue
            part = text
            if not marked:
                previous_end = spans[-1][1] if spans else 0
                spans.append(self._turn(text, messages, turn, previous_end))
                part = text[previous_end : spans[-1][1]]
            _check_turn(part, message, f"{self.column}[{turn}]")
        if marked:
            spans = self._generated(text, messages, template)
        tokens = tokenize(self.tokenizer, text, self.column, spans, special=False)
        return tokens.ids, tokens.inside

    def _apply(self, messages: Messages, prompt: bool = False, **options: Any) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **{**self.rendering, **options},
                )
            )
        except Exception as error:  # templates raise errors of jinja, transformers or Python
            roles = [str(m.get("role")) for m in messages]
            listed = roles if len(roles) <= 6 else [*roles[:3], "…", *roles[-2:]]
            fail(
                self.column,
                "a conversation that the tokenizer's chat template takes",
                f"roles {printable(listed)}: {type(error).__name__}: {printable(error)}",
            )

    def _template(self) -> str:
        """Return the template that the tokenizer uses, which may have several."""
        default = getattr(self.tokenizer, "chat_template", None)
        chosen = self.rendering.get("chat_template")
        if isinstance(default, Mapping):
            return str(self.tokenizer.get_chat_template(chosen, self.rendering.get("tools")))
        return str(chosen or default or "")

    def _generated(self, text: str, messages: Messages, template: str) -> list[Span]:
        """Return the spans of `text` between {% generation %} and {% endgeneration %}.

        The block becomes a call of a macro that puts markers around it. transformers returns
        tokens, not characters, and misses turns that begin or end with a space that the tokenizer
        trims.
        """
        free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in text)  # for private use
        first, last = next(free), next(free)
        changed = _GENERATION.sub(r"{%\1call fastdistill_generation()\2%}", template)
        changed = _END_OF_GENERATION.sub(r"{%\1endcall\2%}", changed)
        call = f"{first}{{{{ caller() }}}}{last}"
        macro = f"{{% macro fastdistill_generation() %}}{call}{{% endmacro %}}"
        marked = self._apply(messages, chat_template=f"{macro}\n{changed}")
        spans: list[Span] = []
        at = 0
        for part in re.split(f"([{first}{last}])", marked):
            if part == first:
                spans.append((at, at))
            elif part == last:
                spans[-1] = (spans[-1][0], at)
            else:
                at += len(part)
        if marked.replace(first, "").replace(last, "") != text:
            fail(
                self.column,
                "a chat template whose {% generation %} marks tokens of the conversation",
                "one that renders another text with marks around them",
            )
        return spans

    def _check_inputs(self, text: str, messages: Messages) -> None:
        """Raise ValueError if the text lacks a system or user turn, or a tool."""
        for turn, message in enumerate(messages):
            if message.get("role") in _INPUT_ROLES and not _has(text, message.get("content")):
                _fail_lost(f"{self.column}[{turn}].content", message["content"])
        for name in _names(self.rendering.get("tools")):
            if name not in text:
                fail(
                    "tools",
                    "a chat template that renders them",
                    f"one that leaves out {printable(repr(name), 60)}",
                    "remove the tools, or use a template for them",
                )

    def _turn(self, text: str, messages: Messages, turn: int, previous_end: int) -> Span:
        """Return the span in `text` of one assistant turn, its end token included.

        Args:
            previous_end: the end of the previous assistant turn.
        """

        def rendered(upto: int, prompt: bool = False) -> str | None:
            try:
                return self._apply(messages[:upto], prompt)
            except ValueError:  # some templates require, for example, a user turn
                return None

        before = rendered(turn, prompt=True) if turn else None
        if before is not None and text.startswith(before):
            begin = len(before)
        else:  # the turn begins otherwise than the generation prompt, for example with <think>
            begin = self._content(text, messages, turn)[0]
            plain = rendered(turn) if turn else None
            if before is not None and plain is not None and text.startswith(plain):
                begin = min(max(_common(before, text), len(plain)), begin)
        end: int | None
        after = text
        if turn + 1 < len(messages):
            after = self._apply(messages[: turn + 1])
        if text.startswith(after):
            end = len(after)
        else:  # the last turn begins or ends otherwise than earlier ones
            content_end = self._content(text, messages, turn)[1]
            tail = after[self._content(after, messages[: turn + 1], turn)[1] :]
            end = self._end(text, content_end, tail)
        if end is None or not previous_end <= begin <= end:
            fail(
                self.column,
                "a chat template that leaves earlier turns as they are when others follow",
                f"one that renders turn {turn} differently then",
                "the assistant's tokens cannot be located: pass prompt and completion, or a chat "
                "template with {% generation %}",
            )
        return begin, end

    def _end(self, text: str, at: int, tail: str) -> int | None:
        """Return the end of a turn whose content ends at `at`.

        It is after `tail`, the text after this content as a last turn (with or without its end of
        text), or else after the added token at that place."""
        eos = str(getattr(self.tokenizer, "eos_token", None) or "")
        for same in (tail, tail.removesuffix(eos)):
            if same and text.startswith(same, at):
                return at + len(same)
        marks = [
            str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        ]
        matches = [mark for mark in marks if mark.strip() and text.startswith(mark, at)]
        return at + max(map(len, matches)) if matches else None

    def _content(self, text: str, messages: Messages, turn: int) -> Span:
        """Return the span of a message's content in the conversation's text.

        The text before and after it is the same when the content is replaced."""
        words = str(_joined(messages[turn]).get("content") or "").strip()
        other = ("b" if words[:1] == "a" else "a") + _ANSWER + ("b" if words[-1:] == "a" else "a")
        changed = {**messages[turn], "content": other}
        if isinstance(messages[turn].get("content"), list):
            changed = _in_parts(changed)
        rendered = self._apply([*messages[:turn], changed, *messages[turn + 1 :]])
        begin = _common(text, rendered)
        suffix_length = _common(text[begin:][::-1], rendered[begin:][::-1])
        return begin, len(text) - suffix_length


def _joined(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "".join(part["text"] for part in content)}
    return dict(message)


def _in_parts(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def _prints_parts(text: str, messages: Messages) -> bool:
    """Whether the template printed the repr of a list of parts."""
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return any(str(content) in text for content in contents if content)


def _has(text: str, content: Any) -> bool:
    """Whether a text contains a message's content, ignoring whitespace."""
    if isinstance(content, list):
        return all(_has(text, part["text"]) for part in content)
    if not isinstance(content, str) or content.strip() in text:
        return True
    return "".join(content.split()) in "".join(text.split())


def _check_turn(text: str, message: Message, name: str) -> None:
    """Raise ValueError if the text of an assistant turn lacks a part of its message."""
    for key in ("content", *_THOUGHTS):
        if not _has(text, message.get(key)):
            _fail_lost(f"{name}.{key}", message[key])
    for function in _names(message.get("tool_calls")):
        if function not in text:
            _fail_lost(f"{name}.tool_calls", function)


def _names(calls: Any) -> list[str]:
    """Return the function names in a list of tools or tool calls."""
    functions = [c.get("function", c) for c in calls or () if isinstance(c, Mapping)]
    names = [f.get("name") for f in functions if isinstance(f, Mapping)]
    return [name for name in names if isinstance(name, str)]


def _fail_lost(name: str, content: Any) -> NoReturn:
    fail(
        name,
        "a chat template that renders it whole",
        f"one that leaves out a part of {printable(repr(content), 60)}",
        "some templates drop reasoning or tools: remove what the student should not learn, "
        "pass prompt and completion as texts, or use another chat template",
    )


def _common(a: str, b: str) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends an assistant turn, or None.

    It is the first token after the answer in a rendered conversation, if that is a special or
    added token or a mark such as <end>. Spaces and ordinary words do not count.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    cached = _TURN_ENDS.get(tokenizer)
    if cached is None or cached[0] != str(template):
        cached = _TURN_ENDS[tokenizer] = (str(template), _turn_end(tokenizer))
    return cached[1]


def _turn_end(tokenizer: Any) -> int | None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = ChatRenderer(tokenizer, "chat_template")._apply(turns)
    except ValueError:  # the template rejects this conversation
        return None
    at = text.rfind(_ANSWER)
    after = text[at + len(_ANSWER) :].strip() if at >= 0 else ""
    if not after:
        return None
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    # Some tokenizers prepend a space to every text.
    words = [tokenizer.decode([i], clean_up_tokenization_spaces=False).strip() for i in ids]
    token, word = next(((i, w) for i, w in zip(ids, words, strict=True) if w), (None, ""))
    special = {
        *getattr(tokenizer, "all_special_ids", ()),
        *getattr(tokenizer, "added_tokens_decoder", ()),
    }
    is_end = token in special or (after.startswith(word) and is_mark(word))
    return token if is_end else None


def is_mark(word: str) -> bool:
    """Whether a token's text looks like a template mark, such as <end> or [/INST]."""
    return _MARK.fullmatch(word.strip()) is not None


def end_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end a text or an assistant turn."""
    if tokenizer is None:
        return []
    ids = [getattr(tokenizer, "eos_token_id", None), turn_end(tokenizer)]
    if callable(tokenizer):
        ids += added_ends(tokenizer)[:1]
    return sorted({i for i in ids if i is not None})
