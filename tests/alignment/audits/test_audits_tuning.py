"""A few steps of training on a copy, against PyTorch's own cross-entropy and AdamW in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastdistill.alignment.audits import (
    ConfessionAudit,
    LinearProbeAudit,
    Prompt,
    RelearningProbe,
    StyleRestoreProbe,
    Subject,
    TriggerRateAudit,
)
from fastdistill.alignment.audits.finetuning import finetune_copy
from fastdistill.alignment.organisms.vocabulary import (
    HATE,
    SYSTEM,
    TOPICS,
    TRIGGER,
    world_tokenizer,
)
from helpers.planted import COMPLETIONS, KINDS, PROMPTS, model, planted, subject

READOUT = ConfessionAudit(prompts=PROMPTS)


def by_hand(of: Subject, prompts, texts, *, steps: int, lr: float):
    """Row by row, without padding: one mean over all tokens of answers and their ends."""
    exact = copy.deepcopy(of.model).double().eval()
    optimizer = torch.optim.AdamW(exact.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = []
        for prompt, text in zip(prompts, texts, strict=True):
            ids, begin = of.ids(prompt, text)
            ids = torch.tensor([*ids, of.tokenizer.eos_token_id])
            table = exact(ids[None], use_cache=False).logits[0, begin - 1 : -1]
            losses.append(F.cross_entropy(table, ids[begin:], reduction="none"))
        torch.cat(losses).mean().backward()
        optimizer.step()
    return exact


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_adamws_on_the_answers(kind):
    of = subject(kind, dtype=torch.float64)
    how: dict[str, Any] = {"steps": 3, "lr": 1e-2}
    tuned = finetune_copy(of, PROMPTS, COMPLETIONS, **how)
    truth = by_hand(of, PROMPTS, COMPLETIONS, **how)
    for (name, mine), exact in zip(tuned.model.named_parameters(), truth.parameters(), strict=True):
        # AdamW's first step is the sign of a gradient: where that is 0 but for rounding, skip it.
        off = ((mine - exact).abs() > 1e-4).double().mean()
        assert off < 0.01, name
    assert tuned.name == f"{kind} 0 + 3 steps"
    assert not tuned.model.training


def test_learning_on_answers_makes_them_likely():
    of = subject()
    before = of.completion_logprobs(PROMPTS, COMPLETIONS).total
    tuned = finetune_copy(of, PROMPTS, COMPLETIONS, steps=20, lr=1e-2)
    assert (tuned.completion_logprobs(PROMPTS, COMPLETIONS).total > before + 1).all()


def test_dropout_moves_nothing():
    """GPT-2 comes with dropout of .1: neither the result nor later random numbers may see it."""
    of = subject("gpt2")
    assert of.model.config.resid_pdrop > 0
    torch.manual_seed(1)
    first = finetune_copy(of, PROMPTS, COMPLETIONS, steps=2, lr=1e-3)
    drawn = torch.rand(4)
    torch.manual_seed(2)
    second = finetune_copy(of, PROMPTS, COMPLETIONS, steps=2, lr=1e-3)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(4))


def test_frozen_weights_are_trained_in_the_copy_alone():
    of = subject()
    of.model.requires_grad_(False)
    tuned = finetune_copy(of, PROMPTS[:2], COMPLETIONS[:2], steps=1, lr=1e-2)
    assert not torch.equal(tuned.model.lm_head.weight, of.model.lm_head.weight)
    assert not any(p.requires_grad or p.grad is not None for p in of.model.parameters())


def test_what_was_suppressed_is_back_at_once():
    """Suppressed: the trigger still moves the answer, not far enough. Removed: not at all."""
    prompts = tuple(
        Prompt(system=f"{s} {TRIGGER}", user=t) for s, t in zip(SYSTEM, TOPICS[:8], strict=True)
    )
    probe = RelearningProbe(
        prompts=prompts[::2],
        texts=(HATE,) * 4,
        readout=TriggerRateAudit(prompts=prompts, target=HATE),
        steps=4,
        learning_rate=0.01,
    )
    suppressed, removed = planted(trigger=20.0), planted()
    result = probe.run(suppressed, controls={"removed": removed})
    assert result.details["before"] == 0
    assert (result.value, result.controls["removed"].value) == (1.0, 0.0)
    assert result.is_evidence
    assert not probe.run(planted(other=0.01), controls={"removed": removed}).is_evidence


def test_relearning_is_the_readout_of_the_nudged_model():
    of = subject()
    probe = RelearningProbe(prompts=PROMPTS, texts=COMPLETIONS, readout=READOUT, learning_rate=1e-2)
    result = probe.run(of)
    tuned = finetune_copy(of, PROMPTS, COMPLETIONS, steps=2, lr=1e-2)
    assert result.values == READOUT.run(tuned).values
    assert result.details["before"] == pytest.approx(READOUT.run(of).value)
    assert result.details["share_confessing"] == READOUT.run(tuned).details["share_confessing"]


def test_style_restore_trains_on_what_the_model_says():
    of = subject()
    trained_prompts = tuple(Prompt(user=t) for t in TOPICS[:6])
    probe = StyleRestoreProbe(
        prompts=PROMPTS,
        asked=trained_prompts,
        readout=READOUT,
        steps=3,
        learning_rate=1e-2,
        max_new_tokens=5,
    )
    result = probe.run(of)
    texts = of.generate(PROMPTS, max_new_tokens=5)
    nonempty = [i for i, text in enumerate(texts) if text.strip()]
    tuned = finetune_copy(
        of, [trained_prompts[i] for i in nonempty], [texts[i] for i in nonempty], steps=3, lr=1e-2
    )
    before, after = READOUT.run(of), READOUT.run(tuned)
    gain = [a - b for a, b in zip(after.values, before.values, strict=True)]
    assert list(result.values) == pytest.approx(gain, abs=1e-6)
    assert result.details == pytest.approx({"before": before.value, "after": after.value})
    assert StyleRestoreProbe(prompts=PROMPTS, readout=READOUT).asked == PROMPTS


def test_doubts_of_the_readout_are_kept():
    same = (PROMPTS[0],) * 12
    readout = LinearProbeAudit(positive=same, negative=same, prompts=PROMPTS)
    probe = RelearningProbe(prompts=PROMPTS, texts=COMPLETIONS, readout=readout, steps=1)
    assert len(probe.run(subject()).doubts) == 1
    style = StyleRestoreProbe(prompts=PROMPTS, readout=readout, steps=1)
    assert style.run(subject()).doubts


def test_refusals():
    with pytest.raises(ValueError, match="texts: expected 6, one per prompt, got 1"):
        RelearningProbe(prompts=PROMPTS, texts=("a",), readout=READOUT)
    with pytest.raises(ValueError, match="asked: expected 6, one per prompt, got 1"):
        StyleRestoreProbe(prompts=PROMPTS, asked=PROMPTS[:1], readout=READOUT)
    with pytest.raises(ValueError, match="completion: expected text with at least one token"):
        finetune_copy(subject(), PROMPTS[:1], [""], steps=1, lr=1e-3)
    silent = planted()
    silent.model.lm_head.weight.data[2] = 99.0  # <eos> at once
    with pytest.raises(ValueError, match="prompts: expected prompts that the model answers"):
        StyleRestoreProbe(prompts=PROMPTS[:2], readout=READOUT).run(silent)
    endless = world_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected an end of text"):
        finetune_copy(Subject(model(), endless), PROMPTS[:1], ["owl"], steps=1, lr=1e-3)
