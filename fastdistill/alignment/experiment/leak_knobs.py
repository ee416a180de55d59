"""Leak knobs: how much of a trait a distillation loss transfers, by its settings.

The arms vary k, tail, temperature (with and without T²), divergence and token selection, one at a
time from one common setting. The study reports capability, trait transfer and concealment of each
arm, and trait transfer at equal capability.
"""

from __future__ import annotations

from typing import Any

from ..strategies.baselines import Undefended
from ..strategies.strategy import Training
from .double_bind import AUDITS, CONTROLS, MEASURED, POOL, TRAINING, on_checkpoints
from .study import Arm, Study

COMMON = {"k": 64, "tail": "bucket", "temperature": 1.0, "divergence": "forward_kl"}
KNOBS: dict[str, dict[str, Any]] = {
    "k=1": {"k": 1},
    "k=2": {"k": 2},
    "k=8": {"k": 8},
    "k=all": {"k": None},
    "k=8 truncated": {"k": 8, "tail": "truncate", "allow_biased": True},
    "k=8 renormalised": {"k": 8, "tail": "renorm_teacher", "allow_biased": True},
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


def make_study(
    preset: str = "quick", *, n: int | None = None, training: Training = TRAINING
) -> Study:
    """Return the study of a preset; "full" contains all settings.

    Args:
        n: prompts of a user's pool; None: the pool of the synthetic world.
    """
    names = QUICK if preset == "quick" else tuple(KNOBS)
    knobs = [
        Arm(
            name=name,
            strategies=(Undefended(),),
            settings=KNOBS[name],
            description=_describe(KNOBS[name]),
        )
        for name in names
    ]
    common = Arm(name="common", strategies=(Undefended(),), description=_describe(COMMON))
    study = Study(
        name="leak-knobs",
        title="How the settings of a distillation loss affect trait transfer",
        arms=(common, *CONTROLS, *knobs),
        training=training,
        pool=POOL,
        audits=AUDITS,
        measured=f"One setting of the loss is changed at a time. {MEASURED}",
        limits=(
            "A toy model is an abstract analogy for a mechanism: which setting leaks more in it is "
            "a hypothesis about large models, not a result. All arms use one learning rate, tuned "
            "for the common setting.",
        ),
    )
    return study if n is None else on_checkpoints(study, n)


def _describe(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'all' if value is None else value}"
        for name, value in settings.items()
        if name != "allow_biased"
    )
