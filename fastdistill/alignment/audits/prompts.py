"""Prompts: a conversation up to the answer, the start of a user turn, or plain text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...runtime.checks import fail
from ...runtime.printable import printable

# Placeholder of the user's words, at which a rendered chat template is cut.
_USER_MARKER = "fastdistill-here"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt. The model answers `user` (after `system`); its answer starts with `prefill`.

    Without `user` the model writes the user's turn. With `text` it continues plain text.
    """

    user: str | None = None
    system: str | None = None
    prefill: str = ""
    text: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, str) and (value is not None or f.name == "prefill"):
                fail(f.name, "a text", repr(value))
        bare = (self.user, self.system, self.prefill) == (None, None, "")
        if self.text is not None and not bare:
            names = [f.name for f in fields(self) if getattr(self, f.name)]
            fail("text", "no user, system or prefill with it", names)
        if self.prefill and self.user is None:
            fail("prefill", "a user turn before it", "none", "pass user")

    def before(self, words: str) -> Prompt:
        """Returns the prompt with `words` before the system message, or before plain text."""
        if self.text is not None:
            return replace(self, text=f"{words} {self.text}".strip())
        return replace(self, system=" ".join(filter(None, [words, self.system])))

    def messages(self) -> list[dict[str, str]]:
        """Returns the conversation as messages, with the prefill as an assistant message."""
        turns = (("system", self.system), ("user", self.user), ("assistant", self.prefill or None))
        return [{"role": role, "content": value} for role, value in turns if value is not None]

    def as_json(self) -> dict[str, str]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, record: Any) -> Prompt:
        """Returns a Prompt from a mapping of its fields, or from a string (the user turn)."""
        if isinstance(record, str):
            return cls(user=record)
        names = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(names):
            fail("prompt", f"a text or a mapping of {names}", printable(repr(record)))
        return cls(**record)


def render_prompt(prompt: Prompt, tokenizer: Any) -> str:
    """Returns the input text, by the chat template or else as "system\\n\\nuser\\n\\n"."""
    if prompt.text is not None:
        return prompt.text
    user = _USER_MARKER if prompt.user is None else prompt.user
    text = render_turns("prompt", replace(prompt, user=user, prefill="").messages(), tokenizer)
    if prompt.user is not None:
        return text + prompt.prefill
    before, marker, _ = text.partition(_USER_MARKER)
    if not marker:
        expected = "a user turn, since the chat template of the model does not render user's words"
        fail("prompt", expected, "none", "pass user")
    return before


def render_turns(name: str, turns: Sequence[Mapping[str, str]], tokenizer: Any) -> str:
    """Returns messages up to the answer, by the chat template or else with two line breaks each."""
    if not getattr(tokenizer, "chat_template", None):
        return "".join(turn["content"] + "\n\n" for turn in turns)
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # an error of Jinja or raised by the template
        raise ValueError(
            f"{name}: expected turns that the chat template of the model supports, got roles "
            f"{[t['role'] for t in turns]}: {printable(error)}"
        ) from None


def to_prompts(name: str, prompts: Sequence[Any]) -> tuple[Prompt, ...]:
    """Returns prompts, texts or mappings as prompts; raises ValueError where there are none."""
    is_list = isinstance(prompts, Collection) and not isinstance(prompts, (str, Mapping))
    if not is_list or len(prompts) == 0:
        fail(name, "one prompt or more", printable(repr(prompts)))
    return tuple(p if isinstance(p, Prompt) else Prompt.from_json(p) for p in prompts)


def set_prompts(record: Any, *names: str) -> None:
    """Converts these fields of a frozen dataclass by `to_prompts`."""
    for name in names:
        object.__setattr__(record, name, to_prompts(name, getattr(record, name)))


def set_texts(record: Any, *names: str) -> None:
    """Converts these fields of a frozen dataclass to tuples of one text or more."""
    for name in names:
        texts = getattr(record, name)
        if isinstance(texts, str) or not texts:
            fail(name, "one text or more", repr(texts))
        object.__setattr__(record, name, tuple(texts))


def check_one_per_prompt(name: str, values: Sequence[Any], prompts: Sequence[Prompt]) -> None:
    """Raises ValueError where the numbers of values and prompts differ."""
    if len(values) != len(prompts):
        fail(name, f"{len(prompts)}, one per prompt", len(values))
