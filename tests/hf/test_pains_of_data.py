"""Mistakes with data and tokenizers that cost this field the most runs: avoided, or named at once.

With test_pains_of_training.py and test_trainer_distributed.py, fifteen of them.
"""

from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.answers import Answers, spread
from helpers.example_texts import STOCK, TALK, tokenizer
from helpers.training import VOCAB, build, llama, ragged, step_losses, train, weights

WORDS = [f"w{i}" for i in range(VOCAB)]


def words(vocabulary=WORDS):
    vocab = {word: index for index, word in enumerate(vocabulary)}
    model = Tokenizer(models.WordLevel(vocab, unk_token=vocabulary[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=vocabulary[0])


def test_padded_vocabulary(tmp_path, caplog):
    """152064 rows against 151936: cut to what both have, garbage in the rest unseen, said once."""
    narrow, wide = llama(0), llama(7, vocab=VOCAB + 11)
    with torch.no_grad():
        wide.lm_head.weight[VOCAB:] *= 1e3
    teacher = Teacher(wide, tokenizer=words())
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        trainer = train(
            tmp_path,
            model=narrow,
            teacher=teacher,
            eval_dataset=ragged(),
            processing_class=words(),
        )
    warnings = [r.getMessage() for r in caplog.records if "padding" in r.getMessage()]
    assert len(warnings) == 1
    assert f"{VOCAB} rows and the teacher's {VOCAB + 11}" in warnings[0]
    cut = llama(7, vocab=VOCAB + 11)
    cut.resize_token_embeddings(VOCAB)
    assert (weights(trainer) - weights(train(tmp_path, teacher=cut))).abs().max() < 1e-6
    padded = train(tmp_path, model=llama(0, vocab=VOCAB + 11), teacher=llama(7, scale=20.0))
    start = llama(0, vocab=VOCAB + 11).lm_head.weight
    assert torch.equal(padded.model.lm_head.weight[VOCAB:], start[VOCAB:])
    assert not torch.equal(padded.model.lm_head.weight[:VOCAB], start[:VOCAB])


@pytest.mark.slow
def test_padded_vocabulary_of_a_dense_teacher(tmp_path):
    wide = llama(7, vocab=VOCAB + 11, scale=20.0)
    cut = llama(7, vocab=VOCAB + 11, scale=20.0)
    cut.resize_token_embeddings(VOCAB)
    runs = [train(tmp_path, teacher=teacher, k=None) for teacher in (wide, cut)]
    assert (weights(runs[0]) - weights(runs[1])).abs().max() < 1e-6


def test_different_tokenizer_of_equal_size(tmp_path):
    swapped = [*WORDS[:5], WORDS[6], WORDS[5], *WORDS[7:]]
    teacher = Teacher(llama(7), tokenizer=words(swapped))
    with pytest.raises(ValueError, match=r"2 tokens have another id \(first: 'w[56]'"):
        build(tmp_path, teacher=teacher, processing_class=words())


def test_all_zero_mask(tmp_path):
    """A stock chat template's assistant mask has no ones: no loss, no error, no learning."""
    masks = [
        {"input_ids": row["input_ids"], "assistant_masks": [0] * len(row["input_ids"])}
        for row in ragged()
    ]
    with pytest.raises(ValueError, match=r"expected target tokens, got none in 12 examples"):
        build(tmp_path, data=masks)
    talk = build(tmp_path, data=[{"messages": TALK}] * 4, processing_class=tokenizer(STOCK))
    assert (talk.data_collator([{"messages": TALK}])["labels"] != -100).sum() == 9


@pytest.mark.slow
def test_all_masked_batches(tmp_path):
    """Among others they count for nothing, and are no NaN."""
    silent = {"input_ids": torch.arange(3, 12), "labels": torch.full((9,), -100)}
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 13}
    trainer = train(tmp_path, data=[*ragged(), silent], **cut)
    whole = train(tmp_path)
    assert (weights(trainer) - weights(whole)).abs().max() < 1e-6
    assert step_losses(trainer) == pytest.approx(step_losses(whole), rel=1e-5)


def test_pad_is_eos(tmp_path):
    same = tokenizer(pad_token="<end>")
    lost = [{"input_ids": [8, 9, 10, 0], "labels": [8, 9, 10, -100]}] * 4
    with pytest.raises(ValueError, match=r"expected the end token \(id 0\) among the labels"):
        build(tmp_path, data=lost, processing_class=same)
    trainer = build(tmp_path, data=[{"text": "a cat"}] * 4, processing_class=same)
    batch = trainer.data_collator([{"text": "a cat"}, {"text": "a cat and a dog"}])
    assert batch["labels"][0].tolist() == [-100, 8, 0, -100, -100, -100]


def test_shift(tmp_path):
    """Labels shifted by the caller, and answers one position late."""
    shifted = [row | {"labels": row["input_ids"].roll(-1)} for row in ragged()]
    with pytest.raises(ValueError, match="the labels are shifted already"):
        build(tmp_path, data=shifted)

    def late(ids, k):
        answers = torch.tensor([0.9, *[0.01] * (k - 1)]).log().expand(*ids.shape, k)
        return TopK(spread(ids, k), answers)  # knows the current token, not the next

    with pytest.raises(ValueError, match="fit the previous position better by"):
        train(tmp_path, teacher=Answers(late), k=4)
