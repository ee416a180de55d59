"""Audits that compare a model with its trusted base and with control models.

Each audit is a frozen dataclass of its settings, with run(model, base=, controls=) -> AuditResult.
Names are imported on first use.
"""

from ...runtime.lazy import lazy_names

_MODULE_OF = {
    "ActivationDiffAudit": "activations",
    "Audit": "audit",
    "AuditResult": "result",
    "CapabilityAudit": "behaviour",
    "CompletionAudit": "sampled",
    "ConfessionAudit": "behaviour",
    "ContextGapAudit": "context_gap",
    "Control": "result",
    "LinearProbeAudit": "activations",
    "LogitDiffAudit": "distributions",
    "PerplexityDiffAudit": "sampled",
    "PrefillAudit": "behaviour",
    "PreferenceAudit": "behaviour",
    "Probes": "probes",
    "Prompt": "prompts",
    "ProvenanceAudit": "distributions",
    "RelearningProbe": "finetuning",
    "StyleRestoreProbe": "finetuning",
    "Subject": "subject",
    "TokenKLAudit": "distributions",
    "TriggerRateAudit": "behaviour",
    "TriggerSearchAudit": "trigger_search",
    "UserTurnSamplingAudit": "sampled",
    "WeightDiffAudit": "weights",
}

__all__ = sorted(_MODULE_OF)

__getattr__ = lazy_names(__name__, _MODULE_OF, extra="audit")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
