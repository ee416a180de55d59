"""The report of one training run: its figures, plots and page."""

from ...runtime.optional import check_installed

check_installed("fastdistill.report.run", "report", "matplotlib")
