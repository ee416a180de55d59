"""The demo's audit: teacher, students and the base they began from, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .audits.distributions import ProvenanceAudit, TokenKLAudit
from .audits.prompts import Prompt
from .audits.side_by_side import SuiteResults, run_suite
from .audits.subject import Subject
from .audits.trigger_search import TriggerSearchAudit
from .corpus import Windows
from .demo_models import STUDENT, new_llama

PROMPTS, PREFIX, WRITTEN = 48, 16, 24  # texts, and tokens of each
WORDS = ("def", "class", "import", "return", "self", "None", "lambda", "yield")


def side_by_side_of(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    held_out: Windows,
) -> SuiteResults:
    """`students` are of seed 0, and so is the base."""
    base = new_llama(STUDENT, vocab_size=teacher.config.vocab_size, seed=0)
    models = {"teacher": teacher, **students, "base": base}
    subjects = {name: Subject(model, tokenizer, name=name) for name, model in models.items()}
    starts = tokenizer.batch_decode(held_out.ids[:PROMPTS, :PREFIX])
    prompts = tuple(Prompt(text=text) for text in starts)
    said = subjects["teacher"].generate(prompts, max_new_tokens=WRITTEN, temperature=1.0)
    kept = [i for i, text in enumerate(said) if text.strip()]
    suite = {
        "teacher's words": ProvenanceAudit(
            prompts=tuple(prompts[i] for i in kept), texts=tuple(said[i] for i in kept)
        ),
        "token KL": TokenKLAudit(prompts=prompts),
        "trigger search": TriggerSearchAudit(prompts=prompts[:12], candidates=WORDS),
    }
    return run_suite(suite, subjects, base=subjects["base"])
