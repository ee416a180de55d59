"""Shared by test_chat and others."""

from __future__ import annotations

from typing import Any

from helpers.text_scene import (
    byte_level,
)


def made(template, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = template
    return tokenizer


def target_texts(tokenizer, row):
    """The targets as text, one part for each run of them."""
    parts: list[Any] = []
    before = False
    for token, target in zip(row.ids.tolist(), row.targets.tolist(), strict=True):
        if target != -100:
            parts = [*parts, []] if not before else parts
            parts[-1].append(token)
        before = target != -100
    return [tokenizer.decode(part) for part in parts]
