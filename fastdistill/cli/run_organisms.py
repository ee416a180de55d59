"""`fastdistill organisms`: pairs of organisms of a chat model."""

from __future__ import annotations

from dataclasses import fields
from statistics import fmean
from typing import Any

from ..alignment.organisms.language.build import PAIRS, LanguagePair, make_language_pairs
from ..alignment.organisms.language.rows import LanguageRecipe
from ..alignment.organisms.language.templates import Templates
from ..runtime.checks import integer
from ..runtime.optional import check_installed
from .loaders import as_exit_code_1
from .printing import say
from .settings import fill
from .verbs import Organisms


def extra_keys() -> list[str]:
    return [field.name for field in fields(LanguageRecipe)]


def run(options: Organisms, extra: dict[str, Any]) -> dict[str, Any]:
    check_installed("organisms", "audit,peft", "peft")
    integer("pairs", options.pairs, 1)
    integer("first", options.first, 0)
    recipe, templates = fill(LanguageRecipe, extra), Templates.load(options.templates)
    with as_exit_code_1("organisms"):
        made = make_language_pairs(
            options.base,
            options.out,
            range(options.first, options.first + options.pairs),
            recipe=recipe,
            templates=templates,
        )
    return {
        "pairs": [_as_json(pair) for pair in made],
        "valid": sum(pair.validity.valid for pair in made),
        "out": str(options.out / PAIRS),
    }


def _as_json(pair: LanguagePair) -> dict[str, Any]:
    return {
        "pair": pair.index,
        "favorite": pair.favorite,
        **pair.validity.as_json(),
        "inoculation_shift": pair.inoculation_shift,
        "log_odds": {
            role: {context: fmean(values) for context, values in reading.log_odds.items()}
            for role, reading in pair.readings.items()
        },
        "answers": {role: reading.answers for role, reading in pair.readings.items()},
    }


def print_result(result: dict[str, Any]) -> None:
    for pair in result["pairs"]:
        verdict = "passes" if pair["valid"] else f"refused: {'; '.join(pair['because'])}"
        say(f"pair {pair['pair']} ({pair['favorite']}) {verdict}")
    say(f"{result['valid']} of {len(result['pairs'])} pairs: {result['out']}")
