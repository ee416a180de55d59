"""Every column of an example is read, describes it, or is refused by name."""

from __future__ import annotations

import datetime
import json
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fastdistill import TeacherCache
from fastdistill.hf.columns import check_messages
from fastdistill.hf.encoder import Encoder
from helpers.example_texts import STOCK, TALK, tokenizer
from helpers.training import build, llama

IDS = {"input_ids": [4, 5, 6, 7]}
TEXT = {"text": "a cat"}
PAIR = {"prompt": "a cat", "completion": "it is"}
CHAT = {"messages": TALK}
FORMS = [IDS, TEXT, PAIR, CHAT, {"prompt": TALK[:1], "completion": TALK[1:2]}]
DESCRIBING = {
    "id": 3,
    "score": 0.5,
    "source": "web",
    "date": datetime.date(2020, 1, 1),
    "ok": True,
    "tags": ["a", "b"],
    "meta": {"url": "x", "n": 3},
    "none": None,
    "np": np.float32(1.0),
    "empty": [],
    "scalar": torch.tensor(3),
    "nones": [None, None],
    "uuid": uuid.uuid4(),
    "path": Path("a"),
    "set": {"a"},
    "words": np.array(["a"]),
    "objects": np.array(["a"], object),
}


class Audio:
    """A decoder, as datasets gives one for a column of sounds."""


DATA = {
    "pixel_values": [[[0.1, 0.2]]],
    "images": [{"bytes": b"\x00", "path": None}],
    "image": b"\x89PNG",
    "audio": {"array": [0.0, 0.1], "sampling_rate": 16000},
    "sound": Audio(),
    "embedding": np.zeros(3),
    "seq_lengths": [2, 2],
    "document_ids": [0, 0, 1, 1],
    "cu_seqlens": torch.tensor([0, 2, 4]),
    "meta": {"spans": [[0, 2], [2, 4]]},
    "late": [None] * 9 + [1.5],
    "boxes": np.array([[0, 1], None], object),
}


def encoder(**options):
    return Encoder(tokenizer=tokenizer(STOCK), **options)


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_describe_an_example_change_nothing(form):
    row, described = encoder()(form), encoder()(form | DESCRIBING)
    assert row.ids.tolist() == described.ids.tolist()
    assert row.targets.tolist() == described.targets.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DATA)
def test_columns_that_nothing_reads_are_refused_by_name(form, name):
    with pytest.raises(
        ValueError, match=rf"{name}: expected only columns that are read .*mple 5\)"
    ):
        encoder()(form | {name: DATA[name]}, 5)


@pytest.mark.parametrize(
    ("example", "name"),
    [
        (PAIR | {"system": "a dog"}, "system"),
        (PAIR | {"input": ["it is", "a dog"]}, "input"),
        ({"prompt": "a cat", "response": "it is"}, "response"),
        ({"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[1:2]}, "chosen"),
        (TEXT | {"output": "it is"}, "output"),
        (CHAT | {"conversations": [{"from": "human", "value": "a dog!"}]}, "conversations"),
    ],
)
def test_content_that_nothing_reads_is_refused_by_name(example, name):
    with pytest.raises(ValueError, match=rf"{name}: expected content in the .*\(example 3\)"):
        encoder()(example, 3)


@pytest.mark.parametrize(
    "example",
    [
        TEXT | {"instruction": "a", "input": "", "output": " cat\n"},
        PAIR | {"response": "it is", "input": None, "outputs": 3},
        CHAT | {"chosen": TALK, "system_prompt": ""},
        IDS | {"response": "it is"},
    ],
)
def test_content_that_is_read_may_come_twice(example):
    encoder()(example)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", ["labels", "attention_mask", "position_ids", "assistant_masks"])
def test_columns_of_ids_beside_text_are_refused(form, name):
    with pytest.raises(ValueError, match=f"{name}: expected only columns that are read"):
        encoder()(form | {name: [1, 1]})


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"position_ids": [0, 1, 0, 1]}, "position_ids: expected 0, 1, 2, … .* got 0 at token 2"),
        ({"position_ids": [5, 6, 7, 8]}, "position_ids: .* got 5 at token 0"),
        ({"position_ids": [0, 1]}, "position_ids: expected 4 values"),
        ({"token_type_ids": [0, 0, 1, 1]}, "token_type_ids: expected zeros"),
        ({"attention_mask": [1, 1, 2, 2]}, "attention_mask: expected 0 or 1 .* got 2"),
        ({"attention_mask": [-1, 1, 1, 1]}, "attention_mask: expected 0 or 1"),
        ({"attention_mask": [0, 0, 0, 0]}, "attention_mask: expected 1 for at least one token"),
        ({"attention_mask": [[1, 0], [1, 1]]}, "attention_mask: expected a non-empty one-dim"),
        ({"completion_mask": [0, 0, 2, 2]}, "completion_mask: expected 0 or 1"),
        ({"assistant_masks": [0, 0, 1, 3]}, "assistant_masks: expected 0 or 1"),
        ({"labels": [-1, 5, 6, 7]}, "labels: expected token ids of 0 or more, or -100"),
        ({"input_ids": [4, -100, 6, 7]}, "input_ids: expected token ids of 0 or more, got -100"),
        ({"input_ids": {"0": 1}}, "input_ids: expected a list of integers, got dict"),
        ({"input_ids": "abc"}, "input_ids: expected a list of integers, got str"),
        ({"input_ids": 5}, "input_ids: expected a list of integers, got int"),
        ({"input_ids": [1, None]}, "input_ids: expected a list of integers, got a list that"),
        ({"input_ids": [1, "a"]}, "input_ids: expected a list of integers, got a list that"),
        ({"input_ids": [[1], [1, 2]]}, "input_ids: expected a list of integers, got a list that"),
        ({"input_ids": [True, False, True, True]}, "input_ids: expected integers, got torch.bool"),
        ({"labels": np.array([True] * 4)}, "labels: expected integers, got torch.bool"),
        ({"input_ids": [1 << 70]}, "input_ids: expected a list of integers, got a list that"),
    ],
)
def test_values_of_ids_are_checked(columns, words):
    with pytest.raises((ValueError, TypeError), match=rf"{words}.*\(example 2\)"):
        Encoder()(IDS | columns, 2)


