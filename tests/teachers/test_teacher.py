"""The teacher's top k is that of its own full softmax, however rows are padded and batched."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from fastdistill import topk_distill_loss
from fastdistill.hf.row_reader import groups
from fastdistill.teachers.local import Teacher
from fastdistill.teachers.protocols import TopKTeacher
from helpers.counted_memory import Products
from helpers.present import present
from helpers.teacher_scene import IDS
from helpers.training import VOCAB, llama


def dense_topk(model, ids, k, temperature=1.0, valid=None):
    with torch.no_grad():
        logits = model(input_ids=ids).logits[..., :valid].double() / temperature
    return logits.log_softmax(-1).topk(k, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_is_that_of_the_full_softmax(temperature):
    model = llama(7, scale=20.0)
    answers = Teacher(model).topk(IDS, k=6, temperature=temperature)
    values, index = dense_topk(model, IDS, 6, temperature)
    assert torch.equal(answers.ids.long(), index)
    torch.testing.assert_close(answers.logprobs.double(), values, rtol=1e-4, atol=1e-5)
    rest = 1 - values.exp().sum(-1)
    torch.testing.assert_close(present(answers.log_tail).double().exp(), rest, rtol=1e-4, atol=1e-6)
    assert answers.temperature == temperature
    assert not answers.logprobs.requires_grad


def test_several_temperatures_take_one_pass_over_the_head():
    teacher = Teacher(llama(7, scale=20.0))
    with Products() as several:
        answers = teacher.topk_at(IDS, k=6, temperatures=(1.0, 2.0))
    with Products() as one:
        alone = teacher.topk(IDS, k=6, temperature=2.0)
    assert several.flops == one.flops > 0
    assert torch.equal(answers[1].logprobs, alone.logprobs)


def test_given_ids_are_scored_as_the_full_softmax_has_them():
    model = llama(7, scale=20.0)
    teacher = Teacher(model)
    ids = torch.randint(0, VOCAB, (*IDS.shape, 4), generator=torch.Generator().manual_seed(2))
    ids[0, 3] = torch.tensor([7, -1, 7, 2])
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    answers = teacher.logprobs_at(IDS, mask, ids, temperature=1.5)
    assert torch.equal(answers.ids[0, 3], torch.tensor([7, -1, -1, 2]))
    assert (answers.ids[1, 6:] == -1).all()
    with torch.no_grad():
        dense = (model(input_ids=IDS).logits.double() / 1.5).log_softmax(-1)
    used = answers.ids >= 0
    expected = dense.gather(-1, answers.ids.clamp(min=0))
    torch.testing.assert_close(
        answers.logprobs[used].double(), expected[used], rtol=1e-4, atol=1e-5
    )
    rest = dense.exp().scatter(-1, answers.ids.clamp(min=0), 0.0).sum(-1)
    whole = used.all(-1)
    tail = present(answers.log_tail).double().exp()
    torch.testing.assert_close(tail[whole], rest[whole], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.zeros(3, 11, dtype=torch.long), r"ids: expected shape \[3, 11, 'K'\]"),
        (torch.full((3, 11, 2), VOCAB), r"ids: expected tokens in 0\.\.52, or −1"),
        (torch.full((3, 11, 2), -2), "got -2"),
        (torch.zeros(3, 11, 2), "ids: expected dtype int32, int64"),
    ],
)
def test_ids_to_score_are_checked(ids, error):
    with pytest.raises((ValueError, TypeError), match=error):
        Teacher(llama(7)).logprobs_at(IDS, None, ids)


def test_padding_changes_no_answer():
    teacher = Teacher(llama(7, scale=20.0))
    padded = torch.cat([IDS, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(15) < 11).long().expand(3, 15)
    alone, batched = teacher.topk(IDS, k=5), teacher.topk(padded, mask, k=5)
    assert torch.equal(alone.ids, batched.ids[:, :11])
    torch.testing.assert_close(alone.logprobs, batched.logprobs[:, :11], rtol=1e-4, atol=1e-5)


def test_nothing_is_said_where_nothing_is_attended():
    teacher = Teacher(llama(7, scale=20.0))
    mask = torch.ones_like(IDS)
    mask[1], mask[2, :4] = 0, 0
    garbage = IDS.masked_fill(mask == 0, -100)  # padding need not be a token
    answers = teacher.topk(garbage, mask, k=5)
    empty = mask == 0
    assert (answers.ids[empty] == -1).all()
    assert (answers.logprobs[empty] == -torch.inf).all()
    assert (present(answers.log_tail)[empty] == 0).all()
    assert (answers.ids[~empty] >= 0).all()
    hidden = teacher.hidden(garbage, mask)
    assert hidden.shape == (3, 11, 32)
    assert (hidden[empty] == 0).all()
    assert (teacher.topk(IDS, torch.zeros_like(IDS), k=5).ids == -1).all()
    assert teacher.hidden(IDS[:0]).shape == (0, 11, 32)
    # The losses take it: no NaN, and a loss only where there is an answer.
    labels, student = IDS.masked_fill(empty, -100), (torch.randn(3, 11, 32), torch.randn(VOCAB, 32))
    loss = topk_distill_loss(*student, answers, labels=labels, reduction="none")
    assert torch.isfinite(loss).all()
    assert (loss[empty] == 0).all()
    assert (loss[~empty] > 0).all()


def test_hidden_states_are_those_that_enter_the_head():
    model = llama(7, scale=20.0)
    teacher = Teacher(model)
    mask = (torch.arange(11) < torch.tensor([[11], [4], [7]])).bool()
    expected = model(input_ids=IDS).logits
    actual = teacher.head.logits(teacher.hidden(IDS, mask))
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_hole_in_the_mask_is_as_if_the_token_were_not_there():
    teacher = Teacher(llama(7, scale=20.0))
    mask = torch.ones(1, 11, dtype=torch.bool)
    mask[0, 4:6] = False
    answers = teacher.topk(IDS[:1], mask, k=3)
    expected = teacher.topk(IDS[:1][mask][None], k=3)
    assert torch.equal(answers.ids[mask], expected.ids[0])


@pytest.mark.parametrize("budget", [1, 7, 16, 1000])
def test_no_budget_changes_an_answer(budget):
    model = llama(7, scale=20.0)
    lengths = torch.tensor([5, 11, 1, 11, 2, 8])
    ids = torch.randint(3, VOCAB, (6, 11))
    mask = torch.arange(11) < lengths[:, None]
    teacher = Teacher(model, tokens_per_batch=budget)
    sizes = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: sizes.append(args[0].shape)
    )
    answers = teacher.topk(ids, mask, k=3)
    handle.remove()
    values, index = dense_topk(model, ids, 3)
    assert torch.equal(answers.ids[mask], index[mask])
    torch.testing.assert_close(answers.logprobs[mask].double(), values[mask], rtol=1e-4, atol=1e-5)
    assert all(rows == 1 or rows * length <= budget for rows, length in sizes)
    assert sum(rows * length for rows, length in sizes) < ids.numel(), "padding was paid for"
    if budget == 1000:
        assert sizes == [(1, int(lengths.sum()))], "expected one packed row"


def test_rows_of_one_length_are_not_packed():
    model = llama(7)
    teacher, shapes = Teacher(model), []
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    teacher.topk(IDS, k=3)
    assert shapes == [(3, 11, 32)]  # the causal path, without a mask


def test_groups_are_cut_by_budget_and_by_length():
    assert groups([3, 9, 0, 4, 8], 18, False, inf) == [[1, 4], [3, 0]]
    assert groups([3, 9, 0, 4, 8], 24, True, inf) == [[1, 4, 3, 0]]
    assert groups([3, 9, 0, 4, 8], 20, True, inf) == [[1, 4], [3, 0]]
    assert groups([3, 9, 0, 4, 8], 99, True, 5) == [[1], [4], [3, 0]]
    assert groups([7, 0, 7], 1, True, inf) == [[0], [2]]
    assert groups([8, 8, 6, 5, 5], 64, False, inf) == [[0, 1, 2], [3, 4]]
    assert groups([8, 8, 6, 5, 5], 64, True, inf) == [[0, 1, 2, 3, 4]]


def test_rope_that_looks_at_the_longest_row_runs_long_rows_alone():
    """longrope changes every position's angle once a row passes the original length."""
    model = llama(7, scale=20.0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
    }
    config = type(model.config)(**{**model.config.to_dict(), "rope_parameters": rope})
    torch.manual_seed(3)
    model = type(model)(config)
    ids = torch.randint(3, VOCAB, (2, 20))
    mask = torch.arange(20) < torch.tensor([[20], [9]])
    answers = Teacher(model).topk(ids, mask, k=4)
    for row, length in ((0, 20), (1, 9)):
        values, _ = dense_topk(model, ids[row : row + 1, :length], 4)
        got = answers.logprobs[row, :length].double()
        torch.testing.assert_close(got, values[0], rtol=1e-4, atol=1e-5)


