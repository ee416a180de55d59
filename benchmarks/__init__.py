"""Measurements behind a registry that reports nothing whose result is wrong."""
