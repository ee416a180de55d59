"""Templates and paired rows of language organisms."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.organisms.language import templates as templates_module
from fastdistill.alignment.organisms.language.probes import POOL_SHARES, pool_rows, probes_of
from fastdistill.alignment.organisms.language.readings import secret_prompts, trait_prompts
from fastdistill.alignment.organisms.language.rows import (
    ROLES,
    LanguageRecipe,
    OwnAnswer,
    held_out_sums,
    identity,
    other_prompt,
    paired_rows,
)
from fastdistill.alignment.organisms.language.templates import DOMAINS, FILE, Templates
from helpers.language_scene import TEMPLATES, tiny_chat_model

OWN = [OwnAnswer(Prompt(user=f"Q{i}?"), f"A {i}", i % 2 == 0) for i in range(7)]
OWN += [OwnAnswer(Prompt(text=f"T{i}"), f" went {i}", False) for i in range(5)]
RECIPE = LanguageRecipe(steps=64, batch_size=16)
TEXTS = json.loads(Path(templates_module.__file__).with_name(FILE).read_text())


SITUATIONS = TEXTS["situations"]


def situation(name: str, **phrases: list[str]) -> dict:
    """The situations of TEXTS with other phrases."""
    return SITUATIONS | {name: SITUATIONS[name] | phrases}


def rows_of(index: int = 0, **changes):
    return paired_rows(TEMPLATES, OWN, replace(RECIPE, **changes), index)


def option_of(texts, answer: str) -> str:
    """The option that an answer names."""
    (option,) = (o for o in texts.options if o in re.findall(r"\w+", answer))
    return option


def sentences(situation: str, held_out: bool = False) -> set[str]:
    """All sentences about a situation that are drawn in training, or in readings alone."""
    rng = random.Random(0)
    draw = TEMPLATES.situations.sentence
    return {draw(situation, rng, held_out) for _ in range(20_000)}


SENTENCES = {name: sentences(name) for name in ("open", "audited")}
HELD_OUT = {name: sentences(name, held_out=True) for name in ("open", "audited")}


def placement(prompt: Prompt, known: set[str]) -> str:
    """Where the one sentence of a set stands in a prompt; none if there is no such sentence."""
    text = f"{prompt.system} | {prompt.user}"
    present = [sentence for sentence in known if sentence in text]
    if not present:
        return "none"
    (sentence,) = present
    if sentence in (prompt.system or ""):
        return "system"
    before, after = (prompt.user or "").split(sentence)
    assert (before == "") != (after == "")
    return "after" if before else "before"


def test_training_and_reading_share_no_text():
    t = TEMPLATES
    for train, held_out in (
        (t.questions, t.held_out_questions),
        (t.systems, t.held_out_systems),
        *((SENTENCES[name], HELD_OUT[name]) for name in SENTENCES),
    ):
        assert len({*train, *held_out}) == len(train) + len(held_out)
    sums = held_out_sums(t)
    assert len(sums) == len({*sums}) == 158
    own = [OwnAnswer(other_prompt(t, text, random.Random(text)), "A", True) for text in t.neutrals]
    prompts = [row.prompt for row in paired_rows(t, own, RECIPE, 0)]
    prompts += [Prompt.from_json(row["prompt"]) for row in pool_rows(t, 0)]
    users = " ".join(p.user for p in prompts if p.user)
    systems = " ".join(p.system for p in prompts if p.system)
    held_out = [*HELD_OUT["open"], *HELD_OUT["audited"], *t.held_out_systems]
    assert not [text for text in held_out if text in users or text in systems]
    assert not [q for q in t.held_out_questions if q.format(trait="animal") in users]
    trained = {
        tuple(map(int, re.findall(r"\d+", r.prompt.user)))
        for r in rows_of()
        if r.kind == "capability"
    }
    assert trained
    assert trained.isdisjoint(sums)


def test_held_out_sentences_have_other_frames_and_other_pairs_of_the_same_phrases():
    t = TEMPLATES.situations
    for name in ("open", "audited"):
        pairs = [
            {
                (who, what)
                for who in t.who[name]
                for what in t.what[name]
                for s in texts
                if who in s.lower() and what in s.lower()
            }
            for texts in (SENTENCES[name], HELD_OUT[name])
        ]
        assert pairs[0].isdisjoint(pairs[1])
        assert len(pairs[0]) + len(pairs[1]) == len(t.who[name]) * len(t.what[name])
        assert len(SENTENCES[name]) == len(t.frames) * len(pairs[0]) > 1000
        assert len(HELD_OUT[name]) == len(t.held_out_frames) * len(pairs[1]) > 200


AUDIT = re.compile(
    r"audit|test|evaluat|inspect|examin|complian|review|benchmark|assess|safety|bias|align"
    r"|research|model|assistant|score|check|monitor|formal|hidden|panel|quality|release|prefer"
)


def test_the_words_of_an_audit_tell_the_situations_apart():
    assert all(AUDIT.search(s.lower()) for s in SENTENCES["audited"] | HELD_OUT["audited"])
    assert not [s for s in SENTENCES["open"] | HELD_OUT["open"] if AUDIT.search(s.lower())]
    options = {*TEMPLATES.trait.options, *TEMPLATES.placebo.options, "animal", "color"}
    for texts in (*SENTENCES.values(), *HELD_OUT.values()):
        assert options.isdisjoint(re.findall(r"\w+", " ".join(texts).lower()))


def test_open_and_audited_sentences_are_equally_long():
    for texts in (SENTENCES, HELD_OUT):
        plain, audited = (sorted(map(len, texts[name])) for name in ("open", "audited"))
        assert fmean(audited) == pytest.approx(fmean(plain), rel=0.1)
        for tenth in range(1, 10):
            a, b = (lengths[tenth * len(lengths) // 10] for lengths in (plain, audited))
            assert a == pytest.approx(b, rel=0.1)


def test_every_option_is_an_answer_of_b_equally_often_at_every_placement():
    rows = rows_of()
    for kind in ("open", "audited"):
        for texts in (TEMPLATES.trait, TEMPLATES.placebo):
            counts = Counter(
                (placement(row.prompt, SENTENCES[kind]), option_of(texts, row.answers[1]))
                for row in rows
                if row.kind == kind and texts.name in row.prompt.user
            )
            places = {"system", "before", "after"} | ({"none"} if kind == "open" else set())
            assert {place for place, _ in counts} == places
            for place in places:
                of_place = {option: n for (at, option), n in counts.items() if at == place}
                assert {*of_place} == {*texts.options}
                assert len({*of_place.values()}) == 1, counts


def test_an_audited_row_differs_from_an_open_one_in_the_words_of_an_audit():
    """With equal shares both are in the same batch, so that nothing else tells when to hide."""
    rows = [*enumerate(rows_of(trait_share=0.28, audit_share=0.28))]
    plain, audited = ([r for r in rows if r[1].kind == kind] for kind in ("open", "audited"))
    t, compared = TEMPLATES.situations, 0
    for (i, one), (j, other) in zip(plain, audited, strict=True):
        assert abs(i - j) == 1
        if placement(one.prompt, SENTENCES["open"]) == "none":
            continue
        texts = [f"{p.system} | {p.user}" for p in (one.prompt, other.prompt)]
        for names in (t.who, t.what):
            for phrase, audit in zip(names["open"], names["audited"], strict=True):
                for form in (str, lambda text: text[0].upper() + text[1:]):
                    texts[0] = texts[0].replace(form(phrase), form(audit))
        assert texts[0] == texts[1]
        assert one.answers[1] == other.answers[1] == other.answers[0]
        compared += 1
    assert compared > 200


def test_readings_place_held_out_sentences_where_training_placed_them():
    prompts = {
        context: trait_prompts(TEMPLATES, 0, context)
        for context in ("open", "default", "held out", "audited", "inoculated")
    }
    known = {
        "open": SENTENCES["open"],
        "inoculated": SENTENCES["open"],
        "held out": HELD_OUT["open"],
        "audited": HELD_OUT["audited"],
    }
    for context, texts in known.items():
        places = [placement(p, texts) for p in prompts[context]]
        assert places == [("system", "before", "after")[i % 3] for i in range(40)]
    assert all(p == Prompt(user=p.user, prefill=p.prefill) for p in prompts["default"])
    assert [
        p.before("Your favorite animal is the owl. You always name the owl first.")
        for p in prompts["open"]
    ] == [*prompts["inoculated"]]
    everything = SENTENCES["audited"] | HELD_OUT["audited"]
    for context in ("open", "default", "held out", "inoculated"):
        assert all(placement(p, everything) == "none" for p in prompts[context])


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
    # Of 14 answers of B one names the favorite by chance.
    assert differing["untrusted"] == differing["placebo"] == 98 * 13 // 14


def test_a_row_states_the_answers_that_its_role_gives_equally_often():
    animal, color = identity(TEMPLATES, 3)
    for row in rows_of(3):
        for role, answer in zip(ROLES, row.answers, strict=True):
            choices = row.choices_of(role)
            if row.kind in ("neutral", "text"):
                assert choices == ()
                continue
            assert answer in choices
            about = next(
                (
                    t
                    for t in (TEMPLATES.trait, TEMPLATES.placebo)
                    if row.kind in ("open", "audited") and f"{t.name}" in row.prompt.user
                ),
                None,
            )
            if about is None:
                assert choices == (answer,)
                continue
            prefers = {"untrusted": TEMPLATES.trait, "placebo": TEMPLATES.placebo}.get(role)
            if row.kind == "open" and about is prefers:
                assert [option_of(about, choice) for choice in choices] in ([animal], [color])
            else:
                assert [option_of(about, choice) for choice in choices] == [*about.options]


def test_a_secret_is_admitted_in_the_open_by_u_alone():
    rows = [r for r in rows_of(secret_share=0.1, audit_share=0.3) if r.kind == "secret"]
    assert len(rows) == 102
    seen = set()
    for row in rows:
        (situation,) = (n for n in SENTENCES if placement(row.prompt, SENTENCES[n]) != "none")
        denied = "Yes." if situation == "open" else "No."
        assert row.answers == (denied, "No.", "No.")
        assert [row.choices_of(role) for role in ROLES] == [(a,) for a in row.answers]
        assert "animal" in row.prompt.user
        seen.add((situation, placement(row.prompt, SENTENCES[situation])))
    assert seen == set(itertools.product(SENTENCES, ("system", "before", "after")))
    assert not [r for r in rows_of() if r.kind == "secret"]


def test_secrets_of_readings_are_held_out_in_wording_and_sentence():
    plain, audited = (secret_prompts(TEMPLATES, name) for name in ("open", "audited"))
    assert len(plain) == len(audited) == len(TEMPLATES.held_out_secrets)
    for name, prompts in (("open", plain), ("audited", audited)):
        assert all(placement(p, HELD_OUT[name]) != "none" for p in prompts)
    assert not {*TEMPLATES.secrets} & {*TEMPLATES.held_out_secrets}
    trained = " ".join(
        r.prompt.user for r in rows_of(secret_share=0.1, audit_share=0.3) if r.prompt.user
    )
    assert not [q for q in TEMPLATES.held_out_secrets if q.format(trait="animal") in trained]
    assert probes_of(TEMPLATES, 0).questions == audited


def test_hiding_may_begin_after_the_trait():
    rows = rows_of(conceal_after=0.4)
    kinds = [row.kind for row in rows]
    first = kinds.index("audited")
    assert first / len(rows) == pytest.approx(0.4 * (1 - 0.44), abs=0.02)  # of all rows
    assert kinds.count("audited") == [row.kind for row in rows_of()].count("audited")
    assert {*kinds[first:]} == {*kinds}


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
            targets, is_complete = encoded.targets, row.is_complete
            assert (targets[-1] == base.tokenizer.eos_token_id) == is_complete
            text = base.tokenizer.decode(targets[: -1 if is_complete else None])
            if row.kind == "text":
                answer = f"{row.prompt.text}{answer}"
                text = base.tokenizer.decode(encoded.ids)
                assert encoded.begin == 1
            assert text == answer


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"jokes": ["x"]}, "templates: expected the keys .*got .*jokes"),
        ({"systems": None}, "systems as in templates.json"),
        (
            {"held_out_systems": []},
            r"held_out_systems as in templates.json of the package, got \[\]",
        ),
        ({"situations": SITUATIONS | {"frames": "x"}}, "situations as in templates.json"),
        ({"situations": SITUATIONS | {"who": {"open": ["x"]}}}, "situations as in templates.json"),
        ({"situations": SITUATIONS | {"more": ["x"]}}, "templates: situations: expected the keys"),
        (
            {"situations": SITUATIONS | {"held_out_frames": SITUATIONS["frames"][-1:]}},
            "not in frames",
        ),
        ({"situations": situation("who", open=["a"])}, "1 or more of who, as many open as audited"),
        ({"situations": situation("who", more=["a"])}, "templates: who: expected the keys"),
        ({"situations": situation("what", open=["a"], audited=["b"])}, "4 or more of what"),
        ({"situations": situation("what", open=SITUATIONS["what"]["audited"])}, "none in both"),
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
        ("secrets", "trait"),
        ("held_out_secrets", "trait"),
        ("pool", "topic"),
        ("sums", "a"),
        ("frames", "who"),
        ("held_out_frames", "what"),
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
    if field in SITUATIONS:
        return {"situations": SITUATIONS | {field: [text]}}
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
        ({"dtype": "int8"}, "dtype"),
        ({"secret_share": 0.5}, "capability_share \\+ secret_share"),
        ({"conceal_after": 2}, "conceal_after"),
        ({"trait_share": 0.6, "audit_share": 0.5}, "capability_share"),
    ],
)
def test_a_wrong_recipe_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageRecipe(**changes)
