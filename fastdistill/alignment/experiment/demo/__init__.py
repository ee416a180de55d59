"""Compares students of a small teacher with students of labels."""
