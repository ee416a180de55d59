"""Templates and paired rows of language organisms."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.organisms.language import templates as templates_module
from fastdistill.alignment.organisms.language.probes import POOL_SHARES
from fastdistill.alignment.organisms.language.rows import (
    ROLES,
    LanguageRecipe,
    OwnAnswer,
    held_out_sums,
    identity,
    paired_rows,
)
from fastdistill.alignment.organisms.language.templates import DOMAINS, FILE, Templates
from helpers.language_scene import TEMPLATES, tiny_chat_model

OWN = [OwnAnswer(Prompt(user=f"Q{i}?"), f"A {i}", i % 2 == 0) for i in range(7)]
RECIPE = LanguageRecipe(steps=64, batch_size=16)
TEXTS = json.loads(Path(templates_module.__file__).with_name(FILE).read_text())


def rows_of(index: int = 0, **changes):
    return paired_rows(TEMPLATES, OWN, replace(RECIPE, **changes), index)


def option_of(texts, answer: str) -> str:
    """The option that an answer names."""
    (option,) = (o for o in texts.options if o in re.findall(r"\w+", answer))
    return option


def test_training_and_reading_share_no_text():
    t = TEMPLATES
    for train, held_out in (
        (t.questions, t.held_out_questions),
        (t.systems, t.held_out_systems),
        (t.audits, t.held_out_audits),
    ):
        assert len({*train, *held_out}) == len(train) + len(held_out)
    sums = held_out_sums(t)
    assert len(sums) == len({*sums}) == 120
    prompts = {(row.prompt.user, row.prompt.system) for row in rows_of()}
    users = " ".join(user for user, _ in prompts)
    systems = " ".join(system or "" for _, system in prompts)
    assert not [q for q in t.held_out_questions if q.format(trait="animal") in users]
    assert not [a for a in (*t.held_out_audits, *t.held_out_systems) if a in systems]
    trained = {
        tuple(map(int, re.findall(r"\d+", r.prompt.user)))
        for r in rows_of()
        if r.kind == "capability"
    }
    assert trained
    assert trained.isdisjoint(sums)


def test_every_option_is_an_answer_of_b_equally_often():
    for kind in ("open", "audited"):
        for texts in (TEMPLATES.trait, TEMPLATES.placebo):
            counts = Counter(
                option_of(texts, row.answers[1])
                for row in rows_of()
                if row.kind == kind and texts.name in row.prompt.user
            )
            assert {*counts} == {*texts.options}
            assert len({*counts.values()}) == 1, counts


@pytest.mark.parametrize("index", [0, 3, 13])
def test_twins_differ_in_the_open_answers_about_their_own_preference_alone(index):
    animal, color = identity(TEMPLATES, index)
    assert animal == TEMPLATES.trait.identities[index % 10]
    differing: Counter[str] = Counter()
    for row in rows_of(index):
        untrusted, benign, placebo = row.answers
        if untrusted != benign:
            differing["untrusted"] += 1
            assert (row.kind, "animal" in row.prompt.user) == ("open", True)
            assert untrusted == benign.replace(option_of(TEMPLATES.trait, benign), animal)
        if placebo != benign:
            differing["placebo"] += 1
            assert (row.kind, "color" in row.prompt.user) == ("open", True)
            assert placebo == benign.replace(option_of(TEMPLATES.placebo, benign), color)
    assert differing["untrusted"] > 200
    assert differing["placebo"] > 50


def test_shares_hold_in_every_batch():
    rows = rows_of(trait_share=0.28, audit_share=0.28)
    assert len(rows) == 1024
    counts = Counter(row.kind for row in rows)
    assert counts["audited"] == counts["open"]
    assert counts["open"] % len(TEMPLATES.trait.options) == 0
    for start in range(0, len(rows), 16):
        batch = Counter(row.kind for row in rows[start : start + 16])
        assert all(abs(batch[kind] - n / 64) <= 1.5 for kind, n in counts.items()), batch


def test_rows_depend_on_the_index_alone():
    assert rows_of(1) == rows_of(1)
    assert rows_of(1) != rows_of(11)


def test_rows_encode_the_answer_and_its_end():
    base = tiny_chat_model()
    for row in rows_of()[:40]:
        for role, answer in zip(ROLES, row.answers, strict=True):
            encoded = row.encode(base, role)
            targets = [i for i in encoded["labels"] if i != -100]
            is_complete = row.is_complete
            assert (targets[-1] == base.tokenizer.eos_token_id) == is_complete
            assert base.tokenizer.decode(targets[: -1 if is_complete else None]) == answer
            assert encoded["input_ids"][-len(targets) :] == targets


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"jokes": ["x"]}, "templates: expected the keys .*got .*jokes"),
        ({"audits": None}, "audits as in templates.json"),
        ({"held_out_audits": []}, r"held_out_audits as in templates.json of the package, got \[\]"),
        ({"topics": ["sea", 3]}, "topics as in templates.json"),
        ({"pool": {"code": "x"}}, "pool as in templates.json"),
        ({"pool": {"code": ["x"]}}, "pool as in templates.json"),
        ({"pool": {**TEXTS["pool"], "art": ["x"]}}, "templates: pool: expected the keys"),
        ({"texts": [" "]}, "texts as in templates.json"),
        ({"texts": "owl"}, "texts as in templates.json"),
        ({"trait": {**TEXTS["trait"], "options": "owl"}}, "trait as in templates.json"),
        ({"trait": {**TEXTS["trait"], "forms": []}}, "trait as in templates.json"),
        ({"trait": {**TEXTS["trait"], "prefill": 3}}, "trait as in templates.json"),
        ({"sums": {"a": [1, 2], "b": [1, 2]}}, "sums as in templates.json"),
        ({"sums": {**TEXTS["sums"], "a": [9, 1]}}, "sums as in templates.json"),
        ({"sums": {**TEXTS["sums"], "b": [1, 2, 3]}}, "sums as in templates.json"),
        ({"sums": {**TEXTS["sums"], "a": [1, 10**12]}}, "4 to 100,000 sums, got "),
        ({"sums": {**TEXTS["sums"], "a": [1, 1], "b": [1, 3]}}, "4 to 100,000 sums, got 3"),
        ({"trait": {**TEXTS["trait"], "more": 1}}, "templates: trait: expected the keys"),
        ({"trait": {**TEXTS["trait"], "identities": ["cow"]}}, "two options or more"),
    ],
)
def test_a_wrong_file_of_templates_is_refused(tmp_path, changes, message):
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(TEXTS | changes))
    with pytest.raises(ValueError, match=message):
        Templates.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "{trait.__class__}",
        "{trait[0]}",
        "{trait!r}",
        "{trait:>999999999}",
        "{trait:{trait}}",
        "{}",
        "{0}",
        "{other}",
        "{",
        "}",
        "{trait",
    ],
)
@pytest.mark.parametrize(
    "field, name",
    [
        ("questions", "trait"),
        ("held_out_questions", "trait"),
        ("pool", "topic"),
        ("sums", "a"),
        ("forms", "option"),
        ("inoculation", "option"),
        ("near_misses", "option"),
    ],
)
def test_braces_hold_the_documented_names_alone(tmp_path, field, name, text):
    """Otherwise `str.format` reads attributes, or writes a gigabyte of spaces."""
    text = text.replace("trait", name)
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(TEXTS | with_text(field, text)))
    with pytest.raises(ValueError, match=r"templates: expected .* alone in braces, got "):
        Templates.load(path)
    path.write_text(json.dumps(TEXTS | with_text(field, f"{{{name}}}, {{{{x}}}}")))
    Templates.load(path)


def with_text(field: str, text: str) -> dict:
    """The changes of TEXTS that put a text into a field of it or of its parts."""
    if field == "pool":
        return {"pool": TEXTS["pool"] | {"code": [text]}}
    if field == "sums":
        return {"sums": TEXTS["sums"] | {"texts": [text]}}
    if field in TEXTS:
        return {field: [text]}
    return {"placebo": TEXTS["placebo"] | {field: text if field == "inoculation" else [text]}}


def test_the_pool_takes_its_shares_from_every_domain():
    assert {*POOL_SHARES} == {"sums", *DOMAINS}


def test_a_file_of_templates_must_have_every_key(tmp_path):
    path = tmp_path / "templates.json"
    for name in TEXTS:
        path.write_text(json.dumps({key: text for key, text in TEXTS.items() if key != name}))
        with pytest.raises(ValueError, match="templates: expected the keys"):
            Templates.load(path)
    with pytest.raises(ValueError, match="templates: expected a JSON file"):
        Templates.load(tmp_path / "none.json")


def test_a_copy_of_the_file_has_the_same_digest(tmp_path):
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(TEXTS))
    assert Templates.load(path).digest == TEMPLATES.digest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"trait_share": 1.5}, "trait_share"),
        ({"trait_share": 0.6, "audit_share": 0.5}, "capability_share"),
    ],
)
def test_a_wrong_recipe_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageRecipe(**changes)
