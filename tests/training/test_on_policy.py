"""On-policy steps learn from the teacher's word on the student's own samples, however cut."""

from __future__ import annotations

import pytest
import torch

from fastdistill.hf.collator import padded
from fastdistill.hf.encoder import EncodedExample
from fastdistill.losses.types import TopK
from fastdistill.training.on_policy import excerpts, is_on_policy, sample
from helpers.training import build, llama, peaked, ragged, step_losses, train, weights


def prompts(n=12):
    return [{**row, "labels": torch.full_like(row["labels"], -100)} for row in ragged(n)]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_an_update_does_not_depend_on_how_it_is_cut(tmp_path, divergence):
    options = {"lmbda": 0.5, "max_new_tokens": 6, "max_steps": 4, "divergence": divergence}
    whole = train(tmp_path, **options)
    cut = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    for other in (train(tmp_path, **cut, **options), train(tmp_path, packing=True, **options)):
        assert (weights(other) - weights(whole)).abs().max() < 1e-6
        assert step_losses(other) == pytest.approx(step_losses(whole), rel=1e-5)
    assert 0 < sum(is_on_policy(whole.args, step) for step in range(4)) < 4


def test_the_loss_is_that_of_the_sampled_rows(tmp_path):
    """The first step's samples, trained on as data, give the same loss."""
    options = {"max_new_tokens": 5, "max_steps": 1}
    on = build(tmp_path, lmbda=1.0, data=prompts(), **options)
    collated = on.data_collator(prompts())
    drawn = sample(
        llama(0), collated, config=on.args, step=0, pad_id=0, ends=[2], vocab=None, synced=False
    )
    rows = [
        {"input_ids": ids[mask == 1], "labels": labels[mask == 1]}
        for ids, mask, labels in zip(*drawn.values(), strict=True)
    ]
    on.train()
    off = train(tmp_path, data=rows, **options)
    assert step_losses(on) == pytest.approx(step_losses(off), rel=1e-5)
    assert (weights(on) - weights(off)).abs().max() < 1e-6


def test_labels_of_sampled_tokens_count_for_nothing(tmp_path):
    options = {"lmbda": 0.999999, "max_new_tokens": 5, "max_steps": 2, "z_loss": 0.01}
    mixed = train(tmp_path, ce_weight=0.5, **options)
    assert torch.equal(weights(mixed), weights(train(tmp_path, **options)))


def test_prompts_alone_train_on_policy_and_not_off(tmp_path):
    trained = train(tmp_path, lmbda=1.0, max_new_tokens=4, data=prompts())
    assert step_losses(trained)[0] > 0
    with pytest.raises(ValueError, match="expected target tokens"):
        build(tmp_path, lmbda=0.5, data=prompts())


def test_a_teacher_of_another_vocabulary_never_meets_a_padding_token(tmp_path):
    class Careful:
        vocab_size = 53

        def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
            assert input_ids.max() < 53
            ids = (input_ids.unsqueeze(-1) + torch.arange(k)) % 53
            logprobs = torch.linspace(-1, -3, k) - torch.rand(ids.shape) - 1
            return TopK(ids, logprobs, None, temperature)

    student = llama(0, vocab=64)
    with torch.no_grad():
        student.lm_head.weight[53:] *= 100.0
    train(
        tmp_path, model=student, teacher=Careful(), lmbda=1.0, max_new_tokens=8, data=prompts(), k=4
    )


class Letters:
    """A tokenizer of one letter per id."""

    def decode(self, ids):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def test_samples_are_text_and_truncated():
    prompt, completion = [0] * 300, [1] * 500
    row = EncodedExample(
        torch.tensor(prompt + completion),
        torch.tensor([-100] * 300 + completion),
        torch.ones(800, dtype=torch.long),
    )
    short = EncodedExample(
        torch.tensor([2, 3]), torch.tensor([-100, 3]), torch.ones(2, dtype=torch.long)
    )
    texts = excerpts(padded([row, short, short, short], 0), Letters())
    assert texts[0] == {"prompt": "…" + "a" * 200, "completion": "b" * 400 + "…"}
    assert texts[1] == {"prompt": "c", "completion": "d"}  # without padding
    assert len(texts) == 3


def test_the_panel_says_that_the_text_is_the_students(tmp_path):
    trainer = train(tmp_path, lmbda=1.0, max_new_tokens=4)
    assert trainer.panel.sampled
    assert "student's own" in trainer.panel.lines()[-1][0]


def test_what_cannot_be_on_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ce_weight: expected 0 with lmbda=1, got 0\.5"):
        build(tmp_path, lmbda=1.0, ce_weight=0.5)
    with pytest.raises(ValueError, match="teacher: expected a teacher for the student's samples"):
        build(tmp_path, teacher=None, ce_weight=1.0, lmbda=0.5)
    with pytest.raises(ValueError, match="max_new_tokens: expected an integer of 1 or more, got 0"):
        build(tmp_path, max_new_tokens=0)
    with pytest.raises(ValueError, match="sampling_temperature: expected a finite number above 0"):
        build(tmp_path, sampling_temperature=0.0)
    with pytest.raises(ValueError, match="max_new_tokens: expected at most"):
        train(tmp_path, lmbda=1.0, max_new_tokens=64)


def test_a_dense_teacher_scores_samples_too(tmp_path):
    whole = train(tmp_path, lmbda=1.0, max_new_tokens=4, k=None, divergence="reverse_kl")
    topk = train(tmp_path, lmbda=1.0, max_new_tokens=4, k=53, divergence="reverse_kl")
    assert step_losses(whole) == pytest.approx(step_losses(topk), rel=1e-4)
    assert peaked().config.vocab_size == 53
