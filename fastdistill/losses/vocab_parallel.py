"""Vocabulary-parallel heads: rank r holds rows [offset_r, offset_r + V_r) of W and b.

    lse_rest = log Σ_r e^{L_r},   mean_rest = Σ_r e^{L_r − lse_rest} m_r,   z_ids = max_r z_ids_r

with L_r and m_r the log-sum-exp and mean logit outside the slots on rank r, and z_ids_r the logits
of the slots whose id rank r holds (NEG elsewhere). Hidden states, ids, teacher and labels are the
same on every rank. So are all results of the combined statistics: their gradient needs no
communication. A pass over the head (a chunk of tokens in the fused loss) needs one all-reduce (max)
of the packed maxima and slots and one (sum) of the packed sums. dX needs one all-reduce in fp32,
since the parts may be far larger than their sum. To the kernels a shard is a head of its own: ids
count from its first row, and ids of other ranks are −1.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from ..kernels import op_gather
from ..kernels.head import LMHead, Stats, chunk_tokens
from ..kernels.op_common import or_empty, or_none
from ..kernels.token_loss import ABSENT, NEG
from ..runtime import checks, tensor_checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Placement(NamedTuple):
    """The shard of this rank.

    `rows` is the size of the whole vocabulary if a DTensor states it. `weight_key` is the caller's
    tensor: the sizes of the shards are cached by its identity.
    """

    group: ProcessGroup
    position: int
    rows: int | None
    weight_key: Tensor


class Shard(NamedTuple):
    """Rows [offset, …) of a vocabulary of `rows` rows; no rank holds more than `largest`.

    offsets are those of all ranks, in their order.
    """

    group: ProcessGroup
    offset: int
    rows: int
    largest: int
    offsets: tuple[int, ...]

    def slots(self, ids: Tensor, head: LMHead) -> Tensor:
        """Ids relative to the first row of this shard; −1 in empty slots and for other ranks."""
        local = ids - self.offset
        return torch.where((local >= 0) & (local < head.vocab_size), local, -1)

    def chunk(
        self,
        head: LMHead,
        tokens: int,
        weight_grad: bool,
        size_of: Callable[[LMHead, int, bool, str], int] = chunk_tokens,
    ) -> int:
        """Return the tokens per chunk of a fused loss, computed from the largest shard.

        All ranks reduce the same chunks, so the size must not depend on this shard or GPU.
        """
        weight = head.weight.new_empty(1, 1, device="meta").expand(
            self.largest, head.weight.shape[1]
        )
        whole = head._replace(weight=weight, valid_vocab=self.largest)
        return size_of(whole, tokens, weight_grad, head.weight.device.type)

    def all_reduce(self, parts: list[Tensor], op: Any) -> list[Tensor]:
        """All-reduce of [n, ·] columns, packed into one message."""
        dist.all_reduce(packed := torch.cat(parts, -1), op, group=self.group)
        return list(packed.split([p.shape[-1] for p in parts], -1))

    def all_reduce_lse(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the log-sum-exps [n] of the whole vocabulary from those of this shard."""
        lse_nL = torch.stack(parts, -1)
        (top_nL,) = self.all_reduce([lse_nL], dist.ReduceOp.MAX)
        share_nL = torch.where(lse_nL < ABSENT, 0.0, (lse_nL - top_nL).exp())
        (sum_nL,) = self.all_reduce([share_nL], dist.ReduceOp.SUM)
        return [t.contiguous() for t in (top_nL + sum_nL.log()).unbind(-1)]

    def all_reduce_sum(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the sums over the ranks of tensors [n]."""
        columns = [t.unsqueeze(-1) for t in parts]
        return [t.squeeze(-1) for t in self.all_reduce(columns, dist.ReduceOp.SUM)]

    def combine_stats(self, local: Stats) -> Stats:
        """The statistics of the whole vocabulary from those of this shard."""
        lses = [t for t in (local.lse_rest, local.lse_base) if t is not None]
        lse_nL = torch.stack(lses, -1)
        top_nL, z_nS = self.all_reduce([lse_nL, local.z_ids], dist.ReduceOp.MAX)
        share_nL = torch.where(lse_nL < ABSENT, 0.0, (lse_nL - top_nL).exp())
        moments = [] if local.mean_rest is None else [share_nL[:, :1] * local.mean_rest[:, None]]
        sum_nL, *sums = self.all_reduce([share_nL, *moments], dist.ReduceOp.SUM)
        empty = top_nL < ABSENT
        whole_nL = torch.where(empty, NEG, top_nL + sum_nL.log())
        mean = torch.where(empty[:, 0], 0.0, sums[0][:, 0] / sum_nL[:, 0]) if sums else None
        base = None if local.lse_base is None else whole_nL[:, 1].contiguous()
        return Stats(z_nS.contiguous(), whole_nL[:, 0].contiguous(), mean, base)

    def all_reduce_grad(self, dx: Tensor) -> Tensor:
        """dX of the whole vocabulary, in the type of its parts, fp32 or fp64."""
        total = dx.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


def backend_of(impl: str, head: LMHead) -> str:
    """The implementation for this shard: the Triton kernels cannot run on padding alone."""
    return impl if head.vocab_size else "torch"


def is_dtensor(value: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes a while
    return module is not None and isinstance(value, module.DTensor)


def _local(name: str, value: Any) -> Tensor:
    """The local rows of a DTensor; their gradient flows back to it."""
    from torch.distributed.tensor import Shard as Sharded

    if tuple(value.placements) != (Sharded(0),):
        hint = f"redistribute it, or pass {name}.full_tensor() without a group"
        checks.fail(
            name, "a DTensor sharded on dim 0 over a 1-D mesh", tuple(value.placements), hint
        )
    local: Tensor = value.to_local()
    return local


def _check_group(group: Any) -> ProcessGroup:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__};"
            " of a DeviceMesh pass mesh.get_group(), and only on ranks that belong to it"
        )
    if not dist.is_initialized():
        checks.fail(
            "group",
            "a group of the running torch.distributed",
            "one while it is not initialized",
            "call init_process_group first",
        )
    return group


def distribute_head(head: LMHead, group: Any, impl: str) -> tuple[LMHead, Placement | None]:
    """Return the head with this rank's weight [V_r, H] and bias [V_r], and their placement.

    For a head that is not distributed: the head itself and None.
    """
    weight: Any = head.weight
    bias: Any = head.bias
    if group is not None:
        group = _check_group(group)
    if is_dtensor(bias) and not is_dtensor(weight):
        checks.fail("bias", "a tensor, as weight is", "a DTensor", "pass bias.to_local()")
    if group is None and not is_dtensor(weight):
        return head, None
    if torch.compiler.is_compiling():
        checks.fail(
            "group",
            "None in one graph of torch.compile",
            "a vocabulary-parallel head",
            "compile without fullgraph=True: the call then runs in eager",
        )
    if impl == "reference":
        checks.fail(
            "impl",
            "'auto', 'torch' or 'triton' with a vocabulary-parallel head",
            "'reference'",
            "gather the weight: it takes the whole head",
        )
    if not is_dtensor(weight):
        return head, Placement(group, dist.get_rank(group), None, weight)
    mesh, rows = weight.device_mesh, weight.shape[0]
    local = _local("weight", weight)
    if group is not None and group != mesh.get_group():
        checks.fail("group", "None, or the group of the weight's mesh", "another group")
    if is_dtensor(bias):
        if bias.device_mesh != mesh:
            checks.fail("bias", f"the mesh of weight, {mesh}", bias.device_mesh)
        bias = _local("bias", bias)
    placement = Placement(mesh.get_group(), mesh.get_coordinate()[0], rows, weight)
    return head._replace(weight=local, bias=bias), placement


# {weight: {(group, V_r): Shard}}. Exchanging the sizes is a collective that the host waits for: it
# runs once per weight. The key is the identity, so that all ranks hit or miss together.
_SHARDS = WeakTensorKeyDictionary()


def shard_of(placement: Placement, weight: Tensor) -> Shard:
    """The position of `weight` [V_r, H] in the vocabulary of its group."""
    known: dict[Any, Shard] = _SHARDS.setdefault(placement.weight_key, {})
    key = (placement.group, weight.shape[0])
    if key not in known:
        known[key] = _exchange_sizes(placement, weight)
    return known[key]


def _all_gather_rows(group: ProcessGroup, local: Tensor) -> list[list[int]]:
    """Return the int64 values of all ranks, in rank order."""
    rows = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, local, group=group)
    return torch.stack(rows).tolist()


def _exchange_sizes(placement: Placement, weight: Tensor) -> Shard:
    local = [placement.position, *weight.shape]
    rows = sorted(_all_gather_rows(placement.group, torch.tensor(local, device=weight.device)))
    sizes, widths = [size for _, size, _ in rows], {width for _, _, width in rows}
    if len(widths) > 1:
        checks.fail(
            "weight",
            "shape [V_r, H] with one H on every rank of the group",
            f"H = {sorted(widths)}",
        )
    if not sum(sizes):
        checks.fail(
            "weight",
            "a vocabulary of at least one row over the ranks of the group",
            f"0 rows on each of {len(sizes)}",
        )
    if placement.rows not in (None, sum(sizes)):
        checks.fail(
            "weight",
            f"shards of its {placement.rows} rows in all",
            f"{sizes}",
            "build it with distribute_tensor or pass from_local its shape",
        )
    offsets = tuple(itertools.accumulate(sizes, initial=0))[:-1]
    offset = offsets[placement.position]
    return Shard(placement.group, offset, sum(sizes), max(sizes), offsets)


def check_same_on_all_ranks(shard: Shard | None, name: str, ids: Tensor, check: bool) -> None:
    """Raise ValueError if ids or labels differ between the ranks of a group.

    Such a group shares a head but not a batch. It reads values: see `values_readable`.
    """
    if shard is None or not tensor_checks.values_readable(ids, check):
        return
    flat = ids.reshape(-1).long()
    index = torch.arange(flat.numel(), device=flat.device)
    local = torch.stack([flat.new_tensor(flat.numel()), flat.sum(), (flat * index).sum()])
    if len({tuple(row) for row in _all_gather_rows(shard.group, local)}) > 1:
        checks.fail(
            name,
            "the same on every rank of group",
            "ranks that differ",
            "group joins ranks that share a batch and split the vocabulary; ranks with "
            "batches of their own are data-parallel",
        )


def nonempty_rows(rows: Tensor) -> Tensor:
    """Pad a shard without rows to one row, since kernels index it; valid_vocab excludes it."""
    return rows if rows.shape[0] else F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, 1])


class _Replicated(torch.autograd.Function):
    """The same hidden states on every rank, widened to fp32 or fp64.

    Their gradient is summed over the ranks in that type and rounded once to their own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.shard, ctx.type = shard, x.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.view_as(x) if wide == x.dtype else x.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.shard.all_reduce_grad(grad).to(ctx.type), None


class _Combined(torch.autograd.Function):
    """Statistics of a shard to statistics of the whole vocabulary.

    Upstream gradients are the same on every rank. With w = e^{L_r − lse_rest},

    dL_r = w · (g_lse + g_mean · (m_r − mean_rest)),   dm_r = w · g_mean,   dz_r = g_z if held
    """

    @staticmethod
    def forward(
        ctx: Any, shard: Shard, z: Tensor, lse: Tensor, mean: Tensor, base: Tensor
    ) -> tuple[Tensor, ...]:
        whole = shard.combine_stats(Stats(z, lse, or_none(mean), or_none(base)))
        share = torch.where(lse < ABSENT, 0.0, (lse - whole.lse_rest).exp())
        off_mean = mean if whole.mean_rest is None else mean - whole.mean_rest
        base_share = base
        if whole.lse_base is not None:
            base_share = torch.where(base < ABSENT, 0.0, (base - whole.lse_base).exp())
        ctx.save_for_backward(z < ABSENT, share, off_mean, base_share)
        rest = (or_empty(t, z) for t in (whole.mean_rest, whole.lse_base))
        return whole.z_ids, whole.lse_rest, *rest

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_z: Tensor, g_lse: Tensor, g_mean: Tensor, g_base: Tensor
    ) -> tuple[Any, ...]:
        absent, share, off_mean, base_share = ctx.saved_tensors
        on_lse, on_mean = g_lse, g_mean
        if off_mean.numel():
            on_lse, on_mean = g_lse + g_mean * off_mean, g_mean * share
        on_base = g_base * base_share
        return None, g_z.masked_fill(absent, 0.0), on_lse * share, on_mean, on_base


