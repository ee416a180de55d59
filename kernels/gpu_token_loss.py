"""The row mathematics of the sparse losses: the memory and the launches of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import floor_of, plain_name, resolve
from .gpu_launch import cdiv, jitted, launch, mixture, next_power_of_2
from .head import LMHead, Stats
from .token_loss import LossOptions, RowLosses, TeacherTopK, TokenLosses

# Slots of all rows of a program, the most in one tile, and warps: 2 slots per thread.
# Without the bound on registers ptxas spills two of them to fit one more program.
ROWS_TILE = {"slots": 512, "num_warps": 8, "maxnreg": 128}
FIRST_TERM = {"nla": "overlap", "lk_hybrid": "forward_kl"}  # of a combined loss; the other is TV


def token_loss(
    head: LMHead,
    ids_nS: Tensor,
    stats: Stats,
    teacher: TeacherTopK,
    label_n: Tensor | None,
    coef_n: Tensor,
    options: LossOptions,
    *,
    grad: bool,
) -> RowLosses:
    """Losses, statistics and gradients of one chunk, in one launch."""
    assert isinstance(options.divergence, str)
    (n, S), K = stats.z_ids.shape, teacher.ids.shape[1]
    T, tail, new = options.temperature, options.tail, stats.lse_rest.new_empty
    name = plain_name(options.divergence, options.beta, options.skew)
    combined = name if options.is_combined else None
    name = FIRST_TERM.get(name, name)
    rule = resolve(name, options.beta, options.skew)
    has_lse = T == 1.0 or stats.lse_base is not None
    rows = TokenLosses(
        new(n),
        new(n),
        new(n),
        new(n) if has_lse else None,
        new(n) if has_lse and label_n is not None else None,
    )
    entropy = None if stats.mean_rest is None else new(n)
    grads = None
    if grad:
        on_base = options.needs_base and stats.lse_base is not None
        grads = Stats(new(n, S), new(n), None, new(n) if on_base else None)
    constant = 0.0 if tail in ("renorm_both", "truncate") else rule.constant
    SB = min(ROWS_TILE["slots"], next_power_of_2(max(K, 1)))
    BN = ROWS_TILE["slots"] // SB
    launch(
        "triton_token_loss:token_loss",
        (cdiv(n, BN),),
        stats.z_ids,
        p_z=stats.z_ids.contiguous(),
        p_ids=ids_nS.contiguous(),
        p_teacher_ids=teacher.ids.contiguous(),
        p_lp=teacher.lp.contiguous(),
        p_log_tail=teacher.log_tail.contiguous(),
        p_label=None if label_n is None else label_n.contiguous(),
        p_coef=coef_n.contiguous(),
        p_lse_rest=stats.lse_rest,
        p_mean_rest=stats.mean_rest,
        p_lse_base=stats.lse_base,
        p_per_token=rows.per_token,
        p_D=rows.divergence,
        p_mass=rows.student_mass,
        p_lse=rows.lse,
        p_nll=rows.nll,
        p_entropy=entropy,
        p_g_slots=None if grads is None else grads.z_ids,
        p_g_rest=None if grads is None else grads.lse_rest,
        p_g_base=None if grads is None else grads.lse_base,
        n=n,
        K=K,
        S=S,
        T=float(T),
        **mixture(options),
        eta=float(options.eta),
        floor=floor_of(teacher.lp.dtype),
        outside=float(rule.outside or 0.0) if tail == "renorm_teacher" else 0.0,
        on_ids=rule.on_ids if tail == "truncate" else 0.0,
        constant=constant,
        on_D=float(options.on_divergence),
        on_ce=float(options.ce_weight),
        on_z=float(options.z_loss),
        on_slots=head.logit_scale / T,
        cap=0.0 if head.softcap is None else float(head.softcap),
        CAP=head.softcap is not None,
        PHI=None if stats.z_ids.is_meta else jitted(f"triton_divergences:{name}"),
        COMBINED=combined,
        TAIL=tail,
        CONSTANT=constant != 0.0,
        BASE_GRAD=options.needs_base,
        BN=BN,
        SB=SB,
        num_warps=ROWS_TILE["num_warps"],
        maxnreg=ROWS_TILE["maxnreg"],
    )
    return RowLosses(rows, entropy, grads)


def merge_slots(head: LMHead, ids_NS: Tensor, z_NS: Tensor, g_NS: Tensor) -> tuple[Tensor, Tensor]:
    """(distinct ids, d(W x)) [N, S] from d z of slots whose ids may repeat, in one launch.

    The first slot of an id gets the sum; the others become empty. S² comparisons per token, of
    three instructions each, cost 4 µs at N = 8192 and S = 65 on 132 multiprocessors that issue 128
    instructions at 1.7 GHz, and 0.9 ms at S = 1025: a sort and a segmented sum launch dozens of
    kernels.
    """
    on_y = None if head.softcap is None else head.temperature / head.softcap
    return _merge(ids_NS, z_NS, g_NS, head.logit_scale / head.temperature, on_y)


def merge_answers(ids_NK: Tensor, lp_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return token_loss.merge_answers with one launch instead of a sort and dozens of operators."""
    p_NK = lp_NK.exp()
    ids, merged = _merge(ids_NK, lp_NK, p_NK, 1.0, None)
    lp = torch.where(merged == p_NK, lp_NK, merged.log().clamp(min=floor_of(lp_NK.dtype)))
    return ids, lp, merged.sum(-1)


def _merge(
    ids_NS: Tensor, z_NS: Tensor, g_NS: Tensor, on_slots: float, on_y: float | None
) -> tuple[Tensor, Tensor]:
    """Launch merge_slots; without on_y there is no softcap."""
    N, S = ids_NS.shape
    distinct, g_slots = torch.empty_like(ids_NS), torch.empty_like(z_NS)
    SB = min(ROWS_TILE["slots"], next_power_of_2(max(S, 1)))
    BN = ROWS_TILE["slots"] // SB
    launch(
        "triton_token_loss:merge_slots",
        (cdiv(N, BN) if S else 0,),
        z_NS,
        p_ids=ids_NS.contiguous(),
        p_z=z_NS.contiguous(),
        p_g=g_NS.contiguous(),
        p_distinct=distinct,
        p_g_slots=g_slots,
        n=N,
        S=S,
        on_slots=on_slots,
        on_y=on_y or 0.0,
        CAP=on_y is not None,
        BN=BN,
        SB=SB,
        num_warps=ROWS_TILE["num_warps"],
    )
    return distinct, g_slots
