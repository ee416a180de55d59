"""The demo: students of a small teacher beside students of labels."""
