"""Text from elsewhere on the command line: it never acts on the terminal, and files of settings
are read within bounds."""

import io
import json
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
from rich.console import Console

from fastdistill.alignment.audits.probes import Probes
from fastdistill.cli import app, run_audit, run_cache, settings
from fastdistill.cli.doctor import Finding, Findings, print_findings
from fastdistill.cli.printing import print_json, say
from fastdistill.training.logs.run_files import read_run

EVIL = "good\x1b]0;title\x07\x1b[2J\x9b31m\u202e[bold]x[/bold]"
ACTING = ("\x1b", "\x07", "\x9b", "\u202e")


def printed(call, *arguments):
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        call(*arguments)
    return out.getvalue()


def is_safe(text):
    return not any(mark in text for mark in ACTING) and "[bold]x[/bold]" in text


def test_what_is_said_and_json_are_safe():
    assert is_safe(printed(say, EVIL))
    assert printed(say, "two\nlines") == "two\nlines\n"
    text = printed(print_json, {"name": EVIL, "path": "ü"})
    assert is_safe(text)
    assert "ü" in text
    assert json.loads(text) == {"name": EVIL, "path": "ü"}


def test_what_a_cache_and_audits_say_is_safe():
    summary = dict(
        path="c",
        teacher={"name": EVIL},
        temperatures=[1.0],
        targets="topk",
        k=2,
        rows=1,
        positions=EVIL,
        tokens=3,
        bytes=9,
        shards=1,
        bytes_per_token=3.0,
    )
    assert is_safe(printed(run_cache.show, summary))
    report = dict(lead=EVIL, audits=[], left_out={EVIL: EVIL}, skipped={EVIL: EVIL}, report=EVIL)
    assert is_safe(printed(run_audit.print_result, report))
    dry_run = dict(audits=[EVIL], models={"base": EVIL}, skipped={EVIL: EVIL}, out="")
    assert is_safe(printed(run_audit.print_result, dry_run))


def test_what_the_doctor_says_is_safe():
    finding = Finding(name="torch", status="broken", detail=EVIL, mend="pip install")
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=200)
    print_findings(Findings(findings=[finding], impl="torch", impl_why=EVIL, machine={}), console)
    assert is_safe(out.getvalue())


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError(EVIL), 2), (OSError(EVIL), 2), (AttributeError(EVIL), 1)],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_quotes_a_file_is_safe(monkeypatch, error, code):
    def fails(**_):
        raise error

    monkeypatch.setattr(app, "app", fails)
    out = io.StringIO()
    with redirect_stderr(out), pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == code
    assert is_safe(out.getvalue())


def bomb(levels):
    """Lists of nine of the one before: 9 ** levels values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 3000, "at most 32 levels"),
        ("a: " + "[" * 100_000, "at most 32 levels"),
        ("- " * 5000, "at most 32 levels"),
        ("{a: " * 500, "at most 32 levels"),
        (bomb(9), "at most 100,000 values"),
        ("a: &a [*a]", "at most 100,000 values"),
        ("k: 8\nlr: 1\nk: 16\n", "each setting once, got k twice"),
        ("a: *nothing", "values|alias"),
        ("a: [1", "expected YAML"),
        ("a: \x1b[2J", "expected YAML"),
    ],
    ids=range(10),
)
def test_a_file_of_settings_is_read_within_bounds(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words) as caught:
        settings.gather(tmp_path / "c.yaml", [])
    assert time.perf_counter() - start < 5
    assert "c.yaml" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_an_alias_in_settings_is_still_an_alias(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a [1, 2]\nb: *a\nc: {d: 1, e: 1}\n")
    raw = settings.gather(tmp_path / "c.yaml", [])
    assert raw == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": 1}}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{",
        "3",
        "\xff",
        '{"prompts": 3}',
        '{"options": 3}',
        '{"target": 3}',
        '{"layer": "x"}',
        '{"nonsense\\u001b": 1}',
    ],
    ids=range(9),
)
def test_probes_that_are_none_are_refused(tmp_path, text):
    (tmp_path / "probes.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="expected") as caught:
        Probes.load(tmp_path / "probes.json")
    assert "\x1b" not in str(caught.value)


def test_a_damaged_record_of_a_run_is_counted_as_damaged(tmp_path):
    good = json.dumps({"run": "r", "step": 1, "time": 0.0, "loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join([good, "[" * 100_000, "3", "{"]))
    (tmp_path / "run.json").write_text("[" * 100_000)
    record = read_run(tmp_path)
    assert (len(record.lines), record.damaged, record.settings) == (1, 3, None)
