"""The registry: every measured op with its contenders and lower bounds of its cost.

FLOPs in units of N·V·H: 2 for one pass over a head, 6 with gradients in the forward pass, 8 with
recomputation, 2 more for the pass of a dense teacher. Bytes: the heads and hidden states read once,
their gradients written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import fastdistill as fd
from fastdistill.runtime.backend import resolve_impl

from . import data, peers, quantized
from .data import Data
from .registry import Contender, Missing, Op
from .shapes import Shape


def _topk_loss(d: Data, **options: Any) -> Any:
    assert d.teacher is not None
    return fd.topk_distill_loss(d.hidden, d.weight, d.teacher, **options)


def _renorm_both(d: Data, **options: Any) -> Any:
    return _topk_loss(d, tail="renorm_both", **options)


def _dense(d: Data, divergence: str, **options: Any) -> Any:
    assert d.teacher_hidden is not None
    assert d.teacher_weight is not None
    return fd.linear_distill_loss(
        d.hidden,
        d.weight,
        d.teacher_hidden,
        d.teacher_weight,
        divergence=divergence,
        beta=peers.BETA,
        **options,
    )


def _scoring(d: Data, **options: Any) -> Any:
    scores = fd.token_scores(d.hidden, d.weight, labels=d.labels, teacher=d.teacher, **options)
    return scores._asdict()


def _lse_gather(d: Data, **options: Any) -> Any:
    assert d.teacher is not None
    return fd.linear_lse_gather(d.hidden, d.weight, d.teacher.ids, **options)._asdict()


def _linear_topk(d: Data, **options: Any) -> Any:
    assert d.teacher is not None
    best = fd.linear_topk(d.hidden, d.weight, d.teacher.ids.shape[-1], **options)
    return {"ids": best.ids, "logprobs": best.logprobs, "log_tail": best.log_tail}


def _eager_topk(d: Data) -> Any:
    assert d.teacher is not None
    return peers.linear_topk(d, d.teacher.ids.shape[-1])


def ours(
    compute: Callable[..., Any], methods: dict[str, float] | None = None
) -> tuple[Contender, ...]:
    """Both backends of one function, for each of its backward methods (name: passes)."""

    def one(impl: str, method: str | None, passes: float | None) -> Contender:
        options = {"impl": impl} | ({} if method is None else {"backward": method})

        def run(d: Data) -> Any:
            if impl == "triton" and not d.hidden.is_cuda:
                raise Missing("triton: needs a GPU; its interpreter on a CPU says nothing of speed")
            try:
                resolve_impl(impl, d.hidden.device)
            except ValueError as error:
                raise Missing(str(error)) from None
            return compute(d, **options)

        return Contender(" ".join(filter(None, (impl, method))), run, passes=passes)

    variants: list[tuple[str | None, float | None]] = [*(methods or {}).items()] or [(None, None)]
    return tuple(
        one(impl, method, passes) for impl in ("torch", "triton") for method, passes in variants
    )


def skipping(eps: float) -> Contender:
    """The fused loss with tile skipping; not gated, its error is reported."""

    def run(d: Data) -> Any:
        if not d.hidden.is_cuda or d.hidden.dtype.itemsize != 2:
            raise Missing("tiles are skipped by the Triton kernels, in 16 bits")
        return _topk_loss(d, impl="triton", grad_filter_eps=eps)

    return Contender(f"triton fused, tiles ≥ {eps:g}", run, exact=False, passes=6.0)


def truth(compute: Callable[..., Any]) -> Callable[[Data], Any]:
    return functools.partial(compute, impl="reference")


def _scan_bytes(s: Shape, size: int, times: int = 1) -> float:
    return times * (s.V + s.N) * s.H * size


def _gather_bytes(s: Shape, size: int) -> float:
    """K rows per token gathered twice, their gradients read and written.

    No row counts as shared between tokens: if ids repeat, a cache can do better.
    """
    return 4 * s.N * s.K * s.H * size


_grad_bytes = functools.partial(_scan_bytes, times=2)
_dense_bytes = functools.partial(_scan_bytes, times=3)
BACKWARD = {"fused": 6.0, "recompute": 8.0}
_kl = functools.partial(_dense, divergence="forward_kl")
_jsd = functools.partial(_dense, divergence="jsd")


def _draft_loss(name: str) -> Op:
    compute = functools.partial(_topk_loss, divergence=name)
    return Op(
        f"{name} of K teacher tokens and a tail bucket, with both gradients",
        "both",
        data.sparse,
        truth(compute),
        ours(compute, BACKWARD),
        6,
        _grad_bytes,
    )


OPS = {
    "topk_loss": Op(
        "forward KL to K teacher tokens and a tail bucket, with both gradients",
        "both",
        data.sparse,
        truth(_topk_loss),
        (*peers.pytorch(peers.topk_loss), *ours(_topk_loss, BACKWARD), skipping(2.0**-12)),
        6,
        _grad_bytes,
    ),
    "renorm_both": Op(
        "forward KL renormalized over the K tokens, with both gradients; no pass over the head",
        "both",
        data.sparse,
        truth(_renorm_both),
        (*peers.pytorch(peers.renorm_both), *ours(_renorm_both)),
        0,
        _gather_bytes,
    ),
    # Ops of their own: the committed results of the two above have uniform ids.
    "topk_loss_zipf": Op(
        "topk_loss with ids that repeat as those of a language model (Zipf)",
        "both",
        data.zipf,
        truth(_topk_loss),
        (*peers.pytorch(peers.topk_loss), *ours(_topk_loss, BACKWARD)),
        6,
        _grad_bytes,
    ),
    "renorm_both_zipf": Op(
        "renorm_both with ids that repeat as those of a language model (Zipf)",
        "both",
        data.zipf,
        truth(_renorm_both),
        (*peers.pytorch(peers.renorm_both), *ours(_renorm_both)),
        0,
        _gather_bytes,
    ),
    "scoring": Op(
        "every per-token score, with labels and a teacher; no gradient",
        "forward",
        data.sparse,
        truth(_scoring),
        (*peers.pytorch(peers.scoring), *ours(_scoring)),
        2,
        _scan_bytes,
    ),
    "linear_topk": Op(
        "the K most probable tokens and the tail; no gradient",
        "forward",
        data.sparse,
        truth(_linear_topk),
        (
            Contender("F.linear alone", peers.head_product, exact=False, part=True),
            *peers.pytorch(_eager_topk),
            *ours(_linear_topk),
        ),
        2,
        _scan_bytes,
    ),
    "dense_loss": Op(
        "forward KL to a teacher with a head of its own, with both gradients",
        "both",
        data.dense,
        truth(_kl),
        (*peers.pytorch(peers.dense_loss), *ours(_kl, {"fused": 8.0}), *peers.DENSE_KL),
        8,
        _dense_bytes,
    ),
    "dense_jsd": Op(
        "generalised JSD (β = ½) to a teacher with a head of its own, with both gradients",
        "both",
        data.dense,
        truth(_jsd),
        (*peers.pytorch(peers.dense_jsd), *ours(_jsd, {"fused": 8.0}), *peers.DENSE_JSD),
        8,
        _dense_bytes,
    ),
    "label_loss": Op(
        "cross-entropy of labels, with both gradients; ours as top-1 with a one-hot teacher",
        "both",
        data.labeled,
        truth(_topk_loss),
        (*peers.pytorch(peers.label_loss), *ours(_topk_loss, BACKWARD), *peers.LABEL),
        6,
        _grad_bytes,
    ),
    **quantized.OPS,
}

# Predicted but not measured, at the shapes of another op.
PREDICTED = {
    "lse_gather": (
        "scoring",
        Op(
            "logits of K tokens and the log-sum-exp of the others; no gradient",
            "forward",
            data.sparse,
            truth(_lse_gather),
            ours(_lse_gather),
            2,
            _scan_bytes,
        ),
    ),
    **{f"topk_{name}": ("topk_loss_zipf", _draft_loss(name)) for name in ("nla", "lk_hybrid")},
}
