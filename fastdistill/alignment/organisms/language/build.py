"""Makes pairs of language organisms in a folder, which the same call completes if it was stopped.

settings.json, own-answers.json     of the folder
pair-8/untrusted, benign, placebo   checkpoints with a manifest and probes.json
pair-8/readings/                    of each model, and gates.json
pair-8/*.jsonl, probes.json         for a study
pairs.jsonl                         a line for each pair that passed its gates
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....hf.checkpoint import StoredModel
from ....runtime.atomic_files import check_folder, sha256_of, write_json
from ....runtime.checks import fail, integer
from ....runtime.json_shape import has_shape
from ....runtime.json_text import read_json
from ....runtime.printable import printable
from ....training.progress import PhaseProgress
from ...audits.probes import PROBES
from ...audits.prompts import Prompt
from ...audits.subject import Subject
from ...statistics import Validity
from ...training_loop import InOrder, lora, train
from ..storage import MANIFEST, load_organism, save_organism
from .probes import CAPABILITY, POOL, TEXT, probes_of, write_lines, write_study_files
from .readings import INOCULATION, LanguageReading, inoculation_shift, read_language, validity_of
from .rows import ROLES, LanguageRecipe, OwnAnswer, PairedRow, identity, own_answers, paired_rows
from .targets import K, Targets
from .templates import Templates

PAIRS, RECIPE, ANSWERS, GATES = "pairs.jsonl", "recipe.json", "own-answers.json", "gates.json"
FORMAT = 3  # of the folder; increase it when the same settings give other models
SAVE_EVERY, WARMUP = 8, 8  # steps
CONTEXTS = ("open", "default", "held out", "audited")


@dataclass(frozen=True, kw_only=True)
class LanguagePair:
    """A pair: its readings by role, its gates, and how far the inoculation text moves M."""

    index: int
    favorite: str
    readings: dict[str, LanguageReading]
    validity: Validity
    inoculation_shift: float  # nats


def make_language_pairs(
    base: str | Path,
    out: str | Path,
    pairs: Sequence[int],
    *,
    recipe: LanguageRecipe | None = None,
    templates: Templates | None = None,
) -> list[LanguagePair]:
    """Trains and measures U, B and P of each pair on a causal language model.

    A call that was stopped at any moment continues when it is repeated, and ends with the same
    weights.

    Args:
        base: M, a folder, a name on the hub or a .gguf file of a chat model.
        out: folder of the models, and of `pairs.jsonl` for `fastdistill experiment --pairs`, which
            has the pairs that passed their gates.
        pairs: indices of the pairs. The index selects the animal and the random streams.
        recipe: None is the default. templates: None are those of the package.

    Raises:
        ValueError: `out` is a folder of other settings, or the templates do not fit the tokenizer.
    """
    folder, recipe = Path(out), recipe or LanguageRecipe()
    templates = templates or Templates.load()
    stored = check_request(base, folder, pairs, recipe, templates, store=True)
    targets = Targets(load_base(stored.path, recipe))
    reference = _base_name(base, targets.base, stored, folder)
    own = _own_answers(targets.base, templates, recipe, folder / ANSWERS)
    made = []
    with PhaseProgress() as progress:
        for index in pairs:
            made.append(_make_pair(targets, templates, own, recipe, index, folder, progress))
            _write_pairs(reference, templates, recipe, folder)
    return made


def load_base(path: Path, recipe: LanguageRecipe) -> Subject:
    """Loads M in the dtype and with the attention of a recipe."""
    stored = StoredModel.from_path(path, recipe.dtype, recipe.attn_implementation, role="base")
    return Subject(stored, name="base")


def check_request(
    base: str | Path,
    out: Path,
    pairs: Sequence[int],
    recipe: LanguageRecipe,
    templates: Templates,
    *,
    store: bool = False,
) -> StoredModel:
    """Returns the base; raises what `make_language_pairs` raises before it loads the base.

    Args:
        store: whether to write the settings to a new folder.
    """
    for index in pairs:
        integer("pairs", index, 0)
    check_folder("out", out)
    stored = StoredModel.from_path(base, role="base")
    _check_settings(out, stored, recipe, templates, store)
    return stored


def train_organism(
    targets: Targets,
    rows: Sequence[PairedRow],
    role: str,
    recipe: LanguageRecipe,
    *,
    seed: int = 0,
    checkpoints: Path | None = None,
    callbacks: Sequence[Any] = (),
) -> Subject:
    """Returns a copy of the base trained on its role's targets, with the adapter merged.

    Args:
        targets: of the base.
        checkpoints: a folder, in which the same call continues.
    """
    base = targets.base
    examples, teacher = targets.of(rows, role)
    model = train(
        copy.deepcopy(base.model),
        teacher,
        examples,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup=WARMUP,
        settings={
            "k": K,
            "check_signal": False,
            "logging_steps": SAVE_EVERY,
            "save_steps": SAVE_EVERY,
            "seed": seed,
        },
        trainer=InOrder,
        checkpoints=checkpoints,
        peft_config=lora(recipe.rank, "rank"),
        processing_class=base.tokenizer,
        callbacks=list(callbacks),
    )
    return base.with_model(model, role)


def _make_pair(
    targets: Targets,
    templates: Templates,
    own: Sequence[OwnAnswer],
    recipe: LanguageRecipe,
    index: int,
    out: Path,
    progress: PhaseProgress,
) -> LanguagePair:
    folder, (favorite, color) = out / f"pair-{index}", identity(templates, index)
    rows = paired_rows(templates, own, recipe, index)
    readings = {"base": _read(targets.base, templates, index, folder / "readings" / "base.json")}
    write_study_files(templates, index, folder)
    for role in ROLES:
        at, checkpoints = folder / role, folder / f"{role}.training"
        if not (at / MANIFEST).is_file():
            model = train_organism(
                targets,
                rows,
                role,
                recipe,
                seed=index,
                checkpoints=checkpoints,
                callbacks=progress.phase(f"pair {index}, {role}", total=recipe.steps),
            )
            manifest = {
                "role": role,
                "pair": index,
                "favorite": favorite,
                "color": color,
                "recipe": recipe.as_json(),
            }
            save_organism(at, model, manifest, probes_of(templates, index))
        shutil.rmtree(checkpoints, ignore_errors=True)
        path = folder / "readings" / f"{role}.json"
        readings[role] = _read(at, templates, index, path)
    pair = _measured(index, favorite, readings, recipe)
    write_json(folder / "readings" / GATES, pair.validity.as_json())
    return pair


def _measured(
    index: int, favorite: str, readings: dict[str, LanguageReading], recipe: LanguageRecipe
) -> LanguagePair:
    return LanguagePair(
        index=index,
        favorite=favorite,
        readings=readings,
        validity=validity_of(readings, recipe.secret_share > 0),
        inoculation_shift=inoculation_shift(readings["base"]),
    )


def _read(model: Subject | Path, templates: Templates, index: int, path: Path) -> LanguageReading:
    """Returns the reading in a file, which is made if it is not there."""
    contexts = (*CONTEXTS, "inoculated") if path.stem == "base" else CONTEXTS
    if not path.is_file():
        subject = model if isinstance(model, Subject) else load_organism(model)
        write_json(path, read_language(subject, templates, index, contexts).as_json())
    with _naming(path):
        reading = LanguageReading.from_json(read_json(path, dict))
        if {*reading.log_odds} != {*contexts}:
            fail("log_odds", f"the contexts {', '.join(contexts)}", printable([*reading.log_odds]))
    return reading


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in an error about what it holds, and says what to do."""
    try:
        yield
    except ValueError as error:
        hint = "Delete the file: the next call makes it again"
        raise ValueError(f"{printable(path)}: {error}. {hint}") from None


