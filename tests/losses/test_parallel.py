"""Two processes, each with its part of the vocabulary, make the results and gradients of one.

Each of CHECKS runs once in both processes of one pair; its test reports what it found.
"""

from __future__ import annotations

import json
import os
import traceback
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import fastdistill as fd
from fastdistill.kernels import head as heads
from fastdistill.kernels.divergences import NAMES
from fastdistill.kernels.token_loss import TAILS
from helpers.cases import PAIRS, case, leaves, top_k
from helpers.interpreter import patch_language_once_a_launch
from helpers.present import present
from helpers.tolerances import GRADIENT, VALUE, relative

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="no c10d")]

IMPLS = ["torch", "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["torch"]
CUTS = [40, 53, 66, 67]  # of 67 rows, those of the first rank


class Ranks:
    """One of the two processes; what disagrees is noted, so that both stay in step."""

    def __init__(self, rank: int) -> None:
        self.rank, self.group = rank, dist.group.WORLD
        self.failures: list[str] = []

    def rows(self, whole, cut: int = 40):
        return whole[:cut] if self.rank == 0 else whole[cut:]

    def close(self, what: str, actual, truth, budget: float) -> None:
        if (error := relative(actual, truth)) > budget or not actual.isfinite().all():
            self.failures.append(f"{what}: relative error {error:.3g} > {budget:.3g}")

    def refused(self, words: str, call, *args, **options) -> None:
        try:
            call(*args, **options)
            self.failures.append(f"not refused: {words}")
        except Exception as error:
            if words not in str(error):
                self.failures.append(f"expected {words!r}, got {error}")

    def same(self, what: str, call, c, cut: int = 40, impl: str = "torch") -> None:
        """call(x, w, b, **where) -> tensors, with shards of the head and in fp64 with the whole."""
        dtype = c.hidden.dtype
        ours = leaves(c.hidden, self.rows(c.weight, cut), self.rows(c.bias, cut))
        whole = leaves(c.hidden, c.weight, c.bias, dtype=torch.float64)
        actual, truth = call(*ours, group=self.group, impl=impl), call(*whole, impl="torch")
        for a, t in zip(actual, truth, strict=True):
            self.close(what, a, t, VALUE[dtype])
        for outputs in (actual, truth):
            g = torch.Generator().manual_seed(5)
            up = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in outputs]
            if dtype.itemsize == 2 and not outputs[0].dim():
                up[0].fill_(1)  # another factor would round the kept gradients once more
            wanted = [(t, u.to(t)) for t, u in zip(outputs, up, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in wanted], [u for _, u in wanted])
        for name, a, t in zip(("hidden", "weight", "bias"), ours, whole, strict=True):
            # The other rank's rows: an error counts against the whole.
            grad = present(t.grad).clone()
            (grad if name == "hidden" else self.rows(grad, cut)).copy_(present(a.grad))
            self.close(f"{what} {name}.grad", grad, t.grad, GRADIENT[dtype])


def primitive(r: Ranks) -> None:
    """Repeated and empty slots, padding, shards that are all padding, ids that cover a shard."""
    traps = torch.randint(30, (12, 6), generator=torch.Generator().manual_seed(3))
    traps[:, 2], traps[1, 1], traps[4] = traps[:, 0], -1, -1
    many, all_of_it = (torch.arange(k).expand(12, k) for k in (40, 67))
    shaped = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 2.0}
    padded = [(traps, {"valid_vocab": v}) for v in (53, 30)]
    for ids, head in [*padded, (traps, shaped), (many, shaped), (all_of_it, {})]:

        def call(x, w, b, ids=ids, head=head, **where):
            out = fd.linear_lse_gather(x, w, ids, bias=b, with_entropy=True, **head, **where)
            rest = [] if ids is all_of_it else [out.lse_rest]
            return out.logits.masked_fill(ids < 0, 0), out.entropy, out.lse, *rest

        for cut, impl in product(CUTS, IMPLS):
            r.same(f"{impl} {cut} {ids.shape[1]} {head}", call, case(torch.float64), cut, impl)
        r.same(f"bfloat16 {ids.shape[1]} {head}", call, case(torch.bfloat16))


