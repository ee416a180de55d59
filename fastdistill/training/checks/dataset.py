"""Checks of datasets before the first step.

Each check catches a mistake that training would not show: masks without a target, end tokens that
are masked together with the padding, labels that are shifted already.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...hf.columns import MASKS, form_of
from ...hf.encoder import IGNORE_INDEX, EncodedExample, Encoder, is_listed
from ...runtime import checks
from ...runtime.printable import printable

logger = logging.getLogger(__name__)

LOOKED_AT = 64  # examples, evenly spaced


def check_kinds(train: Any, evaluate: Any) -> None:
    """Raise TypeError for an object that is no dataset, ValueError for an empty dataset."""
    for name, dataset in datasets_by_name(train, evaluate).items():
        # A stream has no length, but can be read repeatedly.
        is_stream = hasattr(dataset, "__iter__") and not hasattr(dataset, "__len__")
        if dataset is None or (is_stream and not hasattr(dataset, "__next__")):
            continue
        if not is_listed(dataset):
            raise TypeError(
                f"{name}: expected a dataset or a list of examples, got {type(dataset).__name__}. "
                "Pass a single split, or create a dataset with datasets.load_dataset, "
                "Dataset.from_dict, from_pandas or from_generator"
            )
        if not len(dataset):
            checks.fail(name, "an example", "none")


def check_datasets(encoder: Encoder, train: Any, evaluate: Any, *, prompts_only: bool) -> None:
    """Run `check_examples` on all datasets; only training data may be prompts alone."""
    for name, dataset in datasets_by_name(train, evaluate).items():
        sampled = prompts_only and name == "train_dataset"
        check_examples(name, dataset, encoder, prompts_only=sampled)


def datasets_by_name(train: Any, evaluate: Any) -> dict[str, Any]:
    """Return a trainer's datasets by the names that error messages use."""
    several = evaluate if isinstance(evaluate, dict) else {"": evaluate}
    return {"train_dataset": train} | {
        f"eval_dataset[{name!r}]" if name else "eval_dataset": dataset
        for name, dataset in several.items()
    }


def some_of(dataset: Any) -> list[tuple[int, Any]]:
    """Return evenly spaced (index, example) pairs; none of a stream, which would be consumed."""
    if dataset is None or not hasattr(dataset, "__len__") or len(dataset) == 0:
        return []
    return [(i, dataset[i]) for i in sample_indices(len(dataset))]


