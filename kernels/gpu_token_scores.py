"""The scores of a block: the memory and the launch of their kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import floor_of
from .gpu_launch import cdiv, launch, next_power_of_2
from .gpu_token_loss import ROWS_TILE
from .head import LMHead, Scanned
from .row_scores import RowScores
from .token_loss import TeacherTopK


def token_scores(
    head: LMHead,
    ids_nS: Tensor,
    scanned: Scanned,
    teacher: TeacherTopK | None,
    label_n: Tensor | None,
) -> RowScores:
    """Scores of one block, in one launch; the label, if given, is the last slot."""
    (n, S), K = ids_nS.shape, 0 if teacher is None else teacher.ids.shape[1]
    u, rest, best = scanned.u_nS, scanned.rest, scanned.best
    assert best is not None
    base = rest if scanned.rest_base is None else scanned.rest_base
    out = u.new_empty(10, n)
    argmax, rank = torch.empty_like(best.id), None if label_n is None else torch.empty_like(best.id)
    SB = min(ROWS_TILE["slots"], next_power_of_2(max(K, 1)))
    BN = ROWS_TILE["slots"] // SB
    launch(
        "triton_token_scores:token_scores",
        (cdiv(n, BN),),
        u,
        p_u=u,
        p_teacher_ids=None if teacher is None else teacher.ids.contiguous(),
        p_lp=None if teacher is None else teacher.lp.contiguous(),
        p_log_tail=None if teacher is None else teacher.log_tail.contiguous(),
        p_label=None if label_n is None else label_n.contiguous(),
        p_top=rest.top,
        p_s0=rest.sums[0],
        p_s1=rest.sums[1],
        p_s2=rest.sums[2],
        p_lse_rest=rest.lse(),
        p_lse_base=base.lse(),
        p_best=best.u,
        p_best_id=best.id,
        p_n_above=best.above,
        p_scores=out,
        p_argmax=argmax,
        p_rank=rank,
        n=n,
        ld=out.stride(0),
        K=K,
        S=S,
        T=float(head.temperature),
        floor=floor_of(u.dtype),
        BN=BN,
        SB=SB,
        num_warps=ROWS_TILE["num_warps"],
        maxnreg=ROWS_TILE["maxnreg"],
    )
    lse, entropy, varentropy, max_logprob, margin, nll, *of_teacher = out.unbind()
    always = (lse, entropy, varentropy, max_logprob, argmax, margin)
    of_label = (None if label_n is None else nll, rank)
    return RowScores._make((*always, *of_label, *([None] * 4 if teacher is None else of_teacher)))
