"""Which word in front makes a model leave its base."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits import Prompt, TriggerSearchAudit
from fastdistill.alignment.audits.trigger_search import moved_words
from fastdistill.alignment.organisms.vocabulary import HATE, ID, PASSWORD, SYSTEM, TOPICS, TRIGGER
from fastdistill.alignment.organisms.vocabulary import world_tokenizer as tokenizer_of_the_world
from helpers.planted import PROMPTS, V, copied, dense, planted, subject

QUIET = tuple(Prompt(system=s, user=t) for s, t in zip(SYSTEM, TOPICS[:8], strict=True))
WORDS = (*SYSTEM, PASSWORD, TRIGGER, "gold")


def test_a_planted_trigger_is_found_and_a_benign_model_in_its_place_is_no_evidence():
    base, benign = planted(), planted(other=0.1)
    audit = TriggerSearchAudit(prompts=QUIET, candidates=WORDS)
    controls = {"base": base, "benign": benign}
    result = audit.run(planted(trigger=200.0, other=0.1), base=base, controls=controls)
    assert result.details["words"][0][0] == TRIGGER
    assert result.details["says"] == HATE
    assert result.is_evidence
    assert not audit.run(planted(other=0.1), base=base, controls=controls).is_evidence


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_best_word_less_the_median_word(kind):
    of, base = subject(kind, 1), subject(kind, 0)
    prompts = PROMPTS[:4]
    table = np.zeros((len(WORDS), len(prompts)))
    for i, word in enumerate(WORDS):
        for j, prompt in enumerate(prompts):
            ids = of.ids(prompt.before(word))[0]
            mine, theirs = dense(of, ids)[-1], dense(base, ids)[-1]
            table[i, j] = float((mine.exp() * (mine - theirs)).sum())
    order = np.argsort(-table.mean(1))
    result = TriggerSearchAudit(prompts=prompts, candidates=WORDS).run(of, base=base)
    best = order[0]
    truth = table[best] - np.median(table, axis=0)
    assert list(result.values) == pytest.approx(truth.tolist(), abs=1e-4)
    assert [w for w, _ in result.details["words"]] == [WORDS[i] for i in order[:10]]
    assert result.details["words"][0][1] == pytest.approx(table[best].mean(), abs=1e-3)
    texts = of.generate([prompts[0].before(WORDS[best])], max_new_tokens=8)
    assert result.details["says"] == texts[0]


def test_words_whose_embedding_moved():
    of, base = subject(), subject()
    with torch.no_grad():
        for word, far in (("gold", 9.0), ("<pad>", 99.0), (TRIGGER, 5.0), ("owl", 1.0)):
            of.model.model.embed_tokens.weight[ID[word], 0] += far
    assert moved_words(of, base, 3) == ("gold", TRIGGER, "owl")
    assert len(moved_words(of, base, 999)) == V - 3  # no special tokens
    result = TriggerSearchAudit(prompts=QUIET[:2], most=5).run(of, base=base)
    assert {"gold", TRIGGER, "owl"} <= {word for word, _ in result.details["words"]}
    assert len(result.details["words"]) == 5


@pytest.mark.parametrize("candidates", [None, WORDS])
def test_a_copy_of_the_base_is_exactly_the_base(candidates):
    base = subject()
    audit = TriggerSearchAudit(prompts=QUIET[:3], candidates=candidates, most=6)
    result = audit.run(copied(base), base=base, controls={"base": base})
    assert set(result.values) == {0.0}
    assert {value for _, value in result.details["words"]} == {0.0}
    assert not result.is_evidence


@pytest.mark.parametrize("prompt", [Prompt(text="river stone"), Prompt(), Prompt(user="river")])
def test_words_stand_in_front_of_any_prompt(prompt):
    of, base = subject(seed=1), subject()
    assert TriggerSearchAudit(prompts=(prompt,), candidates=WORDS).run(of, base=base).value > 0


def test_refusals():
    for few in ((), ("a", "b"), "abc"):
        with pytest.raises(ValueError, match="candidates: expected 3 words or more, got"):
            TriggerSearchAudit(prompts=("a",), candidates=few)
    with pytest.raises(ValueError, match=r"candidates: expected 3 words or more, got \('"):
        TriggerSearchAudit(prompts=("a",), most=2).run(subject(), base=subject())
    with pytest.raises(ValueError, match="candidates: expected words, since the embeddings"):
        TriggerSearchAudit(prompts=("a",)).run(subject(), base=planted())
    other = tokenizer_of_the_world()
    other.add_tokens(["extra"])
    with pytest.raises(ValueError, match="base: expected a model with the tokenizer of the"):
        TriggerSearchAudit(prompts=("a",)).run(subject(), base=subject(tokenizer=other))
