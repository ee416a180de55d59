"""Checks the columns of an example: which are read, and which raise an error.

A column is either read, or it is text or a single value that describes the example. An unread
column of numbers, bytes or objects could change the meaning of the example, so it raises an error.
So does one with a name of content, such as "response", whose text is in no column that is read.
None counts as absent, since Arrow fills missing columns with it.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from itertools import islice
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ..runtime.checks import fail
from ..runtime.json_text import JSONError, parse_json
from ..runtime.printable import printable

FORMS = "input_ids, messages, prompt and completion, or text"
MASKS = ("assistant_masks", "completion_mask")  # of the targets
TEACHER_PROMPT = "teacher_prompt"  # what the teacher reads before the answer, instead of the prompt
# The columns that each form reads, in order of preference of the forms.
_READ = {
    "input_ids": ("labels", "attention_mask", *MASKS, "position_ids", "token_type_ids"),
    "messages": ("tools", "chat_template_kwargs", TEACHER_PROMPT),
    "prompt": ("completion", "tools", "chat_template_kwargs", TEACHER_PROMPT),
    "text": (),
}
_TEXTS = ("messages", "prompt", "completion", "text", "tools", "chat_template_kwargs")
# Columns of instruction and preference datasets that are part of the conversation.
_CONTENT = (
    *("instruction", "input", "system", "system_prompt", "conversation", "conversations"),
    *("response", "responses", "output", "outputs", "chosen", "rejected"),
)
# Columns of images, audio and video. A path or URL in one of them is not an ignored text.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_SINGLE = (
    str,
    bool,
    int,
    float,
    complex,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    PurePath,
)
# Keys by which other formats mark whether an assistant turn is trained on.
_TRAIN_KEYS = ("weight", "train", "training")
_TEXT_PARTS = ("text", "input_text", "output_text")  # types of parts of a content
_LOOKED_AT = 8  # items of a list that are inspected


def check_columns(example: Any, tensors: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Return the form of an example and its columns that are not None.

    `tensors`: names of the tensors that the model reads with input_ids.

    Raises:
        ValueError or TypeError: it has no known form, a column of the wrong type, or a column that
        is not read.
    """
    if not isinstance(example, Mapping):
        fail("train_dataset", f"dicts with {FORMS}", type(example).__name__)
    columns = {name: value for name, value in example.items() if value is not None}
    form = form_of(columns)
    if form is None:
        empty = sorted(str(name) for name in example if name not in columns)
        got = f"{sorted(map(str, columns))}" + (f", and None in {empty}" if empty else "")
        fail("train_dataset", f"dicts with {FORMS}", printable(got))
    for name, value in columns.items():
        is_tensor = form == "input_ids" and name in tensors
        if name != form and name not in _READ[form] and not is_tensor:
            _check_unread(str(name), value, form, columns)
    if form == "messages":
        columns["messages"] = check_messages("messages", columns["messages"])
        _check_train_keys("messages", columns["messages"])
    elif form == "prompt":
        columns |= _checked_pair(columns["prompt"], columns.get("completion"))
    elif form == "text":
        check_text("text", columns["text"])
    if form != "input_ids":
        columns |= _checked_rendering(columns, form)
    if TEACHER_PROMPT in columns:
        columns[TEACHER_PROMPT] = _checked_teacher_prompt(columns[TEACHER_PROMPT], form, columns)
    return form, columns


def _checked_teacher_prompt(value: Any, form: str, columns: Mapping[str, Any]) -> Any:
    if form not in ("messages", "prompt"):
        fail(TEACHER_PROMPT, "messages, or prompt and completion, beside it", form)
    if isinstance(columns[form], str):
        return check_text(TEACHER_PROMPT, value)
    return check_messages(TEACHER_PROMPT, value)


def form_of(example: Mapping[Any, Any]) -> str | None:
    """Return the column that decides how an example is read; None if it has none of them."""
    return next((name for name in _READ if example.get(name) is not None), None)


