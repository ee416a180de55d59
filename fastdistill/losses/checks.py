"""Checks of what the losses take: hidden states, a head, ids, labels and a teacher's top k.

Shapes, types, devices and scalars are always checked. Checks of values (`values_readable`) read the
data: they run on CPU tensors, and on a GPU only with check=True, since they stall its stream.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.head import LMHead
from ..kernels.token_loss import LossOptions
from ..runtime.checks import fail, number, positive
from ..runtime.tensor_checks import FLOATS, INTS, like_tokens, same_device, tensor, values_readable
from .answer_checks import AnswerRules, find_invalid
from .types import TopK


def check_head(hidden: Any, lm_head: LMHead, prefix: str = "") -> None:
    """Check hidden [..., H] against an LM head [V, H]."""
    weight, bias, logit_scale, softcap = lm_head[:4]
    names = {n: prefix + n for n in ("hidden", "weight", "bias", "logit_scale", "softcap")}
    tensor(names["hidden"], hidden, FLOATS)
    tensor(names["weight"], weight, FLOATS)
    if hidden.dim() not in (2, 3):
        fail(names["hidden"], "shape [N, H] or [B, T, H]", list(hidden.shape))
    if not hidden.shape[-1]:
        fail(names["hidden"], "at least one channel", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        fail(
            names["weight"],
            f"shape [V, {hidden.shape[-1]}] (hidden's last dimension)",
            list(weight.shape),
        )
    if weight.dtype != hidden.dtype:
        hint = "cast one of them, or call under torch.autocast"
        fail(names["weight"], f"dtype {hidden.dtype} as {names['hidden']}", weight.dtype, hint)
    same_device(names["weight"], weight, hidden)
    if bias is not None:
        tensor(names["bias"], bias, FLOATS)
        if bias.shape != weight.shape[:1]:
            fail(names["bias"], f"shape [{weight.shape[0]}]", list(bias.shape))
        same_device(names["bias"], bias, hidden)
    number(names["logit_scale"], logit_scale)
    if not math.isfinite(logit_scale) or logit_scale == 0:
        fail(names["logit_scale"], "a finite number other than 0", repr(logit_scale))
    if softcap is not None:
        positive(names["softcap"], softcap)
    positive("temperature", lm_head.temperature)


def check_vocabulary(valid_vocab: int | None, rows: int) -> int:
    """The number of real tokens among the rows of a head."""
    if valid_vocab is None:
        return rows
    if not isinstance(valid_vocab, int) or valid_vocab is True or not 0 < valid_vocab <= rows:
        fail("valid_vocab", f"an integer in 1..{rows} (rows of weight)", repr(valid_vocab))
    return valid_vocab


def check_ids(name: str, value: Any, hidden: Tensor, vocab: int, check: bool) -> None:
    """Check ids int32/int64 [..., K] over the positions of hidden, each −1 or a token."""
    tensor(name, value, INTS)
    if value.shape[:-1] != hidden.shape[:-1] or value.dim() != hidden.dim():
        fail(name, f"shape {[*hidden.shape[:-1], 'K']}", list(value.shape))
    if not value.shape[-1]:
        fail(name, "at least one slot", list(value.shape), "an empty one holds the id −1")
    if value.shape[-1] > vocab:
        fail(name, f"K ≤ V = {vocab}", f"K = {value.shape[-1]}")
    same_device(name, value, hidden)
    if value.numel() and values_readable(value, check):
        low, high = int(value.min()), int(value.max())
        if low < -1 or high >= vocab:
            bad = low if low < -1 else high
            fail(
                name,
                f"ids in 0..{vocab - 1}, or −1 for an empty slot",
                f"{bad}",
                "a teacher with another vocabulary needs its ids mapped first",
            )


def check_teacher(
    answers: Any,
    hidden: Tensor,
    active: Tensor | None,
    *,
    vocab: int,
    options: LossOptions,
    check: bool,
) -> None:
    """Check a TopK against the loss that uses it; `active` is bool [...], or None for all."""
    if not isinstance(answers, TopK):
        raise TypeError(f"teacher: expected a fastdistill.TopK, got {type(answers).__name__}")
    ids_, logprobs, log_tail, taken_at = answers
    tail, temperature = options.tail, options.temperature
    check_ids("teacher.ids", ids_, hidden, vocab, check)
    tensor("teacher.logprobs", logprobs, FLOATS)
    if logprobs.shape != ids_.shape:
        fail("teacher.logprobs", f"shape {list(ids_.shape)} as teacher.ids", list(logprobs.shape))
    same_device("teacher.logprobs", logprobs, hidden)
    if log_tail is not None:
        tensor("teacher.log_tail", log_tail, FLOATS)
        like_tokens("teacher.log_tail", log_tail, hidden)
    positive("teacher.temperature", taken_at)
    if tail == "renorm_both":
        if ids_.shape[-1] == 1:
            fail(
                "tail",
                "another tail when K = 1",
                "'renorm_both'",
                "one outcome renormalized over itself is 1: the loss is always 0",
            )
    elif not math.isclose(taken_at, temperature, rel_tol=1e-6):
        fail(
            "temperature",
            f"{taken_at:g}, at which the teacher's payload was taken",
            f"{temperature:g}",
            "take the payload at the loss temperature: its normalizer at "
            "another one is not known (tail='renorm_both' needs none)",
        )
    if not logprobs.numel() or not values_readable(logprobs, check):
        return
    # Slots may be empty; renorm_both uses the K ids alone and ignores the rest.
    total = "any" if tail == "renorm_both" else "at most"
    rules = AnswerRules(vocab=vocab, repeats=True, nothing=True, total=total)
    counted = answers if active is None else answers.at(active)
    wrong = find_invalid(counted.flatten(), rules)
    if wrong is not None:
        fail(f"teacher.{wrong.field}", wrong.expected, wrong.got, wrong.hint)


def check_grad_filter(options: LossOptions, reduction: str, dtype: torch.dtype) -> None:
    """Check `grad_filter_eps`: only the fused Triton pass can skip tiles."""
    name, eps, impl = "grad_filter_eps", options.filter_eps, options.impl
    if not (isinstance(eps, (int, float)) and math.isfinite(eps) and eps >= 0):
        fail(name, "a number ≥ 0 or None", repr(eps))
    if impl != "triton":
        fail(name, f"None with impl={impl!r}", repr(eps), "only the Triton kernels skip tiles")
    by_rows = options.tail == "renorm_both" and not options.needs_base
    if options.backward == "recompute" or reduction == "none" or by_rows:
        fail(
            name,
            "None unless the loss takes the fused pass",
            repr(eps),
            "use reduction='mean' or 'sum', backward='auto', another tail",
        )
    if dtype not in (torch.float16, torch.bfloat16):
        fail(name, "a float16 or bfloat16 head", dtype)


def check_labels(value: Any, hidden: Tensor, vocab: int, ignore_index: int, check: bool) -> None:
    tensor("labels", value, INTS)
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    like_tokens("labels", value, hidden)
    if value.numel() and values_readable(value, check):
        wrong = (value != ignore_index) & ((value < 0) | (value >= vocab))
        if wrong.any():
            fail(
                "labels",
                f"tokens in 0..{vocab - 1} or ignore_index = {ignore_index}",
                int(value[wrong][0]),
            )
