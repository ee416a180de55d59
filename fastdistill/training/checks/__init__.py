"""Checks of a dataset and of a teacher's answers."""