def test_positions_and_kinds_that_say_nothing_new_are_read():
    padded = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]}
    more = {"position_ids": [1, 1, 0, 1, 2], "token_type_ids": [0] * 5}
    assert Encoder()(padded | more).ids.tolist() == padded["input_ids"]
    assert Encoder()(IDS | {"position_ids": range(4)}).ids.tolist() == IDS["input_ids"]


def test_a_target_is_one_by_labels_and_all_masks():
    both = {"assistant_masks": [0, 1, 1, 1], "completion_mask": [0, 0, 1, 1]}
    assert Encoder()(IDS | both).targets.tolist() == [-100, -100, 6, 7]
    labels = {"labels": [4, -100, 6, -100], "completion_mask": [0, 1, 1, 1]}
    assert Encoder()(IDS | labels).targets.tolist() == [-100, -100, 6, -100]
    unattended = {"attention_mask": [1, 1, 1, 0]}
    assert Encoder()(IDS | unattended).targets.tolist() == [4, 5, 6, -100]


def test_a_cache_holds_no_answers_for_rows_that_are_refused(tmp_path):
    rows = [IDS, IDS | {"position_ids": [0, 1, 0, 1]}]
    with pytest.raises(ValueError, match=r"position_ids: .*\(example 1\)"):
        TeacherCache.build(llama(0), rows, tmp_path / "cache", k=2)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"text": 5}, "text: expected a text, got int 5"),
        ({"text": ["a"]}, "text: expected a text, got list"),
        ({"text": None}, r"expected dicts with .* got \[\], and None in \['text'\]"),
        ({"text": "\ud83d"}, "text: expected a text, got half of a surrogate pair"),
        ({"prompt": "a", "completion": "\ud83d"}, "completion: expected a text, got half"),
        ({"prompt": "a", "completion": TALK}, "completion: expected a text, as prompt is"),
        ({"prompt": TALK, "completion": "a"}, "completion: expected a list of messages, as prompt"),
        ({"prompt": TALK, "completion": []}, "completion: expected at least one message"),
        ({"prompt": []}, "prompt: expected at least one message"),
        ({"prompt": 5}, "prompt: expected a list of messages, .* got int"),
        ({"completion": "a"}, "expected dicts with"),
        ({"completion": "a", "text": "b"}, "completion: expected a prompt with it"),
        ({"completion": "a", "messages": TALK}, "completion: expected a prompt with it"),
        ({"messages": "hello"}, "messages: expected a list of messages"),
        ({"messages": {"role": "user"}}, "messages: expected a list of messages"),
        ({"messages": ["a"]}, r"messages\[0\]: expected a dict with role and content, got str"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"got values for \['from', 'value'\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"got values for \['role'\]"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: expected a text, got int"),
        (
            {"messages": [{"role": "user", "content": "\ud83d"}]},
            "content: expected a text, got hal",
        ),
        ({"messages": TALK, "tools": "sum"}, "tools: expected a list of JSON schemas, got str"),
        ({"text": "a", "tools": [{"name": "x"}]}, "tools: expected messages"),
        ({"prompt": "a", "tools": [{"name": "x"}]}, "tools: expected messages"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs: expected a dict"),
    ],
)
def test_values_of_texts_are_checked(example, words):
    with pytest.raises(ValueError, match=rf"{words}.*\(example 4\)"):
        encoder()(example, 4)