def distil(teacher, **options):
    """topk_distill and its statistics, as a call."""

    def call(x, w, b, **where):
        out = fd.topk_distill(x, w, teacher, bias=b, allow_biased=True, **options, **where)
        return [t for t in out if t is not None]

    return call


def everything(c, **options):
    """The same with every option that changes a number, and ignored labels."""
    labels = c.labels.clone()
    labels[[0, 5]] = -100
    weights = torch.rand(12, generator=torch.Generator().manual_seed(2)) + 0.5
    options |= {
        "temperature": 1.5,
        "t2_scale": True,
        "labels": labels,
        "ce_weight": 0.3,
        "z_loss": 1e-3,
        "beta": 0.3,
        "skew": 0.2,
        "softcap": 20.0,
        "logit_scale": 0.8,
        "token_weight": weights,
    }
    return distil(top_k(c.teacher_logits, 7, 1.5), **options)


def by_hand(log_p, log_q):
    return (log_q.exp() * (log_q - log_p).square()).sum(-1)


def every_divergence_and_tail(r: Ranks) -> None:
    c, t = case(torch.float64), top_k(case().teacher_logits, 7)
    pairs = [*PAIRS, *((by_hand, tail) for tail in TAILS)]
    for (divergence, tail), way in product(pairs, ("fused", "recompute")):
        options = {"divergence": divergence, "tail": tail, "backward": way}
        r.same(f"everything {options}", everything(c, **options), c)
        r.same(f"{options}", distil(t, **options), c)


def every_dtype_backend_and_cut(r: Ranks) -> None:
    for impl, dtype in product(IMPLS, (torch.float64, torch.bfloat16, torch.float16)):
        c = case(dtype)
        for tail, cut, divergence in zip(TAILS, CUTS, NAMES[:4], strict=True):
            for reduction in ("sum", "none"):
                call = everything(c, tail=tail, divergence=divergence, reduction=reduction)
                r.same(f"{impl} {dtype} {tail} {cut} {reduction}", call, c, cut, impl)


def parts_beyond_16_bits(r: Ranks) -> None:
    """A channel of W near 1000, which all tokens share: the ranks' parts of dX go beyond float16
    and cancel in their sum. Tokens agree on their teacher, and the loss is scaled."""
    c = case(torch.float64)
    w, x = c.weight / 8, c.hidden.clone()
    w[:, 1], x[:, 1], w[5, 1] = 1000.0, 1e-3, 1000.5
    ids = torch.tensor([5, 50, 7]).expand(12, 3).contiguous()
    t = fd.TopK(ids, torch.tensor([0.6, 0.3, 0.05]).log().expand(12, 3).contiguous())

    def primitive_of(x, w, b, **where):
        out = fd.linear_lse_gather(x, w, ids, bias=b, with_entropy=True, **where)
        return out.lse - out.logits[:, 0] + present(out.entropy) / 8

    def loss_with(**options):
        return lambda x, w, b, **where: fd.topk_distill_loss(x, w, t, bias=b, **options, **where)

    calls = {
        "primitive": primitive_of,
        "fused": loss_with(backward="fused"),
        "recompute": loss_with(backward="recompute"),
        "none": loss_with(reduction="none"),
        "rows alone": loss_with(tail="renorm_both"),
        "callable": loss_with(divergence=by_hand, backward="recompute"),
    }
    low = [v.half() for v in (x, w, c.bias)]
    for impl, (what, call) in product(IMPLS, calls.items()):
        ours = leaves(low[0], r.rows(low[1]), r.rows(low[2]))
        whole = leaves(*low, dtype=torch.float64)
        (call(*ours, group=r.group, impl=impl).sum() * 512).backward()
        (call(*whole, impl="torch").sum() * 512).backward()
        # GPUs multiply a dz that is rounded to float16, and the channel is a sum of roundings.
        budget = 0.15 if impl == "triton" else GRADIENT[torch.float16]
        r.close(f"{impl} {what}", ours[0].grad, whole[0].grad, budget)


