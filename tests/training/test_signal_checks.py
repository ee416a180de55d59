"""The first batch tells answers about this text from answers about another one."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill import Teacher, TeacherCache
from fastdistill.losses.types import TopK
from fastdistill.training.checks.signal import (
    Signal,
    check_teacher_matches_text,
    contexts_of,
    label_logprob,
    signal,
)
from helpers.answers import Answers
from helpers.training import VOCAB, build, llama, peaked, train


def following(n=12, length=24):
    """Text in which each token tells the next, with a slip now and then."""
    rows = []
    for seed in range(n):
        g = torch.Generator().manual_seed(seed)
        ids = [int(torch.randint(3, VOCAB, (1,), generator=g))]
        for _ in range(length - 1):
            slip = torch.rand(1, generator=g).item() < 0.2
            jump = int(torch.randint(3, VOCAB, (1,), generator=g))
            ids.append(jump if slip else (ids[-1] - 3 + 7) % (VOCAB - 3) + 3)
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)})
    return rows


class Knows:
    """Answers with the rule; `of` maps the ids it thinks it reads."""

    vocab_size = VOCAB

    def __init__(self, of=lambda ids: ids):
        self.of = of

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        nxt = (self.of(input_ids) - 3 + 7) % (VOCAB - 3) + 3
        ids = torch.stack([nxt, (nxt - 2) % (VOCAB - 3) + 3], -1)
        return TopK(ids, torch.tensor([0.8, 0.02]).log().expand(ids.shape))


def run(tmp_path, teacher, **options):
    return train(tmp_path, teacher=teacher, data=following(), k=2, max_steps=1, **options)


def test_a_teacher_that_knows_the_text_passes(tmp_path):
    result = run(tmp_path, Knows()).panel.signal
    assert result.is_plausible
    assert result.delivered > 0.5 * result.claimed > 1


def test_answers_that_belong_to_other_rows_stop_the_run(tmp_path):
    class Shuffled(Knows):
        def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
            return super().topk(input_ids.roll(1, 0), k=k, temperature=temperature)

    with pytest.raises(ValueError, match="no better than the same answers half a batch away"):
        run(tmp_path, Shuffled())
    run(tmp_path, Shuffled(), check_signal=False)


def test_another_tokenizer_of_the_same_size_stops_the_run(tmp_path):
    """Every id is valid, every answer confident, and nothing fits."""
    mapping = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="Check that teacher and data use the same tokenizer"):
        run(tmp_path, Knows(of=lambda ids: mapping[ids]))


def figures(**changes):
    base = {"nll": 5.0, "nll_shuffled": 5.0, "claimed": 2.0, "delivered": 0.0}
    more = {"delivered_error": 0.05, "student": 0.0, "student_error": 0.05, "tokens": 500}
    return Signal(**(base | more | changes))


def test_what_is_no_lie_passes():
    check_teacher_matches_text(figures(claimed=0.1), positions_trusted=False)  # claims nothing
    check_teacher_matches_text(figures(delivered=0.5), positions_trusted=False)  # keeps a part
    noisy = figures(delivered_error=0.5)
    check_teacher_matches_text(noisy, positions_trusted=False)
    check_teacher_matches_text(figures(tokens=63), positions_trusted=False)  # too few to tell
    with pytest.raises(ValueError, match=r"5\.00 against 5\.00 nats, .* a gap of 2\.00"):
        check_teacher_matches_text(figures(), positions_trusted=False)


def test_a_model_in_this_process_is_refused_only_where_the_text_can_be_known():
    check_teacher_matches_text(figures(), positions_trusted=True)
    with pytest.raises(ValueError, match="no better than the same answers"):
        check_teacher_matches_text(figures(student=1.0), positions_trusted=True)


def test_claim_and_delivery_are_what_they_say():
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(400, VOCAB, generator=g) * 2).log_softmax(-1)
    labels = torch.multinomial(p.exp(), 1, generator=g)[:, 0]
    teacher = TopK(torch.arange(VOCAB).expand(400, -1), p, torch.full((400,), -100.0))
    nll = torch.zeros(400)
    result = signal(teacher, labels, nll, nll + 1, VOCAB)
    away = p.roll(200, 0)
    assert result.claimed == pytest.approx((p.exp() * (p - away)).sum(-1).mean().item(), rel=1e-4)
    at = torch.arange(400)
    assert result.nll == pytest.approx(-p[at, labels].mean().item(), rel=1e-5)
    assert result.nll_shuffled == pytest.approx(-away[at, labels].mean().item(), rel=1e-5)
    assert result.delivered == pytest.approx(result.nll_shuffled - result.nll, rel=1e-4)
    assert abs(result.delivered - result.claimed) < 4 * result.delivered_error  # an honest teacher
    assert result.student == 1.0


def test_tokens_outside_the_payload_share_the_tail():
    teacher = TopK(torch.tensor([[4, 7]]), torch.tensor([[0.5, 0.3]]).log())
    expected = math.log(0.2 / (VOCAB - 2))
    assert label_logprob(teacher, torch.tensor([9]), VOCAB).item() == pytest.approx(expected, 1e-4)
    assert label_logprob(teacher, torch.tensor([7]), VOCAB).item() == pytest.approx(math.log(0.3))


def test_overlap_is_the_share_of_common_tokens(tmp_path):
    student = llama(0)
    same = build(tmp_path, teacher=llama(0), k=5, check_signal=False)
    same.train()
    assert same.panel.overlap == 1.0
    assert train(tmp_path, model=student, k=5).panel.overlap < 0.6


# ---- honest answers that look constant


def one_token_answers(prompts, n=16):
    rows = []
    for i in range(n):
        ids = [1, *prompts[i % len(prompts)], 10 + i]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    return rows


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("check_signal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("teacher", ["model", "choices", "certain"])
def test_one_question_with_many_answers(tmp_path, teacher, packed, check_signal):
    """The same context has the same answer, a distribution over choices, or one sure token."""
    choices = lambda ids, k: TopK(  # noqa: E731
        torch.arange(10, 14).expand(*ids.shape, 4), torch.full((*ids.shape, 4), math.log(0.25))
    )
    certain = lambda ids, k: TopK(  # noqa: E731
        torch.arange(10, 12).expand(*ids.shape, 2),
        torch.tensor([0.0, -torch.inf]).expand(*ids.shape, 2),
    )
    answering = {"model": peaked(), "choices": Answers(choices), "certain": Answers(certain)}[
        teacher
    ]
    train(
        tmp_path,
        teacher=answering,
        data=one_token_answers([[5, 6]]),
        k=4,
        packing=packed,
        check_signal=check_signal,
    )


def test_several_samples_of_several_prompts(tmp_path):
    rows = one_token_answers([[5, 6], [7], [9, 8, 7]])
    train(tmp_path, teacher=peaked(), data=rows, k=4)
    cache = TeacherCache.build(Teacher(peaked()), rows, tmp_path / "c", k=4, positions="targets")
    train(tmp_path, teacher=cache, data=rows, k=4)


def test_a_constant_answer_to_several_questions_is_no_signal(tmp_path):
    same = lambda ids, k: TopK(  # noqa: E731
        torch.arange(k).expand(*ids.shape, k), torch.linspace(-1, -6, k).expand(*ids.shape, k)
    )
    rows = one_token_answers([[5, 6], [7], [9, 8, 7]])
    with pytest.raises(ValueError, match="after 3 different contexts"):
        train(tmp_path, teacher=Answers(same), data=rows, k=4)
    train(tmp_path, teacher=Answers(same), data=rows, k=4, check_signal=False)


def test_contexts_do_not_depend_on_padding():
    ids = torch.tensor([[4, 5, 6, 0, 0], [0, 0, 4, 5, 6], [5, 4, 6, 0, 0], [4, 5, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    contexts = contexts_of(ids, mask)
    assert torch.equal(contexts[0, :3], contexts[1, 2:])
    assert torch.equal(contexts[0, :2], contexts[3, :2])
    ends = torch.stack(
        [contexts[0, 2], contexts[2, 2], contexts[3, 2], contexts[0, 0], contexts[0, 1]]
    )
    assert len(ends.unique()) == 5
