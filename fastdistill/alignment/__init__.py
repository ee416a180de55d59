"""Alignment experiments: audits, organisms, strategies, statistics, studies and their reports."""

from ..runtime.optional import check_installed

check_installed("fastdistill.alignment", "audit", "numpy", "transformers")
