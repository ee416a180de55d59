"""Fuzzing of the readers of untrusted files: `python -m fuzz --help`, with tests/ on the path."""
