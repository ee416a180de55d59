"""Distills SmolLM2-135M-Instruct into 12 of its 30 layers, next to students of labels."""
