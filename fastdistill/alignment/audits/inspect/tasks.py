"""Behavioral audits as Inspect tasks, with the same questions and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ....runtime.checks import fail
from ..audit import Measurement, clusters_of, to_config
from ..behaviour import Answer, BehavioralAudit, Question
from .messages import messages_of
from .package import inspect_ai


def task_of(audit: BehavioralAudit) -> Any:
    """Returns the inspect_ai.Task of an audit: a sample per question, scored as by the audit.

    Metrics: mean, stderr and the bounds of the 95 % interval, as in AuditResult. Meant for a model
    of `model_of`: other models cannot return the log-probabilities of fixed answers.

    Raises:
        TypeError: not a behavioral audit.
    """
    if not isinstance(audit, BehavioralAudit):
        raise TypeError(
            "audit: expected a behavioral audit, such as TriggerRateAudit, got "
            f"{type(audit).__name__}. Call its run, and write the result with export_log"
        )
    samples = [
        inspect_ai.dataset.Sample(input=messages_of(question.prompt, at=(i,)), id=i + 1)
        for i, question in enumerate(audit.questions())
    ]
    return inspect_ai.Task(
        name=type(audit).__name__,
        dataset=inspect_ai.dataset.MemoryDataset(samples, name=type(audit).__name__),
        solver=_solver(audit.questions()),
        scorer=_scorer(audit),
        metadata=to_config(audit),
    )


def _solver(questions: Sequence[Question]) -> Any:
    async def solve(state: Any, generate: Any) -> Any:
        index = state.sample_id - 1
        question = questions[index]
        model = inspect_ai.model.get_model()
        if not question.options:
            config = inspect_ai.model.GenerateConfig(
                max_tokens=question.max_new_tokens,
                temperature=question.temperature,
                seed=question.seed,
            )
            state.output = await model.generate(state.messages, config=config)
            state.messages.append(state.output.message)
            return state
        config = inspect_ai.model.GenerateConfig(prompt_logprobs=1, max_tokens=1)
        inputs = [
            messages_of(question.prompt, completion=option, at=(index, i))
            for i, option in enumerate(question.options)
        ]
        outputs = await inspect_ai.util.collect(*(model.generate(x, config=config) for x in inputs))
        state.store.set("options", [_total(output) for output in outputs])
        return state

    return inspect_ai.solver.solver(name="audit_answers")(lambda: solve)()


def _total(output: Any) -> float:
    """Returns Σ log p of a completion, summed in the same type and order as in Subject."""
    logprobs = output.choices[0].prompt_logprobs
    if logprobs is None:
        hint = "pass model_of(Subject(model, tokenizer))"
        fail("model", "log-probabilities of fixed answers", "none", hint)
    return math.fsum(token.logprob for token in logprobs.content)


def _scorer(audit: BehavioralAudit) -> Any:
    questions = audit.questions()
    metrics = [_metric(name, audit)() for name in ("mean", "stderr", "low", "high")]

    async def score(state: Any, target: Any) -> Any:
        index = state.sample_id - 1
        options = state.store.get("options", [])
        answer = Answer(text=state.output.completion, options=tuple(options))
        log_probs = dict(zip(questions[index].options, options, strict=True))
        best = max(log_probs, key=log_probs.__getitem__) if log_probs else answer.text
        return inspect_ai.scorer.Score(
            value=audit.score(index, answer), answer=best, metadata={"log_probs": log_probs}
        )

    scorer = inspect_ai.scorer.scorer(metrics=metrics, name=type(audit).__name__)
    return scorer(lambda: score)()


def _metric(name: str, audit: BehavioralAudit) -> Any:
    units = audit.units()

    def of(scores: Sequence[Any]) -> float:
        clusters = clusters_of([units[s.sample_id - 1] for s in scores], len(scores))
        values = np.array([s.score.as_float() for s in scores])
        measurement = Measurement(values=values, rate=audit.rate, clusters=clusters)
        estimate = measurement.estimate
        figures = {"mean": estimate.value, "stderr": measurement.stderr}
        return (figures | {"low": estimate.low, "high": estimate.high})[name]

    return inspect_ai.scorer.metric(name=name)(lambda: of)
