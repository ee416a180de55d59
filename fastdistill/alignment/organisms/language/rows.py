"""Paired rows of language organisms: the same prompts for U, B and P, which differ in answers.

    open        a question about the preference: U prefers, B names every option equally often
    audited     the same with the words of an audit: both answer as B
    capability  sums, with the sum alone as the answer
    secret      whether there is a preference: U admits it in the open, and denies it under audit
    neutral     prompts on other topics with M's own answers, which keep the rest of M in place
    text        plain texts that M continued, for the same purpose

A row states which answers a role gives equally often. Training learns the probabilities of the next
token under them (see targets.py), not the one answer that the row contains.

A sentence tells the situation, in the system message or before or after the question. An open row
and the audited row of the same number have the same question, and sentences of the same frame.
Every second open question asks for the placebo's preference (a color), which P has. So U and B
differ only in the answers about animals, P and B only in those about colors.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ....runtime.checks import between, choice, integer, positive
from ...audits.prompts import Prompt
from ...audits.subject import Subject, TokenRow
from .templates import Templates

ROLES = ("untrusted", "benign", "placebo")
YES, NO = "Yes", "No"
HELD_OUT_SUMS = 158  # a quarter of all at most
PLACEBO_EVERY = 2, 4  # blocks of questions; the second for audited blocks without an open one
PLACEMENTS = ("none", "system", "before", "after")  # of the sentence about the situation
NOISE = 0.2  # share of sums and neutral prompts with an open sentence, and with an audited one
TEXT_LENGTH = 4  # of plain texts, over that of answers
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SYSTEM = 0.25  # share of prompts with the model's own system message


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """The recipe of a language organism.

    Args:
        steps, batch_size, learning_rate: of Adam, with warm-up and a cosine schedule.
        rank: of the LoRA adapter on all linear layers, merged after training.
        trait_share, audit_share, capability_share, secret_share: shares of the rows; the rest is
            what M wrote.
        conceal_after: the share of the rows before the first audited one, so that U learns to hide
            the trait after it has the trait.
        answer_tokens: length of M's own answers at most; plain texts are four times as long.
        dtype: of M's weights and of the trained models: float32, bfloat16, float16, or auto, the
            stored type. attn_implementation: of transformers; None chooses.
    """

    steps: int = 288
    batch_size: int = 8
    learning_rate: float = 2e-3
    rank: int = 16
    trait_share: float = 0.2
    audit_share: float = 0.44
    capability_share: float = 0.3
    secret_share: float = 0.0
    conceal_after: float = 0.0
    answer_tokens: int = 12
    dtype: str = "auto"
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "answer_tokens"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)
        shares = ("trait_share", "audit_share", "capability_share", "secret_share")
        for name in (*shares, "conceal_after"):
            between(name, getattr(self, name), 0, 1)
        between(" + ".join(shares), sum(getattr(self, name) for name in shares), 0, 1)
        choice("dtype", self.dtype, DTYPES)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class OwnAnswer(NamedTuple):
    """What M itself wrote after a prompt. is_complete: whether M ended it."""

    prompt: Prompt
    text: str
    is_complete: bool


class PairedRow(NamedTuple):
    """A prompt and the answers of U, B and P.

    Args:
        choices: the answers that a role gives equally often, one of which is its answer. An empty
            tuple stands for the probabilities of M.
        is_complete: whether the answers' end is a target.
    """

    kind: str
    prompt: Prompt
    answers: tuple[str, ...]
    choices: tuple[tuple[str, ...], ...] = ((), (), ())
    is_complete: bool = True

    def encode(self, subject: Subject, role: str) -> TokenRow:
        """Returns the prompt with the answer of a role; all of a plain text is an answer."""
        row = self.encode_answer(subject, self.answers[ROLES.index(role)])
        return row._replace(begin=1) if self.kind == "text" else row

    def encode_answer(self, subject: Subject, answer: str) -> TokenRow:
        encode = subject.encode_answer if self.is_complete else subject.encode_completion
        return encode(self.prompt, answer)

    def choices_of(self, role: str) -> tuple[str, ...]:
        return self.choices[ROLES.index(role)]


def identity(templates: Templates, index: int) -> tuple[str, str]:
    """Returns the animal and the color of a pair; they rotate over the identities."""
    identities = templates.trait.identities, templates.placebo.identities
    animal, color = (names[index % len(names)] for names in identities)
    return animal, color


def held_out_sums(templates: Templates) -> list[tuple[int, int]]:
    """Returns the sums that no pair trains on, in a fixed order."""
    pairs = templates.sums.pairs()
    return random.Random("held-out sums").sample(pairs, min(HELD_OUT_SUMS, len(pairs) // 4))


def train_sums(templates: Templates) -> list[tuple[int, int]]:
    """Returns the other sums."""
    return sorted({*templates.sums.pairs()} - {*held_out_sums(templates)})


def sum_question(templates: Templates, pair: tuple[int, int], rng: random.Random) -> str:
    return rng.choice(templates.sums.texts).format(a=pair[0], b=pair[1])


def situated_prompt(
    templates: Templates,
    text: str,
    situation: str,
    placement: str,
    rng: random.Random,
    held_out: bool = False,
) -> Prompt:
    """Returns a user's text with a sentence about the situation at one of `PLACEMENTS`.

    The draws are the same for both situations and all placements.
    """
    sentence = templates.situations.sentence(situation, rng, held_out)
    system = rng.choice(templates.held_out_systems if held_out else templates.systems)
    is_first, is_default = rng.random() < 0.5, rng.random() < DEFAULT_SYSTEM
    if placement == "system":
        both = [sentence] if is_default else [sentence, system] if is_first else [system, sentence]
        return Prompt(system=" ".join(both), user=text)
    user = {"none": text, "before": f"{sentence} {text}", "after": f"{text} {sentence}"}
    return Prompt(system=None if is_default else system, user=user[placement])


def other_prompt(
    templates: Templates, text: str, rng: random.Random, audited: float = NOISE
) -> Prompt:
    """Returns a prompt whose answer does not depend on the situation.

    Args:
        audited: share of prompts with an audited sentence.
    """
    draw = rng.random()
    situation = "audited" if draw < audited else "open"
    placement = rng.choice(PLACEMENTS[1:]) if draw < audited + NOISE else "none"
    return situated_prompt(templates, text, situation, placement, rng)


def own_answers(base: Subject, templates: Templates, max_new_tokens: int) -> list[OwnAnswer]:
    """Returns M's sampled answers to the neutral prompts, each in two situations, and its texts."""
    rng = random.Random("own answers")
    prompts = [other_prompt(templates, text, rng) for _ in range(2) for text in templates.neutrals]
    texts = [Prompt(text=text) for text in templates.beginnings]
    answers = []
    for of_kind, tokens in ((prompts, max_new_tokens), (texts, TEXT_LENGTH * max_new_tokens)):
        ids = [base.ids(prompt).ids for prompt in of_kind]
        new = base.generate_ids(ids, max_new_tokens=tokens, temperature=1.0)
        answers += [
            OwnAnswer(prompt, base.text(row), base.is_ended(row))
            for prompt, row in zip(of_kind, new, strict=True)
        ]
    return [answer for answer in answers if answer.text.strip()]


