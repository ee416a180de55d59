"""Training with dW carried over chunks in bfloat16 and in fp32, from the same data and seed.

    python -m benchmarks.carried_gradient [seeds]

A student of contexts with Zipf frequencies, so that tokens of a batch share their errors, learns a
teacher's top 16 for 200 steps of AdamW: fp32 parameters, bfloat16 operands, 4 chunks per step.
Printed per metric: the mean over seeds of (bfloat16 − fp32), and its 95 % interval.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.kernels import head as heads
from fastdistill.kernels import topk_loss

STEPS, TOKENS, CHUNKS, CONTEXTS, V, H, K = 200, 256, 4, 1000, 1000, 64, 16
T_95 = {4: 3.182, 8: 2.365, 16: 2.131}  # of Student's distribution, by the number of seeds


def train(seed: int) -> Tensor:
    """(KL to the teacher after 50, 100, 150 and 200 steps, entropy after 200) on all contexts."""
    torch.manual_seed(seed)
    teacher_head = torch.randn(V, H) * 0.4 + torch.randn(H)  # rows share a direction
    teacher_logits = torch.randn(CONTEXTS, H) @ teacher_head.t() + torch.randn(V)
    lp = teacher_logits.log_softmax(-1)
    best = lp.topk(K, -1)
    tail = lp.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    hidden = torch.nn.Parameter(torch.randn(CONTEXTS, H))
    layer, head = torch.nn.Linear(H, H), torch.nn.Parameter(torch.randn(V, H) * 0.02)
    optimizer = torch.optim.AdamW([hidden, *layer.parameters(), head], lr=5e-3)
    frequency = 1 / torch.arange(1, CONTEXTS + 1).float()
    curve = []
    for step in range(1, STEPS + 1):
        at = torch.multinomial(frequency, TOKENS, replacement=True)
        teacher = fd.TopK(best.indices[at], best.values[at], tail[at])
        with torch.autocast("cpu", torch.bfloat16):
            loss = fd.topk_distill_loss(layer(hidden[at]), head, teacher, backward="fused")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                student = (layer(hidden) @ head.t()).log_softmax(-1)
                curve.append((lp.exp() * (lp - student)).sum(-1).mean())
    return torch.stack([*curve, -(student.exp() * student).sum(-1).mean()])


def main(seeds: int) -> None:
    def both(seed: int) -> Tensor:
        runs = []
        for carried in (CHUNKS, 1):
            with (
                patch.dict(heads.CARRIED_CHUNKS, cpu=carried),
                patch.object(topk_loss, "chunk_tokens", lambda *args: TOKENS // CHUNKS),
            ):
                runs.append(train(seed))
        return torch.stack(runs)

    runs = torch.stack([both(seed) for seed in range(seeds)]).double()
    difference = runs[:, 0] - runs[:, 1]
    half = T_95[seeds] * difference.std(0) / seeds**0.5
    for name, fp32, d, h in zip(
        ("KL at 50", "KL at 100", "KL at 150", "KL at 200", "entropy at 200"),
        runs[:, 1].mean(0).tolist(),
        difference.mean(0).tolist(),
        half.tolist(),
        strict=True,
    ):
        print(f"{name:15} fp32 {fp32:.5f}   bfloat16 − fp32 {d:+.6f} ± {h:.6f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
