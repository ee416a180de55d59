"""What a plan proposes for a card, and how it says it."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import Qwen3Config

from fastdistill.training.plan import Settings, plan_memory, print_plan, proposal
from fastdistill.training.plan.sizes import in_gb

# Layers as in the public 1.7B and 8B models of this family, but fewer.
BIG = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
STUDENT = BIG | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}
TEACHER = BIG | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 10,
    "num_attention_heads": 32,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    Qwen3Config(**STUDENT).save_pretrained(folder / "student")
    Qwen3Config(**TEACHER).save_pretrained(folder / "teacher")
    return folder


def printed(plan):
    text = io.StringIO()
    print_plan(plan, Console(width=80, file=text))
    return text.getvalue()


def settings(plan):
    return plan.proposal.memory.settings


def part(memory, name):
    return next(p.bytes for p in memory.parts if p.name == name)


@pytest.fixture(scope="module")
def plans(models):
    def plan(gpu, **options):
        pair = models / "student", models / "teacher"
        settings = Settings(seq=2048, batch=2, dtype="bfloat16", **options)
        return plan_memory(*pair, settings=settings, gpu=gpu, tokens=10**8, throughput=9e3)

    return {gpu: plan(gpu) for gpu in ("80GB", "14GB", "6GB", "1GB")}


@pytest.mark.slow
def test_proposals_take_no_more_than_they_need(plans):
    roomy, card, tight, hopeless = plans.values()
    assert roomy.fits
    assert roomy.proposal.measures == ()
    assert not card.fits
    for plan in (roomy, card, tight):
        assert plan.proposal.missing == 0
        assert plan.proposal.memory.needed <= plan.card
    assert settings(card).gradient_checkpointing
    assert not settings(card).cached
    assert settings(card).lora_rank is None
    assert settings(tight).cached
    assert hopeless.proposal.missing == hopeless.proposal.memory.needed - hopeless.card > 0


def test_a_measure_keeps_the_rows_of_an_update(models):
    student = models / "student"
    least: dict[str, Any] = {"gradient_checkpointing": True, "backward": "recompute"}
    enough = plan_memory(
        student, settings=Settings(seq=8192, batch=3, accumulation=2, **least)
    ).memory.needed
    proposed = settings(plan_memory(student, settings=Settings(seq=8192, batch=6), gpu=enough))
    assert (proposed.batch, proposed.accumulation) == (3, 2)
    batches = [m.changes["batch"] for m in measures_of(6) if "batch" in m.changes]
    assert batches == [3, 1]


def measures_of(batch):
    alone: Any = SimpleNamespace(configs={"teacher": None})
    return proposal.measures(alone, Settings(seq=8, batch=batch))


def test_every_phase_is_there_and_the_largest_is_the_peak(plans):
    memory = plans["14GB"].memory
    phases = {phase.name: phase.bytes for phase in memory.phases}
    assert list(phases) == ["teacher", "forward", "loss", "backward", "update"]
    assert plans["14GB"].peak == max(phases.values()) < sum(p.bytes for p in memory.parts)
    held = sum(part(memory, n) for n in ("student weights", "gradients", "optimizer"))
    assert phases["update"] == held + part(memory, "teacher weights")
    assert part(memory, "optimizer") == 2 * part(memory, "gradients")
    stored, checkpointed = plans["14GB"].activations.values()
    assert checkpointed < stored / 10
    assert list(plans["14GB"].teacher_weights) == ["bfloat16", "int8", "nf4"]


def test_what_is_said_fits_a_page(plans):
    for plan in plans.values():
        lines = printed(plan).splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 80
        whole = " ".join(lines)
        for line in plan.proposal.memory.settings.lines():
            assert (line in whole) == (plan.proposal.missing == 0)
    assert "3.1 hours" in printed(plans["80GB"])
    assert "does not fit 1.00 GB" in printed(plans["1GB"])
    assert "the largest part is student weights" in " ".join(printed(plans["1GB"]).split())
    assert in_gb(plans["14GB"].proposal.memory.needed) in printed(plans["14GB"])


def test_json(plans):
    plan = json.loads(json.dumps(plans["6GB"].as_json()))
    assert plan["fits"] is False
    assert "teacher=CACHE" in plan["proposal"]["settings"]
    assert plan["memory"]["peak"] == plans["6GB"].peak
