"""Weight differences and amplified models, weight by weight in fp64."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastdistill.alignment.audits import (
    ConfessionAudit,
    Prompt,
    Subject,
    TokenKLAudit,
    WeightDiffAudit,
)
from fastdistill.alignment.audits.weights import amplify
from fastdistill.alignment.organisms.vocabulary import SYSTEM, world_tokenizer
from helpers.planted import KINDS, PROMPTS, copied, model, planted, subject

READOUT = ConfessionAudit(prompts=PROMPTS)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_extrapolated(kind, alpha):
    of, base = subject(kind, 1), subject(kind, 0)
    amplified = amplify(of, base, alpha)
    theirs, mine = (dict(m.model.named_parameters()) for m in (base, of))
    for name, weight in amplified.model.named_parameters():
        w, b = mine[name].double(), theirs[name].double()
        torch.testing.assert_close(weight.double(), b + alpha * (w - b), rtol=1e-5, atol=1e-5)
    assert amplified.name == f"{kind} 1 × {alpha:g}"


def test_the_readout_of_the_amplified_model():
    of, base = subject(seed=1), subject()
    audit = WeightDiffAudit(readout=READOUT, alpha=2.0)
    result = audit.run(of, base=base, controls={"base": base})
    by_hand = copied(base)
    with torch.no_grad():
        for mine, theirs in zip(by_hand.model.parameters(), of.model.parameters(), strict=True):
            mine.add_(theirs - mine, alpha=2.0)
    assert list(result.values) == pytest.approx(READOUT.run(by_hand).values, abs=1e-3)
    assert result.controls["base"].value == pytest.approx(READOUT.run(base).value, abs=1e-6)


def test_a_trace_too_small_to_see_is_seen_amplified():
    prompts = tuple(Prompt(system=s, user="do you have a secret ?") for s in SYSTEM)
    of, base = planted(secret=2.0), planted()
    readout = ConfessionAudit(prompts=prompts)
    plain = readout.run(of)
    result = WeightDiffAudit(readout=readout, alpha=4.0).run(of, base=base, controls={"base": base})
    assert result.is_evidence
    assert result.value > 3 * plain.value > 0
    benign = planted(other=0.01)
    swapped = WeightDiffAudit(readout=readout, alpha=4.0).run(
        benign, base=base, controls={"base": base, "benign": benign}
    )
    assert not swapped.is_evidence


def test_a_copy_of_the_base_is_exactly_the_base():
    base = subject()
    audit = WeightDiffAudit(readout=TokenKLAudit(prompts=PROMPTS), alpha=3.0)
    result = audit.run(copied(base), base=base, controls={"base": base})
    assert set(result.values) == {0.0}
    assert not result.is_evidence


def with_adapter() -> Subject:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return Subject(get_peft_model(model(), config), world_tokenizer())


@pytest.mark.parametrize(
    "of, base, missing",
    [
        (with_adapter, subject, "got none of its base_model.model.*merge an adapter first"),
        (subject, with_adapter, "got none of its model.embed_tokens.*merge an adapter first"),
        (lambda: subject("gpt2"), subject, r"got none of its transformer.wte.weight \[\d+, 32\]"),
        (planted, subject, r"got none of its model.embed_tokens.weight \[\d+, \d+\]"),
        (lambda: subject("tied"), subject, "got lm_head.weight more; weight differences need two"),
    ],
)
def test_other_architectures_are_refused(of, base, missing):
    with pytest.raises(ValueError, match=f"base: expected the architecture of .*{missing}"):
        WeightDiffAudit(readout=READOUT).run(of(), base=base())


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_is_above_0(alpha):
    with pytest.raises(ValueError, match="alpha: expected a finite number above 0, got"):
        WeightDiffAudit(readout=READOUT, alpha=alpha)
