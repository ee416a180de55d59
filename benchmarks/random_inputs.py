"""Random calls of the losses for benchmarks.random_losses: shapes, options and tensors.

A group is BATCH calls with the same shape and options and different tensors, so that their truth is
computed at once. It is a function of (seed, index) alone.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.kernels.divergences import NAMES, minimum_of
from fastdistill.kernels.token_loss import TAILS

BATCH = 8
DTYPES = {torch.float32: 35, torch.bfloat16: 25, torch.float16: 20, torch.float64: 20}
KINDS = {"topk": 70, "dense": 15, "scores": 10, "linear_topk": 5}
WIDTHS = (0.0, 1e-3, 0.3, 1.0, 1.0, 4.0, 4.0, 12.0, 40.0, 200.0, 1e3, 1e4)
LARGEST_FP16 = 6e4


def squared_difference(lp: Tensor, lq: Tensor) -> Tensor:
    """A callable divergence: Σ (p − q)²."""
    return (lp.exp() - lq.exp()).square().sum(-1)


class Group(NamedTuple):
    kind: str
    dtype: torch.dtype
    hidden: Tensor  # [B, N, H]
    weight: Tensor  # [B, V, H], with padding rows from valid_vocab on
    bias: Tensor | None
    labels: Tensor | None
    token_weight: Tensor | None
    ids: Tensor  # [B, N, K]
    logprobs: Tensor
    log_tail: Tensor | None
    taken_at: float  # temperature of the teacher
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_head: dict[str, Any]
    head: dict[str, Any]  # logit_scale, softcap, valid_vocab
    options: dict[str, Any]
    reduction: str
    upstream: float
    k: int


def weighted(rng: random.Random, choices: dict[Any, int]) -> Any:
    return rng.choices(list(choices), list(choices.values()))[0]


def temperature(rng: random.Random) -> float:
    if rng.random() < 0.5:
        return 1.0
    return rng.choice((0.01, 0.1, 0.5, 2.0, 7.0, 100.0, 10 ** rng.uniform(-2, 2)))


def options(rng: random.Random, kind: str) -> dict[str, Any]:
    T = temperature(rng)
    while True:
        name = rng.choice((*NAMES, squared_difference))
        beta, skew = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)), rng.choice((0.0, 0.01, 0.1, 0.5, 0.9))
        tail = "bucket" if kind == "dense" else rng.choice(TAILS)
        if minimum_of(name, beta, skew, tail) is not None:
            break
    return {
        "divergence": name,
        "beta": beta,
        "skew": skew,
        "eta": rng.choice((0.0, 3.0, 10.0)),
        "tail": tail,
        "temperature": T,
        "t2_scale": rng.random() < 0.3,
        "ce_weight": rng.choice((0.0, 0.0, 0.3, 1.0)),
        "z_loss": rng.choice((0.0, 0.0, 1e-3)),
    }


def head(rng: random.Random, V: int) -> dict[str, Any]:
    return {
        "logit_scale": rng.choice((1.0, 1.0, 1.0, 0.1, 7.0, -1.0)),
        "softcap": rng.choice((None, None, None, 30.0, 1.0, 1e-3, 1e4)),
        "valid_vocab": rng.randint(1, V) if rng.random() < 0.2 else None,
    }


def draw(seed: int, index: int) -> Group:
    rng = random.Random(f"{seed} {index}")
    g = torch.Generator().manual_seed(rng.getrandbits(60))
    kind, dtype = weighted(rng, KINDS), weighted(rng, DTYPES)
    N, H = rng.choice((1, 1, 2, 3, 4, 5, 7)), rng.choice((1, 2, 3, 5, 8, 16, 17, 33))
    V = rng.choice((2, 3, 5, 17, 31, 64, 65, 80, 127)) if rng.random() < 0.95 else 400
    o, of_head = options(rng, kind), head(rng, V)
    vocab = of_head["valid_vocab"] or V
    K = rng.choice((1, 2, 3, 5, 8, 16, vocab))
    K = max(1, min(K, vocab))
    if o["tail"] == "renorm_both" and K == 1:
        o["tail"] = "bucket"

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=g, dtype=torch.float64)

    def stored(t: Tensor) -> Tensor:
        limit = LARGEST_FP16 if dtype == torch.float16 else torch.inf
        return t.clamp(-limit, limit).to(dtype)

    def width() -> float:
        return rng.choice(WIDTHS) / abs(of_head["logit_scale"])

    hidden = stored(normal(N, H))
    weight = normal(V, H) * width() / H**0.5
    if rng.random() < 0.2:  # rows that share a direction
        weight = weight + 3 * weight.std() * normal(1, H)
    weight = stored(weight)
    bias = None
    if rng.random() < 0.4:
        bias = normal(V) * rng.choice((0.1, 3.0))
        infinite = rng.random() < 0.3 and of_head["logit_scale"] > 0
        if infinite and vocab > 1:
            lost = torch.rand(BATCH, V, generator=g) < 0.3
            lost[:, 0] = False
            bias = bias.masked_fill(lost, -torch.inf)
        bias = bias.to(dtype if dtype != torch.float16 or not infinite else torch.float32)
    labels = None
    if rng.random() < 0.6 or o["ce_weight"]:
        labels = torch.randint(vocab, (BATCH, N), generator=g)
        masked = rng.choice((0.0, 0.0, 0.3, 1.0))
        labels[torch.rand(BATCH, N, generator=g) < masked] = -100
    token_weight = None
    if rng.random() < 0.5:
        token_weight = normal(N) * rng.choice((1.0, 1.0, 1e-6, 1e12 if kind == "topk" else 1.0))
        token_weight[torch.rand(BATCH, N, generator=g) < 0.2] = 0.0
        token_weight = token_weight.float()
    G = rng.choice((1, 4, H))
    teacher_hidden, teacher_weight = stored(normal(N, G)), normal(V, G) * rng.choice(WIDTHS[1:])
    near = rng.choice((None, 0.0, 1e-6, 1e-3, 0.1, 1.0)) if kind == "dense" else None
    teacher_head = {"teacher_logit_scale": 1.0, "teacher_softcap": rng.choice((None, None, 30.0))}
    if near is not None:  # the student's own, plus noise
        teacher_hidden = hidden.clone()
        teacher_weight = weight.double() * (1 + near * normal(V, H))
        teacher_head = {
            "teacher_logit_scale": of_head["logit_scale"],
            "teacher_softcap": of_head["softcap"],
        }
    teacher_weight = stored(teacher_weight)
    taken_at = o["temperature"]
    if o["tail"] == "renorm_both" and rng.random() < 0.3:
        taken_at = temperature(rng)
    z = student_logits(hidden, weight, bias, of_head, vocab) / taken_at
    ids, logprobs, log_tail = answers(rng, g, z, K, o)
    return Group(
        kind, dtype, hidden, weight, bias, labels, token_weight, ids, logprobs, log_tail, taken_at,
        teacher_hidden, teacher_weight, teacher_head, of_head, o,
        rng.choice(("mean", "mean", "sum", "none")),
        rng.choice((1.0, 1.0, 2.0**16, 2.0**-10, -3.5)),
        K,
    )  # fmt: skip


def student_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, of_head: dict[str, Any], vocab: int
) -> Tensor:
    s = hidden.double() @ weight[:, :vocab].double().mT
    s = (s if bias is None else s + bias[:, None, :vocab].double()) * of_head["logit_scale"]
    return s if of_head["softcap"] is None else of_head["softcap"] * (s / of_head["softcap"]).tanh()


def answers(
    rng: random.Random, g: torch.Generator, z: Tensor, K: int, o: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A teacher's ids, log-probabilities and tail: near the student, or with any ids."""
    B, N, V = z.shape
    near = rng.choice((None, None, 0.0, 1e-6, 1e-3, 0.1, 1.0))
    if near is not None and z.isfinite().all():
        noise = torch.randn(z.shape, generator=g, dtype=torch.float64)
        lp = (z + near * noise).log_softmax(-1)
        if rng.random() < 0.7:
            ids = lp.topk(K, -1).indices
        else:
            ids = torch.rand(z.shape, generator=g).topk(K, -1).indices
        logprobs = lp.gather(-1, ids)
        log_tail = lp.scatter(-1, ids, -torch.inf).logsumexp(-1)
    else:
        columns = torch.randn(B, N, K + 1, generator=g, dtype=torch.float64)
        lp = (columns * rng.choice((0.3, 1.0, 4.0, 12.0, 40.0, 100.0, 1e3))).log_softmax(-1)
        logprobs, log_tail = lp[..., :K], lp[..., K]
        if rng.random() < 0.5:  # distinct
            ids = torch.rand(B, N, V, generator=g).topk(K, -1).indices
        else:  # Zipf's law, with repeats
            rank = torch.arange(1, V + 1, dtype=torch.float64)
            ids = torch.multinomial(1 / rank, B * N * K, replacement=True, generator=g)
            ids = ids.view(B, N, K)
        if rng.random() < 0.3:
            empty = torch.rand(B, N, K, generator=g) < rng.choice((0.2, 0.5, 1.0))
            moved = logprobs.masked_fill(~empty, -torch.inf).logsumexp(-1)
            log_tail = torch.logaddexp(log_tail, moved)
            ids = ids.masked_fill(empty, -1)
    if o["divergence"] == "argmax_ce":  # no ties after rounding
        return ids, logprobs, log_tail
    logprobs = logprobs.to(rng.choice((torch.float32, torch.float32, torch.float64)))
    has_tail = rng.random() < 0.8 or o["divergence"] in ("nla", "lk_hybrid")
    return ids, logprobs, log_tail.to(logprobs.dtype) if has_tail else None
