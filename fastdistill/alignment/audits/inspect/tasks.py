"""Behavioral audits as Inspect tasks, with the same questions and scores.

`task_of` returns the task for any eval of Inspect. `run_with_inspect` runs an audit through Inspect
and returns the same values as the audit's own `run`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....runtime.checks import fail
from ..audit import Measurement, clusters_of, to_config
from ..behaviour import Answer, BehavioralAudit, Question
from ..prompts import Prompt
from ..result import AuditResult
from ..subject import Subject, to_subject
from .messages import messages_of
from .package import inspect_ai
from .provider import model_of

# Seconds that a batch waits for a missing request, whose sample may have failed. The batch of an
# audit is full once all its questions have arrived.
PATIENCE = 5.0


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
        inspect_ai.dataset.Sample(
            input=messages_of(question.prompt, at=(i,)),
            id=i + 1,
            metadata={
                "options": list(question.options),
                "max_new_tokens": question.max_new_tokens,
                "temperature": question.temperature,
                "seed": question.seed,
            },
        )
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


class _InspectSubject(Subject):
    """A Subject that answers the questions of one audit through Inspect.

    Everything else runs as in the original Subject, whose model, tokenizer and name it shares.
    """

    def __init__(self, subject: Subject, audit: BehavioralAudit, role: str, log_dir: Path) -> None:
        self.__dict__.update(subject.__dict__)
        self._eval = (subject, audit, role, log_dir)
        self._cached: dict[Question, deque[Answer]] | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        streams: Sequence[int] | None = None,
        **settings: Any,
    ) -> list[str]:
        answers = self._answers([Question(prompt=p, **settings) for p in prompts])
        if answers is None:
            return super().generate(prompts, streams=streams, **settings)
        return [answer.text for answer in answers]

    def option_log_probs(self, prompts: Sequence[Prompt], options: Sequence[str]) -> Tensor:
        answers = self._answers([Question(prompt=p, options=tuple(options)) for p in prompts])
        if answers is None:
            return super().option_log_probs(prompts, options)
        return torch.tensor([answer.options for answer in answers])

    def _answers(self, questions: Sequence[Question]) -> list[Answer] | None:
        """Returns answers in the order of the audit; None for questions of something else."""
        if self._cached is None:
            self._cached = {}
            _, audit, _, _ = self._eval
            for question, answer in zip(audit.questions(), _ask(*self._eval), strict=True):
                self._cached.setdefault(question, deque()).append(answer)
        remaining = {question: len(answers) for question, answers in self._cached.items()}
        if any(n > remaining.get(question, 0) for question, n in Counter(questions).items()):
            return None
        return [self._cached[question].popleft() for question in questions]


def _ask(subject: Subject, audit: BehavioralAudit, role: str, log_dir: Path) -> list[Answer]:
    """Runs one eval with all questions at once: generated batches are those of the audit's run."""
    questions = audit.questions()
    at_once = sum(max(1, len(question.options)) for question in questions)
    log = inspect_ai.eval(
        task_of(audit),
        model=model_of(subject, at_once=at_once, patience=PATIENCE),
        max_samples=len(questions),
        max_connections=at_once,
        metadata={"role": role},
        log_dir=str(log_dir),
        log_format="eval",
        log_realtime=False,  # otherwise written to the user's folders
        ctl_server=False,
        display="none",
    )[0]
    if log.status != "success":
        reason = log.error.message if log.error else "no reason given"
        raise RuntimeError(
            f"audit: Inspect ended {type(audit).__name__} with {log.status}: {reason}"
        )
    return [
        Answer(text=sample.output.completion, options=tuple(sample.store.get("options", ())))
        for sample in sorted(log.samples, key=lambda sample: sample.id)
    ]


def run_with_inspect(
    audit: BehavioralAudit,
    model: Any,
    *,
    base: Any = None,
    controls: Mapping[str, Any] | None = None,
    log_dir: str | Path,
) -> AuditResult:
    """Runs an audit with every question answered through Inspect.

    Inspect writes its own traces to the user's data folder (XDG_DATA_HOME on Linux).

    Args:
        log_dir: folder of the .eval logs, one for the model and one per control. "role" in the
            metadata of a log names the model.

    Raises:
        TypeError: not a model, or not a behavioral audit.
        RuntimeError: a sample failed, with Inspect's reason.
    """
    if not isinstance(audit, BehavioralAudit):
        task_of(audit)

    def through_inspect(name: str, subject: Any) -> Subject:
        return _InspectSubject(to_subject(name, subject), audit, name, Path(log_dir))

    return audit.run(
        through_inspect("model", model),
        base=base,
        controls={
            name: through_inspect(f"controls[{name!r}]", c) for name, c in (controls or {}).items()
        },
    )
