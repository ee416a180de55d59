"""Calls at the main shape for test_counted, and the memory that they take."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill.kernels import dense_loss, lse_gather, topk, topk_loss
from fastdistill.kernels.head import Stats
from fastdistill.kernels.token_loss import LossOptions
from fastdistill.losses.arguments import to_teacher_rows

N, H, V, K = 8192, 4096, 128256, 64


OPTIONS = LossOptions()


NEED: dict[str, Any] = {"need_hidden": True, "need_weight": True, "need_bias": False}


class Alive(TorchDispatchMode):
    """Bytes of storages that operations made and that still live; the peak of it."""

    def __init__(self, *tensors):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


class Products(TorchDispatchMode):
    """FLOPs of the matrix products."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm, torch.ops.fastdistill.bf16_product)
        if function.overloadpacket in products:
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        return function(*args, **(kwargs or {}))


def fused(e, h, x, t, coef):
    p = to_teacher_rows(t, OPTIONS).teacher
    out = topk_loss.fused(e, h, x, p.ids, p, None, coef, OPTIONS, base=False, entropy=False, **NEED)
    return out.dx, out.dw


def recompute(e, h, x, t, coef):
    stats = lse_gather.lse_gather(e, h, x, t.ids, moment=False, base=False)
    upstream = Stats(torch.empty_like(stats.z_ids), coef, None, None)
    return e.recompute(h, x, t.ids, stats, upstream, **NEED, hidden_type=x.dtype)[:2]


def streamed_topk(e, h, x, t, coef):
    topk.topk(e, h, x, K, (1.0,))
    return ()


def dense(e, h, x, t, coef):
    return dense_with(OPTIONS, e, h, x, coef)


def draft(e, h, x, t, coef):
    return dense_with(LossOptions("lk_hybrid"), e, h, x, coef)


def dense_with(options, e, h, x, coef):
    out = dense_loss.dense(e, h, x, dense_loss.DenseTeacher(h, x), None, coef, options, **NEED)
    return out.dx, out.dw
