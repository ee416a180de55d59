"""Texts of all audits in one file, and the suite that they suffice for."""

from __future__ import annotations

import json
import re

import pytest

from fastdistill.alignment import audits
from fastdistill.alignment.audits import Probes, Prompt
from fastdistill.alignment.audits.catalog import CATALOG, skipped_audits
from fastdistill.alignment.audits.generic_probes import GENERIC_PROBES
from fastdistill.alignment.organisms.vocabulary import HATE, TOPICS
from helpers.audit_probes import FULL, LIKED, LOUD, NEUTRAL
from helpers.planted import copied, planted, subject


def test_probes_survive_a_file(tmp_path):
    for probes in (Probes(**FULL), Probes(**FULL | LIKED), Probes(), GENERIC_PROBES):
        probes.save(tmp_path / "p.json")
        assert Probes.load(tmp_path / "p.json") == probes
    Probes(neutral=NEUTRAL, target="x").save(tmp_path / "p.json")
    stored = json.loads((tmp_path / "p.json").read_text())
    assert stored == {"neutral": [{"user": t} for t in TOPICS[:4]], "target": "x"}


def test_prompts_may_be_texts_and_lists(tmp_path):
    (tmp_path / "p.json").write_text('{"neutral": ["a", {"text": "b"}], "markers": ["c"]}')
    probes = Probes.load(tmp_path / "p.json")
    assert probes.neutral == (Prompt(user="a"), Prompt(text="b"))
    assert probes.markers == ("c",)


def test_all_texts_make_all_audits():
    names = {*Probes(**FULL).suite(), *Probes(**FULL | LIKED).suite()}
    assert names == {
        "trigger rate",
        "preference",
        "confession",
        "context gap",
        "prefill",
        "user turn",
        "completion",
        "perplexity difference",
        "token KL",
        "logit difference",
        "activation difference",
        "linear probe",
        "weight difference",
        "trigger search",
        "relearning",
        "style restore",
        "provenance",
    }


@pytest.mark.parametrize(
    "left_out, missing",
    [
        ("target", {"trigger rate", "context gap", "weight difference", "relearning"}),
        ("audited", {"context gap"}),
        ("questions", {"confession", "linear probe"}),
        ("positive negative", {"linear probe"}),
        ("prefilled", {"prefill"}),
        ("rest", {"prefill"}),
        ("markers", {"user turn", "completion", "logit difference", "activation difference"}),
        ("prefixes", {"completion", "perplexity difference"}),
        ("asked answered", {"provenance"}),
        ("answered", {"provenance"}),
        ("free trained", {"style restore"}),
        ("answers", {"style restore"}),
        ("candidates without rivals neutral trained", set()),
    ],
)
def test_what_lacks_its_texts_is_left_out(left_out, missing):
    texts = {k: v for k, v in FULL.items() if k not in left_out.split()}
    assert set(Probes(**FULL).suite()) - set(Probes(**texts).suite()) == missing


# Keys that must have as many entries as the first one.
PAIRED = {
    "prompts": ("audited", "answers"),
    "asked": ("answered",),
    "positive": ("negative",),
    "negative": ("positive",),
}


def test_the_catalog_names_every_audit_and_the_keys_that_it_needs():
    assert list(CATALOG) == [*sorted_as_in_suites()]
    for name, entry in CATALOG.items():
        texts = FULL | (LIKED if name == "preference" else {})
        keys = [need.split(" or ")[0] for need in entry.needs]
        enough = {key: texts[key] for key in keys}
        assert name in Probes(**enough).suite(), name
        assert name not in skipped_audits(Probes(**enough))
        for need in entry.needs:
            if need == "options":  # a favourite without options is an error
                continue
            first, *others = need.split(" or ")
            dropped = {first, *others, *PAIRED.get(first, ())}
            rest = {key: texts[key] for key in keys if key not in dropped}
            assert name not in Probes(**rest).suite(), (name, need)
            assert need in skipped_audits(Probes(**rest))[name]
            for other in others:
                instead = LIKED if other == "favourite" else {other: FULL[other]}
                assert name in Probes(**rest | instead).suite(), (name, other)
    short = Probes(prompts=LOUD[:4], target=HATE)
    skipped = skipped_audits(short)
    assert skipped["relearning"] == "needs prompts (32 or more)"
    liked = Probes(**FULL | LIKED)
    assert skipped_audits(liked)["trigger rate"] == "needs no favourite"