def check_text(name: str, value: Any) -> str:
    """Return a text; raise ValueError for another type or text that is not valid UTF-8."""
    if not isinstance(value, str):
        fail(name, "a text", f"{type(value).__name__} {printable(repr(value), 60)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = printable(value[error.start])
        fail(
            name,
            "a text",
            f"half of a surrogate pair ({half}) at character {error.start}",
            "the text was cut inside a character; remove that half",
        )
    return str(value)


def check_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation without keys whose value is None.

    Arrow gives every message the keys of all messages, but a template treats a present key as used.
    """
    expected = "a list of messages, dicts with role and content"
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__len__"):
        fail(name, expected, f"{type(value).__name__} {printable(repr(value), 60)}")
    messages = []
    for turn, message in enumerate(value):
        if not isinstance(message, Mapping):
            fail(f"{name}[{turn}]", "a dict with role and content", type(message).__name__)
        present = without_none(message)
        if not isinstance(present.get("role"), str) or len(present) < 2:
            keys = [str(key) for key in present]
            fail(f"{name}[{turn}]", "a dict with role and content", f"values for {keys}")
        _check_content(f"{name}[{turn}].content", present.get("content"))
        _check_strings(f"{name}[{turn}]", present)
        calls = present.get("tool_calls", [])
        if not isinstance(calls, (list, tuple)) or not all(isinstance(c, Mapping) for c in calls):
            got = printable(repr(calls), 60)
            fail(f"{name}[{turn}].tool_calls", "a list of calls, dicts with a function", got)
        messages.append(present)
    return messages


def _check_train_keys(name: str, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a key that excludes an assistant turn; all turns are targets."""
    for turn, message in enumerate(messages):
        for key in _TRAIN_KEYS if message["role"] == "assistant" else ():
            if key in message and message[key] not in (1, "1"):
                fail(
                    f"{name}[{turn}].{key}",
                    "1, since every turn of the assistant's is learned",
                    printable(repr(message[key]), 60),
                    "pass the turns that are learned as "
                    "completion, and those before them as prompt",
                )


def without_none(value: Any) -> Any:
    """Return a value without the mapping keys whose value is None, recursively."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(item) for item in value]
    return value


def check_integers(name: str, values: Any, like: Tensor | None = None) -> Tensor:
    """Return a column as int64 [T].

    Args:
        name: of the column. values: a list, array or tensor.
        like: the ids; the column must have as many values.
    """
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        fail(name, "a list of integers", f"{type(values).__name__} {printable(repr(values), 60)}")
    try:
        row = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        fail(name, "a list of integers", f"a list that is no tensor ({printable(error, 80)})")
    if row.dim() != 1 or row.numel() == 0:
        expected = "a non-empty one-dimensional list of integers"
        fail(name, expected, f"shape {tuple(row.shape)}")
    is_mask = name == "attention_mask" or name in MASKS
    if row.is_floating_point() or row.is_complex() or (row.dtype == torch.bool and not is_mask):
        raise TypeError(f"{name}: expected integers, got {row.dtype}")
    if like is not None and len(row) != len(like):
        fail(name, f"{len(like)} values, one per token of input_ids", len(row))
    return row.long()


def check_mask(name: str, values: Any, like: Tensor) -> Tensor:
    """Return a column of 0 and 1 as int64 [T]."""
    mask = check_integers(name, values, like)
    invalid = mask[(mask != 0) & (mask != 1)]
    if len(invalid):
        fail(
            name,
            "0 or 1 for each token",
            int(invalid[0]),
            "numbers of documents in a packed row are not read: pass each document as an example "
            "of its own, with packing=True",
        )
    return mask


def check_positions(columns: Mapping[str, Any], ids: Tensor, attended: Tensor) -> None:
    """Raise ValueError if position_ids or token_type_ids contradict a single plain row."""
    if "position_ids" in columns:
        positions = check_integers("position_ids", columns["position_ids"], ids)
        read = positions[attended != 0]
        other = (read != torch.arange(len(read))).nonzero()[:, 0].tolist()
        if other:
            fail(
                "position_ids",
                "0, 1, 2, … over the attended tokens",
                f"{int(read[other[0]])} at token {other[0]}",
                "a row of packed documents is not read as one: pass each "
                "document as an example of its own, with packing=True",
            )
    if "token_type_ids" in columns:
        kinds = check_integers("token_type_ids", columns["token_type_ids"], ids)
        if kinds.any():
            fail(
                "token_type_ids",
                "zeros, since no causal model here reads them",
                int(kinds[kinds != 0][0]),
                "remove the column; documents of a packed row become examples of their own",
            )


def _check_unread(name: str, value: Any, form: str, columns: Mapping[str, Any]) -> None:
    """Raise ValueError for an unread column unless it is text or a single value."""
    if name == "completion" and form != "input_ids":
        fail(
            name,
            "a prompt with it, and no other form",
            f"{form} with it",
            "pass prompt and completion alone; a prompt may be an empty text",
        )
    is_empty = isinstance(value, (Mapping, Sequence)) and not len(value)
    if name in ("tools", "chat_template_kwargs") and form == "text" and not is_empty:
        fail(name, "messages, whose template reads it", "text with it")
    if name in _CONTENT and form != "input_ids":
        _check_content_is_read(name, value, form, columns)
    has_media = name in _MEDIA and bool(_texts_in(value))
    if name in _TEXTS or not (has_media or _is_data(value)):
        return
    what = f"{type(value).__name__} of numbers or bytes"
    if has_media:
        what = f"the text {printable(repr(_texts_in(value)[0]), 60)}"
    elif isinstance(value, (list, tuple)):
        what = f"a list of {len(value)} with numbers or bytes in it"
    read = ", ".join((form, *_READ[form]))
    fail(
        name,
        f"only columns that are read ({read}), texts and single values",
        what,
        "images, audio, positions and lengths of packed documents are not read: remove the column "
        "if it does not matter. Pass images to a vision model as input_ids and the tensors of its "
        "processor, and each packed document as an example",
    )


def _check_content_is_read(name: str, value: Any, form: str, columns: Mapping[str, Any]) -> None:
    """Raise ValueError if a text in `value` is in no column that is read."""
    read = "\n".join(_texts_in([columns[form], columns.get("completion")]))
    lost = [text for text in _texts_in(value) if text.strip() not in read]
    if lost:
        fail(
            name,
            f"content in the columns that are read ({', '.join((form, *_READ[form]))})",
            f"a text in none of them: {printable(repr(lost[0]), 60)}",
            "it would be ignored: make it part of messages, prompt or completion, or remove the "
            "column if it does not matter",
        )


def _texts_in(value: Any) -> list[str]:
    """Return the texts of a text, a list or a conversation, without the roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key not in ("role", "from", "type")]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts_in(item)]
    return []


