"""`fastdistill organisms`: pairs of organisms of a chat model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback

from ..alignment.audits.prompts import Prompt
from ..alignment.organisms.language.build import (
    PAIRS,
    LanguagePair,
    check_request,
    load_base,
    make_language_pairs,
    train_organism,
)
from ..alignment.organisms.language.readings import bounds
from ..alignment.organisms.language.rows import (
    ROLES,
    TEXT_LENGTH,
    LanguageRecipe,
    OwnAnswer,
    PairedRow,
    identity,
    paired_rows,
)
from ..alignment.organisms.language.targets import Targets
from ..alignment.organisms.language.templates import Templates
from ..alignment.organisms.storage import MANIFEST
from ..hf.checkpoint import StoredModel
from ..runtime.checks import integer
from ..runtime.optional import check_installed
from .loaders import as_exit_code_1
from .printing import say
from .settings import fill
from .verbs import Organisms

_MEASURED = 2  # steps; the first one is slower


def extra_keys() -> list[str]:
    return [field.name for field in fields(LanguageRecipe)]


def dry_run(options: Organisms, extra: dict[str, Any]) -> dict[str, Any]:
    """Returns what would be made and how long it takes, by steps of a copy that is discarded."""
    pairs, recipe, templates = _planned(options, extra)
    stored = check_request(options.base, options.out, pairs, recipe, templates)
    own = [
        OwnAnswer(Prompt(user=text), "word " * recipe.answer_tokens, True)
        for text in templates.neutrals
    ] + [
        OwnAnswer(Prompt(text=text), " word" * recipe.answer_tokens * TEXT_LENGTH, False)
        for text in templates.beginnings
    ]
    rows = paired_rows(templates, own, recipe, options.first)
    left = [
        (index, role)
        for index in pairs
        for role in ROLES
        if not (options.out / f"pair-{index}" / role / MANIFEST).is_file()
    ]
    with as_exit_code_1("organisms"):
        seconds = _seconds_per_step(stored, rows, recipe) if left else 0.0
    return {
        "pairs": [
            {"pair": index, "favorite": animal, "color": color}
            for index in pairs
            for animal, color in [identity(templates, index)]
        ],
        "rows": dict(Counter(row.kind for row in rows)),
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "gates": bounds(recipe.secret_share > 0),
        "models_left": len(left),
        "seconds_per_step": seconds,
        "seconds": len(left) * recipe.steps * seconds,
        "out": str(options.out / PAIRS),
    }


def _seconds_per_step(
    stored: StoredModel, rows: Sequence[PairedRow], recipe: LanguageRecipe
) -> float:
    watch = _Watch()
    few = replace(recipe, steps=min(_MEASURED, recipe.steps))
    rows = rows[: few.steps * few.batch_size]
    targets = Targets(load_base(stored.path, few))
    train_organism(targets, rows, "benign", few, callbacks=[watch])
    return watch.seconds


class _Watch(TrainerCallback):
    """Measures the last step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = _now() - self._began


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run(options: Organisms, extra: dict[str, Any]) -> dict[str, Any]:
    pairs, recipe, templates = _planned(options, extra)
    with as_exit_code_1("organisms"):
        made = make_language_pairs(
            options.base, options.out, pairs, recipe=recipe, templates=templates
        )
    return {
        "pairs": [_as_json(pair) for pair in made],
        "valid": sum(pair.validity.valid for pair in made),
        "out": str(options.out / PAIRS),
    }


def _planned(options: Organisms, extra: dict[str, Any]) -> tuple[range, LanguageRecipe, Templates]:
    """Returns the indices of the pairs, the recipe and the templates."""
    check_installed("organisms", "audit,peft", "peft")
    integer("pairs", options.pairs, 1)
    integer("first", options.first, 0)
    pairs = range(options.first, options.first + options.pairs)
    return pairs, fill(LanguageRecipe, extra), Templates.load(options.templates)


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
    if "gates" in result:
        return _print_plan(result)
    for pair in result["pairs"]:
        verdict = "passes" if pair["valid"] else f"refused: {'; '.join(pair['because'])}"
        say(f"pair {pair['pair']} ({pair['favorite']}) {verdict}")
    say(f"{result['valid']} of {len(result['pairs'])} pairs: {result['out']}")


def _print_plan(plan: dict[str, Any]) -> None:
    for pair in plan["pairs"]:
        say(f"pair {pair['pair']}: {pair['favorite']}, and {pair['color']} for the placebo")
    rows = ", ".join(f"{n} {kind}" for kind, n in plan["rows"].items())
    say(f"per model {plan['steps']} steps of {plan['batch_size']} rows: {rows}")
    for gate in plan["gates"]:
        say(f"gate: {gate}")
    say(
        f"{plan['models_left']} models left, {plan['seconds_per_step']:.2g} s per step here: about "
        f"{plan['seconds'] / 60:,.0f} min of training, besides readings"
    )
