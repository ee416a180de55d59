"""Changes files so that they stay close to valid: `mutate` picks the way by the file's name.

Random bytes rarely reach past a parser. So JSON is changed as a tree, a safetensors header with its
length, a GGUF header field by field, a compressed file below its compression. One change in eight
is made to the bytes themselves.
"""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

OUTSIDE = "../outside/secret.safetensors"  # a file next to the folder that is read
NUMBERS = (*range(-1, 4), 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 10**9, 10**12)
NUMBERS += (2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
FLOATS = (0.0, -0.0, 0.5, 1e-45, 1e-320, 1e30, 1e308, float("inf"), -float("inf"), float("nan"))
TEXTS = (
    *("", " ", "x", "0", "-1", "null", "true", "nan", "1e999", "F64", "I64", "torch.uint8"),
    *(OUTSIDE, "/etc/passwd", "..", ".", "a/b", "pickled.bin", "\0", "http://127.0.0.1:9/x"),
    *("\x1b]52;c;eA==\x07", "\x1b[2J", "\x9b2J", "\u202etxt", "\ud800", "\n", "\r", "é", "😀"),
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"><svg onload=x>", "]]>"),
    *("javascript:alert(1)", "{{7*7}}", "{% for x in range(9**9) %}", "%n%s", "(a+)+$", "(?s).*"),
    *("__class__", "os.system", "__import__('os')", "builtins.eval", "A" * 4096),
)
_BYTES = tuple(bytes([c]) for c in b'\0\xff\x80\n"\\{[]},:0')
_BYTES += (b"\xff\xff\xff\xff", b"\xff" * 7 + b"\x7f", b"9" * 30, b"*a", b"&a ", b"!!int ", b"- ")
_BYTES += tuple(text.encode("utf-8", "surrogatepass") for text in TEXTS)
_DEEP = (90, 110, 500, 900, 970, 20_000)  # levels; the stack of Python has about 1000


