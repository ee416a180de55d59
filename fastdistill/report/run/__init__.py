"""The report of one training run: its figures, plots and page."""
