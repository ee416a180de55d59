"""Teachers made of a function, for what no real one says."""

from __future__ import annotations

import torch

from helpers.training import VOCAB


class Answers:
    """A teacher that answers with a fixed function of the token ids."""

    vocab_size = VOCAB

    def __init__(self, answer):
        self.answer = answer

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        return self.answer(input_ids, k)


def spread(input_ids, k, start=0):
    return (input_ids.unsqueeze(-1) + start + torch.arange(k)) % VOCAB
