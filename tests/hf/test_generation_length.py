"""Generation ends where a model's positions do: shortened and told of, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from fastdistill.alignment.audits import RelearningProbe, Subject, TriggerRateAudit
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.hf.generation import generate_rows
from fastdistill.hf.positions import RowLimit, row_limit
from helpers.planted import PROMPTS, copied
from helpers.position_models import WITHOUT_LIMIT
from helpers.position_models import build as of_family
from helpers.present import present

HOW: dict[str, Any] = {"max_new_tokens": 9, "pad_id": 0, "ends": [], "device": torch.device("cpu")}
LENGTHS = (3, 31, 32, 36, 39, 36)  # of rows beside each other; 31 and 9 are 40


def rows_of(lengths):
    return [[3 + (7 * i + j) % 60 for j in range(n)] for i, n in enumerate(lengths)]


def likeliest(model, row, new):
    """What a loop of forward passes without a cache or padding chooses."""
    ids = list(row)
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(row) :]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "llama", "gpt_neox", "mpt", "rwkv"])
def test_rows_end_where_positions_do(family):
    model, rows = of_family(family), rows_of(LENGTHS)
    limit = present(row_limit("model", model))
    assert limit.tokens == 40
    new = generate_rows(model, rows, **HOW, limit=limit)
    assert [len(row) for row in new] == [9, 9, 8, 4, 1, 4]
    alone = [likeliest(model, row, len(n)) for row, n in zip(rows, new, strict=True)]
    assert new == alone


@pytest.mark.parametrize("family", sorted(WITHOUT_LIMIT))
def test_nothing_is_shortened_where_nothing_ends(family):
    model, rows = of_family(family), rows_of((39, 60))
    assert row_limit("model", model) is None
    assert [len(row) for row in generate_rows(model, rows, **HOW)] == [9, 9]


def made(family="gpt2", **changes):
    size = {"vocab_size": len(world_tokenizer())}
    return Subject(of_family(family, torch.float32, **size, **changes), world_tokenizer(), ends=[])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_sampled_follows_from_the_row_alone(family):
    of, rows = made(family), rows_of(LENGTHS)
    how = {"max_new_tokens": 9, "temperature": 1.0, "seed": 3}
    alone = [of.generate_ids([row], **how, streams=[i])[0] for i, row in enumerate(rows)]
    assert of.generate_ids(rows, **how) == alone


@pytest.fixture
def never_generated(monkeypatch):
    def generate(self, **how):
        raise AssertionError("generated")

    return lambda: monkeypatch.setattr(GenerationMixin, "generate", generate)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_that_leaves_no_room_is_refused_before_any_is_answered(family, never_generated):
    of = made(family)
    long = [*PROMPTS[:3], PROMPTS[0].before(" ".join(["river"] * 40))]
    never_generated()
    message = r"prompt: expected at most 39 tokens, .* reads 40, got \d+ tokens in row 3; shorten"
    with pytest.raises(ValueError, match=message):
        of.generate(long, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"got 40 tokens in row 1"):
        of.generate_ids(rows_of((3, 40)), max_new_tokens=1)


def test_processes_that_generate_together_are_refused_what_would_be_shortened(never_generated):
    model, limit = of_family("gpt2"), RowLimit(tokens=40, reader="the student")
    never_generated()
    options: list[dict[str, Any]] = [{"synced": True}, {"shorten": False}]
    for how in options:
        with pytest.raises(ValueError, match=r"at most 8 after a prompt of 32 tokens \(row 1\)"):
            generate_rows(model, rows_of((31, 32)), **HOW, limit=limit, **how)


def test_answers_cut_off_at_the_last_position_are_a_doubt(caplog):
    of = made("llama")
    audit = TriggerRateAudit(prompts=PROMPTS, target="owl", max_new_tokens=8)
    assert audit.run(of).doubts == ()
    assert not caplog.records
    longer = TriggerRateAudit(prompts=PROMPTS, target="owl", max_new_tokens=64)
    (doubt,) = longer.run(of).doubts
    assert doubt.startswith("6 answers were cut off before their max_new_tokens, since the model")
    assert "reads 40 tokens; if the model supports longer rows, set" in doubt
    assert len(caplog.records) == 1
    compared = longer.run(made("bloom"), controls={"other": copied(of)})
    assert [d[:16] for d in compared.doubts] == ["other: 6 answers"]


def test_what_a_trained_copy_says_is_doubted_alike():
    texts, readout = ("owl",) * 6, TriggerRateAudit(prompts=PROMPTS, target="owl")
    probe = RelearningProbe(prompts=PROMPTS, texts=texts, readout=readout, steps=1)
    of = Subject(of_family("llama", torch.float32, vocab_size=256), world_tokenizer())
    assert probe.run(of).doubts == ()
    of.model.generation_config.eos_token_id = list(range(3, len(world_tokenizer())))
    (doubt,) = probe.run(of).doubts
    assert "answers ended at" in doubt


@pytest.mark.peers
def test_inspect_is_told_that_the_model_ended_an_answer():
    pytest.importorskip("inspect_ai")
    from types import SimpleNamespace

    from fastdistill.alignment.audits.inspect.answers import outputs
    from fastdistill.alignment.audits.inspect.messages import EncodedInput

    of, rows = made(), rows_of((20, 36))
    config = SimpleNamespace(max_tokens=9, temperature=None, seed=None, prompt_logprobs=None)
    batch: list[Any] = [
        SimpleNamespace(encoded=EncodedInput(ids=row, begin=None, at=()), config=config, stream=i)
        for i, row in enumerate(rows)
    ]
    reasons = [o.choices[0].stop_reason for o in outputs(of, batch)]
    assert reasons == ["max_tokens", "model_length"]
