"""Compares tokenizers by their map from tokens to ids, and sets their chat template."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from ..runtime.checks import fail
from ..runtime.printable import printable


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the sha256 of the map from tokens to ids, including added and special tokens.

    Distillation needs equal maps only. The roles of special tokens, such as end and padding, differ
    between a base model and its chat version (Qwen, Llama), which can distill each other.
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    if not callable(get_vocab):
        raise TypeError(
            f"tokenizer: expected an object with get_vocab(), got {type(tokenizer).__name__}. "
            "Pass the tokenizer, or leave it out"
        )
    pairs = sorted(get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def check_same_tokenizer(student: Any, teacher: Any) -> None:
    """Raise ValueError unless both tokenizers map the same tokens to the same ids."""
    student_digest, teacher_digest = tokenizer_fingerprint(student), tokenizer_fingerprint(teacher)
    if student_digest == teacher_digest:
        return
    a, b = student.get_vocab(), teacher.get_vocab()
    differing = [token for token in a.keys() | b.keys() if a.get(token) != b.get(token)]
    example = min(differing, key=lambda token: min(a.get(token, 1 << 60), b.get(token, 1 << 60)))
    raise ValueError(
        f"processing_class: expected the teacher's tokenizer, got one in which {len(differing):,} "
        f"tokens have another id (first: {example!r} is {a.get(example)} for the student and "
        f"{b.get(example)} for the teacher). Top-k distillation compares probabilities id by id: "
        "use a teacher and a student of one tokenizer, or a MappedTeacher"
    )


def tokenizer_of(processing_class: Any) -> Any:
    """Return a tokenizer, or that of a processor with the processor's chat template."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    template = getattr(processing_class, "chat_template", None)
    if tokenizer is processing_class or not isinstance(template, str):
        return tokenizer
    return with_chat_template(tokenizer, template)


def with_chat_template(tokenizer: Any, chat_template: str | Path | None) -> Any:
    """Return a copy of a tokenizer or processor with another template, or itself if that is None.

    Args:
        chat_template: the Jinja text of a template, or the path of a file with it. A text with {{
            or {% is a template.

    Raises:
        ValueError: no such file, or no tokenizer.
    """
    if chat_template is None:
        return tokenizer
    if tokenizer is None:
        fail("chat_template", "None without a tokenizer", "a template", "pass the tokenizer")
    text = str(chat_template)
    if isinstance(chat_template, Path) or not ("{{" in text or "{%" in text):
        try:
            text = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            fail(
                "chat_template",
                "a template with {{ or {%, or the path of a file with one",
                f"{printable(repr(str(chat_template)), 200)}: {reason}",
            )
    changed = copy.copy(tokenizer)
    changed.chat_template = text
    if hasattr(changed, "tokenizer"):  # of a processor, which saves it, too
        changed.tokenizer = with_chat_template(changed.tokenizer, chat_template)
    return changed