def many_chunks(r: Ranks) -> None:
    """Left alone, the small shard would take more tokens at once than the large one."""
    c, before = case(torch.float64, N=220, V=1000), heads.CHUNK_BYTES
    heads.CHUNK_BYTES = before | {"cpu": (0, 1 << 19)}
    call = distil(top_k(c.teacher_logits, 7), labels=c.labels)
    for cut in (900, 100):
        rows = r.rows(c.weight, cut)
        tokens = heads.chunk_tokens(heads.LMHead(rows), 220, True)
        if (tokens < 110) != (len(rows) == 900):
            r.failures.append(f"{len(rows)} rows take {tokens} tokens: nothing is tested")
        r.same(f"cut at {cut}", call, c, cut)
    heads.CHUNK_BYTES = before


def nothing_counts_and_frozen_parts(r: Ranks) -> None:
    c = case(torch.float64)
    x, w, y, v = leaves(c.hidden, r.rows(c.weight), c.hidden, c.weight)
    t = top_k(c.teacher_logits, 5)
    loss = fd.topk_distill_loss(x, w, t, labels=torch.full((12,), -100), group=r.group)
    empty = fd.linear_lse_gather(x[:0], w, t.ids[:0], with_entropy=True, group=r.group)
    (loss + empty.lse.sum()).backward()
    if loss or present(x.grad).any() or present(w.grad).any():
        r.failures.append("no position counts, and still something is not 0")
    fd.topk_distill_loss(y, v, t).backward()
    for backward in ("fused", "recompute"):
        x.grad = w.grad = None
        module = fd.TopKDistillLoss(backward=backward, group=r.group)
        (module(x, w.detach(), t) + module(c.hidden, w, t)).backward()
        r.close(f"{backward} hidden", x.grad, y.grad, 1e-10)
        r.close(f"{backward} weight", w.grad, r.rows(v.grad), 1e-10)


def heads_of_nearly_the_same_size(r: Ranks) -> None:
    """One rank's shard is as long as before, the other's is not: both have to ask again."""
    for V in (67, 66, 68):
        c = case(torch.float64, V=V)
        r.same(f"{V} rows", distil(top_k(c.teacher_logits, 5)), c, 34)


def dtensor_heads(r: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    c, mesh = case(torch.float64), init_device_mesh("cpu", (2,))
    t, loss, another = top_k(c.teacher_logits, 5), fd.topk_distill_loss, dist.new_group([0, 1])
    for backward in ("fused", "recompute"):
        x, y, v, d = leaves(c.hidden, c.hidden, c.weight, c.bias)
        heads = [distribute_tensor(p, mesh, [Shard(0)]).requires_grad_() for p in c[1:3]]
        w, b = cast(Any, heads)  # a DTensor, and so is its gradient
        loss(x, w, t, bias=b, backward=backward).backward()
        loss(y, v, t, bias=d).backward()
        r.close(f"{backward} hidden", x.grad, y.grad, 1e-10)
        for a, e in ((w, v), (b, d)):
            if a.grad.placements != a.placements or a.grad.shape != a.shape:
                r.failures.append(f"the gradient is not sharded as its head: {a.grad}")
            r.close(f"{backward} {a.shape}", a.grad.full_tensor(), e.grad, 1e-10)
    for other in (Replicate(), Shard(1)):
        words = f"weight: expected a DTensor sharded on dim 0 over a 1-D mesh, got {(other,)}"
        r.refused(words, loss, x, distribute_tensor(c.weight, mesh, [other]), t)
    r.refused("weight: expected a plain tensor, got a DTensor; pass w", fd.linear_topk, x, w, 3)
    r.refused("bias: expected a tensor, as weight is", loss, x, c.weight, t, bias=b)
    r.refused("group: expected None, or the group of", loss, x, w, t, group=another)


def dense_teachers(r: Ranks) -> None:
    """Two heads that are split at the same rows; some shards are all padding."""
    c, g = case(torch.float64), torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 9, generator=g).double() for n in (12, 67))
    labels = c.labels.clamp(max=29)
    labels[[0, 5]] = -100
    options: dict[str, Any] = {
        "labels": labels,
        "ce_weight": 0.3,
        "z_loss": 1e-3,
        "temperature": 1.5,
        "token_weight": torch.linspace(0.5, 2, 12).double(),
    }
    shapes = product(("jsd", "nla", "lk_hybrid"), ("mean", "none"), IMPLS)
    for cut, (name, reduction, impl) in zip(2 * [*CUTS, 40, 53], shapes, strict=False):
        where = {"divergence": name, "reduction": reduction, "valid_vocab": 67 if cut > 53 else 30}

        def call(x, w, b, group=None, cut=cut, where=where, **impl):
            rows = weight if group is None else r.rows(weight, cut)
            of = options | where | impl
            return [fd.linear_distill_loss(x, w, hidden, rows, bias=b, group=group, **of)]

        r.same(f"{impl} {cut} {where}", call, c, cut, impl)
    loss = partial(fd.linear_distill_loss, c.hidden, r.rows(c.weight), hidden, group=r.group)
    rows, other = r.rows(weight), r.rows(weight, 41)
    r.refused("k: expected None with group", loss, rows, k=3)
    r.refused("divergence: expected a name with group", loss, rows, divergence=by_hand)
    r.refused("divergence: expected another than 'argmax", loss, rows, divergence="argmax_ce")
    r.refused("teacher_weight: expected shards from rows [0, 40], as those", loss, other)


