"""Alternatives: eager and compiled PyTorch, and other libraries if installed.

Each takes the data of a case and returns a loss, or outputs by name in forward mode. A library is
imported when its contender runs. It raises Missing if it is not installed, and BrokenPeer if it is
installed but cannot be imported or called.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Data
from .packages import installed
from .registry import BrokenPeer, Compute, Contender, Missing

BETA = 0.5
LIGER = "liger-kernel"


def named(package: str, module: str, name: str) -> Any:
    """An attribute of an optional package."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        installed_version = installed(package)
        if installed_version is None:
            raise Missing(f"{package}: {error}") from None
        raise BrokenPeer(
            f"{package} {installed_version} is installed and lacks {module}.{name}: {error}"
        ) from error


def logits(data: Data) -> Tensor:
    """Logits in the dtype of the model, as a model returns them, then widened."""
    return (data.hidden @ data.weight.t()).float()


def teacher_logits(data: Data) -> Tensor:
    assert data.teacher_hidden is not None
    assert data.teacher_weight is not None
    return (data.teacher_hidden @ data.teacher_weight.t()).float()


def topk_loss(data: Data) -> Tensor:
    """log_softmax of fp32 logits, K gathered, the tail from 1 − Σ."""
    assert data.teacher is not None
    log_p, log_p_tail = data.teacher.logprobs, data.teacher.log_tail
    assert log_p_tail is not None
    log_q = F.log_softmax(logits(data), -1).gather(-1, data.teacher.ids)
    log_q_tail = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) + log_p_tail.exp() * (log_p_tail - log_q_tail)
    return kl.mean()


def renorm_both(data: Data) -> Tensor:
    assert data.teacher is not None
    log_p = F.log_softmax(data.teacher.logprobs, -1)
    log_q = F.log_softmax(logits(data).gather(-1, data.teacher.ids), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def label_loss(data: Data) -> Tensor:
    return F.cross_entropy(logits(data), data.labels)


def dense_loss(data: Data) -> Tensor:
    log_q, log_p = logits(data).log_softmax(-1), teacher_logits(data).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def dense_jsd(data: Data) -> Tensor:
    log_q, log_p = logits(data).log_softmax(-1), teacher_logits(data).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(BETA), log_q + math.log(1 - BETA))
    of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return BETA * of_p + (1 - BETA) * of_q


def scoring(data: Data) -> dict[str, Tensor]:
    """All fields of token_scores from one materialized log-softmax."""
    assert data.teacher is not None
    log_p, log_p_tail = data.teacher.logprobs, data.teacher.log_tail
    assert log_p_tail is not None
    z = logits(data)
    lse = z.logsumexp(-1)
    log_q = z - lse.unsqueeze(-1)
    q = log_q.exp()
    entropy = -(q * log_q).sum(-1)
    best = log_q.topk(2, -1)
    of_label = log_q.gather(-1, data.labels.unsqueeze(-1))
    known = log_q.gather(-1, data.teacher.ids)
    mass = known.exp().sum(-1)
    tail = torch.log1p(-mass.clamp(max=1 - 1e-6))
    overlap = (0.5 * (log_p + known)).exp().sum(-1) + (0.5 * (log_p_tail + tail)).exp()
    return {
        "lse": lse,
        "entropy": entropy,
        "varentropy": (q * (log_q + entropy.unsqueeze(-1)).square()).sum(-1),
        "max_logprob": best.values[:, 0],
        "argmax": best.indices[:, 0],
        "margin": best.values[:, 0] - best.values[:, 1],
        "nll": -of_label[:, 0],
        "label_rank": (log_q > of_label).sum(-1),
        "forward_kl": (log_p.exp() * (log_p - known)).sum(-1)
        + log_p_tail.exp() * (log_p_tail - tail),
        "teacher_mass": log_p.exp().sum(-1),
        "student_mass": mass,
        "hellinger": (1 - overlap).clamp(min=0).sqrt(),
        "acceptance_rate": torch.minimum(log_p, known).exp().sum(-1)
        + torch.minimum(log_p_tail, tail).exp(),
    }


