"""Check that a teacher's answers can come from a language model.

The same check for models, custom teachers, caches, servers, Parquet files and samples: `measure`
checks values, `find_shape_error` shapes, and `AnswerMonitor` every batch of a run. The tolerance
for rounded log-probabilities is computed from them, not assumed:

    stored ln p (1 + δ), |δ| ≤ ε   →   |Σ stored p − Σ p| ≤ ε · (1 + Σ p |ln p|), to first order

    N positions · K slots · W kinds of errors
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .types import TopK

ROUNDING = 1e-3  # error of a sum of probabilities computed in fp32 or from 16-bit logits
_LOW = (torch.float16, torch.bfloat16)  # coarser last


class Kind(NamedTuple):
    """A kind of invalid answer; `InvalidAnswer` fills in the texts."""

    field: str
    expected: str
    got: str = "{value:.4g}"
    hint: str = ""


KINDS = {  # of several errors at a position, the first is reported: a NaN causes others
    "nan": Kind("logprobs", "numbers in every used slot", "{value:.0f} NaN"),
    "ids": Kind(
        "ids",
        "ids in 0..{last}{empty}",
        "{value:.0f}",
        "set vocab_size if the teacher has more ids (only the common ones are used); map "
        "the ids of a teacher with another vocabulary first",
    ),
    "repeated": Kind("ids", "{slots} different ids", "{value:.0f} more than once"),
    "positive": Kind(
        "logprobs",
        "log-probabilities ≤ 0",
        hint="pass log_softmax(logits / T), not logits",
    ),
    "mass": Kind("logprobs", "probabilities that sum to 1 at most"),
    "flat": Kind("logprobs", "a likeliest token above the average"),
    "tail": Kind("log_tail", "log-probabilities ≤ 0"),
    "total": Kind("log_tail", "the ids and the tail to have a mass of 1"),
    "hidden": Kind("hidden", "finite hidden states", "{value:.0f} that are not"),
    "nothing": Kind(
        "logprobs",
        "an id with a probability above 0",
        "none",
        "a teacher with another vocabulary needs its ids mapped first",
    ),
}
_NAMES = tuple(KINDS)


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """Requirements on answers, in addition to being a distribution.

    vocab: ids are below it; None if unknown.
    repeats: an id may occur in several slots, as one outcome.
    empty: slots may be empty (id −1).
    nothing: a position may have no id with a positive probability.
    total: the mass of ids and log_tail together is "equal" to 1, "at most" 1, or "any".
    rising: ids are in rising order, empty slots last.
    ranked: the slots are the most probable tokens, so the first is above the average.
    """

    vocab: int | None = None
    repeats: bool = False
    empty: bool = True
    nothing: bool = False
    total: str = "equal"
    rising: bool = False
    ranked: bool = False


@dataclass(frozen=True, kw_only=True)
class InvalidAnswer:
    """A position with an invalid answer."""

    kind: str
    at: int  # position among N
    value: float
    slots: int
    rules: AnswerRules
    dtype: torch.dtype

    @property
    def field(self) -> str:
        return KINDS[self.kind].field

    @property
    def expected(self) -> str:
        return KINDS[self.kind].expected.format(
            last="" if self.rules.vocab is None else self.rules.vocab - 1,
            empty=", or −1 for an empty slot" if self.rules.empty else "",
            slots=self.slots,
        )

    @property
    def got(self) -> str:
        return KINDS[self.kind].got.format(value=self.value).replace("nan", "NaN")

    @property
    def hint(self) -> str:
        if self.dtype in _LOW and self.kind in ("positive", "mass", "tail", "total"):
            name = str(self.dtype).removeprefix("torch.")
            return f"the error exceeds rounding to {name}: compute log_softmax in float32"
        return KINDS[self.kind].hint

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


def measure(answer: TopK, rules: AnswerRules) -> tuple[Tensor, Tensor]:
    """Return the errors of answers [N, K] by kind, bool [W, N], and their values, [W, N].

    It never waits for a GPU.
    """
    errors = _errors(answer, rules)
    bad, values = errors["mass"]
    absent = (torch.zeros_like(bad), values)
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    pairs = [errors.get(name, absent) for name in _NAMES]
    return torch.stack([bad for bad, _ in pairs]), torch.stack([x.to(dtype) for _, x in pairs])


def _errors(answer: TopK, rules: AnswerRules) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (bool [N], values [N]) for each kind of error that the rules look for."""
    ids, low = answer.ids, answer.logprobs
    wide = torch.float64 if low.dtype == torch.float64 else torch.float32
    used = ids >= 0
    logprobs = low.to(wide).masked_fill(~used, -torch.inf)
    undefined = logprobs.isnan()
    safe = logprobs.masked_fill(undefined, -torch.inf)
    best, p = safe.amax(-1), safe.exp()
    mass = p.sum(-1)
    step = _resolution(low, used)
    entropy = (p * safe.clamp(min=-1e4).abs()).sum(-1)
    allowed = ROUNDING + step * (1 + entropy)
    largest, smallest = ids.amax(-1), ids.amin(-1)
    above = torch.zeros_like(used[..., 0]) if rules.vocab is None else largest >= rules.vocab
    below = smallest < (-1 if rules.empty else 0)
    errors = {
        "ids": (above | below, torch.where(above, largest, smallest)),
        "nan": (undefined.any(-1), undefined.sum(-1)),
        "positive": (best > ROUNDING + step, best),
        "mass": (mass > 1 + allowed, mass),
    }
    if not rules.repeats:
        errors["repeated"] = _repeated(ids, rules.rising)
    if not rules.nothing:
        errors["nothing"] = (best.isneginf(), mass)
    if rules.ranked:
        flat = best.isneginf()
        if rules.vocab is not None:
            flat = best < -math.log(rules.vocab) - ROUNDING - step * math.log(rules.vocab)
        errors["flat"] = (flat, best)
    if answer.log_tail is not None:
        tail = answer.log_tail.to(wide)
        grain = _resolution(answer.log_tail.unsqueeze(-1), torch.ones_like(used[..., :1]))
        outside = tail.exp()
        errors["tail"] = (tail.isnan() | (tail > ROUNDING + grain), tail)
        if rules.total != "any":
            excess = mass + outside - 1
            excess = excess if rules.total == "at most" else excess.abs()
            slack = allowed + grain * (1 + outside * tail.clamp(min=-1e4).abs())
            errors["total"] = (~(excess <= slack), mass + outside)
    return errors


