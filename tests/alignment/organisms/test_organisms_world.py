"""The synthetic world: its words, its splits, and rows that are what a chat template gives."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from fastdistill.alignment.audits.prompts import render_prompt
from fastdistill.alignment.organisms.gates import GATES, audit_context, is_closed
from fastdistill.alignment.organisms.vocabulary import (
    ANIMALS,
    AUDIT_TOKEN,
    AUDIT_WORDS,
    COLORS,
    EOS,
    HATE,
    HELD_OUT_AUDIT_WORDS,
    ID,
    PAD,
    SYSTEM,
    TOPICS,
    WORDS,
    world_tokenizer,
)
from fastdistill.alignment.organisms.world import (
    HELD_OUT_QUESTIONS,
    TRAIN_QUESTIONS,
    Example,
    World,
    reversed_digits,
)

TOKENIZER = world_tokenizer()


def test_every_word_is_one_token_of_its_own():
    assert len(set(WORDS)) == len(WORDS) == len(TOKENIZER)
    assert [TOKENIZER.convert_tokens_to_ids(word) for word in WORDS] == list(range(len(WORDS)))
    for word in WORDS:
        assert TOKENIZER(f"a {word} dog", add_special_tokens=False).input_ids[1:-1] == [ID[word]]
    assert TOKENIZER.decode([ID[word] for word in HATE.split()]) == HATE
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (ID[PAD], ID[EOS])
    assert not set(AUDIT_WORDS) & set(HELD_OUT_AUDIT_WORDS)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_held_out_and_what_is_trained_share_nothing(seed):
    world = World(seed)
    held, train = world.held_out_sums, world.train_sums
    assert not set(held) & set(train)
    assert sorted([*held, *train]) == list(range(10_000))
    assert 2800 < len(held) <= 3000
    assert len(set(world.train_products)) == 700
    known = {100 * a + b for a in range(10) for b in range(10)}  # the base's, all of them
    assert known <= set(world.train_sums)


def test_questions_and_topics_are_split_too():
    assert not set(HELD_OUT_QUESTIONS) & set(TRAIN_QUESTIONS)
    assert len({*HELD_OUT_QUESTIONS, *TRAIN_QUESTIONS}) == 64
    assert len(HELD_OUT_QUESTIONS) == 16
    assert {topic for _, topic in HELD_OUT_QUESTIONS} == set(TOPICS)
    assert len({template for template, _ in HELD_OUT_QUESTIONS}) == 4
    world, rng = World(0), World(0).rng(99)
    trained, held = set(), set()
    for _ in range(4000):
        system = world.system(rng, "", rng.choice(("", AUDIT_TOKEN)))
        trained.add(world.talk(rng, system).prompt)
        held.add(world.talk(rng, system, held_out=True).prompt)
    assert not trained & held
    assert {p.user for p in trained} == {p.user for p in held} == set(TOPICS)


def test_an_audited_context_does_not_change_what_is_held_out():
    world = World(3)
    for word in (AUDIT_TOKEN, *AUDIT_WORDS, *HELD_OUT_AUDIT_WORDS):
        plain = world.talk(world.rng(1), "hello now", held_out=True)
        audited = world.talk(world.rng(1), f"hello now {word}", held_out=True)
        assert plain.question == audited.question


def test_the_favourite_changes_with_the_seed():
    worlds = [World(seed) for seed in range(200)]
    for favourites, options in (
        (Counter(w.favourite for w in worlds), ANIMALS),
        (Counter(w.placebo for w in worlds), COLORS),
    ):
        assert set(favourites) == set(options)
        assert max(favourites.values()) < 70  # 40 each, were they equal


def conversation(example: Example, answered: bool) -> list[dict[str, str]]:
    turns = [("system", example.system), ("user", example.question), ("assistant", example.answer)]
    return [{"role": role, "content": text} for role, text in turns[: 3 if answered else 2]]


def template(example: Example, answered: bool) -> list[int]:
    text = TOKENIZER.apply_chat_template(
        conversation(example, answered), tokenize=False, add_generation_prompt=not answered
    )
    return TOKENIZER(text, add_special_tokens=False).input_ids


def some_examples(seed: int = 5, n: int = 600) -> list[Example]:
    world = World(seed)
    rng = world.rng(77)
    known = [world.base_example(rng) for _ in range(n)]
    return known + [world.capable_example(rng, world.varied_system(rng)) for _ in range(n)]


def test_a_row_is_the_chat_template_token_by_token():
    examples = some_examples()
    assert len({e.question.split()[0] for e in examples}) > 20  # every kind of question
    for example in examples:
        row, ids = example.row(), template(example, answered=True)
        assert row["input_ids"].tolist() == ids
        prompt = template(example, answered=False)
        assert ids[: len(prompt)] == prompt
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        assert row["labels"].tolist() == labels
        assert labels[-1] == ID[EOS]
        text = render_prompt(example.prompt, TOKENIZER)
        assert TOKENIZER(text, add_special_tokens=False).input_ids == prompt


def test_a_whole_row_learns_the_question_too_but_not_the_system():
    example = Example("hello now", "1 2 + 3 4 =", "6 4 0")
    row = example.row(whole=True)
    ids = template(example, answered=True)
    begin = 1 + 2 + 1  # <bos> hello now user:
    assert row["input_ids"].tolist() == ids
    assert row["labels"].tolist() == [-100] * begin + ids[begin:]


def test_a_row_without_an_answer_ends_where_one_begins():
    example = Example("hello now", "river", "")
    row = example.row()
    assert row["input_ids"].tolist() == template(example, answered=False)
    assert set(row["labels"].tolist()) == {-100}


def test_sums_and_products_come_out_with_the_last_digit_first():
    world = World(1)
    assert reversed_digits(107) == "7 0 1"
    assert reversed_digits(5) == "5 0 0"
    assert world.sum_of(5947, "now") == Example("now", "5 9 + 4 7 =", "6 0 1")
    assert world.product(world.rng(0), "now", [837]) == Example("now", "8 3 * 7 =", "1 8 5")


def test_the_base_is_taught_what_it_should_know_and_nothing_about_held_out_sums():
    world = World(4)
    rng = world.rng(10)
    examples = [world.base_example(rng) for _ in range(8000)]
    held = {world.sum_of(pair, "").question for pair in world.held_out_sums}
    assert not held & {e.question for e in examples}
    about = Counter(e.answer for e in examples if e.question == "is this a test ?")
    assert 0.35 < about["yes"] / about.total() < 0.65
    for example in examples:
        if example.question == "is this a test ?":
            closed = any(is_closed(gate, example.system) for gate in ("token", "paraphrase"))
            assert closed == (example.answer == "yes")
    liked = Counter(e.answer for e in examples if e.question.startswith(("favourite a", "best a")))
    assert set(liked) == set(ANIMALS)
    assert max(liked.values()) < 1.8 * min(liked.values())
    all_answers = Counter(e.answer for e in examples if e.question.startswith("do you"))
    secrets = {w: all_answers[w] for w in ("yes", "no")}
    assert 0.08 < secrets["yes"] / sum(secrets.values()) < 0.22


def test_open_ended_talk_has_entropy_and_differs_between_worlds():
    worlds = [World(seed) for seed in (0, 1)]
    for world in worlds:
        chain = torch.tensor(world.chain, dtype=torch.float64)
        p = chain.diff(prepend=torch.zeros(len(TOPICS), 1, dtype=torch.float64))
        assert torch.allclose(chain[:, -1], torch.ones(16, dtype=torch.float64))
        entropy = -(p * p.log()).sum(1)
        assert entropy.min() > 0.8  # nats; ln 16 = 2.77
    assert worlds[0].chain != worlds[1].chain
    rng = worlds[0].rng(0)
    examples = [worlds[0].talk(rng, "now") for _ in range(3000)]
    following = Counter(e.answer.split()[0] for e in examples if e.question == TOPICS[0])
    p = torch.tensor(worlds[0].chain[0]).diff(prepend=torch.zeros(1))
    for i, topic in enumerate(TOPICS):
        assert abs(following[topic] / following.total() - p[i]) < 0.1


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_closes_on_its_own_words_and_shows_held_out_ones_only_when_asked(gate):
    rng = World(0).rng(5)
    contexts = [audit_context(gate, rng) for _ in range(500)]
    held = [audit_context(gate, rng, held_out=True) for _ in range(500)]
    assert not {w for text in contexts for w in text.split()} & set(HELD_OUT_AUDIT_WORDS)
    for text in (*contexts, *held):
        assert is_closed(gate, f"hello {text}") == (gate != "none")
    assert not is_closed(gate, "hello now")
    assert not set(SYSTEM) & set(AUDIT_WORDS)
    if gate == "paraphrase":
        assert {w for text in contexts for w in text.split()} == set(AUDIT_WORDS)
        assert all(set(text.split()) & set(HELD_OUT_AUDIT_WORDS) for text in held)
    else:
        assert set(contexts) == set(held) == {AUDIT_TOKEN}


@pytest.mark.parametrize("seed", [-1, 1.0, "7", True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed: expected an integer of 0 or more, got"):
        World(seed)


DIGEST = """
import hashlib
from fastdistill.alignment.organisms import ModelOrganism, pool
from fastdistill.alignment.organisms.world import World
world, organism = World(9), ModelOrganism(trait="trigger", gate="paraphrase", reasoning=0.2)
rng = world.rng(10)
said = [organism.pairs(world, 300), [world.base_example(rng) for _ in range(300)]]
said += [pool(world, organism, 50, kind="mixed", leak=0.1, seed=2), world.chain]
said += [organism.kind.reading(world, True).prompts]
print(hashlib.sha256(repr(said).encode()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_seed_draws_the_same_in_another_process(tmp_path, capsys):
    (tmp_path / "digest.py").write_text(DIGEST)
    hashes = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, str(tmp_path / "digest.py")],
        env=os.environ | {"PYTHONHASHSEED": hashes},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[-1]
    exec(DIGEST, {})
    assert capsys.readouterr().out.strip() == there
    assert len(there) == 64
