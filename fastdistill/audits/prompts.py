"""What a model is asked: a conversation up to the answer, the user's turn, or bare text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..runtime.printable import printable

# Stands for the user's words while a chat template is cut where they begin.
_USER_MARKER = "fastdistill-here"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`user` (after `system`) asks for the assistant's answer, which begins with `prefill`.

    Without `user` the model is asked to write the user's turn; with `text` to go on from there.
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
                "text: expected alone, without user, system and prefill, got "
                f"{[f.name for f in fields(self) if getattr(self, f.name)]}"
            )
        if self.prefill and self.user is None:
            raise ValueError("prefill: expected with user, whose answer it begins, got none")

    def before(self, words: str) -> Prompt:
        """The same with `words` in front: of the system's, or of bare text."""
        if self.text is not None:
            return replace(self, text=f"{words} {self.text}".strip())
        return replace(self, system=" ".join(filter(None, [words, self.system])))

    def messages(self) -> list[dict[str, str]]:
        """The conversation, the user's turn and the prefill included where there are some."""
        turns = (("system", self.system), ("user", self.user), ("assistant", self.prefill or None))
        return [{"role": role, "content": value} for role, value in turns if value is not None]

    def as_json(self) -> dict[str, str]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if values[f.name] != f.default}

    @classmethod
    def from_json(cls, record: Any) -> Prompt:
        """A mapping of the fields; a bare string is a user's question."""
        if isinstance(record, str):
            return cls(user=record)
        names = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(names):
            got = printable(repr(record))
            raise ValueError(f"prompt: expected a text or a mapping of {names}, got {got}")
        return cls(**record)


def render_prompt(prompt: Prompt, tokenizer: Any) -> str:
    """The text that a model reads, its chat template applied; a base model without one reads
    "system\\n\\nuser\\n\\n"."""
    if prompt.text is not None:
        return prompt.text
    user = _USER_MARKER if prompt.user is None else prompt.user
    turns = replace(prompt, user=user, prefill="").messages()
    if getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's, with what the template said
            raise ValueError(
                f"prompt: expected one that the chat template of the model takes, got roles "
                f"{[t['role'] for t in turns]}: {printable(error)}"
            ) from None
    else:
        text = "".join(turn["content"] + "\n\n" for turn in turns)
    if prompt.user is not None:
        return text + prompt.prefill
    before, marker, _ = text.partition(_USER_MARKER)
    if not marker:
        raise ValueError(
            "prompt: expected user, since the chat template of the model has no place where the "
            "user's words begin, got none"
        )
    return before


def to_prompts(name: str, prompts: Sequence[Any]) -> tuple[Prompt, ...]:
    """Prompts, texts or mappings as prompts; raises where there is none."""
    if isinstance(prompts, str) or not isinstance(prompts, Collection) or len(prompts) == 0:
        got = printable(repr(prompts))
        raise ValueError(f"{name}: expected one prompt or more, got {got}")
    return tuple(p if isinstance(p, Prompt) else Prompt.from_json(p) for p in prompts)
