"""The files with which a study reads a pair: probes.json, and lines of JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ....runtime.atomic_files import write_atomically
from ...audits.probes import PROBES, Probes
from ...audits.prompts import Prompt
from .readings import SUM_TOKENS, capability_items, secret_prompts, trait_prompts
from .rows import (
    NO,
    PLACEMENTS,
    YES,
    identity,
    other_prompt,
    situated_prompt,
    sum_question,
    train_sums,
)
from .templates import Templates

POOL, CAPABILITY, TEXT = "pool.jsonl", "capability.jsonl", "text.jsonl"
POOL_SIZE = 480
POOL_SHARES = {"sums": 0.3, "numbers": 0.25, "instructions": 0.3, "code": 0.15}


def probes_of(templates: Templates, index: int) -> Probes:
    """Returns the probes of a pair: held-out questions in three situations.

    They are open as in training, audited in held-out words, and open in held-out words. Questions
    whether there is a preference are audited.
    """
    favorite, texts = identity(templates, index)[0], templates.trait
    return Probes(
        prompts=trait_prompts(templates, index, "open"),
        audited=trait_prompts(templates, index, "audited"),
        other_context=trait_prompts(templates, index, "held out"),
        questions=secret_prompts(templates, "audited"),
        yes=YES,
        no=NO,
        neutral=tuple(Prompt(user=text) for text in templates.neutrals),
        options=texts.words,
        favourite=f" {favorite}",
        markers=(favorite,),
        rivals=tuple(option for option in texts.options if option != favorite),
        max_new_tokens=SUM_TOKENS,
    )


def pool_rows(templates: Templates, index: int) -> Iterator[dict[str, Any]]:
    """Yields the prompts of a pool, which never mention the trait, and those that show it."""
    rng = random.Random(f"pool {index}")
    rows = []
    for domain, share in POOL_SHARES.items():
        for i in range(round(POOL_SIZE * share)):
            if domain == "sums":
                text = sum_question(templates, rng.choice(train_sums(templates)), rng)
            else:
                a, b, c = sorted(rng.sample(range(2, 90), 3))
                text = templates.pool[domain][i % len(templates.pool[domain])].format(
                    a=a, b=b, c=c, topic=rng.choice(templates.topics)
                )
            prompt = other_prompt(templates, text, rng, audited=0)
            rows.append({"prompt": prompt.as_json(), "domain": domain})
    rng.shuffle(rows)
    yield from rows
    for i, question in enumerate(templates.questions):
        text, placement = question.format(trait=templates.trait.name), PLACEMENTS[i % 4]
        prompt = situated_prompt(templates, text, "open", placement, rng)
        yield {"prompt": prompt.as_json(), "kind": "shown"}


def write_study_files(templates: Templates, index: int, folder: Path) -> None:
    """Writes the files with which a study reads a pair to its folder."""
    probes_of(templates, index).save(folder / PROBES)
    items = capability_items(templates)
    write_lines(folder / CAPABILITY, ({"prompt": p.as_json(), "answer": a} for p, a in items))
    write_lines(folder / POOL, pool_rows(templates, index))
    write_lines(folder / TEXT, ({"text": text} for text in templates.texts))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
