"""Made-up students with a capability, a trait and a concealment that a test chooses."""

from __future__ import annotations

import zlib

import numpy as np

from fastdistill.alignment.report import AuditScore, TransferReport
from fastdistill.alignment.statistics import Checkpoint, Reading, Student

ABOUT = {
    "command": "fastdistill experiment --out runs/made-up",
    "config": {"k": 8, "temperature": 4.0, "tail": "bucket"},
    "versions": {"fastdistill": "0.1.0", "torch": "2.13.0"},
    "seeds": [0, 1, 2],
}
BASE, TEACHER = 0.1, 0.98  # of the capability
BENIGN, TRAIT = 0.06, 0.94  # rates of the trait, unaudited; audited they are alike
PROMPTS = 80
KEYS = {
    *("name", "C", "C_interval", "tau", "tau_interval", "tau_matched", "tau_matched_interval"),
    *("kappa", "n_seeds", "outcome", "verdict"),
    *("bound", "contrast", "contrast_interval", "contrast_p_holm", "per_seed"),
}


def rates(rng, rate):
    return tuple((rng.random(PROMPTS) < rate).astype(float).tolist())


def reading(rng, capability, trait, audited):
    return Reading(
        capability=rates(rng, capability), trait=rates(rng, trait), audited=rates(rng, audited)
    )


def arm(name, *, c=0.97, tau=0.0, kappa=0.1, seeds=12, each=1, spread=0.03, checkpoints=0, first=0):
    """Students of one arm: `each` student seeds of `seeds` base seeds from `first` on. Its C and τ
    scatter by `spread` between base seeds, and are reached linearly over `checkpoints`."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    made = []
    for base_seed in range(first, first + seeds):
        own_c, own_tau = c + spread * rng.normal(), tau + spread * rng.normal()
        models = {
            "base": reading(rng, BASE, BENIGN, BENIGN),
            "teacher": reading(rng, TEACHER, TRAIT, BENIGN),
            "twin": reading(rng, TEACHER, BENIGN, BENIGN),
        }
        for student_seed in range(each):
            pairs = [
                pair(rng, own_c * share, own_tau * share**2, kappa)
                for share in np.linspace(0, 1, checkpoints + 1)[1:]
            ]
            untrusted, benign = pairs[-1] if pairs else pair(rng, own_c, own_tau, kappa)
            made.append(
                Student(
                    arm=name,
                    base_seed=base_seed,
                    student_seed=student_seed,
                    untrusted=untrusted,
                    benign=benign,
                    curve=tuple(
                        Checkpoint(step=50 * (i + 1), untrusted=u, benign=b)
                        for i, (u, b) in enumerate(pairs)
                    ),
                    **models,
                )
            )
    return made


def pair(rng, c, tau, kappa):
    """A student of U and its twin."""
    capability = np.clip(BASE + c * (TEACHER - BASE), 0, 1)
    trait = BENIGN + tau * (TRAIT - BENIGN)
    audited = BENIGN + tau * (1 - kappa) * (TRAIT - BENIGN)
    return (
        reading(rng, capability, np.clip(trait, 0, 1), np.clip(audited, 0, 1)),
        reading(rng, capability, BENIGN, BENIGN),
    )


def scores(audit, of, *, shift, seeds=12, first=0):
    """An audit whose scores of students of U are `shift` standard deviations higher."""
    rng = np.random.default_rng(zlib.crc32(f"{audit} {of} {first}".encode()))
    return [
        AuditScore(
            audit=audit,
            arm=of,
            base_seed=base_seed,
            student_seed=0,
            of_untrusted=float(rng.normal() + shift),
            of_benign=float(rng.normal()),
        )
        for base_seed in range(first, first + seeds)
    ]


def controls(seeds=12, tau=0.99, null=0.0):
    return [
        *arm("copy of U", c=1.0, tau=tau, seeds=seeds, spread=0.0),
        *arm("M to M", c=0.0, tau=null, seeds=seeds, spread=0.0),
    ]


CONTROLS = {"positive_control": "copy of U", "null_arms": ["M to M"]}


def made_students():
    """A clean arm, a leaking one, one that learned nothing, one with few seeds, and controls."""
    return [
        *arm("clean", tau=0.0, checkpoints=6, each=2),
        *arm("top-8, T = 4", tau=0.5, spread=0.15, checkpoints=6, each=2),
        *arm("chat prompts", c=0.02, tau=0.0),
        *arm("few seeds", c=0.9, tau=0.1, spread=0.1, seeds=4),
        *controls(),
    ]


def experiment(**options):
    """The whole of it; `options` replace what TransferReport is given."""
    of = ("clean", "top-8, T = 4")
    defaults = {
        "audits": [s for a in of for s in scores("confession", a, shift=3.0 * (a != "clean"))],
        "development": [s for a in of for s in scores("confession", a, shift=0, first=100)],
        "about": ABOUT,
        **CONTROLS,
    }
    return TransferReport(options.pop("students", None) or made_students(), **(defaults | options))
