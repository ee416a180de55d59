"""The demo's audit of teacher, students and base."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from ...audits.distributions import ProvenanceAudit, TokenKLAudit
from ...audits.prompts import Prompt
from ...audits.side_by_side import SuiteResults, run_suite
from ...audits.subject import Subject
from ...audits.trigger_search import TriggerSearchAudit
from .models import STUDENT, new_llama
from .result import DemoSetting

N_PROMPTS = 48
PREFIX, CONTINUATION = 16, 24  # tokens
WORDS = ("def", "class", "import", "return", "self", "None", "lambda", "yield")


def audit_models(setting: DemoSetting, students: Mapping[str, PreTrainedModel]) -> SuiteResults:
    """Audit the models; students and base have seed 0."""
    base = new_llama(STUDENT, vocab_size=setting.teacher.vocab_size, seed=0)
    models = {"teacher": setting.teacher.model, **students, "base": base}
    tokenizer = setting.tokenizer
    subjects = {name: Subject(model, tokenizer, name=name) for name, model in models.items()}
    starts = tokenizer.batch_decode(setting.held_out.ids[:N_PROMPTS, :PREFIX])
    prompts = tuple(Prompt(text=text) for text in starts)
    texts = subjects["teacher"].generate(prompts, max_new_tokens=CONTINUATION, temperature=1.0)
    pairs = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text.strip()]
    suite = {
        "teacher's words": ProvenanceAudit(
            prompts=tuple(prompt for prompt, _ in pairs), texts=tuple(text for _, text in pairs)
        ),
        "token KL": TokenKLAudit(prompts=prompts),
        "trigger search": TriggerSearchAudit(prompts=prompts[:12], candidates=WORDS),
    }
    return run_suite(suite, subjects, base=subjects["base"])
