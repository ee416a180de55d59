"""Teachers that see more of a row: its column, its own prompt, or the student's own weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from fastdistill import RoutedTeacher, SelfTeacher, ServedTeacher, Teacher, TeacherCache
from helpers.served import ours
from helpers.text_scene import CHATML, byte_level
from helpers.training import build, flat, llama, peaked, ragged, step_losses, train, weights

TOKENIZER = byte_level()
TOKENIZER.chat_template = CHATML
SIZE = len(TOKENIZER)
DOMAINS = ["math", "code", "code"] * 4
ROWS = [{**row, "domain": d} for row, d in zip(ragged(), DOMAINS, strict=True)]


def user(text):
    return [{"role": "user", "content": text}]


PRIVILEGED = [
    {
        "prompt": user(f"what is {n}+2?"),
        "completion": [{"role": "assistant", "content": f"the answer is {n + 2}."}],
        "teacher_prompt": [{"role": "system", "content": "you know: 42"}, *user(f"what {n}?")],
    }
    for n in range(4)
]
SMALL = {"k": 4, "max_steps": 1, "per_device_train_batch_size": 4, "check_signal": False}


def teachers():
    return {"math": Teacher(peaked(7)), "code": Teacher(peaked(8))}


@pytest.mark.parametrize("support", ["teacher", "student"])
def test_a_routed_run_is_the_sum_of_separate_losses(tmp_path, support):
    options = {"max_steps": 1, "support": support, "k": 4, "check_signal": False}
    routed = train(tmp_path, teacher=RoutedTeacher(teachers(), key="domain"), data=ROWS, **options)
    count = sum(int((row["labels"][1:] != -100).sum()) for row in ROWS)
    total, moved = 0.0, torch.zeros_like(weights(routed))
    start = flat(llama(0))
    for name, teacher in teachers().items():
        rows = [row for row in ROWS if row["domain"] == name]
        share = sum(int((row["labels"][1:] != -100).sum()) for row in rows) / count
        alone = train(tmp_path, teacher=teacher, data=rows, **options)
        total += share * step_losses(alone)[0]
        moved += share * (weights(alone) - start)
    assert step_losses(routed)[0] == pytest.approx(total, rel=1e-6)
    assert (weights(routed) - start - moved).abs().max() < 1e-6


def test_a_routed_run_samples_and_evaluates(tmp_path):
    teacher = RoutedTeacher(teachers(), key="domain")
    options = {"lmbda": 0.999, "max_new_tokens": 3, "check_signal": False}
    trainer = train(tmp_path, teacher=teacher, data=ROWS, eval_dataset=ROWS, **options)
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (ragged(), "domain: expected a value in every example"),
        ([{**row, "domain": "law"} for row in ragged()], "domain: expected one of 'math', 'code'"),
    ],
)
def test_rows_without_a_teacher_are_refused(tmp_path, rows, error):
    with pytest.raises(ValueError, match=error):
        train(tmp_path, teacher=RoutedTeacher(teachers(), key="domain"), data=rows)


def test_routed_teachers_share_one_vocabulary():
    other = byte_level(trim=True)
    other.add_tokens(["more"])
    by_name = {"a": Teacher(llama(1), tokenizer=TOKENIZER), "b": Teacher(llama(2), tokenizer=other)}
    with pytest.raises(ValueError, match="token"):
        RoutedTeacher(by_name, key="domain")
    with pytest.raises(ValueError, match="teachers: expected a dict of at least one teacher"):
        RoutedTeacher({}, key="domain")


def test_routed_teachers_are_placed_and_checked_as_single_ones(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(Teacher, "to", lambda self, device: moved.append((self, device)))
    by_name = teachers()
    build(tmp_path, teacher=RoutedTeacher(by_name, key="domain"), data=ROWS)
    assert [teacher for teacher, _ in moved] == list(by_name.values())
    cache = TeacherCache.build(Teacher(peaked()), ragged(), tmp_path / "cache", k=4)
    routed = RoutedTeacher({**by_name, "code": cache}, key="domain")
    with pytest.raises(ValueError, match="support: expected 'teacher' with the cache"):
        build(tmp_path, teacher=routed, data=ROWS, k=4, support="student")


def spliced(row, trainer):
    """The row that the teacher reads, encoded by hand, and the number of its answer's tokens."""
    encode = trainer.data_collator.encoder
    answer = encode({name: row[name] for name in ("prompt", "completion")})
    n = int((answer.targets != -100).sum())
    text = TOKENIZER.apply_chat_template(
        row["teacher_prompt"], tokenize=False, add_generation_prompt=True
    )
    prompt = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return torch.cat([torch.tensor(prompt), answer.ids[answer.prompt_length :]]), n


