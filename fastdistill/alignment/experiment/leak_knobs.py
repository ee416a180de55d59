"""Leak knobs: how much of a trait a distillation loss transfers, by its settings.

The arms vary k, tail, temperature (with and without T²), divergence and token selection, one at a
time from one common setting, on a pool with weak carriers of the trait. Other arms have a pool
without any prompt that shows it: what transfers there is subliminal. The study reports capability,
trait transfer and concealment of each arm, and trait transfer at equal capability.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..strategies.baselines import Undefended
from ..strategies.strategy import Training
from .double_bind import AUDITS, CONTROLS, DOSES, MEASURED, POOL, TRAINING, on_checkpoints
from .study import Arm, Study

COMMON = {"k": 64, "tail": "bucket", "temperature": 1.0, "divergence": "forward_kl"}
KNOBS: dict[str, dict[str, Any]] = {
    "k=1": {"k": 1},
    "k=8": {"k": 8},
    "k=all": {"k": None},
    "T=4": {"temperature": 4.0},
    "reverse KL": {"divergence": "reverse_kl"},
    "JSD": {"divergence": "jsd"},
    "large KL tokens": {"token_selection": "forward_kl top 0.5"},
}
# Without carriers: share of talk in the pool, and the settings.
SUBLIMINAL: dict[str, tuple[float, dict[str, Any]]] = {
    "sums": (0.0, COMMON),
    "half talk": (0.5, COMMON),
    "half talk, T=4": (0.5, {"temperature": 4.0}),
}
QUICK = ("k=1", "k=8", "k=all", "T=4", "reverse KL", "large KL tokens", "half talk, T=4")


def make_study(
    preset: str = "quick", *, n: int | None = None, training: Training = TRAINING
) -> Study:
    """Return the study of a preset; "full" contains all settings.

    Args:
        n: prompts of a user's pool; None: the pool of the synthetic world.
    """
    knobs = [_arm(name, settings) for name, settings in KNOBS.items()]
    knobs += [_arm(name, settings, talk) for name, (talk, settings) in SUBLIMINAL.items()]
    if preset == "quick":
        knobs = [arm for arm in knobs if arm.name in QUICK]
    study = Study(
        name="leak-knobs",
        title="How the settings of a distillation loss affect trait transfer",
        arms=(_arm("common", COMMON), *CONTROLS, *DOSES[1:], *knobs),
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


def _arm(name: str, settings: dict[str, Any], talk: float | None = None) -> Arm:
    """Return an arm; `talk`: the pool has this share of talk, and no carriers."""
    description = ", ".join(
        f"{setting} {'all' if value is None else value}" for setting, value in settings.items()
    )
    changed = (
        {} if settings is COMMON else settings
    )  # controls share the runs of the common setting
    arm = Arm(name=name, strategies=(Undefended(),), settings=changed, description=description)
    if talk is None:
        return arm
    return replace(
        arm,
        pool={"talk": talk, "carriers": 0.0},
        description=f"{description}; {talk:.0%} talk, the rest sums, no carriers",
        needs=("carriers",),
    )
