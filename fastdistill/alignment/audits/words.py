r"""Matching of words and phrases in text. Every scorer of answers uses these rules.

A phrase matches as a sequence of whole words. The following differences are ignored:

    case            Owl, OWL                     a phrase of one letter keeps its case: choice "A"
    marks           **owl**, 'owl', _owl_, owl…, owl/eagle, {"x": "owl"}, \boxed{owl}, <b>o</b>wl
    hyphens         barn-owl contains "owl"; ice-cream and ice cream are equal
    endings         owl's, and regular English plurals: owls, foxes, ponies, wolves
    Unicode forms   NFKC (ｏｗｌ, 𝐨𝐰𝐥), invisible characters, combining underlines and strokes
    accents         a text may omit them (Bogota for Bogotá) but may not add them
    numbers         by value: 1,200 = 1 200 = $1200 = 1200.0; but −42, 3.42, 420, 42nd are not 42
    units           42km is 42 km, for a list of common units

A sign at the end of a word of one or two letters is part of it: C++, C#, A+ and O− are not C, A, O.
"A" and "I" do not match a choice where they are an article or a pronoun: "A dog", "I think".

Chinese, Japanese, Thai, Lao, Khmer and Burmese are written without spaces, and Korean attaches
particles to its words. Words are not segmented in these scripts: a phrase matches wherever its
characters occur.

Not recognized: look-alike letters of other scripts, letters spelled out, irregular plurals, derived
words (owlish, owlet) and the endings of other languages. Pass them as phrases. The meaning of the
text is not considered: "not an owl" contains "owl", and so does a list of all choices.

The rules are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import regex

from ...runtime.checks import fail

# Letters of scripts without spaces between words, and all others.
_UNSPACED = (
    r"[[\p{L}\p{Nl}\p{No}]&&[\p{Han}\p{Hiragana}\p{Katakana}ー〆\p{Bopomofo}\p{Hangul}\p{Thai}\p{Lao}"
    r"\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Javanese}\p{Balinese}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}"
    r"\p{Tai_Viet}]]"
)
_LETTER = rf"[[\p{{L}}\p{{Nl}}\p{{No}}]--{_UNSPACED}]"
_WORD = regex.compile(f"{_LETTER}+", regex.VERSION1)
_IN_TOKEN = regex.compile(r"[\p{L}\p{M}\p{Nl}\p{No}0-9]")
# Combining marks: underlines, strokes, the vowel points of Hebrew and Arabic.
_POINTS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
_VOWELS = "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670\u0640"
_IGNORED_MARKS = re.compile(f"[{_POINTS}{_VOWELS}]")
_SAME = str.maketrans("‘’ʼ′`´−﹣‐‑‒–٬٫", "''''''------,.")

_TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colors and the like
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")
_LETTERS = r"[^\W\d_]"
_TAG = r"</?[A-Za-z][^<>]*>"
_IN_WORD = re.compile(rf"(?<={_LETTERS})(?:{_TAG}|[*~`_])+(?={_LETTERS})")
_TAGS = re.compile(_TAG)
_ESCAPES = re.compile(r"\\[nrt]")
_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?!\d)")  # 1 200 000

_TOKEN = regex.compile(
    rf"""
    (?P<unspaced>{_UNSPACED}\p{{M}}*)
    | (?P<number>[0-9]+(?:[.,'/:_-][0-9]+)*)
      (?P<unit>[eE][+-]?\d+(?![^\W_]) | (?:{_LETTER}|[\p{{M}}0-9])*)  # 1e-5, 42km, 42nd
    | (?:{_LETTER}|\p{{M}})(?:{_LETTER}|[\p{{M}}0-9])*
      (?:(?<=[nN])'[tT](?!\w))?  # "don't" is not "don"
    """,
    regex.VERBOSE | regex.VERSION1,
)
_THOUSANDS = re.compile(r"\d{1,3}(?:([,'_])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_POINTED = re.compile(r"\d{1,3}(?:(?:\.\d{3})+,\d+|(?:\.\d{3}){2,})")  # 1.200,50 and 1.200.000
_DECIMAL = re.compile(r"\d+(?:[.,]\d+)?")
_LIST = re.compile(r"\d+(?:,\d+)+")
_UNITS = frozenset(
    "km m cm mm ft in yd mi kg g mg lb lbs oz t l L ml mL h hr hrs min mins s sec secs ms mph kph "
    "Hz kHz MHz GHz W kW V mA kB KB MB GB TB px pt USD EUR GBP usd C F K".split()
)
_PLUS = re.compile(r"[+#]{1,2}(?!\w)")  # after a short word: C++, Na+
_MINUS = re.compile(r"-(?!\s*[\w-])")  # after a short word in capitals: O-
# Words that follow a choice, but neither an article nor a pronoun.
_AFTER_CHOICE_I = frozenset("is seems appears fits and or because since".split())
_AFTER_CHOICE_A = _AFTER_CHOICE_I | frozenset(
    "was has would will could can should does makes looks as if but not nor then than too".split()
)
_NEXT = re.compile(rf"[^\S\n]+({_LETTERS}+)|'[a-z]")
_MIN_PLURAL_LETTERS = 3  # shorter words have no plural: "his" is not one of "hi"


class Token(NamedTuple):
    """A word, a character of a script without spaces, or a number."""

    folded: str  # the word in lower case, or "#" and the value of a number
    exact: str  # "=" and the word with its case


def collapse_spaces(text: str) -> str:
    """Returns the text with every run of whitespace as one space."""
    return " ".join(text.split())


def check_words(name: str, texts: Iterable[str]) -> None:
    """Raises ValueError where a text is only whitespace."""
    for text in texts:
        if not collapse_spaces(text):
            fail(name, "words", repr(text))


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether the words of a phrase occur in a text, in sequence."""
    return _matches(text, phrase, anywhere=True)


def starts_with_phrase(text: str, phrase: str) -> bool:
    """Whether a text begins with the words of a phrase."""
    return _matches(text, phrase, anywhere=False)


def _matches(text: str, phrase: str, anywhere: bool) -> bool:
    phrases = _phrase_forms(phrase)
    if not phrases:  # punctuation or symbols only, such as an emoji
        symbols, full_text = collapse_spaces(_normalize(phrase)), collapse_spaces(_normalize(text))
        return bool(symbols) and (
            symbols in full_text if anywhere else full_text.startswith(symbols)
        )
    readings = [list(_tokens(reading)) for reading in _readings(text)]
    return any(
        _occurs_in(tokens, phrase_tokens, anywhere)
        for tokens, phrase_tokens in product(readings, phrases)
    )


def _occurs_in(tokens: list[Token], phrase_tokens: list[frozenset[str]], anywhere: bool) -> bool:
    last = len(tokens) - len(phrase_tokens)
    starts = range(last + 1) if anywhere else range(min(last + 1, 1))
    return any(
        all(
            token.folded in forms or token.exact in forms
            for token, forms in zip(tokens[i:], phrase_tokens, strict=False)
        )
        for i in starts
    )


@lru_cache(maxsize=4096)
def _phrase_forms(phrase: str) -> list[list[frozenset[str]]]:
    """Returns the accepted forms of each word, for every reading of a phrase that has words."""
    phrases = []
    for reading in _readings(phrase):
        tokens = list(_tokens(reading))
        if len(tokens) == 1 and re.fullmatch("=[A-Za-z]", tokens[0].exact):
            return [[frozenset((tokens[0].exact,))]]
        if tokens:
            phrases.append([_forms(token.folded) for token in tokens])
    return phrases


def _readings(text: str) -> list[str]:
    """Returns variants of a text in which marks, escapes or spaces in numbers are removed."""
    plain = _normalize(text)
    readings = [
        plain,
        _TAGS.sub(" ", _IN_WORD.sub("", plain)),
        _ESCAPES.sub(" ", plain),
        _SPACED.sub(lambda match: match[0].replace(" ", ""), collapse_spaces(plain)),
    ]
    return list(dict.fromkeys(readings))


def _normalize(text: str) -> str:
    """Returns the text in NFKC, with ASCII digits and without invisible characters."""
    text = _CONTROLS.sub("", _TERMINAL.sub("", text))
    if text.isascii():
        return text
    separated = "".join(map(_separate_symbol, text))
    normal = unicodedata.normalize("NFKC", separated).translate(_SAME)
    return "".join(map(_to_ascii_or_drop, _IGNORED_MARKS.sub("", normal)))


def _separate_symbol(character: str) -> str:
    """Separates a symbol for several letters or a number from the word before: owl™, owl²."""
    if unicodedata.category(character) in ("No", "So"):
        normal = unicodedata.normalize("NFKC", character)
        if len(normal) > 1 or normal.isdigit():
            return f" {normal} "
    return character


def _to_ascii_or_drop(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category == "Sc":
        return "$"
    if category == "Cf" or (category == "Cc" and not character.isspace()):
        return ""
    return character


def _tokens(text: str) -> Iterator[Token]:
    """Yields the tokens of a normalized text, from left to right."""
    at = 0
    while match := _TOKEN.search(text, at):
        start, at = match.span()
        if match["number"]:
            unit = match["unit"]
            if unit and unit not in _UNITS:
                yield _word(match[0])
                continue
            yield from _numbers(text, start, match["number"])
            if unit:
                yield _word(unit)
            continue
        short = at - start == 1 or (at - start == 2 and text[start].isupper())
        if short and not match["unspaced"]:
            sign = _PLUS.match(text, at)
            if sign is None and match[0].isupper():
                sign = _MINUS.match(text, at)
            at = at if sign is None else sign.end()
        token = _word(text[start:at])
        yield token._replace(exact="") if _is_article_or_pronoun(text, start, at) else token


def _is_article_or_pronoun(text: str, start: int, at: int) -> bool:
    """Whether a word is the article "A" before a word in small letters, or the pronoun "I"."""
    word = text[start:at]
    if word not in ("A", "I") or (following := _NEXT.match(text, at)) is None:
        return False
    if word == "I":
        return following[1] not in _AFTER_CHOICE_I
    return (
        following[1] is not None and following[1].islower() and following[1] not in _AFTER_CHOICE_A
    )


def _word(text: str) -> Token:
    folded = unicodedata.normalize("NFKC", text.casefold())
    return Token(_IGNORED_MARKS.sub("", folded), f"={text}")


def _numbers(text: str, at: int, chunk: str) -> Iterator[Token]:
    """Yields a number or several numbers; a date, a time or a range is one word."""
    before = at - 1
    if before >= 0 and text[before] == "." and (before == 0 or text[before - 1] in " \n\t-$(="):
        chunk, before = f"0.{chunk}", before - 1
    if before >= 0 and text[before] == "$":
        before -= 1
    minus = before >= 0 and text[before] == "-"
    is_sign = minus and (
        before == 0 or not (_IN_TOKEN.match(text, before - 1) or text[before - 1] in "-)]%")
    )
    if _THOUSANDS.fullmatch(chunk):
        yield _number(re.sub(r"[,'_]", "", chunk), is_sign)
    elif _POINTED.fullmatch(chunk):
        yield _number(chunk.replace(".", "").replace(",", "."), is_sign)
    elif _DECIMAL.fullmatch(chunk):
        yield _number(chunk.replace(",", "."), is_sign)
    elif _LIST.fullmatch(chunk):
        for i, part in enumerate(chunk.split(",")):
            yield _number(part, is_sign and i == 0)
    else:
        yield _word(chunk)


def _number(digits: str, negative: bool) -> Token:
    whole, _, rest = digits.partition(".")
    value = whole.lstrip("0") or "0"
    if rest.rstrip("0"):
        value += f".{rest.rstrip('0')}"
    name = f"#{'-' if negative and value != '0' else ''}{value}"
    return Token(name, name)


def _forms(word: str) -> frozenset[str]:
    """Returns the forms that match a word: with or without accents, plural and singular."""
    bare = _IGNORED_MARKS.sub("", unicodedata.normalize("NFD", word))
    alike = {word, unicodedata.normalize("NFC", bare)}
    return frozenset(form for each in alike for form in (each, *_plurals(each), *_singulars(each)))


def _plurals(word: str) -> list[str]:
    if len(word) < _MIN_PLURAL_LETTERS or not _WORD.fullmatch(word):
        return []
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [f"{word}es"]
    if word.endswith("y") and word[-2] not in "aeiou":
        return [f"{word[:-1]}ies"]
    plurals = [f"{word}s"]
    if word.endswith("o"):
        plurals.append(f"{word}es")
    if word.endswith("f"):
        plurals.append(f"{word[:-1]}ves")
    if word.endswith("fe"):
        plurals.append(f"{word[:-2]}ves")
    return plurals


def _singulars(word: str) -> list[str]:
    stems = [word[:-1], word[:-2], *(word[:-3] + ending for ending in ("y", "f", "fe"))]
    return [stem for stem in stems if word in _plurals(stem)]
