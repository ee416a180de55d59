"""What a student continues, where it stops, and what max_length takes from both."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.strategies.lessons import TrainingExample, to_row
from fastdistill.hf.collator import DistillCollator
from fastdistill.hf.encoder import Encoder
from fastdistill.teachers.local import Teacher
from fastdistill.training.on_policy import prompts_of
from helpers.example_texts import STOCK, tokenizer
from helpers.training import VOCAB, build, llama, train

EOS = 14  # "." of the words in test_examples; "<end>" (0) ends a turn there
CHAT = [
    {"messages": [{"role": "user", "content": "what is"}, {"role": "assistant", "content": word}]}
    for word in ("cat", "dog", "it", "yes")
]


def turns(template=STOCK):
    return tokenizer(template, eos_token=".")


class Listening:
    """A teacher that keeps what it is asked about."""

    def __init__(self):
        self.model, self.rows = Teacher(llama(7)), []
        self.vocab_size = VOCAB

    def topk(self, ids, mask=None, *, k, temperature=1.0):
        self.rows += [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return self.model.topk(ids, mask, k=k, temperature=temperature)


def prompts(rows, tokens, **options):
    collator = DistillCollator(prompts=True, encoder=Encoder(tokenizer=tokens, **options))
    return [prompt.tolist() for prompt in prompts_of(collator(rows))]


def test_prompts_are_known_whatever_their_length_and_targets():
    tokens = tokenizer()
    for text in ("cat", "a cat", "what is this"):
        ids = tokens(text)["input_ids"]
        rows = [{"prompt": text, "completion": " dog it"}]
        assert prompts(rows, tokens) == [ids]
        assert prompts(rows, tokens, completion_only=False) == [ids]
        assert prompts([{"prompt": text}], tokens) == [ids]
        labels = {"input_ids": [*ids, 9, 10], "labels": [-100] * len(ids) + [9, 10]}
        assert prompts([labels], tokens) == [ids]
        masks = {"input_ids": [*ids, 9, 10], "completion_mask": [0] * len(ids) + [1, 1]}
        assert prompts([masks], tokens) == [ids]
    assert prompts([{"text": "a cat"}], tokens) == [[7, 8, 0]]  # a text goes on from its end
    assert prompts([{"input_ids": [4, 5]}], tokens) == [[4, 5]]
    talk = prompts(CHAT[:1], turns())[0]
    assert prompts(CHAT[:1], turns(), completion_only=False) == [talk]
    assert turns().decode(talk).split()[-1] == "<assistant>"


def test_prompts_behind_padding_and_in_batches():
    rows = [
        {
            "input_ids": [0, 0, 5, 6, 7],
            "attention_mask": [0, 0, 1, 1, 1],
            "labels": [-100, -100, -100, 6, 7],
        },
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},
    ]
    assert prompts(rows, None) == [[5], [5, 6, 7]]
    cut = [{"input_ids": list(range(3, 12)), "labels": [-100] * 6 + [9, 10, 11]}]
    assert prompts(cut, None, max_length=4) == [[3, 4, 5, 6]]


def test_an_empty_prompt_is_refused_by_name_where_the_student_samples():
    with pytest.raises(ValueError, match=r"prompt: expected at least one token .*example 1 of its"):
        prompts(
            [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "cat"}], tokenizer()
        )


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("prompt", ["cat", "a cat"])
@pytest.mark.parametrize("only", [True, False])
def test_the_student_continues_the_prompt(tmp_path, prompt, only):
    teacher, tokens = Listening(), tokenizer()
    train(
        tmp_path,
        teacher=teacher,
        data=[{"prompt": prompt, "completion": " dog it"}] * 4,
        processing_class=tokens,
        lmbda=1.0,
        max_new_tokens=2,
        max_steps=1,
        check_signal=False,
        completion_only_loss=only,
        per_device_train_batch_size=4,
    )
    ids = tokens(prompt)["input_ids"]
    assert teacher.rows
    assert all(row[: len(ids)] == ids and len(row) <= len(ids) + 2 for row in teacher.rows)


def test_samples_stop_where_turns_end(tmp_path):
    """The model and the tokenizer end texts with another token."""
    student = llama(0)
    student.generation_config.eos_token_id = EOS
    student.generation_config.bos_token_id = None
    with torch.no_grad():  # <end> is likely at every step
        student.lm_head.weight.mul_(0.0)
        student.lm_head.weight[0] = 0.0
    teacher = Listening()
    train(
        tmp_path,
        model=student,
        teacher=teacher,
        data=CHAT,
        processing_class=turns(),
        lmbda=1.0,
        max_new_tokens=40,
        max_steps=1,
        check_signal=False,
        per_device_train_batch_size=4,
        learning_rate=1e-9,
    )
    begin = 2  # <assistant>
    tails = [row[row.index(begin) + 1 :] for row in teacher.rows]
    assert any(0 in row for row in tails)
    assert all(0 not in row[:-1] for row in tails)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("form", ["messages", "ids", "stream"])
def test_a_student_of_conversations_is_saved_with_their_end(tmp_path, form):
    student = llama(0)
    student.generation_config.eos_token_id = EOS
    data: Any = CHAT
    if form == "ids":
        encoder = Encoder(tokenizer=turns())
        rows = [encoder(example) for example in CHAT]
        data = [{"input_ids": row.ids, "labels": row.targets} for row in rows]
    elif form == "stream":
        data = Stream()
    trainer = train(
        tmp_path,
        model=student,
        teacher=None,
        data=data,
        processing_class=turns(),
        ce_weight=1.0,
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-1"):
        saved = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert sorted(saved) == [0, EOS]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from CHAT * 4


def test_a_student_of_texts_keeps_its_end(tmp_path):
    student = llama(0)
    student.generation_config.eos_token_id = EOS
    data = [{"text": "a cat and a dog"}] * 4
    trainer = build(
        tmp_path, model=student, teacher=None, data=data, processing_class=turns(), ce_weight=1.0
    )
    assert trainer.model.generation_config.eos_token_id == EOS


ROWS = [{"prompt": "what is this a cat", "completion": " it is"}] * 6


def test_completions_that_are_all_cut_name_max_length(tmp_path):
    for rows in (ROWS, [{"messages": CHAT[0]["messages"]}] * 4):
        with pytest.raises(ValueError, match=r"max_length: .*train_dataset, got 3; of \d examples"):
            build(tmp_path, data=rows, processing_class=turns(), max_length=3)
    with pytest.raises(ValueError, match=r"of eval_dataset, got 5; .* Raise it to 8"):
        build(
            tmp_path,
            data=[{"text": "a cat"}],
            eval_dataset=ROWS,
            processing_class=turns(),
            max_length=5,
        )
    prompts_alone = [{"prompt": "what is this a cat"}] * 2
    with pytest.raises(ValueError, match=r"got 3; of 2 examples .* a part of their prompts"):
        build(tmp_path, data=prompts_alone, processing_class=turns(), max_length=3, lmbda=1.0)


def test_rows_that_are_cut_in_part_are_counted(tmp_path, caplog):
    data = [*ROWS[:2], {"prompt": "a", "completion": " cat"}, {"text": "a cat"}]
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        build(tmp_path, data=data, processing_class=turns(), max_length=5)
    assert (
        "train_dataset: max_length=5 cuts 2 of 4 examples checked, the longest of 8 tokens; "
        "2 lose all their targets" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        build(tmp_path, data=copy.deepcopy(data), processing_class=turns(), max_length=20)
    assert "max_length" not in caplog.text


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl_configs_name_max_length_too(tmp_path):
    gkd = pytest.importorskip("trl.experimental.gkd")
    from fastdistill.compat.trl import GKDTrainer

    args = gkd.GKDConfig(str(tmp_path), max_length=3, use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="max_length: expected room for more than the prompts"):
        GKDTrainer(llama(0), llama(7), args, train_dataset=CHAT, processing_class=turns())


def test_conversations_without_an_assistant_are_named(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "what is"}]}] * 4
    with pytest.raises(ValueError, match=r"no example has a message with the role 'assistant'"):
        build(tmp_path, data=rows, processing_class=turns())
    build(tmp_path, data=rows, processing_class=turns(), lmbda=1.0, max_new_tokens=4)  # prompts
    build(tmp_path, data=[*rows, *CHAT], processing_class=turns())


def test_padding_is_not_counted_where_rows_are_cut(tmp_path, caplog):
    left = {"input_ids": [0, 0, 0, 5, 6, 7, 8], "attention_mask": [0, 0, 0, 1, 1, 1, 1]}
    row = Encoder(max_length=3)(left)
    assert row.ids[row.attention_mask != 0].tolist() == [5, 6, 7]
    assert Encoder(max_length=4)(left).ids.tolist() == left["input_ids"]
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        build(tmp_path, data=[left] * 4, max_length=4)
    assert "max_length" not in caplog.text


def test_answers_of_strategies_end_as_turns_do():
    subject = Subject(llama(0), turns())
    chat = to_row(TrainingExample(prompt=Prompt(user="what is"), answer="a cat"), subject)
    assert chat["labels"][-3:] == [7, 8, 0]
    text = to_row(TrainingExample(prompt=Prompt(text="what is "), answer="a cat"), subject)
    assert text["labels"][-3:] == [7, 8, EOS]
    assert {0, EOS} <= {*subject.ends}


def test_a_run_has_a_chat_template_of_its_own(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(STOCK, encoding="utf-8")
    thinks = STOCK.replace("{{ m['content'] }} <end>", "think {{ m['content'] }} <end>")
    plain = turns(None)
    for template, options in ((path, {}), (thinks, {"train_on_template_tokens": False})):
        trainer = build(
            tmp_path, data=CHAT, processing_class=plain, chat_template=template, **options
        )
        row = trainer.data_collator.encoder(CHAT[0])
        assert plain.decode(row.targets[row.targets != -100]) == "cat <end>"
        saved = trainer.processing_class.chat_template
        assert saved == (STOCK if template == path else thinks)
    assert plain.chat_template is None
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == thinks
    json.dumps(trainer.args.to_dict(), default=float)
    with pytest.raises(ValueError, match=r"chat_template: expected a template .*No such file"):
        build(tmp_path, data=CHAT, processing_class=plain, chat_template=tmp_path / "none")
