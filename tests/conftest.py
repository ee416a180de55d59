"""Uninitialised memory is NaN in every test: a kernel that reads what it never wrote shows it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