def sample_indices(length: int) -> list[int]:
    """Return the indices of at most LOOKED_AT examples, evenly spaced."""
    last, steps = length - 1, max(LOOKED_AT - 1, 1)
    return sorted({i * last // steps for i in range(LOOKED_AT)})


def check_examples(name: str, dataset: Any, encoder: Encoder, *, prompts_only: bool) -> None:
    """Raise ValueError if a sample of a dataset's examples has no learning signal.

    `prompts_only`: the student samples all targets, so the examples need none.
    """
    lengths, without_target, rows = Lengths(encoder.max_length), RowsWithoutTarget(name), []
    for index, example in some_of(dataset):
        row = encoder.encode_uncut(example, index, name)
        lengths.add(row)
        without_target.add(index, example, row)
        rows.append((example, row.truncate(encoder.max_length)))
    if not rows:
        return
    lengths.check(name, prompts_only=prompts_only)
    if not prompts_only:
        _check_null_columns(name, [example for example, _ in rows])
        if not any(has_target(row) for _, row in rows):
            got = f"none in {len(rows):,} examples"
            checks.fail(name, "target tokens", got, _why_no_target(rows))
        without_target.warn()
    labeled_rows = [row for x, row in rows if x.get("labels") is not None]
    if labeled_rows:
        _check_not_shifted(name, labeled_rows)
        _check_end_token(name, labeled_rows, encoder.tokenizer)


def _check_null_columns(name: str, examples: list[Any]) -> None:
    """Raise ValueError for a column of targets that is None in all examples of its form."""
    columns = {"prompt": ["completion"], "input_ids": ["labels", *MASKS]}
    for form, several in columns.items():
        of_form = [example for example in examples if form_of(example) == form]
        for column in several:
            has_column = any(column in example for example in of_form)
            if has_column and all(example.get(column) is None for example in of_form):
                checks.fail(
                    name,
                    f"values in the column {column!r}",
                    f"None in all {len(of_form):,} examples checked",
                    "fill the column; or remove it, if "
                    + (
                        "the student samples completions (lmbda=1)"
                        if form == "prompt"
                        else "every token is a target"
                    ),
                )


@dataclass
class Lengths:
    """Counts of rows and tokens, and of the rows, targets and prompts that max_length cuts."""

    limit: int | None
    seen: int = 0
    tokens: int = 0  # after cutting
    targets: int = 0  # after cutting
    rows: int = 0  # rows that are cut
    longest: int = 0
    taught: int = 0  # rows with targets before cutting
    untaught: int = 0  # rows that lose all their targets
    prompts: int = 0  # rows whose prompt is cut
    longest_prompt: int = 0

    def add(self, row: EncodedExample) -> None:
        """Count a row, before it is cut."""
        taught, left = has_target(row), row.truncate(self.limit)
        self.seen += 1
        self.tokens += int(left.attention_mask.sum())
        self.targets += int((left.targets[1:] != IGNORE_INDEX).sum())
        self.taught += taught
        length = int(row.attention_mask.sum())
        self.longest = max(self.longest, length)
        if self.limit is None or length <= self.limit:
            return
        self.rows += 1
        self.untaught += taught and not has_target(left)
        prompt = int(row.attention_mask[: row.prompt_length].sum())
        is_text = prompt == length and taught  # plain text, where every token is a target
        if prompt > self.limit and not is_text:
            self.prompts += 1
            self.longest_prompt = max(self.longest_prompt, prompt)

    def check(self, name: str, *, prompts_only: bool) -> None:
        """Raise ValueError if the limit removes all targets; warn if it removes some."""
        if not self.rows:
            return
        lost = self.prompts == self.seen if prompts_only else self.untaught == self.taught > 0
        if lost:
            what = "a part of their prompts" if prompts_only else "all their targets"
            checks.fail(
                "max_length",
                f"room for more than the prompts of {name}",
                self.limit,
                f"of {self.seen:,} examples checked, {self.rows:,} are longer and lose {what} "
                f"(the longest has {self.longest:,} tokens). Raise it to {self.longest:,}, or set "
                "it to None",
            )
        logger.warning("%s: %s", name, self.to_text())

    def to_text(self) -> str:
        """Return a sentence on what the limit cuts."""
        return (
            f"max_length={self.limit} cuts {self.rows:,} of {self.seen:,} examples checked, the "
            f"longest of {self.longest:,} tokens; {self.untaught:,} lose all their targets, "
            f"{self.prompts:,} a part of their prompt (the longest of {self.longest_prompt:,})"
        )


@dataclass
class RowsWithoutTarget:
    """Counts rows of a dataset that have no target before they are cut."""

    name: str
    seen: int = 0
    indices: list[int] = field(default_factory=list)
    rows: list[tuple[Any, EncodedExample]] = field(default_factory=list)  # at most LOOKED_AT

    def add(self, index: int, example: Any, row: EncodedExample) -> None:
        """Count a row, before it is cut."""
        self.seen += 1
        if has_target(row):
            return
        self.indices.append(index)
        if len(self.rows) < LOOKED_AT:
            self.rows.append((example, row))

    def warn(self) -> None:
        """Log the number of rows without a target, the first one, and the likely reason."""
        if not self.indices:
            return
        first = getattr(self.rows[0][0], "source", None) or f"example {self.indices[0]}"
        logger.warning(
            "%s: %s of %s examples checked have no target token and train nothing (the first: "
            "%s): %s",
            *(self.name, f"{len(self.indices):,}", f"{self.seen:,}", first),
            _why_no_target(self.rows),
        )


def has_target(row: EncodedExample) -> bool:
    """Return whether a row has a target after its first token, which has no context."""
    return bool((row.targets[1:] != IGNORE_INDEX).any())


def _why_no_target(rows: list[tuple[Any, EncodedExample]]) -> str:
    """Return the likely reason why none of these examples has a target."""
    present = {name for x, _ in rows for name, value in x.items() if value is not None}
    is_tokenized = "input_ids" in present
    if all(len(row.ids) == 1 for _, row in rows):
        return "all examples are one token long, and the first token has no context"
    if is_tokenized and "assistant_masks" in present:
        return (
            "the assistant masks are all zero. A chat template without {% generation %} gives "
            "such masks (among them the stock templates of Llama-3.1, Qwen3 and Gemma-3). Pass "
            "messages, or prompt and completion, so that the trainer finds the turns; or use a "
            "chat template with {% generation %}"
        )
    if is_tokenized and "completion_mask" in present:
        return "the completion masks are all zero"
    if "messages" in present and not is_tokenized:
        roles = sorted({str(m["role"]) for x, _ in rows for m in x.get("messages") or ()})
        if "assistant" not in roles:
            return (
                "no example has a message with the role 'assistant': the roles are "
                f"{printable(roles)}"
            )
        return (
            "the chat template marks none of the assistant's tokens: its {% generation %} block "
            "is in the wrong place, or the turns are empty"
        )
    if "prompt" in present and not is_tokenized:
        return "examples with prompts alone need lmbda=1: the student samples completions"
    return "all labels are −100"


def _check_not_shifted(name: str, rows: list[EncodedExample]) -> None:
    """Raise ValueError if most labels equal a neighboring token instead of their own."""
    agree = {shift: _agreement(rows, shift) for shift in (-1, 0, 1)}
    shift = max(agree, key=lambda s: agree[s])
    if shift == 0 or agree[shift] < 0.9 or agree[0] > 0.5:
        return
    side = "next" if shift == 1 else "previous"
    checks.fail(
        name,
        "labels[t] to be input_ids[t] or −100",
        f"the {side} token in {agree[shift]:.0%} of them",
        "the labels are shifted already, and the trainer shifts them again. Pass unshifted labels",
    )


def _agreement(rows: Iterable[EncodedExample], shift: int) -> float:
    """Return the share of targets that equal the token `shift` positions later."""
    same = total = 0
    for ids, targets in (row[:2] for row in rows):
        if len(ids) < 3:
            continue
        inner = slice(1, len(ids) - 1)  # positions with both neighbors
        counted = targets[inner] != IGNORE_INDEX
        moved = ids.roll(-shift)[inner]
        same += int((moved == targets[inner])[counted].sum())
        total += int(counted.sum())
    return same / total if total >= 8 else 0.0


def _check_end_token(name: str, rows: list[EncodedExample], tokenizer: Any) -> None:
    """Raise ValueError if pad == eos and the padding mask removed every end token from labels."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None or end != getattr(tokenizer, "pad_token_id", None):
        return
    masked = labeled = 0
    for ids, targets, attended in (row[:3] for row in rows):
        follows = torch.zeros_like(attended, dtype=torch.bool)
        follows[1:] = targets[:-1] != IGNORE_INDEX
        ends = (ids == end) & follows & (attended != 0)
        labeled += int((ends & (targets == end)).sum())
        masked += int((ends & (targets == IGNORE_INDEX)).sum())
    if masked and not labeled:
        checks.fail(
            name,
            f"the end token (id {end}) among the labels",
            f"−100 for all {masked} that follow a target",
            "the padding token is the same token, so masking it masks the end too: the student "
            "would never learn to stop. Leave padding to the trainer, which masks by length, or "
            "set another pad_token",
        )
