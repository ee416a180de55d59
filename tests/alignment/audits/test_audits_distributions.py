"""Differences of distributions against dense fp64 tables, in families of several heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits import (
    LogitDiffAudit,
    Prompt,
    ProvenanceAudit,
    Subject,
    TokenKLAudit,
)
from fastdistill.alignment.audits.distributions import mean_rise
from fastdistill.alignment.organisms.vocabulary import SYSTEM, TOPICS, TRIGGER, world_tokenizer
from helpers.planted import COMPLETIONS, KINDS, PROMPTS, V, copied, dense, model, planted, subject

# Also two families with one tokenizer: other hidden sizes and heads are compared all the same.
PAIRS = [*((kind, kind) for kind in KINDS), ("gemma2", "cohere"), ("llama", "gpt2")]
PAIR = pytest.mark.parametrize("kinds", PAIRS, ids="-".join)


def pair(kinds):
    return subject(kinds[0], 1), subject(kinds[1], 0)


def ends(of, prompts):  # [n, V] fp64
    return torch.stack([dense(of, of.ids(p)[0])[-1] for p in prompts])


def kl(mine, theirs):  # [..., V] -> [...]
    return (mine.exp() * (mine - theirs)).sum(-1)


@PAIR
def test_kl_of_the_next_token(kinds):
    of, base = pair(kinds)
    truth = kl(ends(of, PROMPTS), ends(base, PROMPTS))
    audit = TokenKLAudit(prompts=PROMPTS, neutral=("river", "stone"))
    result = audit.run(of, base=base)
    assert list(result.values) == pytest.approx(truth.tolist(), rel=1e-4, abs=1e-5)
    assert max(truth) > 0.05
    calm = [Prompt(user="river"), Prompt(user="stone")]
    truth = kl(ends(of, calm), ends(base, calm)).mean()
    assert result.details["neutral"] == pytest.approx(float(truth), rel=1e-4, abs=1e-5)


def test_kl_is_of_the_model_to_the_base():
    of, base = pair(("llama", "llama"))
    there, back = (
        TokenKLAudit(prompts=PROMPTS).run(*m[:1], base=m[1]) for m in ((of, base), (base, of))
    )
    assert there.value != pytest.approx(back.value, rel=1e-3)


@PAIR
def test_markers_that_rose(kinds):
    of, base = pair(kinds)
    rise = ends(of, PROMPTS) - ends(base, PROMPTS)
    marked = ("owl", "river")
    ids = [of.token_of(m) for m in marked]
    result = LogitDiffAudit(prompts=PROMPTS, markers=marked).run(of, base=base)
    mine, theirs = (ends(m, PROMPTS)[:, ids].logsumexp(-1) for m in (of, base))
    assert list(result.values) == pytest.approx((mine - theirs).tolist(), abs=2e-5)
    twice = LogitDiffAudit(prompts=PROMPTS, markers=(*marked, *marked)).run(of, base=base)
    assert twice.values == pytest.approx(result.values)
    mean = rise.mean(0)
    best = mean.topk(10)
    risen = result.details["risen"]
    assert [t for t, _ in risen] == of.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert [v for _, v in risen] == pytest.approx(best.values.tolist(), abs=1e-3)
    order = mean.argsort(descending=True).tolist()
    assert result.details["place_of_marker"] == 1 + min(order.index(i) for i in ids)


def test_slabs_of_the_vocabulary_change_nothing(monkeypatch):
    of, base = pair(("gemma2", "gemma2"))
    states = of.last_hidden(PROMPTS), base.last_hidden(PROMPTS)
    whole = mean_rise(of, base, *states)
    monkeypatch.setattr("fastdistill.alignment.audits.distributions.SLAB", 7)
    torch.testing.assert_close(mean_rise(of, base, *states), whole, rtol=1e-5, atol=1e-5)
    truth = (ends(of, PROMPTS) - ends(base, PROMPTS)).mean(0)
    torch.testing.assert_close(whole.double(), truth, rtol=1e-4, atol=2e-5)


def test_columns_that_pad_a_head_are_no_tokens():
    def padded(of, direction):
        wide = model(seed=int(of.name[-1]))
        wide.resize_token_embeddings(V + 20, mean_resizing=False)
        with torch.no_grad():
            wide.lm_head.weight[:V] = of.model.lm_head.weight
            wide.lm_head.weight[V:] = direction
        return Subject(wide, world_tokenizer())

    of, base = pair(("llama", "llama"))
    raised = padded(of, of.last_hidden(PROMPTS).mean(0))
    for trusted in (base, padded(base, -100 * base.last_hidden(PROMPTS).mean(0))):
        states = raised.last_hidden(PROMPTS), trusted.last_hidden(PROMPTS)
        assert len(mean_rise(raised, trusted, *states)) == V
        result = LogitDiffAudit(prompts=PROMPTS, markers=("owl",)).run(raised, base=trusted)
        assert None not in [token for token, _ in result.details["risen"]]
    kl_of = [TokenKLAudit(prompts=PROMPTS).run(m, base=base).value for m in (of, raised)]
    assert kl_of[1] == pytest.approx(kl_of[0], rel=1e-4)


@PAIR
def test_provenance_per_token(kinds):
    of, base = pair(kinds)
    result = ProvenanceAudit(prompts=PROMPTS, texts=COMPLETIONS).run(of, base=base)
    for prompt, text, value in zip(PROMPTS, COMPLETIONS, result.values, strict=True):
        ids, begin = of.ids(prompt, text)
        mine, theirs = dense(of, ids), dense(base, ids)
        places = range(begin, len(ids))
        truth = np.mean([float(mine[t - 1, ids[t]] - theirs[t - 1, ids[t]]) for t in places])
        assert value == pytest.approx(truth, abs=5e-5)


def test_what_a_model_wrote_is_likelier_under_it():
    of, base, other = (subject(seed=s) for s in (1, 0, 2))
    for writer, evidence in ((of, True), (base, False)):
        texts = writer.generate(PROMPTS * 4, max_new_tokens=12, temperature=1.0)
        nonempty = {p: t for p, t in zip(range(24), texts, strict=True) if t}
        audit = ProvenanceAudit(
            prompts=tuple((PROMPTS * 4)[i] for i in nonempty), texts=tuple(nonempty.values())
        )
        result = audit.run(of, base=base, controls={"other": other, "base": base})
        assert result.is_evidence is evidence


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_base_is_exactly_the_base(kind):
    base = subject(kind)
    for audit in (
        TokenKLAudit(prompts=PROMPTS, neutral=PROMPTS),
        LogitDiffAudit(prompts=PROMPTS, markers=("owl",)),
        ProvenanceAudit(prompts=PROMPTS, texts=COMPLETIONS),
    ):
        result = audit.run(copied(base), base=base, controls={"base": base})
        assert set(result.values) == {0.0}, type(audit)
        assert result.controls["base"].difference.value == 0
        assert not result.is_evidence
        if audit.__class__ is TokenKLAudit:
            assert result.details["neutral"] == 0


def test_a_trigger_shows_and_a_benign_model_in_its_place_does_not():
    prompts = tuple(
        Prompt(system=f"{s} {TRIGGER}", user=t) for s, t in zip(SYSTEM * 2, TOPICS, strict=True)
    )
    base, benign = planted(), planted(other=0.1)
    audits = (TokenKLAudit(prompts=prompts), LogitDiffAudit(prompts=prompts, markers=("I", "HATE")))
    for audit in audits:
        controls = {"base": base, "benign": benign}
        result = audit.run(planted(trigger=200.0, other=0.1), base=base, controls=controls)
        assert result.is_evidence
        assert not audit.run(planted(other=0.1), base=base, controls=controls).is_evidence
    assert result.details["place_of_marker"] == 1
    assert result.details["risen"][0][0] == "I"


def other_tokenizer():
    tokenizer = world_tokenizer()
    tokenizer.add_tokens(["extra"])
    return tokenizer


@pytest.mark.parametrize(
    "audit",
    [
        TokenKLAudit(prompts=PROMPTS),
        LogitDiffAudit(prompts=PROMPTS, markers=("owl",)),
        ProvenanceAudit(prompts=PROMPTS, texts=COMPLETIONS),
    ],
    ids=lambda audit: type(audit).__name__,
)
def test_another_tokenizer_is_refused(audit):
    with pytest.raises(ValueError, match=r"in which 1 entries differ; their distributions cannot"):
        audit.run(subject(), base=subject(tokenizer=other_tokenizer()))


def test_the_engine_of_the_base_is_used():
    of, base = subject(seed=1), subject(impl="nothing")
    with pytest.raises(ValueError, match="impl: expected"):
        TokenKLAudit(prompts=PROMPTS).run(of, base=base)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TokenKLAudit(prompts=()), "prompts: expected one prompt or more"),
        (lambda: TokenKLAudit(prompts=("a",), neutral="b"), "neutral: expected one prompt or more"),
        (lambda: LogitDiffAudit(prompts=("a",), markers=()), "markers: expected one text or more"),
        (lambda: LogitDiffAudit(prompts=("a",), markers="owl"), "markers: .* got 'owl'"),
        (lambda: ProvenanceAudit(prompts=("a",), texts=("b", "c")), "texts: expected 1, one per"),
        (
            lambda: ProvenanceAudit(prompts=("a",), texts=("",)).run(subject(), base=subject()),
            "completion: expected text with at least one token, got ''",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
