"""fastdistill audit: student, teacher and base, with probes or without."""

from __future__ import annotations

import json

import pytest

from fastdistill.alignment.audits import Probes, Prompt
from helpers.command import files

AUDIT = ("audit", "--model", "teacher", "--base", "student")


@pytest.fixture
def here(tmp_path, monkeypatch):
    files(tmp_path, rows=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def probes(path, **more):
    texts = {
        "prompts": (Prompt(text="def f("), Prompt(text="class A")),
        "target": "self",
        "markers": ("self",),
        **more,
    }
    Probes(**texts).save(path)


def test_one_page_and_one_file(here, run):
    probes(here / "p.json")
    code, _out, err = run(
        *AUDIT,
        *"--teacher teacher --probes p.json --out out".split(),
        "only=[trigger rate, token KL]",
    )
    assert code == 0, err
    result = json.loads((here / "out" / "results.json").read_text())
    names = [(row["name"], row["model"]) for row in result["audits"]]
    assert names == [
        (name, model) for name in ("trigger rate", "token KL") for model in ("student", "teacher")
    ]
    assert all(list(row["controls"]) == ["base"] for row in result["audits"])
    assert result["models"] == {"student": "teacher", "teacher": "teacher", "base": "student"}
    page = (here / "out" / "report.html").read_text()
    assert "trigger rate: share of answers that begin with the target" in page
    assert "token KL: KL of the next token from the base, nats" in page
    assert "Audit: student, teacher, base" in page
    # of two copies of one model every audit says the same
    values = [row["value"] for row in result["audits"]]
    assert values[0] == values[1]
    assert values[2] == values[3] > 0


def test_a_benign_control_is_one_more_control(here, run):
    probes(here / "p.json")
    code, out, err = run(
        *AUDIT, *"--benign teacher --probes p.json --json".split(), "only=[token KL]"
    )
    assert code == 0, err
    (row,) = json.loads(out)["audits"]
    assert set(row["controls"]) == {"base", "benign"}
    assert row["controls"]["benign"]["difference"] == 0
    assert row["is_evidence"] is False


def test_probes_beside_the_model_are_taken(here, run):
    probes(here / "teacher" / "probes.json")
    code, out, err = run(*AUDIT, "--dry-run", "--json")
    assert code == 0, err
    audits = json.loads(out)["audits"]
    assert "trigger rate" in audits
    assert "confession" not in audits


def test_skipped_audits_name_the_keys_that_they_need(here, run):
    probes(here / "p.json")
    code, out, err = run(*AUDIT, "--probes", "p.json", "--dry-run")
    assert code == 0, err
    assert "not enabled by the probes: confession, needs questions\n" in out
    assert "not enabled by the probes: context gap, needs audited\n" in out
    assert "trigger rate, needs" not in out
    code, _out, err = run(*AUDIT, "--probes", "p.json", "--dry-run", "only=[prefill]")
    assert code == 2
    assert "got prefill; of the probes, prefill needs prefilled, rest" in err


def test_without_probes_what_can_be_asked_of_any_model_is(here, run):
    _code, out, _err = run(*AUDIT, "--dry-run", "--json")
    assert json.loads(out)["audits"] == [
        "confession",
        "perplexity difference",
        "token KL",
        "linear probe",
        "trigger search",
    ]
    assert not (here / "fastdistill-audit").exists()


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("only=[telepathy]",), "only: expected names among confession"),
        (("--probes", "nowhere.json"), "probes: expected a JSON file, got nowhere.json"),
        (("--teacher", "nowhere"), "nowhere"),
        (("device=tpu",), "device: expected a device of this machine, got 'tpu'"),
        (("device=cuda:99",), "device: expected a device of this machine, got 'cuda:99'"),
        (("--out", __file__), "out: expected a folder, or a path where one can be made"),
    ],
)
def test_requests_that_cannot_be_met(here, run, more, words):
    code, _out, err = run(*AUDIT, "--dry-run", *more)
    assert code == 2
    assert words in err


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning")
def test_logs_for_inspect(here, run):
    log = pytest.importorskip("inspect_ai.log", reason="needs inspect-ai, of Python 3.11 and up")
    probes(here / "p.json")
    code, _out, err = run(
        *AUDIT, *"--probes p.json --log-dir logs".split(), "only=[trigger rate, token KL]"
    )
    assert code == 0, err
    read = [log.read_eval_log(str(path)) for path in sorted((here / "logs").iterdir())]
    assert {one.status for one in read} == {"success"}
    assert len(read) == 2
