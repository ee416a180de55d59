"""Our logits are the model's own, in every family whose head does something of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastdistill.hf.lm_head import LMHead, at_head, head_of, hidden_states, verify_head

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {"final_logit_softcapping": 30.0},
    "gemma3_text": {"final_logit_softcapping": 5.0},
    "granite": {"logits_scaling": 13.0},
    "cohere": {"logit_scale": 0.0625},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt2": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},
}


def build(family: str, **changes):
    kind = family.removesuffix("_tied")
    options = FAMILIES[family] if kind in ("gpt2", "gptj") else SMALL | FAMILIES[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(options | {"bos_token_id": 1, "eos_token_id": 2} | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_our_logits_are_the_models(family):
    model = build(family)
    for bias in (head_of(model).bias,):
        if bias is not None:
            torch.nn.init.normal_(bias)  # zero at initialisation, where a lost bias would not show
    input_ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        actual = head_of(model).logits(hidden_states(model, input_ids))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert verify_head(model) < 1e-5


def test_multipliers_are_read_not_dropped():
    assert head_of(build("granite")).logit_scale == pytest.approx(1 / 13)
    assert head_of(build("cohere")).logit_scale == 0.0625
    assert head_of(build("gemma2")).softcap == 30.0
    assert head_of(build("gptj")).bias is not None


@pytest.mark.parametrize(
    ("family", "wrong"),
    [("granite", {"logit_scale": 1.0}), ("gemma2", {"softcap": None}), ("gptj", {"bias": None})],
)
def test_a_head_that_is_not_the_models_is_refused(family, wrong):
    model = build(family)
    head = head_of(model)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    fields = {"weight": head.weight, **head.options(), **wrong}
    with pytest.raises(ValueError, match="transforms its logits in a way"):
        verify_head(model, LMHead(**fields))


def test_hooks_leave_nothing_behind():
    model = build("llama")
    input_ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(input_ids=input_ids).logits
        with pytest.raises(RuntimeError, match="stop"), at_head(model, _stop):
            model(input_ids=input_ids)
        after = model(input_ids=input_ids).logits
    assert torch.equal(before, after)


def _stop(hidden):
    raise RuntimeError("stop")


def test_the_head_itself_sees_no_position():
    model = build("llama")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    hidden_states(model, torch.arange(3, 23)[None])
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(1, 0, 61)]


def test_gradients_through_at_head_are_the_models():
    model = build("gemma2")
    input_ids = torch.arange(3, 13)[None]
    model(input_ids=input_ids).logits.logsumexp(-1).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with at_head(model, lambda hidden: head_of(model).logits(hidden).logsumexp(-1).sum()):
        model(input_ids=input_ids).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_adapted_head_is_refused():
    model = build("llama")
    model.lm_head.base_layer = torch.nn.Linear(32, 61)  # what a LoRA layer looks like
    with pytest.raises(ValueError, match="Remove lm_head from target_modules"):
        head_of(model)


def test_quantised_head_and_non_model_are_refused():
    model = build("llama")
    packed = torch.zeros(61, 16, dtype=torch.uint8)
    model.lm_head.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(TypeError, match=r"Leave the head out of quantization"):
        head_of(model)
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        head_of(torch.nn.Linear(2, 2))


def test_reading_hidden_states_costs_nothing_at_the_head():
    """One position per row once made torch copy the head's weight for every row of the batch."""
    config = CONFIG_MAPPING["llama"](
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50_000,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros(4, 8, dtype=torch.int64)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        hidden_states(model, ids)
    largest = max(event.self_cpu_memory_usage for event in seen.key_averages())
    assert largest < model.lm_head.weight.nbytes / 4
