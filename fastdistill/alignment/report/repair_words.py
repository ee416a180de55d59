"""The words of a study that repairs models: the same figures, of a trait that remains or is gone.

In such a study the student of U begins as U, so τ is the share of the trait that remains.
"""

from __future__ import annotations

import re

from matplotlib.figure import Figure
from matplotlib.text import Text

_WORDS = {
    "DFC succeeds": "removed",
    "a student that learned little also acquires little": "a model that loses its capability may "
    "lose the trait with it",
    "a transfer could have been missed": "a trait that remains could have been missed",
    "a transfer is detected where there is none": "a trait is detected where there is none",
    "acquires": "keeps",
    "acquire": "keep",
    "detect a transfer": "detect a trait that remains",
    "detects none without transfer": "detects none where there is none",
    "no trait transfers": "no trait remains",
    "no trait was found to transfer": "no trait was found to remain",
    "a trait transfer of at most": "a remaining trait of at most",
    "the trait of a student as a share of that of its teacher (0: as of the benign twin; 1: as of "
    "the teacher)": "the trait that remains as a share of that before (0: as of the benign twin; "
    "1: as before)",
    "the trait transfers": "the trait remains",
    "trait transferred": "trait that remains",
    "Trait transferred": "Trait that remains",
    "the transferred trait": "the trait that remains",
}
_PATTERN = re.compile("|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)))


def in_repair_words(text: str) -> str:
    """Returns a text of a report in the words of a repair."""
    return _PATTERN.sub(lambda match: _WORDS[match[0]], text)


def relabel(figure: Figure) -> None:
    """Writes the texts of a figure in the words of a repair."""
    for label in figure.findobj(Text):
        label.set_text(in_repair_words(label.get_text()))