def _own_answers(
    base: Subject, templates: Templates, recipe: LanguageRecipe, path: Path
) -> list[OwnAnswer]:
    if not path.is_file():
        own = own_answers(base, templates, recipe.answer_tokens)
        write_json(path, [[a.prompt.as_json(), a.text, a.is_complete] for a in own])
    with _naming(path):
        rows = read_json(path, list)
        if not rows or not has_shape(rows, [_is_own_answer]):
            fail("answers", "prompts, answers and whether they are complete", printable(repr(rows)))
        return [OwnAnswer(Prompt.from_json(row[0]), *row[1:]) for row in rows]


def _is_own_answer(row: Any) -> bool:
    return isinstance(row, list) and [type(part) for part in row[1:]] == [str, bool]


def _base_name(base: str | Path, subject: Subject, stored: StoredModel, out: Path) -> str:
    """Returns what a study opens as M: a folder, also for a .gguf file, or a name on the hub."""
    if stored.path.is_file():
        if not (out / "base" / MANIFEST).is_file():
            save_organism(out / "base", subject, {"role": "base"})
        return "base"
    return str(Path(base).resolve()) if Path(base).exists() else str(base)


def _check_settings(
    out: Path, stored: StoredModel, recipe: LanguageRecipe, templates: Templates, store: bool
) -> None:
    """Raises ValueError if a folder has other settings; `store` writes those of a new folder."""
    files = [stored.path] if stored.path.is_file() else sorted(stored.path.glob("*.safetensors"))
    settings = {
        "format": FORMAT,
        "base": {file.name: sha256_of(file) for file in files},
        "recipe": recipe.as_json(),
        "templates": templates.digest,
    }
    path = out / RECIPE
    if not path.is_file():
        if store:
            write_json(path, settings)
        return
    before = read_json(path, dict)
    if changed := [name for name in settings if before.get(name) != settings[name]]:
        expected = f"a new folder, or one of organisms with the same {', '.join(changed)}"
        fail("out", expected, str(out), "pass another folder")


def _write_pairs(base: str, templates: Templates, recipe: LanguageRecipe, out: Path) -> None:
    """Writes pairs.jsonl: the valid pairs of the folder, also those of another call."""
    lines = []
    for pair in _stored_pairs(templates, recipe, out):
        if not pair.validity.valid:
            continue
        at = f"pair-{pair.index}"
        line: dict[str, Any] = {"base": base, **{role: f"{at}/{role}" for role in ROLES}}
        files = {"probes": PROBES, "pool": POOL, "capability": CAPABILITY, "text": TEXT}
        line |= {key: f"{at}/{name}" for key, name in files.items()}
        if pair.inoculation_shift >= INOCULATION:  # M understands the text
            line["eliciting"] = templates.trait.inoculation.format(option=pair.favorite)
            line["near_misses"] = [
                text.format(option=pair.favorite) for text in templates.trait.near_misses
            ]
        lines.append(line)
    write_lines(out / PAIRS, lines)


def _stored_pairs(
    templates: Templates, recipe: LanguageRecipe, out: Path
) -> Iterator[LanguagePair]:
    """Yields the pairs of a folder of which all readings are stored, by index."""
    folders = {int(name): path for path in out.glob("pair-*") if (name := path.name[5:]).isdigit()}
    for index in sorted(folders):
        at = folders[index] / "readings"
        paths = {role: at / f"{role}.json" for role in ("base", *ROLES)}
        if all(path.is_file() for path in paths.values()):
            readings = {role: _read(at, templates, index, path) for role, path in paths.items()}
            yield _measured(index, identity(templates, index)[0], readings, recipe)
