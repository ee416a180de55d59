"""Prompts: a conversation up to the answer, the start of a user turn, or plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..runtime.printable import printable

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
                raise ValueError(f"{f.name}: expected a text, got {value!r}")
        bare = (self.user, self.system, self.prefill) == (None, None, "")
        if self.text is not None and not bare:
            raise ValueError(
                "text: expected no user, system or prefill with it, got "
                f"{[f.name for f in fields(self) if getattr(self, f.name)]}"
            )
        if self.prefill and self.user is None:
            raise ValueError("prefill: expected a user turn before it, got none. Pass user")

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
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    @classmethod
    def from_json(cls, record: Any) -> Prompt:
        """Returns a Prompt from a mapping of its fields, or from a string (the user turn)."""
        if isinstance(record, str):
            return cls(user=record)
        names = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(names):
            got = printable(repr(record))
            raise ValueError(f"prompt: expected a text or a mapping of {names}, got {got}")
        return cls(**record)


def render_prompt(prompt: Prompt, tokenizer: Any) -> str:
    """Returns the input text, by the chat template or else as "system\\n\\nuser\\n\\n"."""
    if prompt.text is not None:
        return prompt.text
    user = _USER_MARKER if prompt.user is None else prompt.user
    turns = replace(prompt, user=user, prefill="").messages()
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # an error of Jinja or raised by the template
            raise ValueError(
                "prompt: expected turns that the chat template of the model supports, got roles "
                f"{[t['role'] for t in turns]}: {printable(error)}"
            ) from None
    else:
        text = "".join(turn["content"] + "\n\n" for turn in turns)
    if prompt.user is not None:
        return text + prompt.prefill
    before, marker, _ = text.partition(_USER_MARKER)
    if not marker:
        raise ValueError(
            "prompt: expected a user turn, since the chat template of the model does not render "
            "the user's words, got none. Pass user"
        )
    return before


def to_prompts(name: str, prompts: Sequence[Any]) -> tuple[Prompt, ...]:
    """Returns prompts, texts or mappings as prompts; raises ValueError where there are none."""
    if isinstance(prompts, str) or not isinstance(prompts, Collection) or len(prompts) == 0:
        got = printable(repr(prompts))
        raise ValueError(f"{name}: expected one prompt or more, got {got}")
    return tuple(p if isinstance(p, Prompt) else Prompt.from_json(p) for p in prompts)
