"""A teacher's answers are checked in one place: values, rounding, and every batch of a run."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from fastdistill import Teacher, topk_distill_loss
from fastdistill.hf.lm_head import LMHead
from fastdistill.losses.answer_checks import (
    AnswerMonitor,
    AnswerRules,
    find_invalid,
    find_shape_error,
    measure,
)
from fastdistill.losses.types import TopK
from helpers.answers import Answers
from helpers.present import present
from helpers.training import VOCAB, build, peaked, ragged, train

IDS = torch.tensor([[3, 1, 7], [2, 9, 4]])
P = torch.tensor([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1]], dtype=torch.float64)
HONEST = TopK(IDS, P.log().float(), (1 - P.sum(-1)).log().float())


def changed(**of):
    return HONEST._replace(**of)


def put(tensor, value):
    copy = tensor.clone()
    copy[1] = value
    return copy


WRONG = {
    "ids": changed(ids=put(IDS, 10)),
    "repeated": changed(ids=put(IDS, 4)),
    "nan": changed(logprobs=put(HONEST.logprobs, math.nan)),
    "positive": changed(logprobs=put(HONEST.logprobs, math.inf)),
    "mass": changed(logprobs=put(HONEST.logprobs, -0.5)),
    "tail": changed(log_tail=put(HONEST.log_tail, math.nan)),
    "total": changed(log_tail=put(HONEST.log_tail, 0.0)),
    "nothing": TopK(IDS, put(HONEST.logprobs, -math.inf)),
}


def test_what_is_honest_passes():
    for answer in (
        HONEST,
        changed(log_tail=None),
        changed(ids=put(IDS, torch.tensor([2, -1, 4])), log_tail=None),
        TopK(IDS, torch.tensor([[0.0, -math.inf, -math.inf]] * 2), torch.full((2,), -math.inf)),
    ):
        assert find_invalid(answer, AnswerRules(vocab=10)) is None


@pytest.mark.parametrize("kind", WRONG)
def test_every_kind_is_found_at_its_position(kind):
    wrong = present(find_invalid(WRONG[kind], AnswerRules(vocab=10)))
    assert (wrong.kind, wrong.at) == (kind, 1)


def test_nan_is_reported_before_what_it_causes():
    """The top k of NaN logits has one id in every slot."""
    both = changed(ids=put(IDS, 4), logprobs=put(HONEST.logprobs, math.nan))
    assert present(find_invalid(both, AnswerRules(vocab=10))).kind == "nan"


def test_all_mass_gone_is_found():
    gone = changed(logprobs=put(HONEST.logprobs, -math.inf), log_tail=put(HONEST.log_tail, -1e9))
    assert present(find_invalid(gone, AnswerRules(vocab=10))).kind == "total"
    assert find_invalid(gone._replace(log_tail=None), AnswerRules(vocab=10, nothing=True)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("k", [2, 64, 1024])
def test_rounding_is_no_lie(dtype, upcast, k):
    """Whole vocabularies and parts, with tails that are 1 − Σ of what was rounded, or rounded."""
    g = torch.Generator().manual_seed(k)
    for width in (0.1, 1.0, 6.0):
        exact = (torch.randn(256, 1024, generator=g) * width).log_softmax(-1)
        best = exact.topk(k)
        logprobs = best.values.to(dtype)
        rest = exact.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        difference = (1 - logprobs.float().exp().sum(-1)).clamp(min=2.0**-24).log()
        for tail in (None, rest.to(dtype), difference.to(dtype)):
            answer = TopK(best.indices, logprobs, tail)
            if upcast:
                tail = None if tail is None else tail.float()
                answer = TopK(best.indices, logprobs.float(), tail)
            assert find_invalid(answer, AnswerRules(vocab=1024)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_rounding_cannot_do_is_refused(dtype):
    lie = TopK(IDS, (P * 1.25).log().to(dtype))
    wrong = present(find_invalid(lie, AnswerRules(vocab=10)))
    assert wrong.kind == "mass"
    if dtype != torch.float32:
        assert str(dtype).removeprefix("torch.") in wrong.hint


def test_shapes_types_and_slots():
    assert find_shape_error(HONEST, (2,), 3) is None
    assert "expected answers of shape [3, …]" in present(find_shape_error(HONEST, (3,), 3))
    assert "2 were requested" in present(find_shape_error(HONEST, (2,), 2))
    pair = cast(Any, (IDS, P))
    assert "expected a fastdistill.TopK, got tuple" in present(find_shape_error(pair, (2,), 3))
    error = present(find_shape_error(changed(ids=IDS.float()), (2,), 3))
    assert error.startswith("ids: expected int32")
    error = present(find_shape_error(changed(logprobs=P[:, :2]), (2,), 3))
    assert error.startswith("logprobs: expected shape")
    error = present(find_shape_error(changed(log_tail=P), (2,), 3))
    assert error.startswith("log_tail: expected shape")
    empty = "expected a dense tensor with values, got one of "
    assert (
        find_shape_error(changed(ids=IDS.to("meta")), (2,), 3) == f"ids: {empty}the meta device, "
        "without values"
    )
    assert (
        find_shape_error(changed(logprobs=P.to_sparse()), (2,), 3) == f"logprobs: {empty}"
        "torch.sparse_coo"
    )


@pytest.mark.parametrize("factor", [2.0, 1.2])
def test_the_loss_refuses_more_mass_than_there_is(factor):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 8, generator=g), torch.randn(10, 8, generator=g)
    topk_distill_loss(hidden, weight, HONEST)
    with pytest.raises(ValueError, match=r"teacher\.logprobs: expected probabilities that sum to"):
        topk_distill_loss(hidden, weight, TopK(IDS, (P * factor).log()))
    with pytest.raises(ValueError, match=r"teacher\.log_tail: expected the ids and the tail"):
        topk_distill_loss(hidden, weight, changed(log_tail=torch.zeros(2)))


def turning(how, after):
    """A teacher that is honest for some batches."""
    teacher, calls = Teacher(peaked()), []

    def answer(ids, k):
        calls.append(ids)
        payload = teacher.topk(ids, k=k)
        return payload if len(calls) <= after else how(payload)

    return Answers(answer)


TURNS = {
    "one id in every slot": (
        lambda a: a._replace(ids=a.ids[..., :1].expand_as(a.ids)),
        "expected 8 different ids",
    ),
    "no mass": (
        lambda a: a._replace(logprobs=a.logprobs - torch.inf, log_tail=a.log_tail - torch.inf),
        "expected the ids and the tail to have a mass of 1, got 0",
    ),
    "nothing known": (
        lambda a: TopK(a.ids, a.logprobs - torch.inf),
        "expected an id with a probability above 0",
    ),
    "no tail": (
        lambda a: a._replace(log_tail=a.log_tail * 0),
        "expected the ids and the tail to have",
    ),
    "twice the mass": (
        lambda a: TopK(a.ids, a.logprobs + math.log(2), None),
        "expected (prob|log-prob)",
    ),
    "NaN": (lambda a: a._replace(logprobs=a.logprobs * torch.nan), "got 8 NaN"),
    "foreign ids": (lambda a: a._replace(ids=a.ids + VOCAB), "expected ids in 0..52"),
    "more slots": (
        lambda a: TopK(torch.cat([a.ids] * 2, -1), torch.cat([a.logprobs] * 2, -1)),
        "got 16 slots; 8 were requested",
    ),
}


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("turn", TURNS)
def test_a_teacher_that_goes_bad_later(tmp_path, turn):
    how, words = TURNS[turn]
    trainer = build(
        tmp_path,
        teacher=turning(how, after=4),
        max_steps=8,
        check_signal=False,
        per_device_train_batch_size=3,
    )
    with pytest.raises(ValueError, match=words) as error:
        trainer.train()
    assert trainer.state.global_step == 4
    if "slots" not in words:
        assert "in batch 5 of this run, row " in str(error.value)


def test_hidden_states_that_are_not_finite(tmp_path):
    model = Teacher(peaked())

    class Turns:
        calls = 0

        @property
        def head(self) -> LMHead:
            return model.head

        def hidden(self, input_ids, attention_mask=None):
            self.calls += 1
            states = model.hidden(input_ids, attention_mask)
            return (
                states
                if self.calls < 3
                else states.masked_fill(input_ids[..., None] == 7, -torch.inf)
            )

    rows = [{"input_ids": [5, 7, 9, 11]}] * 4
    with pytest.raises(ValueError, match=r"in batch 3 .*position 1, .*: hidden: expected fin"):
        train(tmp_path, teacher=Turns(), k=None, data=rows, max_steps=4, check_signal=False)


def test_evaluation_is_looked_at_too(tmp_path):
    trainer = build(tmp_path, teacher=turning(TURNS["no tail"][0], 0), eval_dataset=ragged(4))
    with pytest.raises(ValueError, match="expected the answers of a language model"):
        trainer.evaluate()


class OnDevice(AnswerMonitor):
    """As on a GPU: nothing is read before `read`."""

    def check(self, answer, rows, positions, rules):
        self.batches += 1
        self._rules, self._slots, self._dtype = rules, answer.ids.shape[-1], answer.logprobs.dtype
        self._store(*measure(answer, rules), rows, positions)


def test_what_is_noted_on_a_device_is_raised_when_it_is_read():
    monitor, at = OnDevice(), torch.arange(2)
    for answer in (HONEST, WRONG["total"], WRONG["repeated"], HONEST):
        monitor.check(answer, at + 5, at + 20, AnswerRules(vocab=10))
    with pytest.raises(ValueError, match=r"in batch 2 .* row 6, position 21, .*: log_tail"):
        monitor.read()
    monitor.read()  # said once
    monitor.check(WRONG["ids"], at, at, AnswerRules(vocab=10))
    with pytest.raises(
        ValueError, match=r"batch 5 .* row 1, position 1, .* expected ids in 0\.\.9"
    ):
        monitor.read()


def test_nothing_waits_for_the_device_and_nothing_is_saved_after_it(tmp_path):
    """What a step does on a device without values to read: `meta` refuses every read."""
    ids, logprobs, log_tail = (present(x).to("meta") for x in HONEST[:3])
    answer = TopK(ids, logprobs, log_tail)
    monitor = AnswerMonitor()
    at = torch.arange(2, device="meta")
    monitor.check(answer, at, at, AnswerRules(vocab=10))
    monitor.check_hidden(torch.empty(2, 4, device="meta"), at, at)
    trainer = build(
        tmp_path,
        teacher=turning(TURNS["one id in every slot"][0], 1),
        max_steps=6,
        logging_steps=100,
        save_strategy="steps",
        save_steps=3,
        check_signal=False,
        per_device_train_batch_size=3,
    )
    trainer._monitor = OnDevice()
    with pytest.raises(ValueError, match="in batch 2 of this run"):
        trainer.train()
    # The norm of the gradient is read before each update: the update of batch 2 is not made, and
    # the weights that are saved are those of the step before it.
    assert trainer.state.global_step == 1
    saved = [p.parent.name for p in (tmp_path / "run").rglob("*.safetensors")]
    assert saved == ["checkpoint-1"]
