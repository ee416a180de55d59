"""Organisms of a language model: a preference that a LoRA adapter plants in a chat model."""
