"""Targets are the positions before a label that counts, whatever the padding."""

from __future__ import annotations

import torch

from fastdistill.hf.collator import padded
from fastdistill.hf.encoder import EncodedExample
from fastdistill.losses.types import TopK
from fastdistill.training.targets import targets_of

IDS = torch.tensor([5, 6, 7, 8])


def test_where_each_target_is_predicted_from():
    labels = torch.tensor([[-100, 6, -100, 8], [-100, -100, -100, -100], [-100, 2, 3, -100]])
    targets = targets_of({"labels": labels})
    assert targets.sources.tolist() == [0, 2, 8, 9]
    assert targets.rows.tolist() == [0, 0, 2, 2]
    assert targets.labels.tolist() == [6, 8, 2, 3]
    assert targets.per_row(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3.0, 0.0, 7.0]
    values = torch.arange(12.0).view(3, 4)
    assert targets.gather(values).tolist() == [0.0, 2.0, 8.0, 9.0]
    topk = targets.gather_topk(TopK(values[..., None].long(), values[..., None], values))
    assert topk.ids[:, 0].tolist() == [0, 2, 8, 9]
    assert targets.take(torch.tensor([1, 3])).labels.tolist() == [8, 3]


def test_what_nothing_precedes_is_no_target():
    """The first token, and the first behind left padding."""
    mask = torch.tensor([0, 0, 1, 1])
    batch = padded(
        [EncodedExample(IDS, IDS, mask), EncodedExample(IDS[:3], IDS[:3], torch.ones(3).long())],
        pad_id=0,
    )
    assert batch["labels"].tolist() == [[-100, -100, -100, 8], [-100, 6, 7, -100]]
    assert targets_of(batch).sources.tolist() == [2, 4, 5]


def test_a_batch_of_single_tokens_has_no_target():
    batch = padded([EncodedExample(IDS[:1], IDS[:1], torch.ones(1).long())] * 2, pad_id=0)
    assert len(targets_of(batch).labels) == 0
