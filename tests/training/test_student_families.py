"""A step of every family is the step of the model's own logits: scales, softcaps and biases of the
head, hidden states divided before it, states beside attention, routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from helpers.families import EXPERTS, FAMILIES, SIZES
from helpers.families import build as of_family
from helpers.training import build, flat, ragged, step_losses

MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
DROPOUTS = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
COMPRESSED = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
MORE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.25},
    "falcon_h1": MAMBA | {"mamba_n_groups": 1, "lm_head_multiplier": 0.4},
    "granitemoe": EXPERTS | {"logits_scaling": 3.0},
    "minicpm3": COMPRESSED
    | {"v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8}
    | {"dim_model_base": 16},
    "gpt2": DROPOUTS,
    "gptj": DROPOUTS,
}


def student(name):
    return of_family(name, **MORE.get(name, {}))


def own_loss(model, rows):
    """Σ of the model's own cross-entropy over targets, and their number."""
    total, count = torch.zeros(()), 0
    for row in rows:
        n = int((row["labels"][1:] != -100).sum())
        labels = row["labels"][None]
        total = total + n * model(input_ids=row["input_ids"][None], labels=labels).loss
        count += n
    return total / count


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("name", sorted({*FAMILIES, *MORE}))
def test_a_step_is_that_of_the_models_own_logits(tmp_path, name):
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    rows = ragged(6)
    reference = student(name).train()
    loss = own_loss(reference, rows)
    loss.backward()
    grads = [0.0 if p.grad is None else p.grad for p in reference.parameters()]
    steps = [(p - 1e-2 * g).detach() for p, g in zip(reference.parameters(), grads, strict=True)]
    expected = torch.cat([p.flatten() for p in steps])
    trainer = build(
        tmp_path,
        model=student(name),
        teacher=None,
        ce_weight=1.0,
        data=rows,
        eval_dataset=rows,
        max_steps=1,
    )
    with torch.no_grad():
        before = own_loss(student(name), rows).item()
    assert trainer.evaluate()["eval_nll"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert step_losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    moved = (expected - flat(student(name))).abs().max()
    assert (flat(trainer.model) - expected).abs().max() < 2e-5 * max(1.0, moved)


def test_a_model_that_divides_before_its_head(tmp_path):
    """MiniCPM as its authors wrote it: hidden / (hidden_size / dim_model_base), then the head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Divides(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None, **more):
            hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False)[0]
            logits = self.lm_head(hidden / 4.0)
            return type("Output", (), {"logits": logits})()

    torch.manual_seed(0)
    model = Divides(LlamaConfig(**SIZES))
    rows = ragged(4)
    metrics = build(
        tmp_path, model=model, teacher=None, ce_weight=1.0, eval_dataset=rows
    ).evaluate()
    total = count = 0.0
    for row in rows:
        with torch.no_grad():
            z = model(row["input_ids"][None]).logits[0, :-1]
        labels = row["labels"][1:]
        nll = torch.nn.functional.cross_entropy(z, labels, ignore_index=-100, reduction="sum")
        total, count = total + nll.item(), count + int((labels != -100).sum())
    assert metrics["eval_nll"] == pytest.approx(total / count, rel=1e-5)