def refusals(r: Ranks) -> None:
    c, t = case(torch.float64), top_k(case().teacher_logits, 5)
    x, w, loss = c.hidden, r.rows(c.weight), partial(fd.topk_distill_loss, group=r.group)
    gather = partial(fd.linear_lse_gather, group=r.group)
    outside, other, H = t.ids - t.ids.max() + 67, t.ids.roll(r.rank, 0), 8 + r.rank
    r.refused("impl: expected 'auto', 'torch' or 'triton' with", loss, x, w, t, impl="reference")
    r.refused("ids: expected ids in 0..66", loss, x, w, t._replace(ids=outside))
    r.refused("ids: expected K ≤ V = 67, got K = 68", gather, x, w, torch.zeros(12, 68).long())
    r.refused("valid_vocab: expected an integer in 1..67", loss, x, w, t, valid_vocab=68)
    r.refused("weight: expected a vocabulary of at least one row", loss, x, w[:0], t)
    r.refused("expected shape [V_r, H] with one H on every", loss, x[:, :H], w[:, :H], t)
    r.refused("ids: expected the same on every rank", loss, x, w, t._replace(ids=other))
    r.refused("labels: expected the same on every rank", loss, x, w, t, labels=other[:, 0])
    compiled = torch.compile(lambda: gather(x, w, t.ids), fullgraph=True, backend="eager")
    r.refused("group: expected None in one graph of torch.compile", compiled)


CHECKS = [
    primitive,
    every_divergence_and_tail,
    every_dtype_backend_and_cut,
    many_chunks,
    dtensor_heads,
    parts_beyond_16_bits,
    nothing_counts_and_frozen_parts,
    heads_of_nearly_the_same_size,
    dense_teachers,
    refusals,
]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if "triton" in IMPLS:
        patch_language_once_a_launch()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory: Any = torch.utils.deterministic  # its attributes are set at run time
    memory.fill_uninitialized_memory = True
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    failures = {}
    for run in CHECKS:
        ranks = Ranks(rank)
        try:
            run(ranks)
        except Exception:
            ranks.failures.append(traceback.format_exc())
        failures[run.__name__] = ranks.failures
        dist.barrier()
    dist.destroy_process_group()
    ones = torch.ones(2, 3)
    late = partial(fd.linear_lse_gather, ones, ones, torch.zeros(2, 1).long())
    ranks.refused("group: expected a group of the running torch", late, group=ranks.group)
    (folder / f"{rank}.json").write_text(json.dumps(failures))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    spawn(work, (folder,), nprocs=2, daemon=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", [run.__name__ for run in CHECKS])
def test_two_processes_are_one(name, pair):
    assert [failures[name] for failures in pair] == [[], []]