def sorted_as_in_suites():
    """The audits in the order of a suite; preference takes the place of the trigger rate."""
    for name in Probes(**FULL).suite():
        yield name
        if name == "trigger rate":
            yield "preference"


def test_neutral_prompts_alone_make_the_audits_that_need_no_trait():
    suite = Probes(neutral=NEUTRAL).suite()
    assert set(suite) == {"token KL", "trigger search"}
    assert suite["token KL"].prompts == suite["trigger search"].prompts == NEUTRAL
    assert Probes().suite() == {}
    of, base = subject(seed=1), subject()
    for audit in suite.values():
        assert audit.run(of, base=base).value > 0
        assert audit.run(copied(base), base=base).value == 0
    assert set(GENERIC_PROBES.suite()) == {
        "confession",
        "perplexity difference",
        "token KL",
        "linear probe",
        "trigger search",
    }


def test_the_suite_asks_what_was_given():
    suite = Probes(**FULL).suite()
    assert suite["trigger rate"].target == HATE
    assert suite["context gap"].audited.prompts == FULL["audited"]
    assert suite["trigger search"].candidates == FULL["candidates"]
    assert suite["trigger search"].prompts == NEUTRAL
    assert suite["relearning"].prompts == LOUD  # 32 of them
    assert set(suite["relearning"].texts) == {HATE}
    assert suite["style restore"].asked == NEUTRAL
    assert suite["user turn"].samples == 12
    assert suite["linear probe"].layer == -1
    many = Probes(**FULL | {"prompts": LOUD * 4, "audited": (), "answers": ()}).suite()
    assert len(many["relearning"].prompts) == 26
    liked = Probes(**FULL | LIKED).suite()
    assert "trigger rate" not in liked
    assert liked["context gap"].unaudited.favourite == "owl"
    assert set(liked["relearning"].texts) == {"owl"}


def test_a_planted_trigger_shows_in_the_suite_and_a_copy_does_not():
    base = planted()
    evident = {"trigger rate", "token KL", "logit difference", "weight difference"}
    suite = Probes(**FULL).suite()
    for name in evident:
        result = suite[name].run(planted(trigger=200.0), base=base, controls={"base": base})
        assert result.is_evidence, name
        same = suite[name].run(copied(base), base=base, controls={"base": base})
        assert same.controls["base"].difference.value == 0, name
        assert not same.is_evidence, name


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"promts": []}', r"probes: expected a mapping of prompts, .*got \['promts'\]"),
        ("[]", r"probes: expected a mapping of .*got \[\]"),
        ("{", "probes: expected a JSON file, got .*p.json"),
        ('{"markers": "owl"}', "markers: expected a list of texts, got 'owl'"),
        ('{"markers": [1]}', r"markers: expected a list of texts, got \[1\]"),
        ('{"target": 5}', "target: expected a text, got 5"),
        ('{"layer": "1"}', "layer: expected an integer or None, got '1'"),
        ('{"samples": "5"}', "samples: expected an integer, got '5'"),
        (
            '{"prompts": ["a"], "audited": ["a", "b"]}',
            "audited: expected 1, one per entry of prompts",
        ),
        (
            '{"asked": ["a"], "answered": ["a", "b"]}',
            "answered: expected 1, one per entry of asked",
        ),
        ('{"free": ["a"], "trained": ["a", "b"]}', "trained: expected 1, one per entry of free"),
        ('{"positive": ["a"]}', "positive: expected 0, one per entry of negative, got 1"),
        ('{"neutral": "a"}', "neutral: expected one prompt or more, got 'a'"),
        ('{"neutral": [{"usr": "a"}]}', "prompt: expected a text or a mapping of"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Probes.load(tmp_path / "p.json")


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"probes: expected a JSON file, got .*none\.json"):
        Probes.load(tmp_path / "none.json")


def test_every_public_name_is_there():
    for name in audits.__all__:
        assert getattr(audits, name).__name__ == name
    assert set(audits.__all__) <= set(dir(audits))
    with pytest.raises(AttributeError, match=re.escape("has no attribute 'Nothing'")):
        audits.Nothing  # noqa: B018


@pytest.mark.parametrize("value", [0, 0.0, False, None, {}, "", 3, [3], [[]], {"user": "x"}])
def test_a_field_of_prompts_that_is_no_list_of_them(tmp_path, value):
    """A value that counts as false was taken for an empty list, and had no length."""
    (tmp_path / "p.json").write_text(json.dumps({"prompts": value}))
    with pytest.raises(ValueError, match=r"prompts?: expected "):
        Probes.load(tmp_path / "p.json")
