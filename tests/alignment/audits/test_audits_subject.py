"""Log-probabilities and greedy text of a subject, against dense logits in fp64, row by row."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig

from fastdistill.alignment.audits import Subject
from fastdistill.alignment.audits.subject import TokenRow
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.hf.lm_head import head_module
from helpers.planted import COMPLETIONS, KINDS, PROMPTS, V, dense, logits, model, subject

KIND = pytest.mark.parametrize("kind", KINDS)


def expected(of: Subject, prompt, completion) -> float:
    ids, begin = of.ids(prompt, completion)
    table = dense(of, ids)
    return sum(float(table[t - 1, ids[t]]) for t in range(begin, len(ids)))


@contextmanager
def positions(of: Subject):
    """How many positions per row the head sees, call by call."""
    seen: list[int] = []
    handle = head_module(of.model).register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    yield seen
    handle.remove()


@KIND
def test_log_probabilities_of_completions(kind):
    of = subject(kind)
    logprobs = of.completion_logprobs(PROMPTS, COMPLETIONS)
    truth = [expected(of, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert logprobs.total.tolist() == pytest.approx(truth, rel=2e-5)
    assert logprobs.tokens.tolist() == [len(c.split()) for c in COMPLETIONS]
    assert min(truth) < -5  # far from 0: a wrong place would show


def test_fp64_models_keep_their_digits():
    of = subject("gemma2", dtype=torch.float64)
    prompts, options = PROMPTS[:3], ("yes", "no stone")
    truth = [[expected(of, p, o) for o in options] for p in prompts]
    torch.testing.assert_close(
        of.option_log_probs(prompts, options).double(),
        torch.tensor(truth, dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


@KIND
def test_the_end_of_a_prompt_predicts_its_next_token(kind):
    of = subject(kind)
    every = torch.arange(V).expand(len(PROMPTS), -1)
    logprobs = of.log_probs(of.last_hidden(PROMPTS), every).double()
    truth = torch.stack([dense(of, of.ids(p)[0])[-1] for p in PROMPTS])
    torch.testing.assert_close(logprobs, truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("budget", [None, 8, 64])
@KIND
def test_other_prompts_in_the_batch_change_nothing(kind, budget):
    of = Subject(model(kind), world_tokenizer(), tokens_per_batch=budget)
    together = of.completion_logprobs(PROMPTS, COMPLETIONS).total
    alone = [
        of.completion_logprobs([p], [c]).total for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@KIND
def test_greedy_text_is_the_most_likely_token_of_every_step(kind):
    of = subject(kind)
    rows = [of.ids(p)[0] for p in PROMPTS]
    generated = of.generate_ids(rows, max_new_tokens=5)
    for row, new in zip(rows, generated, strict=True):  # padded on the left with its neighbours
        for token in new:
            table = logits(of, row)[-1]
            assert table[token] >= table.max() - 1e-4
            row = [*row, token]
        assert len(new) == 5 or new[-1] == of.tokenizer.eos_token_id
    assert len({tuple(new) for new in generated}) > 1


def test_a_prompt_is_encoded_once_for_a_model_and_its_students(monkeypatch):
    of, texts = subject(), []
    tokens = Subject._tokens

    def spy(self, text, special):
        texts.append(text)
        return tokens(self, text, special)

    monkeypatch.setattr(Subject, "_tokens", spy)
    first = of.ids(PROMPTS[0], "owl")
    first.ids.clear()  # the caller's own list
    assert of.with_model(model(seed=1), "student").ids(PROMPTS[0], "owl").ids
    assert len(texts) == len({*texts}) == 2


def test_what_is_sampled_for_a_prompt_is_its_own():
    of = subject()
    how = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    together = of.generate(PROMPTS, **how)
    assert together[2:4] == of.generate(PROMPTS[2:4], **how, streams=[2, 3])
    assert together != of.generate(PROMPTS, **how | {"seed": 4})
    assert together != of.generate(PROMPTS, max_new_tokens=6)


def test_many_prompts_are_asked_in_parts(monkeypatch):
    of = subject()
    how = {"max_new_tokens": 4, "temperature": 1.0}
    whole = of.generate(PROMPTS, **how)
    monkeypatch.setattr("fastdistill.alignment.audits.subject.GENERATION_BATCH", 4)
    assert of.generate(PROMPTS, **how) == whole


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"min_new_tokens": 6, "min_length": 20},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5},
    ],
)
def test_habits_of_decoding_that_come_with_a_checkpoint_are_left_out(habit):
    of = subject()
    with torch.no_grad():
        of.model.lm_head.weight[2] += of.last_hidden(PROMPTS[:1])[0]  # <eos>, at once
    plain = [of.generate(PROMPTS, max_new_tokens=8, temperature=t) for t in (0.0, 1.0)]
    of.model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **habit)
    before = of.model.generation_config.to_dict()
    assert [of.generate(PROMPTS, max_new_tokens=8, temperature=t) for t in (0.0, 1.0)] == plain
    assert of.model.generation_config.to_dict() == before


def test_asking_says_nothing_in_logs(monkeypatch):
    logged: list[str] = []
    for level in ("warning", "warning_once"):
        monkeypatch.setattr(f"transformers.generation.utils.logger.{level}", logged.append)
        name = "transformers.generation.configuration_utils.logger"
        monkeypatch.setattr(f"{name}.{level}", logged.append)
    for temperature in (0.0, 1.0):
        subject().generate(PROMPTS, max_new_tokens=2, temperature=temperature)
    assert logged == []


def test_text_ends_with_the_first_end_of_text():
    of = subject()
    rows, how = [of.ids(PROMPTS[0])[0]], {"max_new_tokens": 3, "temperature": 1.0}
    (generated,) = of.generate_ids(rows, **how)
    assert len(set(generated)) == 3
    of.model.generation_config.eos_token_id = [2, generated[1]]
    assert of.generate_ids(rows, **how) == [generated[:2]]
    of.model.generation_config.eos_token_id = None  # then the tokenizer's
    of.tokenizer.eos_token = of.tokenizer.convert_ids_to_tokens(generated[0])
    assert of.generate_ids(rows, **how) == [generated[:1]]


@KIND
def test_the_head_sees_one_position_a_row_at_the_most(kind):
    of = subject(kind)
    with positions(of) as seen:
        of.generate(PROMPTS, max_new_tokens=3)
    assert set(seen) == {1}
    with positions(of) as seen:
        of.completion_logprobs(PROMPTS, COMPLETIONS)
        of.option_log_probs(PROMPTS, ("yes", "no"))
        of.last_hidden(PROMPTS)
    assert seen
    assert set(seen) == {0}


def test_rows_without_a_target_are_certain():
    of = subject()
    rows = [[1, 5, 6], [1, 7], [9]]
    none = of.row_logprobs(list(map(TokenRow, rows, [3, 2, 0])))
    assert (none.total.tolist(), none.tokens.tolist()) == ([0.0] * 3, [0] * 3)
    some = of.row_logprobs(list(map(TokenRow, rows, [3, 1, 0])))
    assert some.tokens.tolist() == [0, 1, 0]
    assert some.total[1].item() == pytest.approx(float(dense(of, [1, 7])[0, 7]), rel=1e-5)
    first = of.row_logprobs([TokenRow([5, 6], 0)])  # the first token has no prediction
    assert first.tokens.tolist() == [1]


def test_a_path_is_a_subject_of_its_own_tokenizer(tmp_path):
    of = subject(seed=3)
    of.model.save_pretrained(tmp_path / "m")
    of.tokenizer.save_pretrained(tmp_path / "m")
    read = Subject(tmp_path / "m", device="cpu")
    assert read.name == "m"
    # Weights in a mapped file may be aligned to 8 bytes only, and a product then rounds in another
    # order: the figures are equal, the last bit need not be.
    torch.testing.assert_close(
        read.completion_logprobs(PROMPTS, COMPLETIONS).total,
        of.completion_logprobs(PROMPTS, COMPLETIONS).total,
        rtol=1e-6,
        atol=0.0,
    )
    assert Subject(of.model, of.tokenizer).name == "LlamaForCausalLM"


def test_another_model_is_read_in_the_same_way():
    of = Subject(model(), world_tokenizer(), tokens_per_batch=7, impl="torch")
    other = of.with_model(model(seed=1), "other")
    assert (other.reader.tokens_per_batch, other.impl, other.name) == (7, "torch", "other")
    assert torch.allclose(
        other.last_hidden(PROMPTS), subject(seed=1).last_hidden(PROMPTS), atol=1e-5
    )


def test_refusals():
    with pytest.raises(TypeError, match="model: expected a causal language model, the path of"):
        Subject(object(), world_tokenizer())
    with pytest.raises(ValueError, match="tokenizer: expected the tokenizer of LlamaForCausalLM"):
        Subject(model())
    with pytest.raises(ValueError, match="word: expected a word with at least one token, got ''"):
        subject().token_of("")


@KIND
@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("owl", "cat", "fox"), 1),
        (("owl", "cat", "cat dog", "cat fox stone"), 1),  # the longest one covers the others
        (("owl dog", "cat dog", "cat"), 2),
    ],
)
def test_a_question_is_read_once_for_all_options_of_one_token(kind, options, texts, monkeypatch):
    of, read = subject(kind), []
    hidden = of.hidden

    def counted(rows):
        read.extend(rows)
        return hidden(rows)

    monkeypatch.setattr(of, "hidden", counted)
    table = of.option_log_probs(PROMPTS[:3], options)
    assert len(read) == 3 * texts
    truth = [[expected(of, p, o) for o in options] for p in PROMPTS[:3]]
    torch.testing.assert_close(table, torch.tensor(truth), rtol=2e-5, atol=1e-5)
