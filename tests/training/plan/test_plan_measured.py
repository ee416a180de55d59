"""The plan's peak against what torch's allocator held in real training, within 3 %."""

from typing import Any

import pytest

from helpers.plan_runs import Run, error_of

# DistillConfig's, under the name that every version of transformers below 6 knows.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
BF16: dict[str, Any] = {"dtype": "bfloat16"}
CHECKPOINTED = {"gradient_checkpointing": True}
RECOMPUTED = {"backward": "recompute"}
PLAIN = {"optim": "adamw_torch"}

CASES = {
    "llama": Run(),
    "llama with a teacher": Run(teacher=True, options=PLAIN),
    "llama, checkpointed, recomputed": Run(**BF16, options=CHECKPOINTED | RECOMPUTED),
    "llama, accumulated": Run(batch=2, options={"accumulation": 2}),
    "llama, one row": Run(batch=1, seq=512, options=RECOMPUTED),
    "qwen3 with a teacher": Run(family="qwen3", teacher=True, options=CHECKPOINTED),
    "qwen3 in bf16 with a teacher": Run(family="qwen3", **BF16, teacher=True),
    "qwen3, whole vocabulary": Run(family="qwen3", teacher=True, options={"k": None}),
    "llama, student's support": Run(teacher=True, options=PLAIN | {"support": "student"}),
    "qwen3 in bf16, union, recomputed": Run(
        family="qwen3", **BF16, teacher=True, options=RECOMPUTED | {"support": "union"}
    ),
    "gemma2 in bf16": Run(family="gemma2", **BF16, options={"optim": "sgd"}),
    "gpt2": Run(family="gpt2", options=CHECKPOINTED),
    "gpt2 in bf16 with a teacher": Run(family="gpt2", **BF16, teacher=True, options=RECOMPUTED),
    "teacher in nf4": Run(teacher=True, options={"teacher_quant": "nf4"} | CHECKPOINTED),
}


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_training_holds(name):
    error, summary = error_of(CASES[name])
    print(f"{error:+.1%} {summary}")
    assert abs(error) < 0.03, summary


@pytest.mark.slow
def test_adapters():
    pytest.importorskip("peft")
    for options in ({}, CHECKPOINTED):
        error, summary = error_of(Run(options={"lora_rank": 8} | options))
        print(f"{error:+.1%} {summary}")
        assert abs(error) < 0.03, summary