def student_rows(trainer):
    return [trainer.data_collator.encoder(row) for row in PRIVILEGED]


@pytest.mark.parametrize("kind", ["top", "dense", "student", "served", "packed"])
def test_a_teacher_reads_its_own_prompt_and_the_same_answer(tmp_path, kind):
    model = llama(7, vocab=SIZE, scale=20.0)
    options: dict[str, Any] = {**SMALL, "data": PRIVILEGED, "processing_class": TOKENIZER}
    more: dict[str, dict[str, Any]] = {"dense": {"k": None}, "student": {"support": "student"}}
    options |= {"packing": kind == "packed", **more.get(kind, {})}
    with ours(Teacher(model)) as url:
        teacher = ServedTeacher(url) if kind == "served" else Teacher(model)
        trainer = train(
            tmp_path, teacher=teacher, model=llama(0, vocab=SIZE, scale=20.0), **options
        )
    student, losses = llama(0, vocab=SIZE, scale=20.0).double(), []
    model = model.double()
    for row, own in zip(PRIVILEGED, student_rows(trainer), strict=True):
        ids, n = spliced(row, trainer)
        with torch.no_grad():
            lp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            first = len(ids) - len(own.ids) + own.prompt_length
            lp = lp[first - 1 : first - 1 + n]
            lq = student(input_ids=own.ids[None]).logits[0].log_softmax(-1)
            lq = lq[own.prompt_length - 1 : own.prompt_length - 1 + n]
        if kind != "dense":
            chosen = (lq if kind == "student" else lp).topk(4).indices
            inside = torch.zeros_like(lp, dtype=torch.bool).scatter(-1, chosen, True)
            lp, lq = (
                torch.cat(
                    [
                        x.gather(-1, chosen),
                        x.masked_fill(inside, -torch.inf).logsumexp(-1)[:, None],
                    ],
                    -1,
                )
                for x in (lp, lq)
            )
        losses.append((lp.exp() * (lp - lq)).sum(-1))
    assert step_losses(trainer)[0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_a_sampled_answer_follows_the_teachers_prompt(tmp_path):
    trainer = build(
        tmp_path,
        teacher=Teacher(llama(7, vocab=SIZE)),
        model=llama(0, vocab=SIZE),
        **{**SMALL, "data": PRIVILEGED, "processing_class": TOKENIZER},
        lmbda=1.0,
        max_new_tokens=4,
    )
    read = []
    topk = trainer.teacher.topk_at

    def noted(input_ids, attention_mask=None, **options):
        read.append((input_ids, attention_mask))
        return topk(input_ids, attention_mask, **options)

    trainer.teacher.topk_at = noted
    trainer.train()
    ids, mask = read[0]
    batch = trainer.data_collator(PRIVILEGED)
    prompts = [
        prompt[seen == 1].tolist()
        for prompt, seen in zip(
            batch["teacher_prompt_ids"], batch["teacher_prompt_mask"], strict=True
        )
    ]
    for row, attended in zip(ids, mask, strict=True):
        tokens = row[attended == 1].tolist()
        assert any(tokens[: len(p)] == p and 1 <= len(tokens) - len(p) <= 4 for p in prompts)


def test_a_teacher_prompt_that_would_be_ignored_is_refused(tmp_path):
    common = {"model": llama(0, vocab=SIZE), "processing_class": TOKENIZER, "k": 4}
    teacher = Teacher(llama(7, vocab=SIZE))
    plain = [{k: row[k] for k in ("prompt", "completion")} for row in PRIVILEGED]
    cache = TeacherCache.build(teacher, plain, tmp_path / "cache", k=4, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="teacher_prompt: expected no such column with a cache"):
        build(tmp_path, teacher=cache, data=PRIVILEGED, **common)
    with pytest.raises(ValueError, match="teacher_prompt: expected messages, or prompt and"):
        build(tmp_path, teacher=teacher, data=[{"text": "a cat", "teacher_prompt": "b"}], **common)
    with pytest.raises(ValueError, match="teacher_prompt: expected completion_only_loss=True"):
        train(tmp_path, teacher=teacher, data=PRIVILEGED, completion_only_loss=False, **common)


def test_the_student_itself_has_no_divergence_at_first(tmp_path):
    for k in (4, None):
        trainer = train(tmp_path, teacher="self", k=k, max_steps=1, check_signal=False)
        assert step_losses(trainer)[0] == pytest.approx(0.0, abs=1e-6)
        assert all(p.requires_grad for p in trainer.model.parameters())
        assert trainer.model.training


def test_the_student_learns_from_its_own_privileged_prompt(tmp_path):
    options = {**SMALL, "data": PRIVILEGED, "processing_class": TOKENIZER, "max_steps": 8}
    model = llama(0, vocab=SIZE, scale=20.0)
    trainer = train(tmp_path, teacher="self", model=model, **options | {"optim": "adamw_torch"})
    losses = step_losses(trainer)
    assert losses[0] > 1e-3
    assert losses[-1] < losses[0]


def test_without_its_adapter_the_student_is_the_model_it_started_from(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = llama(3, scale=20.0)
    options = {"k": 6, "max_steps": 2, "check_signal": False}
    expected = Teacher(llama(3, scale=20.0)).topk(ragged()[5]["input_ids"][None], k=6)
    trainer = train(
        tmp_path, teacher=SelfTeacher("adapter_off"), model=base, peft_config=lora, **options
    )
    assert step_losses(trainer)[0] > 1e-3
    answers = trainer.teacher.topk(ragged()[5]["input_ids"][None], k=6)
    for name in ("ids", "logprobs", "log_tail"):
        assert torch.equal(getattr(answers, name), getattr(expected, name))
    with pytest.raises(ValueError, match="expected a student with adapters for 'adapter_off'"):
        build(tmp_path, teacher=SelfTeacher("adapter_off"))
    with pytest.raises(ValueError, match="weights: expected one of 'live', 'ema', 'adapter_off'"):
        SelfTeacher("base")


def test_a_teacher_without_a_student_is_refused():
    with pytest.raises(ValueError, match="teacher: expected a SelfTeacher with a student"):
        SelfTeacher().topk(ragged()[0]["input_ids"][None], k=2)


def test_the_moving_average_follows_and_resumes(tmp_path):
    options = {"k": 6, "check_signal": False, "save_strategy": "steps", "save_steps": 2}
    options |= {"lmbda": 0.5, "max_new_tokens": 3, "lr_scheduler_type": "constant"}

    def run(folder, steps):
        trainer = build(folder, teacher=SelfTeacher("ema", decay=0.5), max_steps=steps, **options)
        trainer.train(resume_from_checkpoint="auto")
        return trainer

    one = run(tmp_path / "one", 1)
    expected = 0.5 * flat(llama(0)) + 0.5 * weights(one)
    averages = torch.cat([t.flatten() for t in one.teacher.averages.values()])
    torch.testing.assert_close(averages, expected)
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4)
    assert torch.equal(weights(resumed), weights(whole))
    for name, average in whole.teacher.averages.items():
        assert torch.equal(resumed.teacher.averages[name], average)
    live = build(tmp_path / "live", teacher="self", max_steps=2, **options)
    live.train()
    with pytest.raises(ValueError, match="with the averages of this student"):
        run(tmp_path / "live", 4)
