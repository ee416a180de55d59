"""What cannot train rightly is refused before the first update, in words that help."""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer, models
from training import VOCAB, config, llama, ragged, train
from transformers import PreTrainedTokenizerFast

from fastdistill.config import DistillConfig
from fastdistill.outputs import TopK
from fastdistill.teacher import Teacher
from fastdistill.trainer import DistillTrainer


class Answers:
    """A teacher that answers with a fixed function of the token ids."""

    def __init__(self, answer):
        self.answer = answer

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        return self.answer(input_ids, k)


def zeros(input_ids, k):
    shape = (*input_ids.shape, k)
    return TopK(torch.zeros(shape, dtype=torch.long), torch.zeros(shape))


def constant(input_ids, k):
    ids = torch.arange(k).expand(*input_ids.shape, k)
    return TopK(ids, torch.linspace(-1, -4, k).sub(2).expand(ids.shape))


def uniform(input_ids, k):
    ids = (input_ids.unsqueeze(-1) + torch.arange(k)) % VOCAB
    return TopK(ids, torch.full(ids.shape, 1 / VOCAB).log())


def one_position_late(input_ids, k):
    ids = (
        input_ids.unsqueeze(-1) + torch.arange(k)
    ) % VOCAB  # knows the current token, not the next
    return TopK(ids, torch.tensor([0.9, *[0.01] * (k - 1)]).log().expand(ids.shape))


def not_a_number(input_ids, k):
    ids = (input_ids.unsqueeze(-1) + torch.arange(k)) % VOCAB
    return TopK(ids, torch.full(ids.shape, float("nan")))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (zeros, "teacher"),
        (constant, "the same answer at all"),
        (uniform, "all its answers are equally likely"),
        (one_position_late, "fit the previous position better by"),
        (not_a_number, "NaN"),
    ],
)
def test_a_teacher_without_signal_stops_the_run(tmp_path, answer, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path, teacher=Answers(answer), k=4)


def tokenizer(words):
    vocab = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=words[0])


WORDS = [f"w{i}" for i in range(VOCAB)]


def test_different_tokenizers_are_refused_whatever_their_size(tmp_path):
    swapped = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
    teacher = Teacher(llama(7), tokenizer=tokenizer(swapped))
    with pytest.raises(ValueError, match=r"2 tokens have another id \(first: 'w[56]'"):
        DistillTrainer(llama(0), teacher, config(tmp_path), processing_class=tokenizer(WORDS))


def test_padded_vocabulary_is_cut_and_said_once(tmp_path, caplog):
    narrow = llama(0)
    wide = llama(7, vocab=VOCAB + 11)
    with torch.no_grad():
        wide.lm_head.weight[VOCAB:] *= 1e3  # padding rows are garbage, and must not be seen
    teacher = Teacher(wide, tokenizer=tokenizer(WORDS))
    with caplog.at_level(logging.WARNING, logger="fastdistill.trainer"):
        trainer = DistillTrainer(
            narrow,
            teacher,
            config(tmp_path),
            train_dataset=ragged(),
            eval_dataset=ragged(),
            processing_class=tokenizer(WORDS),
        )
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "padding" in record.getMessage()]
    assert len(said) == 1
    assert f"{VOCAB} rows and the teacher's {VOCAB + 11}" in said[0]
    cut = llama(7, vocab=VOCAB + 11)
    cut.resize_token_embeddings(VOCAB)
    expected = train(tmp_path, teacher=cut, model=llama(0))
    for a, b in zip(trainer.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_padded_student_is_cut_to_its_teacher(tmp_path):
    trainer = train(tmp_path, model=llama(0, vocab=VOCAB + 11), teacher=llama(7, scale=20.0))
    start = llama(0, vocab=VOCAB + 11)
    assert torch.equal(trainer.model.lm_head.weight[VOCAB:], start.lm_head.weight[VOCAB:])
    assert not torch.equal(trainer.model.lm_head.weight[:VOCAB], start.lm_head.weight[:VOCAB])


def test_what_a_trainer_refuses(tmp_path):
    student = llama(0)
    with pytest.raises(ValueError, match=r"teacher: expected one, got None with ce_weight=0"):
        DistillTrainer(student, None, config(tmp_path))
    with pytest.raises(ValueError, match=r"expected another model, got the student itself"):
        DistillTrainer(student, student, config(tmp_path))
    with pytest.raises(ValueError, match=rf"k: expected at most the vocabulary's {VOCAB}"):
        DistillTrainer(student, llama(7), config(tmp_path, k=VOCAB + 1))
    with pytest.raises(TypeError, match=r"teacher: expected a model, a path, or an object"):
        DistillTrainer(student, object(), config(tmp_path))
    with pytest.raises(TypeError, match=r"args: expected a DistillConfig, got dict"):
        DistillTrainer(student, llama(7), {})


def test_config_works_as_it_stands(tmp_path):
    args = DistillConfig(str(tmp_path))
    assert (args.k, args.divergence, args.tail, args.impl) == (64, "forward_kl", "bucket", "auto")
    assert args.prediction_loss_only


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, r"k: expected an integer of 1 or more, got 0"),
        ({"divergence": "kl"}, r"divergence: expected one of forward_kl, .*, got 'kl'"),
        ({"tail": "drop"}, r"tail: expected one of bucket, .*, got 'drop'"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
        ({"temperature": 0.0}, r"temperature: expected a number above 0"),
        ({"temperature": float("nan")}, r"temperature: expected a number between"),
        ({"beta": 1.5}, r"beta: expected a number between 0 and 1, got 1.5"),
        ({"ce_weight": -0.1}, r"ce_weight: expected a number between 0 and 1"),
        ({"tail": "renorm_both", "k": 1}, r"tail: expected something else than 'renorm_both'"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: expected it unset"),
        ({"use_liger_kernel": True}, r"use_liger_kernel: expected it unset"),
    ],
)
def test_config_says_what_it_expected(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig(str(tmp_path), **options)


def test_config_refuses_another_type(tmp_path):
    with pytest.raises(TypeError, match=r"beta: expected a number, got '0.5'"):
        DistillConfig(str(tmp_path), beta="0.5")
