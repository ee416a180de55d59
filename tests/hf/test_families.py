"""The teacher's answers are those of the model's own logits, family by family, packed and padded on
either side; and quantising changes the weights and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fastdistill.hf.row_reader import can_pack
from fastdistill.quant import quantize_model
from fastdistill.quant.linear import QuantizedWeight
from fastdistill.teachers.local import Teacher
from helpers.families import FAMILIES, SIZES, VOCAB, build, padded, texts
from helpers.present import present


def alone(model, rows, k, temperature=1.0):
    """(logprobs, ids) [N, k] of the full softmax, one row at a time."""
    with torch.no_grad():
        logits = [model(input_ids=row[None]).logits[0] for row in rows if len(row)]
    return (torch.cat(logits).double() / temperature).log_softmax(-1).topk(k, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_own_packed_and_padded(family):
    model = build(family)
    rows = texts()
    values, index = alone(model, rows, 6, temperature=1.5)
    teacher = Teacher(model)
    assert teacher.reader.packs
    for packs in (True, False):
        teacher.reader.packs = packs
        for side in ("right", "left"):
            ids, mask = padded(rows, side)
            answers = teacher.topk(ids, mask, k=6, temperature=1.5)
            there = mask.bool()
            assert torch.equal(answers.ids[there], index), (packs, side)
            got = answers.logprobs[there].double()
            torch.testing.assert_close(got, values, rtol=1e-5, atol=2e-5)
            rest = 1 - values.exp().sum(-1)
            torch.testing.assert_close(
                present(answers.log_tail)[there].double().exp(), rest, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_answers_are_those_of_the_dequantised_weights(family, scheme):
    model = build(family)
    quantize_model(model, scheme, compute="exact")
    plain = dequantised(family, model)
    teacher, rows = Teacher(model), texts((9, 5, 12))
    ids, mask = padded(rows, "right")
    answers = teacher.topk(ids, mask, k=1)
    values, index = alone(plain, rows, 1)
    assert torch.isfinite(answers.logprobs[mask.bool()]).all()
    assert torch.equal(answers.ids[mask.bool()], index)
    torch.testing.assert_close(answers.logprobs[mask.bool()].double(), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_with_the_compute_of_this_machine(family, scheme):
    teacher = Teacher(quantize_model(build(family), scheme))
    ids, mask = padded(texts(), "left")
    answers = teacher.topk(ids, mask, k=5)
    assert torch.isfinite(answers.logprobs[mask.bool()]).all()
    mass = answers.logprobs.exp().sum(-1) + present(answers.log_tail).exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def dequantised(family, quantised):
    """The same model with dense layers that hold what the quantised ones stand for."""
    plain = build(family)
    parameters = dict(plain.named_parameters())
    count = 0
    for name, module in quantised.named_modules():
        if isinstance(module, QuantizedWeight):
            target = present(parameters.get(name, parameters.get(f"{name}.weight")))
            dense = module.dequantize(target.dtype)
            target.copy_(dense.t() if family == "gpt2" else dense.view(target.shape))
            count += 1
    assert count > 4
    return plain


# What no rule or trial may let pass: a state that runs on, positions made from the mask alone,
# position_ids taken and then not used to keep rows apart.
UNPACKABLE: dict[str, dict[str, Any]] = {
    "mamba": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("family", UNPACKABLE)
def test_a_model_that_cannot_be_packed_is_padded_and_right(family):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**UNPACKABLE[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_pack(model)
    rows = texts()
    values, index = alone(model, rows, 4)
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        answers = Teacher(model).topk(ids, mask, k=4)
        assert torch.equal(answers.ids[mask.bool()], index)
        got = answers.logprobs[mask.bool()].double()
        torch.testing.assert_close(got, values, rtol=1e-5, atol=2e-5)