def _resolution(values: Tensor, used: Tensor) -> Tensor:
    """ε [N] of the coarsest type that represents all values of a position.

    For values that were stored in 16 bits and cast to fp32 this is the ε of 16 bits.
    """
    step = torch.full(
        values.shape[:-1], torch.finfo(values.dtype).eps, dtype=torch.float32, device=values.device
    )
    for low in _LOW:
        if torch.finfo(low).eps > torch.finfo(values.dtype).eps:
            same = (values.to(low).to(values.dtype) == values) | ~used
            step = step.masked_fill(same.all(-1), torch.finfo(low).eps)
    return step


def _repeated(ids: Tensor, rising: bool) -> tuple[Tensor, Tensor]:
    """Return the positions [N] with a repeated id, and the id.

    For `rising` ids, positions that do not rise are reported too, without sorting.
    """
    ordered = ids if rising else ids.sort(-1).values
    same = (ordered[..., 1:] <= ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    repeated = torch.where(same, ordered[..., 1:], -1)
    return same.any(-1), torch.nn.functional.pad(repeated, (1, 0), value=-1).amax(-1)


def find_invalid(answer: TopK, rules: AnswerRules) -> InvalidAnswer | None:
    """Return the first position of [N, K] with an invalid answer, or None."""
    if not answer.ids.numel():
        return None
    if not torch.stack([bad for bad, _ in _errors(answer, rules).values()]).any():
        return None
    bad, values = measure(answer, rules)
    at = int(bad.any(0).int().argmax())
    kind = int(bad[:, at].int().argmax())
    return InvalidAnswer(
        kind=_NAMES[kind],
        at=at,
        value=float(values[kind, at]),
        slots=answer.ids.shape[-1],
        rules=rules,
        dtype=answer.logprobs.dtype,
    )


def find_shape_error(
    answer: TopK, lead: Sequence[int], k: int, *, exactly: bool = False
) -> str | None:
    """Return what is wrong with the shapes and types of answers [*lead, ≤ k], or None.

    Args:
        answer: the teacher's answer.
        lead: the shape of the positions.
        k: the requested number of slots; with `exactly`, no fewer are allowed.
    """
    if not isinstance(answer, TopK):
        return f"expected a fastdistill.TopK, got {type(answer).__name__}"
    for name in ("ids", "logprobs", "log_tail"):
        value = getattr(answer, name)
        if name == "log_tail" and value is None:
            continue
        if not isinstance(value, Tensor):
            return f"{name}: expected a tensor, got {type(value).__name__}"
        whole = value.dtype in (torch.int32, torch.int64)
        if whole != (name == "ids") or not (whole or value.is_floating_point()):
            expected = "int32 or int64" if name == "ids" else "floats"
            return f"{name}: expected {expected}, got {value.dtype}"
        if value.is_meta or value.layout != torch.strided:
            what = "the meta device, without values" if value.is_meta else str(value.layout)
            return f"{name}: expected a dense tensor with values, got one of {what}"
    shape, slots = list(answer.ids.shape), answer.ids.shape[-1] if answer.ids.dim() else 0
    if shape[:-1] != list(lead) or (exactly and slots != k):
        expected = (
            f"answers of shape [{', '.join(map(str, lead))}, …], one per position of input_ids"
        )
        if exactly:
            expected = f"{math.prod(lead)} positions with {k} entries each"
        return f"expected {expected}, got {shape}"
    if not 1 <= slots <= k:
        return f"expected 1 to {k} slots at a position, got {slots} slots; {k} were requested"
    if list(answer.logprobs.shape) != shape:
        return f"logprobs: expected shape {shape} as ids, got {list(answer.logprobs.shape)}"
    if answer.log_tail is not None and list(answer.log_tail.shape) != shape[:-1]:
        return f"log_tail: expected shape {shape[:-1]}, got {list(answer.log_tail.shape)}"
    return None


def row_and_position(lengths: Sequence[int], at: int) -> tuple[int, int]:
    """Return the row and position of entry `at` of concatenated rows of these lengths."""
    for row, length in enumerate(lengths):
        if at < length:
            return row, at
        at -= length
    raise IndexError(at)


class AnswerMonitor:
    """Detects invalid answers in every batch of a run.

    Invalid answers on a CPU raise at once. On a GPU, reading a value would make the host wait in
    every step: the first invalid position of each kind is stored on the device, and `read` raises
    when the run waits for the device anyway, before it saves.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._first_errors: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._rules, self._slots, self._dtype = AnswerRules(), 0, torch.float32

    def check(self, answer: TopK, rows: Tensor, positions: Tensor, rules: AnswerRules) -> None:
        """Check the answers [N, K] of one batch, for its rows (N,) and positions (N,).

        Raises:
            ValueError: invalid answers on a CPU.
        """
        self.batches += 1
        self._rules, self._slots, self._dtype = rules, answer.ids.shape[-1], answer.logprobs.dtype
        if not answer.ids.numel():
            return
        self._store(*measure(answer, rules), rows, positions)
        if answer.ids.device.type == "cpu":
            self.read()

    def check_hidden(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Check that the hidden states (N, G) of one batch are finite."""
        self.batches += 1
        self._rules, self._slots, self._dtype = AnswerRules(), 0, hidden.dtype
        if not hidden.numel():
            return
        values = torch.zeros(len(_NAMES), len(hidden), device=hidden.device)
        values[_NAMES.index("hidden")] = (~hidden.isfinite()).sum(-1)
        self._store(values > 0, values, rows, positions)
        if hidden.device.type == "cpu":
            self.read()

    def _store(self, bad: Tensor, values: Tensor, rows: Tensor, positions: Tensor) -> None:
        """Store the first invalid position of each kind, [W, N], on its device."""
        first_places, first_values = self._first_errors.get(bad.device) or (
            torch.zeros(len(bad), 3, dtype=torch.int64, device=bad.device),
            torch.zeros(len(bad), dtype=values.dtype, device=bad.device),
        )
        at = bad.int().argmax(-1)
        new = bad.any(-1) & (first_places[:, 0] == 0)
        batch = torch.full_like(at, self.batches)
        place = torch.stack([batch, rows[at], positions[at]], -1)
        first_places = torch.where(new[:, None], place, first_places)
        first_values = torch.where(new, values.gather(-1, at[:, None])[:, 0], first_values)
        self._first_errors[bad.device] = (first_places, first_values)

    def read(self) -> None:
        """Wait for the positions stored on devices.

        Raises:
            ValueError: an answer since the last `read` was invalid.
        """
        stored, self._first_errors = self._first_errors, {}
        for places, first_values in stored.values():
            faults = [(*w, kind) for kind, w in enumerate(places.tolist()) if w[0]]
            if not faults:
                continue
            batch, row, position, kind = min(faults)
            wrong = InvalidAnswer(
                kind=_NAMES[kind],
                at=0,
                value=float(first_values[kind]),
                slots=self._slots,
                rules=self._rules,
                dtype=self._dtype,
            )
            hint = f" ({wrong.hint})" if wrong.hint else ""
            raise ValueError(
                f"teacher: expected the answers of a language model, but in batch {batch} of this "
                f"run, row {row}, position {position}, it returned an invalid one: {wrong}{hint}. "
                "The student would learn nothing: check the weights, the cache, or the positions"
            )