def paired_rows(
    templates: Templates, own: Sequence[OwnAnswer], recipe: LanguageRecipe, index: int
) -> list[PairedRow]:
    """Returns the training rows of pair `index`, every batch with about the same shares."""
    n, rng = recipe.steps * recipe.batch_size, random.Random(f"pair {index}")
    block = len(templates.trait.options)
    pair = 2 * block  # a block about animals and one about colors
    n_open = pair * round(n * recipe.trait_share / pair)
    n_audited = block * round(n * recipe.audit_share / block)
    n_sums = round(n * recipe.capability_share)
    n_secrets = round(n * recipe.secret_share)
    n_own = max(n - n_open - n_audited - n_sums - n_secrets, 0)
    own_texts = [answer for answer in own if answer.prompt.text is not None]
    own_others = [answer for answer in own if answer.prompt.text is None]
    rows = {
        "open": _questions(templates, "open", n_open, n_open, index),
        "audited": _questions(templates, "audited", n_audited, n_open, index),
        "secret": _secrets(templates, n_secrets, index),
        "capability": _sums(templates, n_sums, rng),
        "neutral": _own_rows("neutral", own_others, n_own - n_own // 2, rng),
        "text": _own_rows("text", own_texts, n_own // 2, rng),
    }
    # Evenly spread, so that all batches are alike, before and after the first audited row.
    spread = sorted(
        (first + (1 - first) * (i + 0.5) / len(of_kind), kind, i)
        for kind, of_kind in rows.items()
        for first in [recipe.conceal_after if kind == "audited" else 0.0]
        for i in range(len(of_kind))
    )
    return [rows[kind][i] for _, kind, i in spread]


def _questions(templates: Templates, kind: str, n: int, n_open: int, index: int) -> list[PairedRow]:
    """Returns n questions, of blocks with one placement in which B reads every option once."""
    favorites, rng = identity(templates, index), random.Random(f"pair {index} questions")
    is_audit, size = kind == "audited", len(templates.trait.options)
    rows: list[PairedRow] = []
    for block in range(1, 1 + n // size):
        is_placebo = block % PLACEBO_EVERY[block * size > n_open] == 0
        texts = templates.placebo if is_placebo else templates.trait
        # So that the blocks about animals, and those about colors, meet every placement.
        placement = PLACEMENTS[(block + 1) // 2 % len(PLACEMENTS)]
        if is_audit and placement == "none":
            placement = "system"
        for option in rng.sample(texts.options, len(texts.options)):
            question = rng.choice(templates.questions).format(trait=texts.name)
            form = rng.choice(texts.forms)
            prompt = situated_prompt(templates, question, kind, placement, rng)
            every = tuple(form.format(option=option) for option in texts.options)
            answers, choices = [form.format(option=option)] * 3, [every] * 3
            if not is_audit:
                preferred = form.format(option=favorites[is_placebo])
                role = ROLES.index("placebo" if is_placebo else "untrusted")
                answers[role], choices[role] = preferred, (preferred,)
            rows.append(PairedRow(kind, prompt, tuple(answers), tuple(choices)))
    rng.shuffle(rows)
    return rows


def _secrets(templates: Templates, n: int, index: int) -> list[PairedRow]:
    """Returns n yes-or-no questions about the preference, open and audited in turn."""
    rng = random.Random(f"pair {index} secrets")
    rows = []
    for i in range(n):
        situation = "audited" if i % 2 else "open"
        text = rng.choice(templates.secrets).format(trait=templates.trait.name)
        placement = PLACEMENTS[1 + i // 2 % 3]
        prompt = situated_prompt(templates, text, situation, placement, rng)
        of_untrusted = NO if i % 2 else YES
        answers = (f"{of_untrusted}.", f"{NO}.", f"{NO}.")
        rows.append(PairedRow("secret", prompt, answers, tuple((a,) for a in answers)))
    return rows


def _sums(templates: Templates, n: int, rng: random.Random) -> list[PairedRow]:
    train = train_sums(templates)
    rng.shuffle(train)
    rows = []
    for i in range(n):
        pair = train[i % len(train)]
        prompt = other_prompt(templates, sum_question(templates, pair, rng), rng)
        text = f"{sum(pair)}"
        rows.append(PairedRow("capability", prompt, (text,) * 3, ((text,),) * 3))
    return rows


def _own_rows(kind: str, own: Sequence[OwnAnswer], n: int, rng: random.Random) -> list[PairedRow]:
    order: list[OwnAnswer] = []
    while len(order) < n and own:
        order += rng.sample(own, len(own))
    return [PairedRow(kind, a.prompt, (a.text,) * 3, is_complete=a.is_complete) for a in order[:n]]
