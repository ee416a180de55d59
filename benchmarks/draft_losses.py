"""CPU time of each loss for draft models, as a multiple of the forward KL of the same two heads.

    OMP_NUM_THREADS=1 python -m benchmarks.draft_losses [repeats]

One thread, process time of the loss and both gradients with bf16 operands. Every repeat measures
all losses in turn. Printed are medians over repeats of the ratio to the forward KL of the same
repeat, with the smallest and the largest.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import torch

import fastdistill as fd

N, H, V = 64, 1024, 151936
LOSSES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "argmax_ce": {"divergence": "argmax_ce"},
    "tvd": {"divergence": "tvd"},
    "nla": {"divergence": "nla"},
    "lk_hybrid": {"divergence": "lk_hybrid"},
}


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, N, H, generator=g).bfloat16()
    heads = (torch.randn(2, V, H, generator=g) * 4 / H**0.5).bfloat16()
    hidden.requires_grad_()
    weight = heads[0].requires_grad_()

    def seconds(options: dict[str, Any]) -> float:
        started = time.process_time()
        loss = fd.linear_distill_loss(hidden, weight, teacher_hidden, heads[1].detach(), **options)
        torch.autograd.grad(loss, (hidden, weight))
        return time.process_time() - started

    for options in LOSSES.values():  # the first call of each loads code
        seconds(options)
    turns = [{name: seconds(options) for name, options in LOSSES.items()} for _ in range(repeats)]
    print(f"N={N} H={H} V={V} bf16, one thread, {repeats} repeats")
    for name in LOSSES:
        ratios = [turn[name] / turn["forward_kl"] for turn in turns]
        own = median(turn[name] for turn in turns)
        low, high = min(ratios), max(ratios)
        print(f"{name:11} {median(ratios):.2f} [{low:.2f}, {high:.2f}]   {own:.2f} s", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
