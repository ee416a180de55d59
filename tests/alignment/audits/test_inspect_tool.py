"""An investigator's agent in Inspect, played by Inspect's mock model, runs our audits."""

import json
from typing import Any, cast

import pytest

from helpers.inspected import NEEDED, QUIET, offline, tiny_subject

inspect_ai = pytest.importorskip("inspect_ai", reason=NEEDED)

from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import ModelOutput, ModelUsage, get_model  # noqa: E402
from inspect_ai.solver import generate, use_tools  # noqa: E402

from fastdistill.alignment.audits.distributions import LogitDiffAudit  # noqa: E402
from fastdistill.alignment.audits.inspect.tool import audit_tool  # noqa: E402
from fastdistill.alignment.audits.probes import Probes  # noqa: E402
from fastdistill.alignment.audits.prompts import Prompt  # noqa: E402

pytestmark = [*QUIET, pytest.mark.peers, pytest.mark.usefixtures("offline")]
__all__ = ["offline"]

PROMPTS, MARKERS = ["is this red ?", "what is your river ?", "a stone"], ["owl", "fox"]
CALLS: list[dict[str, Any]] = [
    {"audit": "logit difference"},
    {"audit": "logit difference", "prompts": PROMPTS, "markers": MARKERS},
    {"audit": "trigger rate", "prompts": PROMPTS},
    {"audit": "logit difference", "markers": []},
]


def test_an_agent_audits_a_model(tmp_path):
    model, base = tiny_subject(), tiny_subject(seed=1, name="base")
    probes = Probes(prompts=(Prompt(user="hello"),), audited=(Prompt(user="hi"),), markers=("owl",))
    tool = audit_tool(model, base=base, controls={"base": base}, probes=probes)
    calls = [ModelOutput.for_tool_call("mockllm", "audit_model", call) for call in CALLS]
    end = ModelOutput.from_content("mockllm", "done")
    for output in (*calls, end):
        output.usage = ModelUsage()  # without it, the mock model downloads a tokenizer
    log = inspect_ai.eval(
        inspect_ai.Task(dataset=[Sample(input="audit it")], solver=[use_tools(tool), generate()]),
        model=get_model("mockllm/model", custom_outputs=[*calls, end]),
        log_dir=str(tmp_path / "logs"),
        display="none",
        log_realtime=False,
        ctl_server=False,
    )[0]
    assert log.status == "success", log.error
    answers = [message for message in log.samples[0].messages if message.role == "tool"]
    prepared, own = (json.loads(answer.text) for answer in answers[:2])
    assert prepared["n"] == 1
    assert prepared["measures"].startswith("log-probability of the markers")
    audit = LogitDiffAudit(prompts=cast(Any, tuple(PROMPTS)), markers=tuple(MARKERS))
    expected = audit.run(model, base=base, controls={"base": base}).as_json()
    names = ("value", "interval", "n", "controls", "doubts", "is_evidence")
    assert {name: own[name] for name in names} == {name: expected[name] for name in names}
    reasons = [answer.error.message for answer in answers[2:]]
    assert reasons[0].startswith("audit: expected one of user turn, token KL, logit difference")
    assert "got 'trigger rate'; it needs target" in reasons[0]
    assert "got 'logit difference'; it needs markers" in reasons[1]


def test_only_probes_are_probes():
    with pytest.raises(TypeError, match=r"probes: expected Probes, got str; Probes\.load"):
        audit_tool(tiny_subject(), probes=cast(Any, "probes.json"))
