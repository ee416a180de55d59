"""Shared by test_teacher and others."""

from __future__ import annotations

import torch

from helpers.training import VOCAB

IDS = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(0))
