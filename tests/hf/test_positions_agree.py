"""Student, teacher, packed and padded rows have the same positions: an update and an answer do not
depend on where an example's padding is."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from fastdistill.hf.collator import DistillCollator
from fastdistill.hf.row_reader import can_pack
from fastdistill.teachers.local import Teacher
from fastdistill.training.student import student_at_head
from fastdistill.training.targets import targets_of
from helpers.position_models import build as of_family
from helpers.training import build, flat, step_losses

FAMILIES = ("llama", "gpt2", "opt", "bloom", "gpt_neox", "mpt", "mamba")
DROPOUTS = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "bloom": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}


def student(family, dtype=torch.float32):
    return of_family(family, dtype, **DROPOUTS.get(family, {}))


def bare(n=4):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (6 + i % 3,), generator=g).tolist() for i in range(n)]


def on_the_left(ids, i):
    pads = 2 + i % 3
    return {"input_ids": [0] * pads + ids, "attention_mask": [0] * pads + [1] * len(ids)}


def on_both_sides(ids, i):
    ahead, behind = 1 + i % 2, 2 - i % 2
    mask = [0] * ahead + [1] * len(ids) + [0] * behind
    return {"input_ids": [9] * ahead + ids + [9] * behind, "attention_mask": mask}


def with_holes(ids, i):
    at = 2 + i % 3
    return {
        "input_ids": [*ids[:at], 7, 7, *ids[at:]],
        "attention_mask": [1] * at + [0, 0] + [1] * (len(ids) - at),
    }


FORMS = {"left": on_the_left, "both": on_both_sides, "holes": with_holes}


def rows(form=None):
    if form is None:
        return [{"input_ids": ids} for ids in bare()]
    return [FORMS[form](ids, i) for i, ids in enumerate(bare())]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_reads_each_row_as_if_alone(family, form):
    model = student(family, torch.float64)
    batch = DistillCollator()(rows(form))
    targets = targets_of(batch)
    ids = [torch.tensor([row]) for row in bare()]
    outputs = {}
    for packed in {False, can_pack(model)}:
        logits = lambda h, head: head.logits(h)  # noqa: E731
        with student_at_head(model, batch, targets, logits, packed=packed) as inputs:
            outputs[packed] = model(**inputs)
    alone = torch.cat([model(input_ids=row).logits[0, :-1] for row in ids])
    assert len(targets.labels) == sum(row.shape[1] - 1 for row in ids)
    assert targets.labels.tolist() == [t for row in ids for t in row[0, 1:].tolist()]
    for logits in outputs.values():
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_rows_that_fill_more_than_a_table_of_what_sees_what(tmp_path):
    model = of_family("gpt_neo", torch.float32)
    limit = model.config.max_position_embeddings
    examples = [{"input_ids": [3 + i % 60 for i in range(n)]} for n in (limit, 5, limit // 2, 9)]
    batch = DistillCollator()(examples)
    teacher = Teacher(model)
    hidden = teacher.hidden(batch["input_ids"], batch["attention_mask"])
    for row, example in zip(hidden, examples, strict=True):
        ids = torch.tensor([example["input_ids"]])
        alone = teacher.hidden(ids)[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="packing: expected False for GPTNeoForCausalLM"):
        build(tmp_path, model=model, teacher=model, data=examples, packing=True)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_an_update_does_not_depend_on_where_padding_is(tmp_path, family, form):
    def trained(data, **more):
        trainer = build(
            tmp_path,
            model=student(family),
            teacher=of_family(family, torch.float32),
            data=data,
            max_steps=2,
            **more,
        )
        trainer.train()
        return flat(trainer.model), step_losses(trainer)

    expected, losses = trained(rows())
    layouts: list[dict[str, Any]] = [{}] + [{"packing": True}] * can_pack(student(family))
    for more in layouts:
        weights, others = trained(rows(form), **more)
        assert others == pytest.approx(losses, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_answers_each_row_as_if_alone(family, form):
    model = student(family, torch.float64)
    examples = rows(form)
    width = max(len(e["input_ids"]) for e in examples)
    ids, mask = torch.zeros(2, len(examples), width, dtype=torch.long)
    for i, example in enumerate(examples):
        ids[i, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        mask[i, : len(example["input_ids"])] = torch.tensor(example["attention_mask"])
    hidden = Teacher(model).hidden(ids, mask)
    logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    for i, row in enumerate(bare()):
        alone = model(input_ids=torch.tensor([row])).logits[0]
        answered = logits[i][mask[i] == 1]
        torch.testing.assert_close(answered, alone, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_a_row_of_which_nothing_is_attended_is_refused_with_its_number():
    data = [{"input_ids": [3, 4]}, {"input_ids": [3, 4], "attention_mask": [0, 0]}]
    with pytest.raises(ValueError, match=r"expected 1 .* got 0 .*\(example 1 of its batch\)"):
        DistillCollator()(data)


def prompt_learning():
    kind = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    cpt = {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}
    return {
        "PROMPT_TUNING": peft.PromptTuningConfig(**kind),
        "P_TUNING": peft.PromptEncoderConfig(**kind, encoder_hidden_size=16),
        "PREFIX_TUNING": peft.PrefixTuningConfig(**kind),
        "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(**kind, num_tasks=2),
        "CPT": peft.CPTConfig(task_type="CAUSAL_LM", **cpt),
    }


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "CPT"])
def test_a_teacher_that_reads_tokens_of_its_own_is_refused(kind):
    model = peft.get_peft_model(of_family("llama"), prompt_learning()[kind])
    with pytest.raises(ValueError, match=f"one position per token.*got {kind}: it inserts tokens"):
        Teacher(model)


def test_a_teacher_that_needs_more_than_tokens_is_refused():
    adapters = prompt_learning()["MULTITASK_PROMPT_TUNING"]
    model = peft.get_peft_model(of_family("llama"), adapters)
    with pytest.raises(ValueError, match=r"reads token ids alone.* task_ids"):
        Teacher(model)


@torch.no_grad()
def test_a_prefix_tuned_teacher_answers_as_its_own_forward():
    model = peft.get_peft_model(
        of_family("llama", torch.float32), prompt_learning()["PREFIX_TUNING"]
    ).eval()
    ids = torch.tensor([bare()[0], bare()[3]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    hidden = Teacher(model).hidden(ids, mask)
    head = model.get_output_embeddings().weight
    for i, begin in ((0, 0), (1, 2)):
        alone = model(input_ids=ids[i : i + 1, begin:]).logits[0]
        torch.testing.assert_close(hidden[i, begin:] @ head.T, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", prompt_learning())
def test_a_student_that_reads_tokens_of_its_own_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"got {kind}: it adds tokens before the row"):
        build(tmp_path, model=of_family("llama"), peft_config=prompt_learning()[kind])


def test_a_model_that_expands_a_token_later_is_refused_where_it_does(tmp_path):
    """As a vision model does with an image token that no trial contains."""
    model = of_family("llama")
    plain = model.model.forward

    def expand(input_ids=None, **more):
        if (input_ids == 63).any():
            input_ids = torch.cat([input_ids[:, :1], input_ids], -1)
            more.pop("attention_mask", None)
            more.pop("position_ids", None)
        return plain(input_ids=input_ids, **more)

    model.model.forward = expand
    teacher = Teacher(copy.copy(model))
    teacher.hidden(torch.tensor([[3, 4, 5]]))
    with pytest.raises(ValueError, match="expected one position per token"):
        teacher.hidden(torch.tensor([[3, 63, 5]]))
