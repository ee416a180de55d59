"""Rows to train on and to hold out: English reference prose, and answers of the teacher.

The prose is the language reference in the standard library (pydoc_data.topics, PSF License 2). A
hash of the topic, and the place of a prompt in prompts.txt, decide what is held out.

A row has `input_ids` and `labels`. Of a text every token is a target; of a chat, the answer is.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .....hf.collator import DistillCollator
from .....hf.encoder import IGNORE_INDEX
from .....hf.generation import ends_of
from .....hf.jsonl import JsonLines
from .....runtime.atomic_files import write_atomically
from .....runtime.progress import track
from .....teachers.local import Teacher
from .....training.config import DistillConfig
from .....training.on_policy import sample
from ..corpus import Document, document_windows, is_held_out, packed_windows

WINDOW = 128
ANSWER = 64  # tokens of an answer at most
TEXT_PER_CHAT = 2  # windows of text for each chat to train on
HELD_OUT_EVERY = 4  # prompts
WINDOWS_PER_TOPIC = 3  # held out
PROMPTS_AT_ONCE = 24

Row = dict[str, Tensor]


class Answer(NamedTuple):
    """A prompt, the teacher's answer, and the ids of both: those of the prompt come first."""

    prompt: str
    answer: str
    ids: list[int]
    prompt_tokens: int


class Rows(NamedTuple):
    """Rows to train on, and held-out rows by kind of text."""

    train: list[Row]
    held_out: dict[str, list[Row]]
    prompts: list[str]  # held out


def prompts() -> tuple[list[str], list[str]]:
    """Return the prompts to train on and the held-out prompts."""
    lines = files(__package__).joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()
    train = [line for i, line in enumerate(lines) if i % HELD_OUT_EVERY]
    return train, lines[::HELD_OUT_EVERY]


def topics() -> tuple[list[Document], list[Document]]:
    """Return the topics of the language reference to train on, and the held-out topics.

    Raises:
        ImportError: this Python was installed without pydoc_data.
    """
    try:
        from pydoc_data.topics import topics as texts
    except ModuleNotFoundError:
        raise ImportError(
            "data: expected pydoc_data.topics of the standard library, got a Python without it; "
            "install a complete Python (on Debian: apt install libpython3-stdlib)"
        ) from None
    documents = [Document(name, text) for name, text in sorted(texts.items())]
    train = [document for document in documents if not is_held_out(document.name)]
    return train, [document for document in documents if is_held_out(document.name)]


def prompt_row(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Row:
    """Return a row without a target: a user's turn, up to the start of the answer."""
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}


def answer_prompts(
    teacher: Teacher, questions: list[str], path: Path, n: int, at_once: int = PROMPTS_AT_ONCE
) -> list[Answer]:
    """Return n sampled answers of the teacher, to one prompt after the other, stored at `path`.

    They are samples at temperature 1 from the whole vocabulary, at most ANSWER tokens long, so that
    the cross entropy of their tokens and KL(teacher ‖ student) have the same minimum. `at_once`
    prompts are a batch. A file of an earlier call is read instead.
    """
    if path.is_file():
        stored = JsonLines(path)
        return [Answer(**stored[i]) for i in range(len(stored))]
    tokenizer = teacher.tokenizer
    collate = DistillCollator(pad_id=tokenizer.pad_token_id, prompts=True)
    config = DistillConfig(str(path.parent), max_new_tokens=ANSWER, use_cpu=True, report_to=[])
    answers: list[Answer] = []
    wanted = [questions[i % len(questions)] for i in range(n)]
    batches = [wanted[i : i + at_once] for i in range(0, n, at_once)]
    for step, batch in enumerate(track(batches, "the teacher's answers")):
        rows = [prompt_row(tokenizer, prompt) for prompt in batch]
        sampled = sample(
            teacher.model,
            collate(rows),
            config=config,
            step=step,
            pad_id=tokenizer.pad_token_id,
            ends=ends_of(teacher.model, tokenizer),
            vocab=None,
            synced=False,
        )
        for prompt, row, ids, mask in zip(
            batch, rows, sampled["input_ids"], sampled["attention_mask"], strict=True
        ):
            tokens, start = ids[mask != 0].tolist(), len(row["input_ids"])
            text = tokenizer.decode(tokens[start:], skip_special_tokens=True)
            answers.append(Answer(prompt, text, tokens, start))
    lines = (json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in answers)
    write_atomically(path, "".join(lines))
    return answers


def make_rows(teacher: Teacher, folder: Path, n: int) -> Rows:
    """Return n rows to train on and all held-out rows; the answers are stored in `folder`."""
    questions, held_out_prompts = prompts()
    chats = max(1, n // (1 + TEXT_PER_CHAT))
    train_answers = answer_prompts(teacher, questions, folder / f"answers-{chats}.jsonl", chats)
    held_out_answers = answer_prompts(
        teacher, held_out_prompts, folder / "held-out-answers.jsonl", len(held_out_prompts)
    )
    train_topics, held_out_topics = topics()
    windows = packed_windows(
        train_topics,
        teacher.tokenizer,
        length=WINDOW,
        max_windows=n - chats,
    )
    held_out_windows = document_windows(
        held_out_topics, teacher.tokenizer, length=WINDOW, per_document=WINDOWS_PER_TOPIC
    )
    return Rows(
        train=[*map(text_row, windows.ids), *map(chat_row, train_answers)],
        held_out={
            "text": [text_row(row) for row in held_out_windows.ids],
            "chat": [chat_row(answer) for answer in held_out_answers],
        },
        prompts=held_out_prompts,
    )


def text_row(ids: Tensor) -> Row:
    return {"input_ids": ids, "labels": ids.clone()}


def chat_row(answer: Answer) -> Row:
    ids = torch.tensor(answer.ids)
    labels = ids.clone()
    labels[: answer.prompt_tokens] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def with_prompt(row: Row, tokens: int) -> Row:
    """Return the row without targets among its first tokens: a prompt for on-policy training."""
    labels = row["labels"].clone()
    labels[:tokens] = IGNORE_INDEX
    return {**row, "labels": labels}


def with_hard_labels(row: Row, teacher: Any) -> Row:
    """Return the row with the teacher's likeliest token as each target."""
    best = likeliest(teacher.topk(row["input_ids"][None], k=1))[0]
    labels = row["labels"].clone()
    is_target = labels[1:] != IGNORE_INDEX
    labels[1:][is_target] = best[:-1][is_target]
    return {**row, "labels": labels}


def likeliest(answers: Any) -> Tensor:  # [..., K] -> [...]
    """Return the likeliest id of every position of a TopK, whose ids may be in any order."""
    at = answers.logprobs.argmax(-1, keepdim=True)
    ids: Tensor = answers.ids.gather(-1, at)[..., 0].long()
    return ids
