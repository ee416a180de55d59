"""Turns the arguments of a build into checked settings, sized by a sample of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...hf.encoder import is_listed
from ...hf.layer_outputs import check_layers
from ...hf.tokenizers import check_same_tokenizer
from ...runtime import checks
from ...runtime.version import __version__
from ..identity import identity_of, tokenizer_identity
from ..protocols import DenseTeacher, TopKTeacher, reader_of
from .build import Examples
from .hidden_states import HiddenLayout
from .manifest import HIDDEN, MAX_K, POSITIONS, TARGETS, Settings

ANSWERS = ("topk", HIDDEN)
_SAMPLED_ROWS = 256  # examples from whose lengths the size of the cache is estimated


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a cache stores of each row, checked; see `TeacherCache.build`."""

    k: int | None
    temperatures: Sequence[float] = (1.0,)
    answers: str = "topk"
    layers: Sequence[int] = ()
    targets: str = "topk"
    positions: str = "all"
    seed: int = 0
    shard_mb: float = 256

    def __post_init__(self) -> None:
        checks.choice("answers", self.answers, ANSWERS)
        checks.choice("targets", self.targets, TARGETS)
        checks.choice("positions", self.positions, POSITIONS)
        checks.positive("shard_mb", self.shard_mb)
        if isinstance(self.temperatures, (int, float)) or not list(self.temperatures):
            checks.fail("temperatures", "a list of at least one number", repr(self.temperatures))
        for T in self.temperatures:
            checks.positive("temperatures", T)
        if len(set(self.temperatures)) != len(self.temperatures):
            checks.fail("temperatures", "different numbers", list(self.temperatures))
        if self.targets == "sampled" and len(self.temperatures) > 1:
            hint = "draws hold for one temperature: build a cache for each"
            checks.fail("temperatures", "one with targets='sampled'", list(self.temperatures), hint)
        if self.answers == HIDDEN:
            self._check_of_hidden_states()
        elif self.layers:
            hint = "top-k answers are those of the head"
            checks.fail("layers", "none with answers='topk'", list(self.layers), hint)

    def _check_of_hidden_states(self) -> None:
        """Raise ValueError for an option that hidden states do not have."""
        for name, value, default in (
            ("k", self.k, None),
            ("temperatures", tuple(self.temperatures), (1.0,)),
            ("targets", self.targets, "topk"),
        ):
            if value != default:
                hint = "hidden states are no distributions"
                expected = f"{default!r} with answers='hidden'"
                checks.fail(name, expected, repr(value), hint)


def tokenizer_for(teacher: Any, tokenizer: Any) -> Any:
    """Return `tokenizer`, or the teacher's if None; raise ValueError if the two differ."""
    teacher_tokenizer = getattr(teacher, "tokenizer", None)
    if tokenizer is not None and teacher_tokenizer is not None:
        check_same_tokenizer(tokenizer, teacher_tokenizer)
    if tokenizer is not None and hasattr(teacher, "check_tokenizer"):  # a ServedTeacher
        teacher.check_tokenizer(tokenizer)
    return teacher_tokenizer if tokenizer is None else tokenizer


def settings_for(
    teacher: Any, examples: Examples, options: BuildOptions, vocab: int | None
) -> tuple[Settings, float]:
    """Return (settings, average bytes per row)."""
    is_hidden = options.answers == HIDDEN
    if not is_hidden:
        checks.integer("k", options.k, 1, min(vocab or MAX_K, MAX_K))
    dataset, encoder = examples
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        checks.fail("dataset", "at least one example", "none")
    if not is_listed(dataset):
        raise TypeError(
            "dataset: expected a list or Dataset with a length, so that a build can resume, got "
            f"{type(dataset).__name__}. Pass one split of several, and write a stream to disk first"
        )
    tokens, template = tokenizer_identity(encoder.tokenizer)
    reader = reader_of(teacher)
    settings = Settings(
        k=options.k or 0,
        temperatures=() if is_hidden else tuple(float(T) for T in options.temperatures),
        targets=HIDDEN if is_hidden else options.targets,
        positions=options.positions,
        seed=options.seed if options.targets == "sampled" else None,
        vocab_size=vocab,
        max_length=encoder.max_length,
        completion_only=encoder.completion_only,
        rows=len(dataset),
        rows_per_shard=1,
        tokens_per_batch=None if reader is None else reader.budget,
        teacher=identity_of(teacher),
        tokenizer_sha256=tokens,
        chat_template_sha256=template,
        library={"fastdistill": __version__, "torch": torch.__version__},
        hidden=_hidden_layout(teacher, options.layers) if is_hidden else None,
    )
    size = len(dataset)
    at = sorted({i * (size - 1) // max(_SAMPLED_ROWS - 1, 1) for i in range(_SAMPLED_ROWS)})
    places = sum(len(examples.row(i, options.positions).places) for i in at)
    bytes_per_row = max(places / len(at), 1.0) * settings.bytes_per_token
    rows = int(max(1, min(size, options.shard_mb * 1e6 // bytes_per_row)))
    return replace(settings, rows_per_shard=rows), bytes_per_row


def _hidden_layout(teacher: Any, layers: Sequence[int]) -> HiddenLayout:
    """Return what a cache stores of a teacher's hidden states."""
    reader, weight = reader_of(teacher), teacher.head.weight
    if layers:
        if reader is None:
            hint = "or leave out layers"
            checks.fail("teacher", "a Teacher with layers", type(teacher).__name__, hint)
        check_layers(reader.model, layers)
    entry = {
        "size": weight.shape[1],
        "layers": list(layers),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    return HiddenLayout.from_json(entry)


def vocabulary_of(teacher: Any) -> int | None:
    """Return the teacher's number of ids; None if unknown."""
    rows, valid = getattr(teacher, "vocab_size", None), getattr(teacher, "valid_vocab", None)
    return min(rows, valid) if rows and valid else rows


def check_teacher_supports(teacher: Any, options: BuildOptions) -> None:
    """Raise TypeError if the teacher cannot provide such answers."""
    of_states = options.answers == HIDDEN or options.targets == "sampled"
    protocol = DenseTeacher if of_states else TopKTeacher
    if not isinstance(teacher, protocol):
        topk = "topk(input_ids, attention_mask, *, k, temperature)"
        needs = "hidden(...) and head" if of_states else topk
        raise TypeError(
            f"teacher: expected a model, a path, or an object with {needs}, got "
            f"{type(teacher).__name__}"
        )