def head_product(data: Data) -> dict[str, Tensor]:
    """The product with the head alone: logits in the type of the head."""
    return {"logits": F.linear(data.hidden, data.weight)}


def linear_topk(data: Data, k: int) -> dict[str, Tensor]:
    z = logits(data)
    lse = z.logsumexp(-1, keepdim=True)
    best = z.topk(k, -1)
    rest = z.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return {
        "ids": best.indices,
        "logprobs": best.values - lse,
        "log_tail": rest - lse.squeeze(-1),
    }


def linear_cross_entropy(data: Data) -> Tensor:
    """PyTorch's operator, with its default chunking."""
    call = named("torch", "torch.nn.functional", "linear_cross_entropy")
    options = named("torch", "torch.nn", "LinearCrossEntropyOptions")()
    return call(data.hidden, data.weight, data.labels, options=options)


def cut_cross_entropy(data: Data) -> Tensor:
    call = named("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    return call(data.hidden, data.weight, data.labels)


def liger_cross_entropy(data: Data) -> Tensor:
    loss = named("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")
    return loss()(data.weight, data.hidden, data.labels)


def liger_fused_jsd(data: Data, beta: float) -> Tensor:
    loss = named("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=beta)
    return loss(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight, None)


def liger_chunked_jsd(data: Data, beta: float) -> Tensor:
    """The soft loss alone; the API requires labels."""
    make = named("liger-kernel", "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    loss = make(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)
    return loss(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight, data.labels)


def liger_kl_div(data: Data) -> Tensor:
    """A kernel over materialized log-probabilities of both models."""
    make = named("liger-kernel", "liger_kernel.transformers", "LigerKLDIVLoss")
    log_q, log_p = logits(data).log_softmax(-1), teacher_logits(data).log_softmax(-1)
    return make(reduction="batchmean", log_target=True)(log_q, log_p)


def trl_chunked(data: Data, beta: float) -> Tensor:
    call = named("trl", "trl.trainer.distillation_trainer", "_chunked_divergence_loss")
    assert data.teacher_hidden is not None
    outputs = call(
        student_hidden_states=data.hidden.unsqueeze(0),
        teacher_hidden_states=data.teacher_hidden.unsqueeze(0),
        student_lm_head_weight=data.weight,
        teacher_lm_head_weight=data.teacher_weight,
        completion_mask=data.labels.new_ones(1, data.hidden.shape[0]),
        beta=beta,
    )
    return outputs[0]


@functools.cache
def _compiled(function: Any) -> Any:
    # Above the recompile limit a function silently runs eagerly unless fullgraph is set.
    return torch.compile(function, dynamic=False, fullgraph=True)


def pytorch(compute: Any) -> tuple[Contender, Contender]:
    """The same function, eager and compiled."""

    def compiled(data: Data) -> Any:
        return _compiled(compute)(data)

    return (
        Contender("eager", compute, exact=False),
        Contender("compiled", compiled, exact=False, compiles=True),
    )


def peer(impl: str, compute: Compute, package: str = "", compiles: bool = False) -> Contender:
    return Contender(impl, compute, exact=False, compiles=compiles, package=package)


LABEL = (
    peer("F.linear_cross_entropy", linear_cross_entropy, "torch"),
    peer("cut-cross-entropy", cut_cross_entropy, "cut-cross-entropy"),
    peer("Liger fused CE", liger_cross_entropy, LIGER),
)
DENSE_KL = (
    peer("Liger KL-div", liger_kl_div, LIGER),
    peer("Liger fused JSD, β=0", functools.partial(liger_fused_jsd, beta=0.0), LIGER),
    peer("TRL chunked, β=0", functools.partial(trl_chunked, beta=0.0), "trl"),
)
DENSE_JSD = (
    peer("Liger fused JSD", functools.partial(liger_fused_jsd, beta=BETA), LIGER),
    # Compiles its chunks by default; measured with its defaults.
    peer(
        "Liger chunked JSD", functools.partial(liger_chunked_jsd, beta=BETA), LIGER, compiles=True
    ),
    peer("TRL chunked", functools.partial(trl_chunked, beta=BETA), "trl"),
)
