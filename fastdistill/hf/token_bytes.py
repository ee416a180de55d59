"""The bytes of the tokens of a fast tokenizer: byte-level BPE, or SentencePiece in `tokenizers`.

byte-level (GPT-2)    "Ġcat" -> b" cat"       each character stands for a byte
SentencePiece         "▁cat" -> b" cat"       "<0x0A>" -> b"\\n" with byte fallback
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..runtime.checks import fail
from ..runtime.json_text import parse_json

_PROBE = "Tom said: 12 + 3 = 15\n  and A_b"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token of a tokenizer, and its special tokens.

    texts: id -> bytes, of ordinary tokens. special: id -> the text of a special token.
    ids: bytes -> the id that the tokenizer uses for them: of tokens with the same bytes an added
    one comes first, and one of byte fallback last.
    adds_space: whether the tokenizer puts a space before a text, as Llama 2's.
    """

    tokenizer: Any
    texts: Mapping[int, bytes]
    special: Mapping[int, str]
    ids: Mapping[bytes, int]
    adds_space: bool

    @classmethod
    def of(cls, tokenizer: Any, role: str) -> TokenBytes:
        """Read a tokenizer; `role` is the argument that errors name.

        Raises:
            ValueError: it is no fast tokenizer, its tokens have no known bytes, or it changes a
                text.
        """
        core = getattr(tokenizer, "backend_tokenizer", None)
        steps = list(_decoders(core))
        is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        mark = next((m for step in steps if (m := _mark_for_space(step)) is not None), None)
        if not is_byte_level and mark is None:
            fail(
                role,
                "a fast tokenizer of byte-level BPE or SentencePiece tokens, whose bytes are known",
                type(tokenizer).__name__,
                "load the tokenizer with AutoTokenizer.from_pretrained",
            )
        falls_back = any(step["type"] == "ByteFallback" for step in steps)
        added = tokenizer.added_tokens_decoder
        named = set(tokenizer.all_special_ids)
        table = {character: byte for byte, character in bytes_to_unicode().items()}
        texts: dict[int, bytes] = {}
        fallbacks: dict[int, bytes] = {}
        special: dict[int, str] = {}
        for token, i in tokenizer.get_vocab().items():
            byte = _BYTE.fullmatch(token) if falls_back else None
            if byte is not None:
                fallbacks[i] = bytes([int(byte[1], 16)])
            elif i in named or (i in added and added[i].special):
                special[i] = token
            elif i in added:
                texts[i] = token.encode()
            elif not is_byte_level:
                texts[i] = token.replace(str(mark), " ").encode()
            elif all(character in table for character in token):
                texts[i] = bytes(table[character] for character in token)
        texts |= fallbacks
        ids: dict[bytes, int] = {}
        for i in sorted(texts, key=lambda i: (i in fallbacks, i not in added, i)):
            ids.setdefault(texts[i], i)
        read = cls(tokenizer, texts, special, ids, adds_space=False)
        probe = b"".join(read.pieces(read.encode(_PROBE)))
        if probe.removeprefix(b" ") != _PROBE.encode():
            hint = "use a tokenizer that neither changes letters nor drops spaces"
            fail(role, f"a tokenizer that keeps the text {_PROBE!r}", repr(probe.decode()), hint)
        return cls(tokenizer, texts, special, ids, adds_space=probe.startswith(b" "))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which nothing counts as a special token."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return ids

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of tokens; none for special and unknown ones."""
        return [self.texts.get(i, b"") for i in ids]


def _decoders(core: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps with which a tokenizer of the package tokenizers decodes."""
    decoder = getattr(core, "decoder", None)
    if decoder is not None:
        state = parse_json(decoder.__getstate__(), "tokenizer", dict)
        yield from state.get("decoders", [state])


def _mark_for_space(step: Mapping[str, Any]) -> str | None:
    """Return the character that a decoder replaces with a space, or None."""
    if step["type"] == "Metaspace":
        return str(step["replacement"])
    if step["type"] == "Replace" and step["content"] == " ":
        return str(step["pattern"].get("String"))
    return None
