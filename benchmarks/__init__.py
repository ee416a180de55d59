"""Benchmarks. A case is reported only if its results are correct."""