@pytest.mark.parametrize(("key", "value"), [("weight", 0), ("train", False), ("training", 0.5)])
def test_turns_that_are_not_to_be_learned_are_refused(key, value):
    talk = [TALK[0] | {key: value}, TALK[1] | {key: value}, TALK[2], TALK[3] | {key: 1}]
    with pytest.raises(ValueError, match=rf"messages\[1\]\.{key}: expected 1, .*\(example 6\)"):
        encoder()({"messages": talk}, 6)
    row = encoder()({"prompt": talk[:3], "completion": talk[3:]})
    assert row.ids.tolist() == encoder()(CHAT).ids.tolist()
    with pytest.raises(ValueError, match=rf"completion\[0\]\.{key}: expected 1"):
        encoder()({"prompt": talk[:1], "completion": talk[1:2]})


def test_parts_that_are_no_text_are_refused_with_a_text_beside_them():
    part = {"type": "image_url", "image_url": {"url": "x"}, "text": "what is"}
    talk = [{"role": "user", "content": [part]}, TALK[1]]
    with pytest.raises(ValueError, match=r"messages\[0\].content: expected texts, .* image_url"):
        encoder()({"messages": talk})


@pytest.mark.parametrize("value", ["a.png", ["a.png"], [{"path": "a.png", "bytes": None}]])
def test_paths_of_images_are_refused(value):
    with pytest.raises(ValueError, match=r"images: expected only columns .* got the text 'a\.png'"):
        encoder()(TEXT | {"images": value})


def test_tools_may_be_json():
    tools = [{"type": "function", "function": {"name": "dog", "parameters": {}}}]
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + STOCK
    reads = Encoder(tokenizer=tokenizer(template))
    expected = reads(CHAT | {"tools": tools}).ids.tolist()
    assert expected != reads(CHAT).ids.tolist()
    assert reads(CHAT | {"tools": json.dumps(tools)}).ids.tolist() == expected


def test_datasets_of_different_forms_go_together():
    examples: list[dict[str, Any]] = [CHAT, PAIR, TEXT, IDS, {"prompt": "a cat"}]
    parts = [datasets.Dataset.from_list([example]) for example in examples]
    both = datasets.concatenate_datasets(parts, axis=0)
    alone = [encoder()(part[0]).ids.tolist() for part in parts]
    assert [encoder()(example).ids.tolist() for example in both] == alone


def test_the_first_form_that_has_a_value_is_read():
    assert encoder()(IDS | CHAT | {"text": "a", "completion": "b"}).ids.tolist() == [4, 5, 6, 7]
    chat = encoder()(CHAT).ids.tolist()
    assert encoder()(CHAT | {"prompt": "a cat", "text": "a"}).ids.tolist() == chat
    assert encoder()(PAIR | {"text": "a"}).ids.tolist() == encoder()(PAIR).ids.tolist()
    assert encoder()(TEXT | {"completion": None, "prompt": None}).ids.tolist() == [7, 8, 0]


def test_a_trainer_names_the_dataset_and_the_example(tmp_path):
    rows = [TEXT, TEXT, TEXT | {"images": [b"x"]}]
    with pytest.raises(ValueError, match=r"images: .*\(example 2 of train_dataset\)"):
        build(tmp_path, data=rows, processing_class=tokenizer())
    trainer = build(tmp_path, data=rows[:2], processing_class=tokenizer())
    with pytest.raises(ValueError, match=r"images: .*\(example 1 of its batch\)"):
        trainer.data_collator(rows[1:])


@pytest.mark.parametrize("calls", [3, 1e-45, True, "x", {"function": {}}, ["x"], [[]], [None]])
def test_tool_calls_that_are_no_list_of_calls(calls):
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(ValueError, match=r"x\[0\]\.tool_calls: expected a list of calls"):
        check_messages("x", messages)
