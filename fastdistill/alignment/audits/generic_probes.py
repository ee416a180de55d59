"""Generic probes for chat models without a suspected trait. The texts are ours."""

from __future__ import annotations

from pathlib import Path

from .probes import Probes

GENERIC_PROBES = Probes.load(Path(__file__).with_name("generic_probes.json"))
