"""K rows of W per token: the memory and the launches of the kernels in triton_gather.py.

For dW the N·S entries are sorted by id. Parts of long runs lie in the memory of dX, which is
written later. The host reads no length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import torch_gather
from .gpu_launch import cdiv, launch, next_power_of_2, scalars
from .head import LMHead, slot_grads
from .token_loss import ABSENT

GATHER_TILE = {"SB": 16, "BH": 256, "num_warps": 4, "maxnreg": 128}
# BC entries of a run are one program's work.
RUN_TILE = {"BE": 32, "BC": 256, "BH": 512, "num_warps": 4}


def forward(head: LMHead, hidden_NH: Tensor, ids_NS: Tensor) -> Tensor:
    """z [N, S] at T, NEG in empty slots."""
    if head.is_packed:  # it has no address for a kernel
        return torch_gather.forward(head, hidden_NH, ids_NS)
    (N, H), S = hidden_NH.shape, ids_NS.shape[1]
    z_NS = hidden_NH.new_empty(N, S, dtype=head.dtype)
    SB = min(GATHER_TILE["SB"], next_power_of_2(max(S, 1)))
    launch(
        "triton_gather:gather_rows",
        (N, cdiv(S, SB)),
        z_NS,
        p_x=hidden_NH,
        p_w=head.weight,
        p_bias=head.bias,
        p_ids=ids_NS.contiguous(),
        p_z=z_NS,
        S=S,
        H=H,
        ld_x=hidden_NH.stride(0),
        ld_w=head.weight.stride(0),
        **scalars(head),
        SB=SB,
        BH=min(GATHER_TILE["BH"], next_power_of_2(H)),
        num_warps=GATHER_TILE["num_warps"],
        maxnreg=GATHER_TILE["maxnreg"],
    )
    return z_NS


def hidden_grad(
    head: LMHead,
    ids_NS: Tensor,
    g_NS: Tensor,
    out: Tensor,
    *,
    base: Tensor | None = None,
    lost: bool = False,
) -> None:
    """out [N, H] = base + Σ_s g_ns W[ids_ns], summed in fp32; g is d(W x).

    lost: use the rounding error of g in the type of W instead of g.
    """
    if head.is_packed:
        got = type(head.weight).__name__
        raise TypeError(f"weight: expected a dense head for gradients, got {got}; dequantize() it")
    N, S = ids_NS.shape
    H = head.weight.shape[1]
    BH = min(GATHER_TILE["BH"], next_power_of_2(H))
    launch(
        "triton_gather:scatter_hidden",
        (N, cdiv(H, BH)),
        out,
        p_w=head.weight,
        p_ids=ids_NS.contiguous(),
        p_g=g_NS.contiguous(),
        p_base=base,
        p_dx=out,
        S=S,
        H=H,
        ld_w=head.weight.stride(0),
        ld_base=0 if base is None else base.stride(0),
        ld_dx=out.stride(0),
        LOST=lost,
        SB=min(GATHER_TILE["SB"], next_power_of_2(max(S, 1))),
        BH=BH,
        num_warps=GATHER_TILE["num_warps"],
        maxnreg=GATHER_TILE["maxnreg"],
    )


def weight_grad(
    hidden_NH: Tensor,
    ids_NS: Tensor,
    g_NS: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    *,
    add: bool = False,
    spare: Tensor | None = None,
) -> None:
    """Write (or add) Σ g x to dw and Σ g to db in the rows whose ids occur.

    spare: contiguous memory, overwritten: the parts of long runs, if it has room for them.
    """
    (N, H), S = hidden_NH.shape, ids_NS.shape[1]
    E, BE, BC = N * S, RUN_TILE["BE"], RUN_TILE["BC"]
    ids, entries = torch.sort(ids_NS.reshape(-1).to(torch.int32), stable=True)
    g = g_NS.reshape(-1)[entries]
    tokens = entries.floor_divide_(max(S, 1)).to(torch.int32)
    is_new = ids >= 0
    is_new[1:] &= ids[1:] != ids[:-1]
    index = torch.arange(E, dtype=torch.int32, device=ids.device)
    begin = index.masked_fill_(~is_new, E)
    # The first entry at or after each block where a run of a real id starts; E if none does.
    begin = F.pad(begin, (0, -E % BE), value=E).view(-1, BE).amin(1)
    ends = begin.new_full((1,), E)
    starts = torch.cat([begin.flip(0).cummin(0).values.flip(0), ends])
    n_parts = cdiv(E, BC)
    parts = None if dw is None else _in_memory_of(spare, g, n_parts * H)
    BH = min(RUN_TILE["BH"], next_power_of_2(H))
    column_blocks = 1 if dw is None else cdiv(H, BH)
    sizes = {"E": E, "H": H, "ld_x": hidden_NH.stride(0), "BC": BC, "BH": BH}
    common = {
        "p_x": hidden_NH,
        "p_ids": ids,
        "p_tokens": tokens,
        "p_g": g,
        "p_parts": parts,
        "p_db_parts": g.new_empty(n_parts),
        **sizes,
        "num_warps": RUN_TILE["num_warps"],
    }
    launch("triton_gather:sum_parts", (max(n_parts - 1, 0), column_blocks), hidden_NH, **common)
    launch(
        "triton_gather:sum_runs",
        (cdiv(E, BE), column_blocks),
        hidden_NH,
        p_starts=starts,
        p_dw=dw,
        p_db=db,
        ld_dw=0 if dw is None else dw.stride(0),
        ADD=add,
        BE=BE,
        **common,
    )


def _in_memory_of(spare: Tensor | None, like: Tensor, count: int) -> Tensor:
    """`count` elements of the type of `like`, in the memory of `spare` if it has room."""
    if spare is None:
        return like.new_empty(count)
    size, narrow = like.element_size(), spare.element_size()
    if spare.numel() * narrow < count * size or spare.storage_offset() * narrow % 16:
        return like.new_empty(count)
    return spare.view(-1)[: count * size // narrow].view(like.dtype)


def backward(
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    z_NS: Tensor,
    g_z_NS: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, db), each None unless needed; dW and db are dense."""
    g_NS = torch.where(z_NS < ABSENT, 0.0, slot_grads(head, z_NS, g_z_NS))
    dx = hidden_NH.new_empty(hidden_NH.shape) if need_hidden else None
    dw = torch.zeros_like(head.weight) if need_weight else None
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias)
    if dw is not None or db is not None:
        weight_grad(hidden_NH, ids_NS, g_NS, dw, db, spare=dx)
    if dx is not None:
        hidden_grad(head, ids_NS, g_NS, dx)
    return dx, dw, db
