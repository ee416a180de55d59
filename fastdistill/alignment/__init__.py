"""The alignment instrument: audits, organisms, strategies, statistics, experiments, reports."""

from ..runtime.optional import check_installed

check_installed("fastdistill.alignment", "audit", "numpy", "transformers")