def mutate(name: str, content: bytes, rng: random.Random) -> bytes:
    """Return a changed file; most results are still of the format of `name`."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        change = _BY_SUFFIX.get(name.rpartition(".")[2], _raw) if rng.random() < 0.875 else _raw
        try:
            content = change(content, rng)
        except Exception:
            content = _raw(content, rng)  # an earlier change left no valid file
    return content


def _raw(content: bytes, rng: random.Random) -> bytes:
    data, kind = bytearray(content), rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # headers are in front
        at = min(at, rng.randrange(256))
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + rng.choice((1, 2, 4, 8))] = rng.choice(_BYTES)
    elif kind == 2:
        data[at:at] = rng.choice(_BYTES)
    elif kind == 3:
        del data[at : at + rng.choice((1, 2, 8, 64, len(data)))]
    elif kind == 4:
        part = data[at : at + rng.randrange(1, 64)]
        data[at:at] = part * rng.choice((1, 2, 100))
    elif kind == 5:
        data[at : at + 4] = struct.pack("<I", rng.getrandbits(32))
    else:
        data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
    return bytes(data)


def _value(rng: random.Random) -> Any:
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice((None, True, False)),
        lambda: [_value(rng) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(TEXTS): _value(rng) for _ in range(rng.randrange(3))},
    )
    return rng.choice(kinds)()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _tree(value: Any, rng: random.Random) -> Any:
    places = list(_places(value)) if isinstance(value, (dict, list)) else []
    if not places or rng.random() < 0.02:
        return _value(rng)
    box, key = rng.choice(places)
    old, kind = box[key], rng.randrange(9)
    if kind == 0:
        del box[key]
    elif kind == 1 and isinstance(box, dict):
        box[rng.choice(TEXTS) if rng.random() < 0.5 else f"{key}_"] = box.pop(key)
    elif kind == 2:
        other, name = rng.choice(places)
        box[key] = json.loads(json.dumps(other[name]))
    elif kind == 3:
        box[key] = rng.choice(([old], {"x": old}, [old, old], str(old)))
    elif kind == 4 and isinstance(old, (int, float)):
        box[key] = rng.choice((old + 1, old - 1, -old, old * 2, old / 2, float(old), bool(old)))
    elif kind == 5 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        box[key] = old[:at] + rng.choice(TEXTS) + old[at + rng.randrange(3) :]
    elif kind == 6 and isinstance(box, list):
        box[key:key] = box[key:] * rng.choice((1, 3))
    else:
        box[key] = _value(rng)
    return value


def _json(content: bytes, rng: random.Random) -> bytes:
    value = _tree(json.loads(content), rng)
    text = json.dumps(value)
    if rng.random() < 0.02:
        at, deep = text.find('": ', rng.randrange(len(text))) + 3, rng.choice(_DEEP)
        if at > 2:  # before another value
            nested = '{"a":' * deep + "[]" + "}" * deep
            text = f'{text[:at]}{nested}, "b": {text[at:]}'
    return text.encode("utf-8", "surrogatepass")


def _lines(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines()
    at, kind = rng.randrange(len(lines)), rng.randrange(12)
    if kind == 0:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
    else:
        lines[at] = _json(lines[at], rng)
    return b"\n".join(lines) + b"\n" * rng.choice((0, 1, 1, 1))


def _zipped(content: bytes, rng: random.Random) -> bytes:
    return gzip.compress(_lines(gzip.decompress(content), rng), 1, mtime=0)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + content[8:]
    if kind < 4:
        return content[: 8 + size] + _raw(data, rng)
    entries = json.loads(header)
    nested = [(entries, key) for key in entries if _is_json(entries[key])]
    nested += [(e, k) for e in entries.values() if isinstance(e, dict) for k in e if _is_json(e[k])]
    if nested and kind == 4:  # settings that a header stores as texts
        box, key = rng.choice(nested)
        box[key] = _json(box[key].encode(), rng).decode("utf-8", "replace")
        header = json.dumps(entries).encode()
    else:
        header = _json(header, rng)
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def _is_json(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("{", "[")


def gguf_fields(content: bytes) -> list[tuple[int, str]]:
    """Return (offset, code of struct) of every number in a GGUF header, and of texts, as "s"."""
    fields: list[tuple[int, str]] = [(4, "I"), (8, "Q"), (16, "Q")]
    at = 24

    def number(code: str) -> Any:
        nonlocal at
        fields.append((at, code))
        value = struct.unpack_from("<" + code, content, at)[0]
        at += struct.calcsize("<" + code)
        return value

    def text() -> None:
        nonlocal at
        fields.append((at, "s"))
        at += 8 + struct.unpack_from("<Q", content, at)[0]

    codes = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
    tensors, keys = struct.unpack_from("<QQ", content, 8)
    for _ in range(keys):
        text()
        kind = number("I")
        if kind == 9:
            kind, count = number("I"), number("Q")
            for _ in range(count if kind == 8 else 0):
                text()
            at += 0 if kind == 8 else count * struct.calcsize("<" + codes[kind])
        elif kind == 8:
            text()
        else:
            number(codes[kind])
    for _ in range(tensors):
        text()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    return fields


def _gguf(content: bytes, rng: random.Random) -> bytes:
    at, code = rng.choice(gguf_fields(content))
    if code == "s":
        size = struct.unpack_from("<Q", content, at)[0]
        old = content[at + 8 : at + 8 + size]
        new = rng.choice((_raw(old, rng), rng.choice(_BYTES), old[:-1], old + b"x"))
        return content[:at] + struct.pack("<Q", len(new)) + new + content[at + 8 + size :]
    if code in "fd":
        new = struct.pack("<" + code, rng.choice((-1.0, *FLOATS[:5], *FLOATS[7:])))
    elif rng.random() < 0.5:  # another small number
        new = bytes([rng.randrange(64)]).ljust(struct.calcsize("<" + code), b"\0")
    else:
        width = struct.calcsize("<" + code)
        new = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
    return content[:at] + new + content[at + len(new) :]


def _yaml(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode("utf-8", "replace").split("\n")
    at, kind = rng.randrange(len(lines)), rng.randrange(6)
    name = lines[at].partition(":")[0]
    tag = rng.choice(
        ("int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs")
    )
    if kind == 0:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = f"{name}: !!{rng.choice((tag, 'python/name:os.system', 'merge'))} {_flow(rng)}"
    elif kind == 3:
        lines[at] = f"{name}: &a {_flow(rng)}\nb: *a"
    elif kind == 4:
        levels = rng.choice((9, 31, 32, 33, 2000))
        lines[at] = f"{name}: {'[' * levels}{']' * levels}"
    else:
        lines[at] = f"{rng.choice((name, '? [x]', rng.choice(TEXTS)))}: {_flow(rng)}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _flow(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(
            ("0x1F", "1_000", "1:30", "2020-99-99", "=", "~", "[*a]", "<<", "|", "0o8")
        )
    value = _value(rng)
    return json.dumps(value) if rng.random() < 0.7 else str(value)


_BY_SUFFIX: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "jsonl": _lines,
    "gz": _zipped,
    "safetensors": _safetensors,
    "gguf": _gguf,
    "yaml": _yaml,
}
