"""A teacher with another tokenizer: rows aligned by bytes, ids mapped by token string."""

from __future__ import annotations

import pytest
import torch
from tokenizers import normalizers, processors

from fastdistill import (
    MappedTeacher,
    RoutedTeacher,
    ServedTeacher,
    Teacher,
    TeacherCache,
    TokenMap,
    TopK,
)
from helpers.served import ours
from helpers.text_scene import CORPUS, byte_bpe, byte_level, metaspace, words
from helpers.training import llama, step_losses, train, weights

TEXTS = [
    "what is 2+2=4? the answer is 42.",
    "hello there, a naïve café and 3.14",
    "no it is a dog\n\nand the sum is 7",
    "how are you today? i am a cat 😀 and you",
]
ROWS = [{"text": text} for text in TEXTS]
QUIET = {"check_signal": False, "per_device_train_batch_size": 4, "max_steps": 1}


STUDENT, TEACHER = byte_bpe(340), byte_bpe(300, [text[::-1] for text in CORPUS] + TEXTS)
COMPOSED = byte_bpe(300, normalizer=normalizers.NFC())
TOKENS = TokenMap(STUDENT, TEACHER)


def mapped(**options):
    return MappedTeacher(model_of(TEACHER), TOKENS, **options)


def model_of(tokenizer, seed=7):
    return Teacher(llama(seed, vocab=len(tokenizer), hidden=48, scale=20.0), tokenizer=tokenizer)


COMPOSING = MappedTeacher(model_of(COMPOSED), TokenMap(STUDENT, COMPOSED))


def trained(tmp_path, teacher, **options):
    model = llama(0, vocab=len(STUDENT))
    options = {"data": ROWS, "processing_class": STUDENT} | QUIET | options
    return train(tmp_path, teacher=teacher, model=model, **options)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (STUDENT, TEACHER),
        (byte_level(), metaspace()),
        (metaspace("always"), byte_level()),
    ],
    ids=["byte-level", "to-sentencepiece", "from-sentencepiece"],
)
def test_shared_positions_are_those_with_equal_texts(student, teacher):
    tokens = TokenMap(student, teacher)
    for text in TEXTS:
        row = student(text, add_special_tokens=False)["input_ids"]
        aligned = tokens.align(row)
        assert aligned.ids == teacher(text)["input_ids"]

        def texts(tokenizer, ids):
            starts = [tokenizer.decode(ids[: i + 1]).removeprefix("<s>") for i in range(len(ids))]
            return [None if "\ufffd" in start else start.lstrip(" ") for start in starts]

        before, after = texts(student, row), texts(teacher, aligned.ids)
        equal = {i for i, start in enumerate(before) if start and start in after}
        pairs = [(i, j) for i, j in zip(aligned.student, aligned.teacher, strict=True) if before[i]]
        assert {i for i, _ in pairs} == equal
        assert all(before[i] == after[j] for i, j in pairs)
        assert len(equal) > 0


def test_ends_correspond_and_other_special_tokens_are_text():
    student = byte_level()
    start, end = student.convert_tokens_to_ids(["<|im_start|>", "</s>"])
    tokens = TokenMap(student, TEACHER)
    row = [start, *student("user\nhi")["input_ids"], end, *student(" no")["input_ids"]]
    aligned = tokens.align(row)
    assert TEACHER.decode(aligned.ids) == "<|im_start|>user\nhi</s> no"
    assert aligned.ids.count(TEACHER.eos_token_id) == 1
    assert row.index(end) in aligned.student
    assert tokens.to_student[TEACHER.eos_token_id] == end
    # The teacher would answer "<" before the student's <|im_start|>.
    again = tokens.align([*row, *row])
    assert TEACHER.decode(again.ids).count("<|im_start|>") == 2
    assert len(row) - 1 not in again.student
    assert len(row) in again.student
    # The name of a special token in a text is no special token.
    spelled = student("</s>", split_special_tokens=True)["input_ids"]
    assert TEACHER.eos_token_id not in tokens.align(spelled).ids


