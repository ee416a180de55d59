"""The teacher's top k is that of its own full softmax; it is frozen, and comes from safe files."""

from __future__ import annotations

import pytest
import torch
from test_trainer import VOCAB, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastdistill.fingerprint import refuse_different_tokenizers, tokenizer_fingerprint
from fastdistill.outputs import TopK
from fastdistill.remembering import RememberingTeacher
from fastdistill.teacher import Teacher, TopKTeacher

IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))


def dense_topk(model, ids, k, temperature=1.0, valid=None):
    with torch.no_grad():
        logits = model(input_ids=ids).logits[..., :valid].double() / temperature
    return logits.log_softmax(-1).topk(k, dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_is_that_of_the_full_softmax(temperature):
    model = llama(7, scale=20.0)
    answers = Teacher(model).topk(IDS, k=6, temperature=temperature)
    values, index = dense_topk(model, IDS, 6, temperature)
    assert torch.equal(answers.ids.long(), index)
    torch.testing.assert_close(answers.logprobs.double(), values, rtol=1e-4, atol=1e-5)
    rest = 1 - values.exp().sum(-1)
    torch.testing.assert_close(answers.log_tail.double().exp(), rest, rtol=1e-4, atol=1e-6)
    assert answers.temperature == temperature
    assert not answers.logprobs.requires_grad


def test_padding_changes_no_answer():
    teacher = Teacher(llama(7, scale=20.0))
    padded = torch.cat([IDS, torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(15) < 11).long().expand(3, 15)
    alone, beside = teacher.topk(IDS, k=5), teacher.topk(padded, mask, k=5)
    assert torch.equal(alone.ids, beside.ids[:, :11])
    torch.testing.assert_close(alone.logprobs, beside.logprobs[:, :11], rtol=1e-4, atol=1e-5)


def test_valid_vocab_renormalises_over_what_remains():
    model = llama(7, scale=20.0)
    teacher = Teacher(model)
    teacher.valid_vocab = VOCAB - 10
    values, index = dense_topk(model, IDS, 4, valid=VOCAB - 10)
    answers = teacher.topk(IDS, k=4)
    assert torch.equal(answers.ids.long(), index)
    torch.testing.assert_close(answers.logprobs.double(), values, rtol=1e-4, atol=1e-5)


def test_teacher_is_frozen_in_eval_mode():
    model = llama(7).train()
    teacher = Teacher(model)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert isinstance(teacher, TopKTeacher)


def tokenizer(words):
    vocab = {word: index for index, word in enumerate(words)}
    model = Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=words[0])


WORDS = [f"w{i}" for i in range(VOCAB)]


def test_from_a_path_with_its_tokenizer(tmp_path):
    model = llama(7, scale=20.0)
    model.save_pretrained(tmp_path)
    assert Teacher(tmp_path).tokenizer is None
    tokenizer(WORDS).save_pretrained(tmp_path)
    teacher = Teacher(tmp_path)
    assert tokenizer_fingerprint(teacher.tokenizer) == tokenizer_fingerprint(tokenizer(WORDS))
    assert torch.equal(teacher.topk(IDS, k=3).ids, Teacher(model).topk(IDS, k=3).ids)


def test_pickled_weights_are_not_loaded(tmp_path):
    model = llama(7)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Teacher(tmp_path)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"teacher: expected a causal language model, or the path"):
        Teacher(3)
    with pytest.raises(TypeError, match=r"tokenizer: expected an object with get_vocab"):
        tokenizer_fingerprint("gpt2")


def test_fingerprint_is_the_map_and_not_the_roles():
    base, chat = tokenizer(WORDS), tokenizer(WORDS)
    chat.eos_token, chat.pad_token = WORDS[5], WORDS[5]
    refuse_different_tokenizers(base, chat)
    longer = tokenizer([*WORDS, "extra"])
    with pytest.raises(ValueError, match=r"1 tokens have another id \(first: 'extra' is None"):
        refuse_different_tokenizers(base, longer)


class Counting(Teacher):
    asked = 0

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0) -> TopK:
        self.asked += len(input_ids)
        return super().topk(input_ids, attention_mask, k=k, temperature=temperature)


def test_remembering_asks_once_per_window():
    teacher = Counting(llama(7, scale=20.0))
    remembering = RememberingTeacher(teacher)
    first = remembering.topk(IDS, k=4)
    again = remembering.topk(IDS.flip(0), torch.ones_like(IDS), k=4)
    assert teacher.asked == 3
    plain = Teacher(teacher.model).topk(IDS, k=4)
    for answers, expected in ((first, plain), (again, [t.flip(0) for t in plain[:3]])):
        assert torch.equal(answers.ids, expected[0].long())
        torch.testing.assert_close(answers.logprobs, expected[1])
        torch.testing.assert_close(answers.log_tail, expected[2])
    remembering.topk(IDS, k=5)
    assert teacher.asked == 6
    with pytest.raises(ValueError, match="windows without padding"):
        remembering.topk(IDS, torch.zeros_like(IDS), k=4)
