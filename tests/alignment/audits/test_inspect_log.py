"""Results of audits that run without Inspect, as logs that it reads."""

import json
import math
from typing import Any, cast

import pytest

from helpers.inspected import NEEDED, QUIET, offline, tiny_subject

pytest.importorskip("inspect_ai", reason=NEEDED)

from inspect_ai.log import list_eval_logs, read_eval_log

from fastdistill.alignment.audits.behaviour import CapabilityAudit
from fastdistill.alignment.audits.distributions import TokenKLAudit
from fastdistill.alignment.audits.inspect.log import export_log
from fastdistill.alignment.audits.result import AuditResult

pytestmark = [*QUIET, pytest.mark.peers, pytest.mark.usefixtures("offline")]
__all__ = ["offline"]

AUDIT = TokenKLAudit(prompts=cast(Any, ("hello", "river stone", "cloud")))


@pytest.fixture(scope="module")
def models():
    return [tiny_subject(seed, name) for seed, name in enumerate(("suspect", "base", "twin"))]


@pytest.fixture(scope="module")
def result(models):
    suspect, base, twin = models
    return AUDIT.run(suspect, base=base, controls={"twin": twin})


@pytest.mark.parametrize("suffix", ["eval", "json"])
def test_a_result_is_a_log(result, tmp_path, suffix):
    path = tmp_path / "deep" / f"kl.{suffix}"
    export_log(result, path)
    log = read_eval_log(str(path))
    assert (log.status, log.eval.task, log.eval.model) == (
        "success",
        "TokenKLAudit",
        "fastdistill/suspect",
    )
    own, control = log.results.scores
    low, high = result.interval
    assert figures(own) == {"mean": result.value, "stderr": result.stderr, "low": low, "high": high}
    twin = result.controls["twin"]
    assert control.name == "control: twin"
    assert figures(control) == {
        "mean": twin.value,
        "stderr": twin.stderr,
        "low": twin.interval[0],
        "high": twin.interval[1],
        "difference": twin.difference.value,
        "difference_low": twin.difference.low,
        "difference_high": twin.difference.high,
    }
    assert log.eval.metadata == json.loads(json.dumps(result.as_json()))
    assert log.eval.packages["fastdistill"] == result.versions["fastdistill"]
    assert log.results.total_samples == result.n
    assert len(log.samples) == result.n
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    if suffix == "eval":  # Inspect lists .json files by names of its own only
        assert len(list_eval_logs(str(path.parent))) == 1


def figures(score):
    return {name: metric.value for name, metric in score.metrics.items()}


def test_values_are_samples_with_their_prompts(models, result, tmp_path):
    values = AUDIT.measure(models[0], models[1]).values.tolist()
    assert list(result.values) == values
    export_log(result, tmp_path / "kl.eval")
    samples = read_eval_log(str(tmp_path / "kl.eval")).samples
    assert [sample.scores["TokenKLAudit"].value for sample in samples] == values
    assert [sample.input for sample in samples] == ["hello", "river stone", "cloud"]


def test_answers_are_outputs_of_samples(models, tmp_path):
    audit = CapabilityAudit(prompts=cast(Any, ("hello", "river", "hello")), targets=("owl",) * 3)
    result = audit.run(models[0])
    assert any(result.texts)
    export_log(result, tmp_path / "answers.eval")
    samples = read_eval_log(str(tmp_path / "answers.eval")).samples
    assert [sample.output.completion for sample in samples] == list(result.texts)
    assert [sample.input for sample in samples] == ["hello", "river", "hello"]


def test_a_log_is_replaced_as_a_whole(result, tmp_path):
    path = tmp_path / "kl.eval"
    path.write_bytes(b"an older file")
    export_log(result, path)
    assert read_eval_log(str(path)).status == "success"


def test_what_is_not_known_is_left_out(tmp_path):
    lonely = AuditResult(
        audit="A", model="m", value=1.0, stderr=math.nan, interval=(math.nan, math.nan), n=1
    )
    export_log(lonely, tmp_path / "one.eval")
    log = read_eval_log(str(tmp_path / "one.eval"))
    assert figures(log.results.scores[0]) == {"mean": 1.0}
    assert log.eval.metadata["interval"] == [None, None]
    assert log.samples in (None, [])


def test_refusals(result, tmp_path):
    with pytest.raises(ValueError, match=r"path: expected one that ends with \.eval or \.json"):
        export_log(result, tmp_path / "kl.txt")
    assert list(tmp_path.glob("*kl*")) == []