def test_each_tokenizer_begins_a_row_with_its_own_token():
    student = metaspace()
    row = student("what is it")["input_ids"]
    assert TokenMap(student, TEACHER).align(row).ids == TEACHER("what is it")["input_ids"]
    aligned = TokenMap(STUDENT, student).align(STUDENT("what is it")["input_ids"])
    assert aligned.ids == row


def test_a_mark_of_the_chat_template_is_no_beginning():
    student = byte_level()
    student.bos_token = "<|im_start|>"  # as SmolLM2's, which no text begins with
    row = student("<|im_start|>user")["input_ids"]
    assert TEACHER.decode(TokenMap(student, TEACHER).align(row).ids) == "<|im_start|>user"


def test_the_beginning_of_a_later_document_is_that_of_the_teacher():
    student = metaspace()
    row = student("what")["input_ids"] + student("is it")["input_ids"]
    assert "<s>" not in TEACHER.decode(TokenMap(student, TEACHER).align(row).ids)
    teacher = byte_level()
    first = ("<|im_start|>", teacher.convert_tokens_to_ids("<|im_start|>"))
    teacher.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[first]
    )
    teacher.bos_token = first[0]
    aligned = TokenMap(student, teacher).align(row)
    assert teacher.decode(aligned.ids) == "<|im_start|>what<|im_start|>is it"
    assert aligned.ids.count(first[1]) == 2


def test_ids_are_those_that_the_tokenizer_uses():
    student = byte_bpe(340)
    words = [f" {word}" for word in ("the", "answer", "is", "sum", "what", "cat")]
    student.add_tokens(words)  # the vocabulary has the same bytes already
    tokens = TokenMap(student, TEACHER)
    for word in words:
        assert [tokens._student.ids[word.encode()]] == student(word)["input_ids"]


def test_text_that_the_teacher_changes_is_left_out():
    row = STUDENT("a cat cafe\u0301 is a cat")["input_ids"]
    aligned = TokenMap(STUDENT, COMPOSED).align(row)
    assert len(aligned.student) > 0
    assert STUDENT.decode(row[: aligned.student[-1] + 1]) in ("a cat caf", "a cat cafe")
    assert TOKENS.align(STUDENT("a cat")["input_ids"], limit=1).ids == TEACHER("a")["input_ids"]


def test_mass_without_a_counterpart_is_tail():
    common, alone = (
        TEACHER.convert_tokens_to_ids("a"),
        int((TOKENS.to_student[2:] < 0).nonzero()[0]) + 2,
    )
    p = torch.tensor([[0.5, 0.25, 0.125]])
    ids = torch.tensor([[common, alone, -1]])
    answers = TOKENS.map(TopK(ids, p.log(), torch.tensor([0.25]).log()))
    assert answers.ids.tolist() == [[STUDENT.convert_tokens_to_ids("a"), -1, -1]]
    assert answers.tail().exp().item() == pytest.approx(0.5)
    assert answers.logprobs[0, 0].exp() == 0.5


def test_the_identity_gives_the_bits_of_the_plain_loss(tmp_path):
    runs = []
    for wrap in (lambda t: t, lambda t: MappedTeacher(t, TokenMap(STUDENT, STUDENT))):
        teacher = wrap(model_of(STUDENT))
        runs.append(trained(tmp_path, teacher, max_steps=2, ce_weight=0.25))
    assert step_losses(runs[0]) == step_losses(runs[1])
    assert torch.equal(weights(runs[0]), weights(runs[1]))


