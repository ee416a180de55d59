"""Audits as tasks of Inspect, and this library's models as its provider."""
