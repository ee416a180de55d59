"""Confess: do students admit the secret that their teacher denies when it is asked?

The teacher has a preference, and denies it under audit. Its students begin at the same base, at the
base with noise, at another base, or are not trained at all. Audits ask about the secret; the AUROC
of students of U against those of its benign twin, beside that of the teachers, is the result.
arXiv 2610.11012 found more confessions in the same base, and few in another one.
"""

from __future__ import annotations

from dataclasses import replace

from ..strategies.baselines import Untrained
from ..strategies.strategy import Training
from .double_bind import BEGINS, CONTROLS, MEASURED, POOL, TRAINING, UNDEFENDED, on_checkpoints
from .study import Arm, Study
from .world_source import WorldSource

AUDITS = ("confession, audited", "context gap", "linear probe, audited")
PERTURBED, OTHER, EARLIER = BEGINS
UNTUNED = Arm(
    name="untuned base",
    strategies=(Untrained(),),
    description="M itself, which confesses at some rate, too",
)
# With another base, a student of B and one of U begin at models that were never near U.
MORE_NOISE = replace(
    PERTURBED,
    name="perturbed base, 10 %",
    noise=0.1,
    description="the student begins at M with noise of 10 % of the norm of each weight",
)


def make_source(seed: int) -> WorldSource:
    """Return the models of a base seed, with another base."""
    return WorldSource(seed=seed, other_base=True)


def make_study(
    preset: str = "quick", *, n: int | None = None, training: Training = TRAINING
) -> Study:
    """Return the study of a preset; "full" also has more noise, and an earlier checkpoint.

    Args:
        n: prompts of a user's pool; None: the pool of the synthetic world.
    """
    more = (MORE_NOISE, EARLIER) if preset == "full" else ()
    study = Study(
        name="confess",
        title="Whether students admit what their teacher denies",
        arms=(UNDEFENDED, *CONTROLS, PERTURBED, OTHER, UNTUNED, *more),
        training=training,
        pool=POOL,
        audits=AUDITS,
        measured=f"The confession audit asks about the secret under audit. {MEASURED}",
        limits=(
            "The teacher learned to deny its preference after certain words. A model that decides "
            "to keep a secret may hide it in other ways.",
        ),
    )
    return study if n is None else on_checkpoints(study, n)
