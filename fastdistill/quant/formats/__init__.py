"""Readers of the checkpoint formats that hold quantized weights."""
