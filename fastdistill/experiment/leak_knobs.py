"""Leak knobs: how much of a trait comes through a distillation loss, by its settings.

k × tail × temperature (with and without T²) × divergence × token selection, one at a time from one
common setting: the trait transferred, concealment copied and capability of each, and the trait
where capability is equal.
"""

from __future__ import annotations

from typing import Any

from ..strategies.baselines import Undefended
from ..strategies.strategy import Training
from .double_bind import AUDITS, CONTROLS, MEASURED, MEASURED_THERE, POOL, TRAINING
from .study import Arm, Study

COMMON = {"k": 64, "tail": "bucket", "temperature": 1.0, "divergence": "forward_kl"}
KNOBS: dict[str, dict[str, Any]] = {
    "k=1": {"k": 1},
    "k=2": {"k": 2},
    "k=8": {"k": 8},
    "k=all": {"k": None},
    "k=8 truncated": {"k": 8, "tail": "truncate"},
    "k=8 renormalised": {"k": 8, "tail": "renorm_teacher"},
    "T=2": {"temperature": 2.0},
    "T=4": {"temperature": 4.0},
    "T=4 with T²": {"temperature": 4.0, "t2_scale": True},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "high entropy tokens": {"token_selection": "entropy top 0.5"},
    "large KL tokens": {"token_selection": "forward_kl top 0.5"},
    "small KL tokens": {"token_selection": "forward_kl bottom 0.5"},
}
QUICK = ("k=1", "k=8", "k=all", "T=4", "T=4 with T²", "reverse KL", "large KL tokens")


def study(preset: str = "quick", *, n: int | None = None, training: Training = TRAINING) -> Study:
    """The knobs of a preset: all of them in "full".

    Args:
        n: prompts of a pool that is given; None is the synthetic world's.
    """
    names = QUICK if preset == "quick" else tuple(KNOBS)
    knobs = [
        Arm(name=name, strategies=(Undefended(),), settings=KNOBS[name], says=_said(KNOBS[name]))
        for name in names
    ]
    common = Arm(name="common", strategies=(Undefended(),), says=_said(COMMON))
    return Study(
        name="leak-knobs",
        title="What the knobs of a distillation loss let through",
        arms=(common, *CONTROLS, *knobs),
        training=training,
        pool=POOL if n is None else {"n": n},
        audits=AUDITS,
        measured="One setting of the loss is changed at a time. "
        + (MEASURED if n is None else MEASURED_THERE),
        limits=()
        if n is not None
        else (
            "A toy is an abstract analogy for a mechanism: which knob leaks more in it is a lead "
            "for large models, no result about them. All arms have one learning rate, found for "
            "the common setting.",
        ),
    )


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'all' if value is None else value}" for name, value in settings.items()
    )
