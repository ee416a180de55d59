"""Renders conversations with a chat template and finds the tokens of assistant turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ..runtime.checks import fail
from ..runtime.printable import printable
from .messages import (
    Messages,
    as_parts,
    check_inputs,
    check_turn,
    forms,
    is_mangled,
    is_whole,
    joined,
    names,
)
from .tokenized import Span, added_ends, tokenize

_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_OF_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_ANSWER = "Zq0"  # placeholder answer, to locate what is around it
_NEXT = "Zq1"  # placeholder of the message after it
_MARK = re.compile(r"\W.*\w.*\W", re.DOTALL)  # as <end> or [/INST]
_MARK_AT = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_SPACE_AFTER_MARK = re.compile(r"(?<=[>\]]) +\Z")
_PART_OF_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")


class _Turn(NamedTuple):
    """What a template writes around an answer to a user turn."""

    header: str  # the generation prompt
    end: str  # after the answer, if it is the last message
    following: str  # between the answer and the content of a user turn after it

    @property
    def has_no_end(self) -> bool:
        """Whether a turn ends only where the mark of the next message begins."""
        return not self.end and _MARK_AT.match(self.following) is not None


_TURNS: WeakKeyDictionary[Any, dict[str, _Turn]] = WeakKeyDictionary()


@dataclass(frozen=True)
class ChatRenderer:
    """Renders conversations with a tokenizer's chat template, or encodes them.

    Args:
        column: the name in errors.
        rendering: further arguments of apply_chat_template, as `tools`.
        template_tokens: whether the assistant's turns have what the template writes before an
            answer, as an empty block of thinking.

    Raises:
        ValueError: the template or transformers rejects a conversation, or the text lacks a part
        of it.
    """

    tokenizer: Any
    column: str
    rendering: Mapping[str, Any] = field(default_factory=dict)
    template_tokens: bool = True

    def render(self, messages: Messages, prompt: bool = False) -> tuple[str, Messages]:
        """Return a conversation as text, and its messages in the form that the template reads.

        `prompt` adds the start of the assistant's next turn. The form is the first in which the
        text has everything: a template may raise, drop a content, or print the repr of a list.
        """
        tools = self.rendering.get("tools")
        rendered: list[tuple[str, Messages]] = []
        errors: list[ValueError] = []
        for form in forms(messages):
            try:
                text = self._apply(form, prompt)
            except ValueError as error:
                errors.append(error)
                continue
            if is_mangled(text, form):
                continue
            if is_whole(text, form, tools):
                rendered = [(text, form)]
                break
            rendered.append((text, form))
        if rendered:
            text, form = rendered[0]
            check_inputs(text, form, self.column)
            if tools:
                self._check_tools(text, form, prompt)
            return text, form
        if errors:
            raise errors[0]
        return fail(
            self.column, "texts, or a chat template that takes lists of parts", "lists of parts"
        )

    def encode(self, messages: Messages, first: int = 0) -> tuple[list[int], list[bool]]:
        """Return a conversation's ids, and which belong to assistant turns from `first` on."""
        text, spans = self._spans(messages, first)
        if not self.template_tokens:
            written = self._before_answer()
            spans = [
                (begin + len(written) if text.startswith(written, begin) else begin, end)
                for begin, end in spans
            ]
        tokens = tokenize(self.tokenizer, text, self.column, spans, special=False)
        return tokens.ids, tokens.inside

    def _spans(self, messages: Messages, first: int = 0) -> tuple[str, list[Span]]:
        """Return a conversation as text, and the spans of assistant turns from `first` on.

        A template with {% generation %} marks them. For other templates the span of a turn follows
        from the text up to it and from the text with another answer in its place.
        """
        text, messages = self.render(messages)
        template = self._template()
        marked = first == 0 and _GENERATION.search(template) is not None
        turns = [
            turn
            for turn, message in enumerate(messages)
            if turn >= first and message.get("role") == "assistant"
        ]
        spans: list[Span] = []
        for turn in turns:
            part = text
            if not marked:
                previous_end = spans[-1][1] if spans else 0
                spans.append(self._turn(text, messages, turn, previous_end))
                part = text[previous_end : spans[-1][1]]
            check_turn(part, messages[turn], f"{self.column}[{turn}]")
        if marked:
            return text, self._generated(text, messages, template)
        if not _turn_of(self.tokenizer, template).has_no_end:
            return text, spans
        text += self._next_mark(text, messages)
        return text, [(begin, end + len(self._mark(text, end))) for begin, end in spans]

    def _before_answer(self) -> str:
        """Return what the template writes in a turn before an answer without thinking."""
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
        text, spans = self._spans(talk)
        before, answer, _ = text[min(spans, default=(0, 0))[0] :].partition(_ANSWER)
        return before if spans and answer else ""

    def _next_mark(self, text: str, messages: Messages) -> str:
        """Return the mark with which a message after these would begin; "" if it has none."""
        if messages[-1].get("role") != "assistant":
            return ""
        if not messages[-1].get("tool_calls"):
            return self._mark(_turn_of(self.tokenizer, self._template()).following, 0)
        try:
            longer = self._apply([*messages, {"role": "tool", "content": _NEXT}])
        except ValueError:
            return ""
        return self._mark(longer, len(text)) if longer.startswith(text) else ""

    def _check_tools(self, text: str, messages: Messages, prompt: bool) -> None:
        """Raise ValueError if the text lacks a tool, or is the same without tools."""
        tools = self.rendering["tools"]
        try:
            without = self._apply(messages, prompt, tools=None)
        except ValueError:  # it needs them
            without = ""
        for name in names(tools):
            if name not in text or text == without:
                fail(
                    "tools",
                    "a chat template that renders them",
                    f"one that leaves out {printable(repr(name), 60)}",
                    "remove the tools, or use a template for them",
                )

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
            header = _turn_of(self.tokenizer, self._template()).header
            # No generation prompt here, but the turn has one, as after tools of Gemma 4.
            if header and text.startswith(header, begin) and before == rendered(turn):
                begin += len(header)
        else:  # the turn begins otherwise than the generation prompt, for example with <think>
            begin = self._content(text, messages, turn)[0]
            plain = rendered(turn) if turn else None
            if before is not None and plain is not None and text.startswith(plain):
                begin = min(max(_shared(before, text), len(plain)), begin)
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
        if end is not None and (space := _SPACE_AFTER_MARK.search(text, begin, end)):
            end = space.start()  # it may be a part of the next turn's first token
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
        text), or else after the mark at that place."""
        eos = str(getattr(self.tokenizer, "eos_token", None) or "")
        for same in (tail, tail.removesuffix(eos)):
            if (same or not tail) and text.startswith(same, at):
                return at + len(same)
        mark = self._mark(text, at)
        return at + len(mark) if mark else None

    def _mark(self, text: str, at: int) -> str:
        """Return the added token, or the mark such as <end>, that begins at `at`; "" if none."""
        added = map(str, getattr(self.tokenizer, "added_tokens_decoder", {}).values())
        tokens = [token for token in added if token.strip() and text.startswith(token, at)]
        mark = _MARK_AT.match(text, at)
        return max([*tokens, mark.group() if mark else ""], key=len)

    def _content(self, text: str, messages: Messages, turn: int) -> Span:
        """Return the span of a message's content in the conversation's text.

        The text before and after it is the same when the content is replaced."""
        words = str(joined(messages[turn]).get("content") or "").strip()
        other = ("b" if words[:1] == "a" else "a") + _ANSWER + ("b" if words[-1:] == "a" else "a")
        changed = {**messages[turn], "content": other}
        if isinstance(messages[turn].get("content"), list):
            changed = as_parts(changed)
        rendered = self._apply([*messages[:turn], changed, *messages[turn + 1 :]])
        begin = _common(text, rendered)
        suffix_length = _common(text[begin:][::-1], rendered[begin:][::-1])
        return begin, len(text) - suffix_length


def _common(a: str, b: str) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _shared(a: str, b: str) -> int:
    """Return how many characters two texts begin with alike, without a part of a mark."""
    begin = a[: _common(a, b)]
    part = _PART_OF_MARK.search(begin)
    return part.start() if part else len(begin)


def _turn_of(tokenizer: Any, template: str) -> _Turn:
    known = _TURNS.setdefault(tokenizer, {})
    if template not in known:
        known[template] = _measured_turn(ChatRenderer(tokenizer, "", {"chat_template": template}))
    return known[template]


def _measured_turn(chat: ChatRenderer) -> _Turn:
    def text(*messages: dict[str, str], prompt: bool = False) -> str:
        try:
            return chat.render(messages, prompt)[0]
        except ValueError:  # the template rejects this conversation
            return ""

    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}
    plain, prompt = text(user), text(user, prompt=True)
    following = text(user, answer, {"role": "user", "content": _NEXT})
    return _Turn(
        header=prompt.removeprefix(plain) if plain and prompt.startswith(plain) else "",
        end=text(user, answer).partition(_ANSWER)[2],
        following=following.partition(_ANSWER)[2].partition(_NEXT)[0],
    )


def turn_end(tokenizer: Any) -> int | None:
    """Return the token with which the chat template ends an assistant turn, or None.

    It is the first token after the answer in a rendered conversation, if that is a special or
    added token or a mark such as <end>. Spaces and ordinary words do not count. If nothing follows
    a last answer, it is the mark with which a user turn after it begins.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        turn = _turn_of(tokenizer, ChatRenderer(tokenizer, "chat_template")._template())
    except ValueError:  # several templates, and none is the default
        return None
    after = turn.following if turn.has_no_end else turn.end.strip()
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
