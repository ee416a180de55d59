"""The report of a training run: one HTML page that needs nothing else."""

from .html import Report

__all__ = ["Report"]
