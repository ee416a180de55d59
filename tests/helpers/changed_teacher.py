"""A teacher whose answers a function of the test changes, or sees."""

from __future__ import annotations


class ChangedTeacher:
    def __init__(self, teacher, change):
        self.teacher, self.change = teacher, change
        self.tokenizer, self.vocab_size = teacher.tokenizer, teacher.vocab_size

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        answers = self.teacher.topk(input_ids, attention_mask, k=k, temperature=temperature)
        return self.change(answers, input_ids, attention_mask)
