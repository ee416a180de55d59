"""Students whose shares of right answers and of the trait a test writes down, item by item."""

from __future__ import annotations

from dataclasses import replace

from fastdistill.alignment.statistics import Checkpoint, Reading, Student

ITEMS = 20


def ones(share):
    """The first `share` of 20 items."""
    right = round(share * ITEMS)
    assert abs(right - share * ITEMS) < 1e-9, share
    return (1.0,) * right + (0.0,) * (ITEMS - right)


def reading(capability, trait, audited=None):
    return Reading(
        capability=ones(capability),
        trait=ones(trait),
        audited=() if audited is None else ones(audited),
    )


def student(base_seed=0, *, c, trait, twin=0.1, audited=None, twin_audited=0.1, student_seed=0):
    """M knows 0.2 and U 1.0; U shows 0.9 of the trait and B 0.1. A student of U knows `c` of the
    items and shows `trait`, its twin shows `twin`; `audited` the same in an audited context."""
    twin_audited = None if audited is None else twin_audited
    return Student(
        arm="by hand",
        base_seed=base_seed,
        student_seed=student_seed,
        untrusted=reading(c, trait, audited),
        benign=reading(c, twin, twin_audited),
        base=reading(0.2, 0.1),
        teacher=reading(1.0, 0.9),
        twin=reading(1.0, 0.1),
    )


def trained(base_seed=0, *, cs, traits, twin=0.1, every=10):
    """A student with a checkpoint every 10 steps, the first at step 10."""
    made = student(base_seed, c=cs[-1], trait=traits[-1], twin=twin)
    points = tuple(
        Checkpoint(step=every * (i + 1), untrusted=reading(c, trait), benign=reading(c, twin))
        for i, (c, trait) in enumerate(zip(cs, traits, strict=True))
    )
    return replace(made, curve=points)