class _CombinedSlots(torch.autograd.Function):
    """The logits of the slots alone; each is held by one rank."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, z: Tensor) -> Tensor:
        ctx.save_for_backward(z < ABSENT)
        return shard.all_reduce([z], dist.ReduceOp.MAX)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, grad.masked_fill(ctx.saved_tensors[0], 0.0)


def lse_gather(
    x: Tensor, head: LMHead, ids: Tensor, moment: bool, base: bool, impl: str, shard: Shard | None
) -> tuple[Tensor, ...]:
    """(z_ids, lse_rest, mean_rest, lse_base) over the whole vocabulary, differentiable.

    The last two are empty unless requested. Ids are global.
    """
    scalars = head.scalars() | {"moment": moment, "base": base}
    if shard is None:
        return tuple(op_gather.lse_gather(x, head.weight, head.bias, ids, impl=impl, **scalars))
    local, impl = shard.slots(ids, head), backend_of(impl, head)
    x = _Replicated.apply(x, shard)  # type: ignore[no-untyped-call]
    stats = op_gather.lse_gather(x, head.weight, head.bias, local, impl=impl, **scalars)
    return tuple(_Combined.apply(shard, *stats))  # type: ignore[no-untyped-call]


def gather_logits(x: Tensor, head: LMHead, ids: Tensor, impl: str, shard: Shard | None) -> Tensor:
    """z at global ids [N, K], NEG in empty slots, without a pass over the head."""
    scalars = head.scalars()
    z: Tensor
    if shard is None:
        z = op_gather.gather_logits(x, head.weight, head.bias, ids, impl=impl, **scalars)
        return z
    local, impl = shard.slots(ids, head), backend_of(impl, head)
    x = _Replicated.apply(x, shard)  # type: ignore[no-untyped-call]
    z = op_gather.gather_logits(x, head.weight, head.bias, local, impl=impl, **scalars)
    z = _CombinedSlots.apply(shard, z)  # type: ignore[no-untyped-call]
    return z
