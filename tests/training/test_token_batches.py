"""max_tokens_per_batch: batches by length, the same update, the same batches after resuming."""

from __future__ import annotations

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from fastdistill.training.token_batches import TokenBatches
from helpers.training import build, config, llama, ragged, train, weights

LENGTHS = [5, 23, 7, 8, 4, 20, 7, 3, 11, 5, 5]


def batches(**options):
    return TokenBatches(LENGTHS, 24, packed=False, **options)


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (False, [[3, 4, 5, 5], [5, 7, 7], [8, 11], [20], [23]]),
        (True, [[3, 4, 5, 5, 5], [7, 7, 8], [11], [20], [23]]),
    ],
)
def test_every_row_once_within_the_budget(packed, expected):
    sampler = TokenBatches(LENGTHS, 24, packed=packed)
    rows = [[LENGTHS[i] for i in batch] for batch in sampler]
    assert sorted(i for batch in sampler for i in batch) == list(range(len(LENGTHS)))
    assert len(sampler) == len(rows)
    for row in rows:
        assert (sum(row) if packed else len(row) * max(row)) <= 24
    assert sorted(map(sorted, rows)) == expected


def test_seed_and_epoch_determine_the_batches():
    first = list(batches())
    assert first == list(batches())
    other_epoch, other_seed = list(batches(epoch=lambda: 1)), list(batches(seed=1))
    assert first != other_epoch
    assert other_epoch == other_seed
    assert sorted(map(len, first)) == sorted(map(len, other_epoch))


def test_processes_take_as_many_batches_each():
    shards = [list(BatchSamplerShard(batches(), 2, rank)) for rank in (0, 1)]
    assert len(shards[0]) == len(shards[1]) == 3
    taken = {i for shard in shards for batch in shard for i in batch}
    assert taken == set(range(len(LENGTHS)))


@pytest.mark.parametrize("packing", [False, True])
def test_one_update_is_that_of_the_whole_batch(tmp_path, packing):
    whole = weights(train(tmp_path, max_steps=1, per_device_train_batch_size=12))
    options = {"max_tokens_per_batch": 40, "per_device_train_batch_size": 8, "packing": packing}
    trainer = build(tmp_path, max_steps=1, gradient_accumulation_steps=99, **options)
    loader = trainer.get_train_dataloader()
    assert 3 < len(loader) < 12
    tokens = "attention_mask" if packing else "labels"
    sizes = [int(b[tokens].sum()) if packing else b[tokens].numel() for b in loader]
    assert max(sizes) <= 40
    trainer.train()
    assert torch.allclose(weights(trainer), whole, atol=1e-6)


def test_a_resumed_run_has_the_same_batches(tmp_path):
    options = {
        "max_tokens_per_batch": 60,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "num_train_epochs": 2,
        "max_steps": -1,
        "gradient_accumulation_steps": 2,
    }
    steps = -(-len(build(tmp_path, **options).get_train_dataloader()) // 2)
    whole = train(tmp_path, save_steps=steps + 1, **options)  # after a step of the second epoch
    resumed = build(tmp_path, model=llama(3), save_steps=steps + 1, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{steps + 1}"))
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.state.global_step == 2 * steps > steps + 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: expected its default"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: expected its def"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last: expected its default"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: expected its default"),
        ({"lmbda": 0.5}, "lmbda: expected its default with max_tokens_per_batch, got 0.5"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: expected its"),
        ({"max_tokens_per_batch": 1}, "max_tokens_per_batch: expected an integer"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, options, words):
    defaults = {"per_device_train_batch_size": 8, "max_tokens_per_batch": 64}
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **(defaults | options))


def test_rows_above_the_budget_and_streams_are_refused(tmp_path):
    options = {"per_device_train_batch_size": 8, "max_tokens_per_batch": 20}
    trainer = build(tmp_path, **options)
    with pytest.raises(ValueError, match=r"batch: expected at least 21, .*example 11 of .*got 20"):
        trainer.train()
    stream = datasets.IterableDataset.from_generator(lambda: iter(ragged()))
    trainer = build(tmp_path, data=stream, **options)
    with pytest.raises(ValueError, match="max_tokens_per_batch: expected None with a stream"):
        trainer.train()
