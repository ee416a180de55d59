"""What tests/test_gpu.py runs of the plan: its peak against the allocator's, of real training."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()


def a_plan_is_what_a_gpu_holds():
    from helpers.plan_runs import Run, error_of

    # Large enough that the library's own workspace, some tens of MB, is no part of the result.
    size = {"V": 64000, "H": 1024, "layers": 8} if ON_GPU else {}
    seq = 1024 if ON_GPU else 128
    for dtype, teacher, options in (
        ("bfloat16", True, {}),
        ("bfloat16", True, {"gradient_checkpointing": True, "backward": "recompute"}),
        ("bfloat16", True, {"teacher_quant": "nf4", "gradient_checkpointing": True}),
        ("bfloat16", True, {"k": None}),
        ("float32", False, {"optim": "adamw_torch", "accumulation": 2}),
    ):
        run = Run(family="qwen3", dtype=dtype, size=size, seq=seq, teacher=teacher, options=options)
        error, summary = error_of(run)
        print(f"{error:+.1%} {summary}")
        assert abs(error) < 0.10, summary


CHECKS = [a_plan_is_what_a_gpu_holds]