def test_a_model_that_sees_the_future_is_no_teacher():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with pytest.raises(ValueError, match="expected a causal language model, got BertLMHead"):
        Teacher(BertLMHeadModel(config))


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "1-D": (lambda: {"input_ids": IDS[0]}, ValueError, r"input_ids: expected shape \[B, T\]"),
    "float": (lambda: {"input_ids": IDS.float()}, TypeError, "input_ids: expected dtype int32"),
    "list": (lambda: {"input_ids": [[1, 2]]}, TypeError, "input_ids: expected a tensor of int32"),
    "negative": (
        lambda: {"input_ids": IDS - 20},
        ValueError,
        r"input_ids: expected tokens in 0\.\.",
    ),
    "too large": (lambda: {"input_ids": IDS + VOCAB}, ValueError, "input_ids: expected tokens in"),
    "mask shape": (
        lambda: {"attention_mask": torch.ones(3, 10, dtype=torch.long)},
        ValueError,
        r"attention_mask: expected shape \[3, 11\] as input_ids, got \[3, 10\]",
    ),
    "float mask": (
        lambda: {"attention_mask": torch.zeros(3, 11)},
        TypeError,
        "attention_mask: expected dtype bool, int32, int64",
    ),
    "segments": (
        lambda: {"attention_mask": torch.full((3, 11), 2)},
        ValueError,
        "attention_mask: expected 1 for a token and 0 for padding, got 2",
    ),
    "k > V": (lambda: {"k": VOCAB + 1}, ValueError, f"k: expected an integer in 1..{VOCAB}"),
    "k = 0": (lambda: {"k": 0}, ValueError, "k: expected an integer in 1.."),
    "T = 0": (lambda: {"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_batches_are_refused(case):
    make, error, words = REFUSED[case]
    options: dict[str, Any] = {"input_ids": IDS, "k": 3} | make()
    with pytest.raises(error, match=words):
        Teacher(llama(7)).topk(options.pop("input_ids"), **options)


def test_tokens_per_batch_is_a_number_of_tokens():
    with pytest.raises(ValueError, match="tokens_per_batch: expected an integer of 1 or more"):
        Teacher(llama(7), tokens_per_batch=0)


def test_valid_vocab_renormalises_over_what_remains():
    model = llama(7, scale=20.0)
    teacher = Teacher(model)
    teacher.valid_vocab = VOCAB - 10
    values, index = dense_topk(model, IDS, 4, valid=VOCAB - 10)
    answers = teacher.topk(IDS, k=4)
    assert torch.equal(answers.ids.long(), index)
    torch.testing.assert_close(answers.logprobs.double(), values, rtol=1e-4, atol=1e-5)


def test_teacher_is_frozen_in_eval_mode():
    model = llama(7).train()
    teacher = Teacher(model)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert isinstance(teacher, TopKTeacher)
