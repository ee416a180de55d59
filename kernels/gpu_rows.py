"""Statistics and gradients of rows of logits: the memory and the launches of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .gpu_launch import SLOT_TILE, cdiv, launch, next_power_of_2, scalars
from .head import LMHead, RunningLSE, Scanned, Stats, Top2

# Columns per program and its warps: 16 fp32 per thread.
ROW_TILE = {"BV": 4096, "num_warps": 8}
# 2048 programs fill any GPU and end within microseconds if there is nothing to do.
SCALE_TILE = {"BE": 4096, "num_warps": 8}
SCALE_PROGRAMS = 2048
# Warps per row. Long rows are few: with 16, 128 of them keep every multiprocessor reading. On short
# ones the ends of a program weigh more than its loop, and with 4 more programs overlap.
SHORT_ROW = 16384
REDUCE_WARPS = {True: 4, False: 16}  # by whether a row is short
# Columns per warp and step: with 256 and the two largest, ptxas would need a stack.
REDUCE_COLUMNS = {False: 256, True: 128}


class Running:
    """Running statistics of n tokens over any number of slabs of the vocabulary."""

    def __init__(
        self,
        head: LMHead,
        ids_nS: Tensor,
        moments: int,
        base: bool,
        best: bool,
        label_u_n: Tensor | None,
    ) -> None:
        self.head, self.moments, self.label_u = head, moments, label_u_n
        self.ids = ids_nS.contiguous()
        n, S = ids_nS.shape
        new = partial(head.weight.new_empty, dtype=head.dtype)
        self.u_slots = new(n, S)
        self.top, self.lse = new(n), new(n)
        self.sums = new(moments + 1, n)
        self.base_sum = self.base_lse = None
        if base and head.temperature != 1.0:
            self.base_sum, self.base_lse = new(n), new(n)
        self.best = None
        if best:
            best_id = new(n, dtype=torch.int64)
            self.best = Top2(new(n, 2), best_id, torch.zeros_like(best_id))

    def block(self, rows: slice) -> Callable[[slice, Tensor], None]:
        """A function (columns, raw products [n, v] of these tokens) that reduces them: one launch.

        Slots in them become NEG. Arguments that do not change from slab to slab are built once: the
        host takes about as long per slab as a small GEMM.
        """
        (n, S), half = self.ids.shape, next_power_of_2(self.head.vocab_size) // 2
        best = self.best is not None

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or rows == slice(0, n) else tensor[rows]

        constant = {
            "p_bias": self.head.bias,
            "p_ids": part(self.ids),
            "p_label_u": part(self.label_u),
            "p_u_slots": part(self.u_slots),
            "p_top": part(self.top),
            "p_sums": self.sums[:, rows],
            "p_lse": part(self.lse),
            "p_base_sum": part(self.base_sum),
            "p_base_lse": part(self.base_lse),
            "p_best": None if self.best is None else part(self.best.u),
            "p_best_id": None if self.best is None else part(self.best.id),
            "p_n_above": None if self.best is None else part(self.best.above),
            "n": n,
            "S": S,
            **scalars(self.head),
            "MOMENTS": self.moments,
            "BASE": self.base_sum is not None,
            "BEST": best,
            "SB": min(SLOT_TILE, next_power_of_2(max(S, 1))),
            "maxnreg": 64,
        }

        def reduce(at: slice, raw_nv: Tensor) -> None:
            v = at.stop - at.start
            warps = REDUCE_WARPS[v <= SHORT_ROW]
            launch(
                "triton_reduce:reduce_rows",
                (raw_nv.shape[0],),
                raw_nv,
                p_raw=raw_nv,
                ld_raw=raw_nv.stride(0),
                v=v,
                v0=at.start,
                BV=max(64, min(warps * REDUCE_COLUMNS[best], half)),
                num_warps=warps,
                **constant,
            )

        return reduce

    def scanned(self) -> Scanned:
        T = self.head.temperature
        top = self.top if T == 1.0 else self.top * (1.0 / T)  # rounded as in the kernel
        base = None
        if self.base_sum is not None:
            base = RunningLSE(self.top, [self.base_sum], 1.0, self.base_lse)
        rest = RunningLSE(top, list(self.sums), T, self.lse)
        return Scanned(self.u_slots, rest, base, self.best)


def grad_rows(
    head: LMHead, ids_nS: Tensor, g_nS: Tensor, stats: Stats, grads: Stats
) -> Callable[[Tensor, int], Tensor]:
    """A function (raw products [n, v], their first column) that turns them into dz [n, v].

    dz has the head's own type and takes raw's memory (rows as far apart as raw's were). grads hold
    d lse_rest, d mean_rest and d lse_base per token; g_nS is d(W x) at distinct ids. Arguments that
    do not change from slab to slab are built once.
    """
    S, T, scale = ids_nS.shape[1], head.temperature, head.logit_scale
    mean = grads.mean_rest is not None and stats.mean_rest is not None
    base = grads.lse_base is not None and stats.lse_base is not None
    g_rest, g_mean, g_base = grads.lse_rest, grads.mean_rest, grads.lse_base
    constant = {
        "p_bias": head.bias,
        "p_ids": ids_nS,
        "p_g_slots": g_nS,
        "p_lse_rest": stats.lse_rest,
        "p_g_rest": g_rest.contiguous() if scale == T else g_rest * (scale / T),
        "p_mean_rest": stats.mean_rest if mean else None,
        "p_g_mean": g_mean * (scale / T) if mean and g_mean is not None else None,
        "p_lse_base": stats.lse_base if base else None,
        "p_g_base": g_base * scale if base and g_base is not None else None,
        "S": S,
        **scalars(head),
        "SB": min(SLOT_TILE, next_power_of_2(max(S, 1))),
        "num_warps": ROW_TILE["num_warps"],
    }

    def grad(raw_nv: Tensor, v0: int) -> Tensor:
        n, v = raw_nv.shape
        same = raw_nv.dtype == head.weight.dtype
        out = raw_nv if same else raw_nv.view(head.weight.dtype)[:, :v]
        launch(
            "triton_grad:grad_rows",
            (n,),
            raw_nv,
            p_raw=raw_nv,
            p_dz=out,
            ld_raw=raw_nv.stride(0),
            ld_dz=out.stride(0),
            v=v,
            v0=v0,
            BV=min(ROW_TILE["BV"], next_power_of_2(v)),
            **constant,
        )
        return out

    return grad


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor (0-dim, fp32 or fp64), rounded once; a factor of 1 costs no pass over grad."""
    n = grad.numel()
    launch(
        "triton_grad:scale_in_place",
        (min(cdiv(n, SCALE_TILE["BE"]), SCALE_PROGRAMS),),
        grad,
        p_x=grad,
        p_factor=factor.clone(),  # aligned, as every other tensor: one variant less
        n=n,
        **SCALE_TILE,
    )
    return grad


def move_to_scale(grad_scale: Tensor | None, carried: Tensor | None, *sums: Tensor | None) -> None:
    """Bring sums that carry one scale to another; None for both, or a first scale, does nothing."""
    if grad_scale is not None and carried is not None:
        factor = grad_scale / carried
        for t in sums:
            if t is not None:
                scale_(t, factor)
