"""Helpers for all packages: untrusted text and JSON. Standard library only."""
