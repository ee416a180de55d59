"""Samples follow the student's distribution and depend on seed, step and prompt alone."""

from __future__ import annotations

import pytest
import torch

from fastdistill.hf.generation import ends_of
from fastdistill.training.on_policy import _KeyedChoice, is_on_policy, prompts_of, sample, uniform
from helpers.training import VOCAB, config, llama

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]


def batch(prompts=PROMPTS, completion=(20, 21), pad=0):
    """Right-padded rows: a prompt, and something else as the data's completion."""
    rows = [[*p, *completion] for p in prompts]
    T = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (T - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows])
    labels = torch.where(mask.bool(), ids, -100)
    for row, prompt in zip(labels, prompts, strict=True):
        row[: len(prompt)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def draw(tmp_path, model, inputs=None, *, step=0, ends=(), vocab=None, **options):
    options = {"max_new_tokens": 6, "lmbda": 1.0} | options
    return sample(
        model,
        batch() if inputs is None else inputs,
        config=config(tmp_path, **options),
        step=step,
        pad_id=0,
        ends=list(ends),
        vocab=vocab,
        synced=False,
    )


def completions(sampled):
    is_target = sampled["labels"] != -100
    return [ids[k].tolist() for ids, k in zip(sampled["input_ids"], is_target, strict=True)]


def test_prompts_are_what_comes_before_the_first_target():
    inputs = batch()
    assert [p.tolist() for p in prompts_of(inputs)] == PROMPTS
    inputs["labels"][0] = -100  # a prompt alone
    inputs["labels"][1, 1:4] = inputs["input_ids"][1, 1:4]  # a text alone
    assert [p.tolist() for p in prompts_of(inputs)] == [
        [5, 6, 7, 20, 21],
        [8, 9, 20, 21],
        PROMPTS[2],
    ]


def test_a_sampled_row_is_its_prompt_and_a_completion_of_targets(tmp_path):
    sampled = draw(tmp_path, llama(0))
    for row, prompt in enumerate(PROMPTS):
        n = len(prompt)
        assert sampled["input_ids"][row, :n].tolist() == prompt
        assert (sampled["labels"][row, :n] == -100).all()
        assert sampled["attention_mask"][row].sum() == n + 6
    assert [len(c) for c in completions(sampled)] == [6, 6, 6]


def test_samples_depend_on_seed_step_and_prompt_alone(tmp_path):
    model = llama(0)
    first = completions(draw(tmp_path, model))
    torch.manual_seed(99)
    assert completions(draw(tmp_path, model)) == first
    alone = [completions(draw(tmp_path, model, batch([p])))[0] for p in PROMPTS]
    assert alone == first
    assert completions(draw(tmp_path, model, step=1)) != first
    assert completions(draw(tmp_path, model, seed=1)) != first
    twice = completions(draw(tmp_path, model, batch([PROMPTS[0]] * 2)))
    assert twice[0] == first[0] != twice[1]


def test_sampling_leaves_the_random_stream_and_the_model_as_they_were(tmp_path):
    model = llama(0).train()
    before, settings = torch.random.get_rng_state(), model.generation_config
    draw(tmp_path, model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert model.generation_config is settings


def test_tokens_are_drawn_from_the_distribution():
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]])
    n = 4000
    choice = _KeyedChoice([(seed,) for seed in range(n)], prompt_length=0)
    drawn = choice(torch.empty(n, 0), scores.expand(n, -1)).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / n
    expected = scores.softmax(-1)[0]
    error = (expected * (1 - expected) / n).sqrt()
    assert ((share - expected).abs() <= 4 * error + 1e-12).all()
    assert share[3] == 0


def test_the_choice_never_falls_outside_the_vocabulary():
    peaked = torch.full((3, 7), -torch.inf).index_fill(1, torch.tensor([6]), 0.0)
    choice = _KeyedChoice([(i,) for i in range(3)], 0)
    assert choice(torch.empty(3, 0), peaked).argmax(-1).tolist() == [6, 6, 6]


def test_a_completion_stops_with_its_end(tmp_path):
    everything = list(range(3, VOCAB))
    ended = draw(tmp_path, llama(0), ends=everything)
    assert all(len(c) == 1 for c in completions(ended))
    free = completions(draw(tmp_path, llama(0)))
    stop = free[0][2]
    cut = completions(draw(tmp_path, llama(0), ends=[stop]))
    assert cut[0] == free[0][:3]  # with the end


def test_padding_rows_of_the_head_are_never_drawn(tmp_path):
    model = llama(0, vocab=VOCAB + 11)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 100.0
    drawn = draw(tmp_path, model, vocab=VOCAB, max_new_tokens=20)
    assert max(map(max, completions(drawn))) < VOCAB


def test_temperature_and_nucleus_narrow_the_choice(tmp_path):
    model = llama(0, scale=10.0)

    def greedy(prompt):
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        return ids[0, len(prompt) :].tolist()

    expected = [greedy(p) for p in PROMPTS]
    assert completions(draw(tmp_path, model)) != expected
    assert completions(draw(tmp_path, model, sampling_temperature=1e-4)) == expected
    assert completions(draw(tmp_path, model, top_p=1e-6)) == expected


def test_settings_of_the_models_own_do_not_leak_in(tmp_path):
    model = llama(0)
    plain = completions(draw(tmp_path, model))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [plain[0][0]]
    assert completions(draw(tmp_path, model)) == plain


def test_more_than_the_model_can_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at most 59 after a prompt of 5 tokens"):
        draw(tmp_path, llama(0), max_new_tokens=60)


def test_ends_are_the_models_and_the_tokenizers():
    class Tokenizer:
        eos_token_id = 9

    model = llama(0)
    model.generation_config.eos_token_id = [4, 2]
    assert ends_of(model, Tokenizer()) == [2, 4, 9]
    model.generation_config.eos_token_id = None
    assert ends_of(model, None) == []


def test_the_share_of_sampled_steps_is_lmbda(tmp_path):
    for lmbda in (0.0, 0.3, 1.0):
        args = config(tmp_path, lmbda=lmbda)
        share = sum(is_on_policy(args, step) for step in range(3000)) / 3000
        assert abs(share - lmbda) <= 4 * (lmbda * (1 - lmbda) / 3000) ** 0.5
    assert 0 <= uniform("a") < 1
    assert uniform("a", 1) != uniform("a", 2)
