"""A run on a shuffled stream that stops in its first pass continues as if it had not."""

import pytest
import torch

from helpers.interrupted import SAVING, StopAt
from helpers.training import build, ragged, train, weights

datasets = pytest.importorskip("datasets")


def shuffled():
    """Twelve rows, three updates an epoch, in another order in each epoch."""
    rows = [{name: value.tolist() for name, value in row.items()} for row in ragged()]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    return stream.shuffle(seed=3, buffer_size=5)


def test_a_shuffled_stream_continues_where_it_was(tmp_path):
    whole = train(tmp_path / "whole", **SAVING, data=shuffled())
    train(tmp_path, **SAVING, data=shuffled(), callbacks=[StopAt(2)])
    again = build(tmp_path, **SAVING, data=shuffled())
    again.train(resume_from_checkpoint="auto")
    assert torch.equal(weights(again), weights(whole))


def test_a_second_pass_over_a_stream_is_not_resumed(tmp_path):
    """It would begin the pass again: the place in it is not known without the stream's length."""
    train(tmp_path, **SAVING, data=shuffled(), callbacks=[StopAt(4)])
    words = "resume_from_checkpoint: expected a checkpoint of the first pass over a stream, .* got "
    with pytest.raises(ValueError, match=words + "checkpoint-4, of pass 2; .*streaming=False"):
        build(tmp_path, **SAVING, data=shuffled()).train(resume_from_checkpoint="auto")
    again = build(tmp_path, **SAVING, data=shuffled(), ignore_data_skip=True)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 6