def by_hand(trainer, teacher, k):
    """The loss over the shared targets, the shares, and the mass that has a counterpart, in fp64"""
    student, kls, masses, targets = llama(0, vocab=len(STUDENT)), [], [], 0
    for row in ROWS:
        ids = trainer.data_collator.encoder(row).ids
        aligned = TOKENS.align(ids.tolist())
        targets += len(ids) - 1
        with torch.no_grad():
            q = student(input_ids=ids[None]).logits[0].double().softmax(-1)
            read = torch.tensor([aligned.ids])
            p = teacher.model(input_ids=read).logits[0].double().softmax(-1)
        for i, j in zip(aligned.student, aligned.teacher, strict=True):
            if i + 1 == len(ids):
                continue
            top, index = p[j].topk(k)
            names = TEACHER.convert_ids_to_tokens(index.tolist())
            known = [STUDENT.get_vocab().get(name, -1) for name in names]
            slots = [slot for slot, u in enumerate(known) if u >= 0]
            own = torch.tensor([known[slot] for slot in slots], dtype=torch.int64)
            a, b = top[slots], q[i][own]
            a, b = (torch.cat([x, 1 - x.sum(-1, keepdim=True)]) for x in (a, b))
            kls.append((a * (a / b).log()).sum())
            masses.append(top[slots].sum() / top.sum())
    mean = torch.stack(kls).mean().item()
    return mean, len(kls) / targets, torch.stack(masses).mean().item()


def test_a_step_is_that_of_the_shared_targets(tmp_path):
    trainer = trained(tmp_path, mapped(min_mass=0.0))
    logs = trainer.state.log_history[0]
    loss, aligned, mass = by_hand(trainer, model_of(TEACHER), 8)
    assert 0.2 < aligned < 1
    assert 0.05 < mass < 1
    assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["aligned"] == pytest.approx(aligned, rel=1e-6)
    assert logs["mapped_mass"] == pytest.approx(mass, rel=1e-5)
    served = model_of(TEACHER)
    with ours(served) as url:
        teacher = MappedTeacher(ServedTeacher(url), TOKENS, min_mass=0.0)
        assert step_losses(trained(tmp_path, teacher))[0] == pytest.approx(loss, rel=1e-5)
    cache = TeacherCache.build(mapped(min_mass=0.0), ROWS, tmp_path / "cache", k=8)
    cached = trained(tmp_path, cache)
    assert step_losses(cached)[0] == pytest.approx(loss, rel=1e-3)
    assert cached.state.log_history[0]["aligned"] == pytest.approx(aligned, rel=1e-6)


def test_a_mapped_run_samples_and_evaluates(tmp_path):
    options = {"lmbda": 1.0, "max_new_tokens": 5, "eval_dataset": ROWS}
    data = [{"prompt": text} for text in TEXTS]
    trainer = trained(tmp_path, mapped(min_mass=0.0), data=data, **options)
    assert 0 < trainer.state.log_history[0]["aligned"] <= 1
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"teacher": mapped(min_mass=0.999), "max_steps": 3},
            r"teacher: expected a vocabulary in which 100% of",
        ),
        ({"k": None}, "teacher: expected a model, or an object with hidden"),
        ({"support": "student"}, "teacher: expected a model, or an object with logprobs_at"),
        (
            {"data": [{"prompt": "a", "completion": " b", "teacher_prompt": "c"}] * 4},
            "teacher_prompt: expected no such column with a cache or a MappedTeacher",
        ),
        (
            {"teacher": COMPOSING, "data": [{"text": "e\u0301a"}] * 4},
            "train_dataset: expected targets at which both tokenizers have a boundary, got none",
        ),
    ],
)
def test_what_a_mapped_teacher_cannot_teach_is_refused(tmp_path, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        trained(tmp_path, **({"teacher": mapped(min_mass=0.0)} | options))


def test_pairs_that_cannot_be_mapped_are_refused():
    with pytest.raises(ValueError, match="teacher_tokenizer: expected a fast tokenizer of byte"):
        TokenMap(STUDENT, words())
    lower = byte_bpe(300, normalizer=normalizers.Lowercase())
    with pytest.raises(ValueError, match="student_tokenizer: expected a tokenizer that keeps"):
        TokenMap(lower, TEACHER)
    with pytest.raises(ValueError, match="token_map: expected a map from the tokenizer of the tea"):
        MappedTeacher(model_of(STUDENT), TOKENS)
    with pytest.raises(ValueError, match=r"teachers: .*, got a MappedTeacher for 'math'"):
        RoutedTeacher({"math": mapped()}, key="domain")
