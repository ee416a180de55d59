"""A short part of benchmarks.random_losses, and that it would see an error."""

from __future__ import annotations

import pytest
import torch

from benchmarks import random_losses
from benchmarks.random_inputs import draw


def run(calls: int, seed: int = 0) -> random_losses.Campaign:
    campaign = random_losses.Campaign(seed, "auto")
    campaign.run(0, calls, lambda line: None)
    return campaign


def test_a_few_hundred_calls_agree_with_fp64():
    campaign = run(400)
    assert campaign.failures == []
    assert campaign.calls.total() >= 400
    assert len(campaign.calls) > 10  # kinds, dtypes and paths


@pytest.mark.slow
def test_some_thousand_calls_agree_with_fp64():
    assert run(5000, seed=1).failures == []


@pytest.mark.slow
def test_calls_of_the_triton_kernels_agree_with_fp64():
    campaign = random_losses.Campaign(2, "triton")
    campaign.run(0, 60, lambda line: None)
    assert campaign.failures == []


def test_a_group_depends_on_its_number_alone():
    one, same, other = draw(0, 7), draw(0, 7), draw(0, 8)
    assert one.options == same.options
    assert torch.equal(one.hidden, same.hidden)
    assert other.hidden.shape != one.hidden.shape or not torch.equal(other.hidden, one.hidden)


@pytest.mark.parametrize("wrong", ["scaled", "nan", "other bits"])
def test_an_error_is_seen(monkeypatch, wrong):
    right, count = random_losses.run_loss, iter(range(10**6))

    def result(*arguments):
        results = right(*arguments)
        for grad in (t for name, t in results.items() if name.startswith("grad")):
            factor = {"scaled": 1.05, "nan": torch.nan, "other bits": 1 + 1e-6 * next(count)}
            grad.data.mul_(factor[wrong])
        return results

    monkeypatch.setattr(random_losses, "run_loss", result)
    words = {"scaled": "error", "nan": "not finite", "other bits": "other bits"}
    failures = run(200).failures
    assert [f for f in failures if words[wrong] in f["wrong"]]
