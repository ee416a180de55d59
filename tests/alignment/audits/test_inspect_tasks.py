"""Behavioural audits through Inspect: the same answers and results, logs that Inspect reads."""

import json
import subprocess
import sys
from typing import Any, cast

import pytest

from helpers.inspected import NEEDED, QUIET, offline, tiny_subject

inspect_ai = pytest.importorskip("inspect_ai", reason=NEEDED)

from inspect_ai.log import list_eval_logs  # noqa: E402
from inspect_ai.model import GenerateConfig, Model, ModelAPI, ModelOutput, modelapi  # noqa: E402

from fastdistill.alignment.audits.behaviour import (  # noqa: E402
    BehavioralAudit,
    CapabilityAudit,
    ConfessionAudit,
    PreferenceAudit,
    PrefillAudit,
    TriggerRateAudit,
)
from fastdistill.alignment.audits.distributions import TokenKLAudit  # noqa: E402
from fastdistill.alignment.audits.inspect.provider import model_of  # noqa: E402
from fastdistill.alignment.audits.inspect.tasks import task_of  # noqa: E402
from fastdistill.alignment.audits.prompts import Prompt  # noqa: E402
from fastdistill.alignment.audits.sampled import CompletionAudit, UserTurnSamplingAudit  # noqa: E402
from fastdistill.alignment.organisms.vocabulary import ANIMALS, COLORS, TOPICS  # noqa: E402

pytestmark = [*QUIET, pytest.mark.peers, pytest.mark.usefixtures("offline")]
__all__ = ["offline"]

PROMPTS = tuple(
    Prompt(user=f"is this {topic} near {colour} ?", system=system)
    for topic in TOPICS[:6]
    for colour in COLORS[:2]
    for system in (None, "please answer briefly")
)
BEGUN = tuple(Prompt(user=p.user, system=p.system, prefill="your owl") for p in PROMPTS)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject()


@pytest.fixture(scope="module")
def audits(subject):
    """With targets that some answers meet, so that no score is all 0 or all 1."""
    first_words = [text.split()[0] for text in subject.generate(PROMPTS, max_new_tokens=4)]
    often = max(first_words, key=first_words.count)
    begun = [text.split()[0] for text in subject.generate(BEGUN, max_new_tokens=4)]
    targets = tuple(word if i % 2 else "|AUDIT|" for i, word in enumerate(first_words))
    sampled: dict[str, Any] = {"markers": (*ANIMALS, *COLORS), "samples": 24, "max_new_tokens": 6}
    return {
        type(audit): audit
        for audit in (
            CapabilityAudit(prompts=PROMPTS, targets=targets, max_new_tokens=4),
            TriggerRateAudit(prompts=PROMPTS, target=often, without=PROMPTS[:4], max_new_tokens=4),
            PreferenceAudit(prompts=PROMPTS, options=(*ANIMALS, "owl cat"), favourite="fox"),
            ConfessionAudit(prompts=PROMPTS),
            PrefillAudit(prompts=BEGUN, target=max(begun, key=begun.count), max_new_tokens=4),
            UserTurnSamplingAudit(systems=("", "please"), **sampled),
            CompletionAudit(prefixes=("river stone", "a", "hello your owl"), **sampled),
        )
    }


KINDS = (
    CapabilityAudit,
    TriggerRateAudit,
    PreferenceAudit,
    ConfessionAudit,
    PrefillAudit,
    UserTurnSamplingAudit,
    CompletionAudit,
)


def below(kind):
    for other in kind.__subclasses__():
        yield other
        yield from below(other)


def test_every_behavioural_audit_is_here():
    ours = {
        k for k in below(BehavioralAudit) if k.__module__.startswith("fastdistill.alignment.audits")
    }
    assert {k for k in ours if not k.__name__.startswith("_")} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_that_of_the_audits_own_run(kind, audits, subject, tmp_path):
    audit = audits[kind]
    expected = audit.run(subject)
    assert expected.stderr > 0
    log = evaluate(audit, subject, tmp_path)
    assert (log.eval.task, log.eval.model) == (kind.__name__, "fastdistill/tiny")
    config = json.loads(json.dumps(expected.config))
    assert {name: log.eval.metadata[name] for name in config} == config
    figures = {name: metric.value for name, metric in log.results.scores[0].metrics.items()}
    low, high = expected.interval
    # Options are read once per question here, and one by one by Inspect: last bits differ.
    assert figures == pytest.approx(
        {"mean": expected.value, "stderr": expected.stderr, "low": low, "high": high}, rel=1e-5
    )
    values = values_of(log)
    if kind.rate:
        assert values == list(expected.values)
    assert values == pytest.approx(list(expected.values), rel=1e-5)


def test_one_connection_and_32_give_the_same_values(audits, subject, tmp_path):
    for kind in (PreferenceAudit, UserTurnSamplingAudit, TriggerRateAudit):
        values = [
            values_of(evaluate(audits[kind], subject, tmp_path, max_connections=n)) for n in (1, 32)
        ]
        if kind.rate:
            assert values[0] == values[1]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def evaluate(audit, subject, log_dir, **options):
    (log,) = inspect_ai.eval(
        task_of(audit),
        model=model_of(subject),
        **options,
        display="none",
        log_dir=str(log_dir),
        log_realtime=False,
        ctl_server=False,
    )
    assert log.status == "success"
    return log


def values_of(log):
    return [s.scores[log.eval.task].value for s in sorted(log.samples, key=lambda s: s.id)]


def test_inspects_command_reads_the_log(audits, subject, tmp_path):
    audit = audits[PreferenceAudit]
    evaluate(audit, subject, tmp_path)
    (info,) = list_eval_logs(str(tmp_path))
    command = [sys.executable, "-m", "inspect_ai", "log", "dump", info.name]
    dumped = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert dumped["status"] == "success"
    mean = dumped["results"]["scores"][0]["metrics"]["mean"]["value"]
    assert mean == pytest.approx(audit.run(subject).value, rel=1e-6)
    first = dumped["samples"][0]
    assert first["input"][0]["content"] == PROMPTS[0].user
    assert set(first["scores"]["PreferenceAudit"]["metadata"]["log_probs"]) == set(audit.options)


def test_nothing_is_left_in_the_users_folders_but_inspects_own_notes(
    audits, subject, tmp_path, offline
):
    evaluate(audits[ConfessionAudit], subject, tmp_path / "logs")
    assert {path.name for path in offline.iterdir()} <= {"inspect_ai"}
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_refusals():
    no_behavior = cast(Any, TokenKLAudit)(prompts=("hello",))
    with pytest.raises(TypeError, match=r"audit: expected a behavioral audit.*got TokenKLAudit"):
        task_of(no_behavior)


class Silent(ModelAPI):
    async def generate(self, input, tools, tool_choice, config):
        return ModelOutput.from_content("silent", "owl")


def test_a_model_without_log_probabilities_of_answers_is_refused(audits, tmp_path):
    silent = modelapi(name="silent")(Silent)
    (log,) = inspect_ai.eval(
        task_of(audits[ConfessionAudit]),
        model=Model(silent("silent"), GenerateConfig()),
        display="none",
        log_dir=str(tmp_path),
        log_realtime=False,
        ctl_server=False,
    )
    assert log.status == "error"
    assert "model: expected log-probabilities of fixed answers" in log.error.message
