"""Batches of rows of similar length under a budget of tokens (`max_tokens_per_batch`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from ..hf.encoder import Encoder
from ..runtime import checks
from .config import DistillConfig


class TokenBatches(Sampler[list[int]]):
    """Yields lists of row indices: rows sorted by length, cut into batches of at most `budget`.

    The tokens of a batch are rows · longest row, or with packing the sum of the lengths. Each epoch
    permutes rows of equal length and the order of the batches, by seed + epoch. The sorted lengths
    are the same in every epoch, and therefore so are the sizes of the batches.

    Args:
        lengths: of the rows. budget: of tokens. packed: whether a batch has no padding.
        seed: of the permutations. epoch: returns the current epoch when an iteration begins.

    Raises:
        ValueError: a row is longer than the budget.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        budget: int,
        *,
        packed: bool,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.lengths, self.seed, self.epoch = lengths, seed, epoch
        self.batch_size, self.drop_last = None, False  # read by accelerate, which shards batches
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > budget:
            checks.fail(
                "max_tokens_per_batch",
                f"at least {lengths[longest]}, the tokens of example {longest} of train_dataset",
                budget,
                "raise it, or cut the rows with max_length",
            )
        self.sizes: list[int] = []
        rows = tokens = 0
        for length in sorted(lengths):
            tokens = tokens + length if packed else (rows + 1) * length
            if tokens > budget:
                self.sizes.append(rows)
                rows, tokens = 0, length
            rows += 1
        self.sizes.append(rows)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        g = torch.Generator().manual_seed(self.seed + self.epoch())
        order = torch.randperm(len(self.lengths), generator=g).tolist()
        rows = iter(sorted(order, key=self.lengths.__getitem__))
        batches = [[next(rows) for _ in range(size)] for size in self.sizes]
        for index in torch.randperm(len(batches), generator=g).tolist():
            yield batches[index]


def token_batches(
    config: DistillConfig, dataset: Any, encoder: Encoder, epoch: Callable[[], int] = lambda: 0
) -> TokenBatches:
    """Return the batches of a dataset; every example is encoded once, to read its length.

    Raises:
        ValueError: the dataset is a stream, or an example is longer than the budget.
    """
    budget = config.max_tokens_per_batch
    if budget is None or not hasattr(dataset, "__len__"):
        hint = "the lengths of a stream are unknown; set per_device_train_batch_size"
        checks.fail("max_tokens_per_batch", "None with a stream", budget, hint)
    rows = (encoder(dataset[i], i, "train_dataset") for i in range(len(dataset)))
    return TokenBatches(
        [len(row.ids) for row in rows],
        budget,
        packed=config.packing,
        seed=config.seed if config.data_seed is None else config.data_seed,
        epoch=epoch,
    )
