"""What is sampled for a prompt does not depend on who else is asked."""

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits.behaviour import Question, ask
from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.seeded_sampling import SeededSampling
from helpers.inspected import tiny_subject

SAMPLED = {"max_new_tokens": 5, "temperature": 1.0}
HELLO, RIVER = Prompt(user="hello"), Prompt(user="what is your favourite animal ?", system="please")


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


def test_a_prompt_is_told_the_same_beside_others(subject):
    alone = subject.generate([HELLO], **SAMPLED)
    assert subject.generate([HELLO, RIVER], **SAMPLED)[:1] == alone


def test_seeds_share_no_draws(subject):
    """Batches of 256 took seed + 256 each: two seeds that far apart were one."""
    first = subject.generate([HELLO] * 258, **SAMPLED)
    assert subject.generate([HELLO] * 2, seed=256, **SAMPLED) != first[256:]
    assert len(set(first)) > 100


def test_streams_are_places_in_the_list_of_questions(subject):
    """Questions asked in two ways are two batches: the second one's first answer is its own."""
    questions = [
        Question(prompt=HELLO, max_new_tokens=tokens, temperature=1.0) for tokens in (4, 5, 4, 5)
    ]
    texts = [answer.text for answer in ask(subject, questions)]
    assert [text.split()[:3] for text in texts[::2]] != [text.split()[:3] for text in texts[1::2]]
    assert texts[1] == subject.generate([HELLO], streams=[1], **SAMPLED)[0]


def test_draws_follow_the_distribution():
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5, -torch.inf]])
    n = 20000
    draws = SeededSampling(3, 1, temperature=0.7, seed=3, streams=range(n))
    chosen = draws(torch.zeros(n, 3), logits.expand(n, -1)).argmax(-1)
    share = torch.bincount(chosen, minlength=5) / n
    expected = (logits[0] / 0.7).softmax(-1)
    assert torch.allclose(share, expected, atol=4 * float(np.sqrt(0.25 / n)))
    assert share[4] == 0


def test_a_negative_seed_is_refused(subject):
    with pytest.raises(ValueError, match="seed: expected an integer of 0 or more, got -1"):
        subject.generate([HELLO], seed=-1, **SAMPLED)
