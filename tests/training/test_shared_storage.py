"""A student and a teacher with memory in common are noticed by the memory, in whatever objects."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from torch import nn

from fastdistill.teachers.local import Teacher, load_teacher
from fastdistill.training.checks.shared_storage import models_in, shared_parameters
from helpers.training import build, llama, ragged

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def depth_pruned(teacher):
    """The teacher's own modules, without its second layer."""
    student = llama(0)
    student.model = copy.copy(teacher.model)
    student.model._modules = dict(teacher.model._modules)
    student.model.layers = nn.ModuleList([teacher.model.layers[0]])
    student.lm_head = teacher.lm_head
    return student


def of_one_embedding(teacher):
    student = llama(0)
    student.model.embed_tokens = teacher.model.embed_tokens
    return student


def of_one_parameter(teacher):
    student = llama(0)
    student.lm_head.weight = teacher.lm_head.weight
    return student


def of_one_memory(teacher):
    """Parameters of its own around the same data."""
    student = llama(0)
    student.lm_head.weight = nn.Parameter(teacher.lm_head.weight.data)
    return student


def of_a_part_of_the_memory(teacher):
    """A smaller vocabulary, as a view of the teacher's."""
    student = llama(0, vocab=40)
    student.lm_head.weight = nn.Parameter(teacher.lm_head.weight.data[:40])
    return student


STUDENTS = {
    depth_pruned: EMBEDDING,
    of_one_embedding: EMBEDDING,
    of_one_parameter: HEAD,
    of_one_memory: HEAD,
    of_a_part_of_the_memory: HEAD,
}


@pytest.mark.parametrize("wrap", [lambda m: m, Teacher, lambda m: Around(Teacher(m))])
@pytest.mark.parametrize("make", STUDENTS)
def test_shared_weights_are_named(tmp_path, make, wrap):
    model = llama(1)
    student = make(model)
    data = [{"input_ids": row["input_ids"] % 40} for row in ragged()]
    with pytest.raises(ValueError, match=f"expected another model.*{STUDENTS[make]}"):
        build(tmp_path, model=student, teacher=wrap(model), data=data)


class Slotted:
    __slots__ = ("inner", "unset")

    def __init__(self, inner):
        self.inner = inner


class Around:
    """A caller's own teacher: what it answers with is somewhere inside."""

    def __init__(self, held):
        self.held = held

    def topk(self, input_ids, attention_mask, *, k, temperature):
        raise AssertionError("refused before it is asked")


def looped(model):
    around = Around(None)
    around.held = [around, model]
    return around


PLACES = {
    "list": lambda model: Around([model]),
    "dict": lambda model: Around({"first": (1, {model})}),
    "partial": lambda model: Around(functools.partial(print, m=model)),
    "method": lambda model: Around(model.forward),
    "slots": lambda model: Around(Slotted(model)),
    "tensor": lambda model: Around(model.lm_head.weight.data[:3]),
    "state": lambda model: Around(model.state_dict()),
    "loop": looped,
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_teacher_keeps_its_model(tmp_path, place):
    """An ensemble keeps a list of them."""
    student = llama(0)
    with pytest.raises(ValueError, match=r"expected another model"):
        build(tmp_path, model=student, teacher=PLACES[place](student))
    build(tmp_path, model=student, teacher=PLACES[place](llama(0)))


def test_a_teacher_given_as_a_model_is_not_frozen_first(tmp_path):
    model = llama(1)
    student = of_one_embedding(model)
    with pytest.raises(ValueError, match="expected another model"):
        build(tmp_path, model=student, teacher=model)
    assert all(p.requires_grad for p in student.parameters())


def test_an_adapted_student_and_its_base(tmp_path):
    base = llama(1)
    student = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"expected another model.*lora_A"):
        build(tmp_path, model=student, teacher=base)
    with pytest.raises(ValueError, match=r"expected another model.*lora_A"):
        build(tmp_path, model=student, teacher=student.get_base_model())
    base = llama(1)
    adapters = peft.LoraConfig(task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"expected another model.*lora_A"):
        build(tmp_path, model=base, teacher=base, peft_config=adapters)


def test_adapters_over_weights_that_a_teacher_shares_are_no_harm(tmp_path):
    """Of a frozen base in memory once, the student's adapters train and the teacher stands."""
    base = llama(1)
    student = peft.get_peft_model(llama(2), peft.LoraConfig(task_type="CAUSAL_LM"))
    ours, theirs = (
        dict(student.get_base_model().named_parameters()),
        base.state_dict(keep_vars=True),
    )
    for name, parameter in ours.items():
        if "lora_" not in name:
            parameter.data = theirs[name.replace(".base_layer", "")].data
    assert HEAD in "".join(shared_parameters(student, [base]))
    before = copy.deepcopy(base.state_dict())
    build(tmp_path, model=student, teacher=base).train()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_model_quantised_in_place_while_a_student_shares_it(tmp_path):
    model = llama(1)
    student = depth_pruned(model)
    teacher = load_teacher(model, quant="int8")
    with pytest.raises(ValueError, match=f"expected another model.*{EMBEDDING}"):
        build(tmp_path, model=student, teacher=teacher)
    model = llama(1)
    with pytest.raises(ValueError, match="got the student itself"):
        build(tmp_path, model=model, teacher=load_teacher(model, quant="int8"))


def test_what_is_frozen_on_purpose_may_be_shared(tmp_path):
    model = llama(1)
    student = of_one_embedding(model)
    student.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    trainer = build(tmp_path, model=student, teacher=Teacher(model))
    assert trainer.train().global_step == 2
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_copies_share_nothing(tmp_path):
    model = llama(1)
    student = copy.deepcopy(depth_pruned(model))
    assert shared_parameters(student, [model]) == []
    assert build(tmp_path, model=student, teacher=model).train().global_step == 2


def test_two_loads_of_one_checkpoint_share_nothing(tmp_path):
    llama(1).save_pretrained(tmp_path)
    first, second = (load_teacher(tmp_path, device="cpu").model for _ in range(2))
    assert shared_parameters(first, [second]) == []


def test_neighbours_in_one_memory_are_not_shared():
    memory = torch.randn(12, 4)
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    first.weight = nn.Parameter(memory[:6])
    second.weight = nn.Parameter(memory[6:])
    assert shared_parameters(first, [second]) == []
    second.weight = nn.Parameter(memory[5:11])
    assert shared_parameters(first, [second]) == ["weight"]


def test_models_inside_of_teachers():
    model = llama(1)
    teacher = Around(Teacher(model))
    assert any(inner is model for inner in models_in(teacher)[0])
    assert models_in(object()) == ([], [])


def test_a_function_may_read_the_student(tmp_path):
    """An interpolated target asks the student that is being trained."""
    model = llama(0)
    teacher = Around(lambda: model)
    assert models_in(teacher) == ([], [])