def _is_data(value: Any) -> bool:
    """Whether a value is a list of numbers, bytes, an array, or an object of another type."""
    if value is None or isinstance(value, _SINGLE) or getattr(value, "ndim", None) == 0:
        return False
    if isinstance(value, Mapping):
        return any(_is_data(item) for item in value.values())
    if getattr(getattr(value, "dtype", None), "kind", "") in ("U", "T", "O"):  # NumPy's texts
        value = value.tolist()
    if isinstance(value, (list, tuple, Set)):
        sample = islice((item for item in value if item is not None), _LOOKED_AT)
        numbers = (int, float, complex)
        return any(
            _is_data(x) or isinstance(x, numbers) or getattr(x, "ndim", None) == 0 for x in sample
        )
    return True


def _checked_pair(prompt: Any, completion: Any) -> dict[str, Any]:
    """Check that prompt and completion are both texts or both messages."""
    if isinstance(prompt, str):
        check_text("prompt", prompt)
        if completion is not None:
            if not isinstance(completion, str):
                fail("completion", "a text, as prompt is", type(completion).__name__)
            check_text("completion", completion)
        return {}
    checked = {"prompt": check_messages("prompt", prompt)}
    if completion is not None:
        if isinstance(completion, str):
            fail("completion", "a list of messages, as prompt is", "a text")
        checked["completion"] = check_messages("completion", completion)
        _check_train_keys("completion", checked["completion"])
        if not checked["completion"]:
            fail("completion", "at least one message", "none")
    if not checked["prompt"] and completion is None:
        fail("prompt", "at least one message", "none")
    return checked


def _checked_rendering(columns: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Check tools and chat_template_kwargs, which only a chat template reads."""
    checked: dict[str, Any] = {}
    for name, kind in (("tools", (list, tuple)), ("chat_template_kwargs", Mapping)):
        value = columns.get(name)
        if value is None or (isinstance(value, (Mapping, Sequence)) and not len(value)):
            continue
        if isinstance(value, str) and name == "tools":  # Arrow holds no schemas of many shapes
            with suppress(JSONError):
                value = parse_json(value, "tools", list)
        if not isinstance(value, kind):
            expected = "a dict" if kind is Mapping else "a list of JSON schemas"
            fail(name, expected, f"{type(value).__name__} {printable(repr(value), 60)}")
        if form == "prompt" and isinstance(columns["prompt"], str):
            fail(name, "messages, whose template reads it", "a prompt that is a text")
        checked[name] = without_none(value)
        _check_strings(name, checked[name])
    return {"tools": None, "chat_template_kwargs": {}} | checked


def _check_content(name: str, content: Any) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        fail(name, "a text", f"{type(content).__name__} {printable(repr(content), 60)}")
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            fail(
                name,
                "texts",
                f"a part of type {printable(kind)}",
                "images, audio and video are not read from messages: pass images to a vision "
                "model as input_ids and the tensors of its processor",
            )


def _check_strings(name: str, value: Any) -> None:
    if isinstance(value, str):
        check_text(name, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_strings(name, key)
            _check_strings(f"{name}.{printable(key)}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_strings(name, item)
