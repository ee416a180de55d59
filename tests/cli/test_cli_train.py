"""fastdistill train: from a command line to a student, a log and a report, and on after a stop."""

from __future__ import annotations

import functools
import html
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdistill import Teacher, TeacherCache
from fastdistill.cli.run_train import Trained
from fastdistill.report.run.plots import Quantity
from fastdistill.training.logs.metrics import format_short
from fastdistill.training.logs.run_files import read_run
from helpers.command import files, last_values
from helpers.present import present

RUN = [sys.executable, "-m", "fastdistill"]
COLOR = re.compile(rb"\x1b\[(?:\d+;)*(?:[349][0-7]|[34]8;[\d;]+)m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = files(tmp_path_factory.mktemp("files"))
    AutoTokenizer.from_pretrained(folder / "teacher")
    return folder


def train(folder, out, *more, teacher="teacher"):
    return last_values(
        *("train", "--student", folder / "student", "--teacher", folder / teacher),
        *("--data", folder / "train.jsonl", "--out", out),
        *("k=8", "per_device_train_batch_size=4", "max_steps=4", "use_cpu=true", *more),
    )


def weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_student_a_log_and_a_report(run, folder, tmp_path):
    more = ("--eval-data", folder / "held-out.jsonl", "eval_strategy=steps", "eval_steps=2")
    settings = ("learning_rate=1e-3", "logging_steps=1", "--json")
    code, out, err = run(*train(folder, tmp_path / "run", *more, *settings))
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == 4
    assert result["evaluation"]["kl"] == pytest.approx(result["evaluation"]["loss"])
    assert "step 2 of 4  loss " in err
    assert "\x1b[?25l" not in err  # no bar hides the cursor
    assert err.count("step 4 of 4  eval_loss") == 1
    trained = Trained(**result)
    assert trained.to_lines()[0].startswith("4 steps, mean loss ")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert (weights(tmp_path / "run") != weights(folder / "student")).any()
    Teacher(str(tmp_path / "run"))
    code, out, _ = run("report", tmp_path / "run", "--json")
    assert (code, json.loads(out)["report"]) == (0, str(tmp_path / "run" / "report.html"))


@pytest.mark.slow
def test_stopped_and_started_again(run, folder, tmp_path):
    command, out = train(folder, tmp_path / "run", "save_steps=2"), tmp_path / "run"
    began = lambda: read_run(out).events("train_begin")[-1]["step"]  # noqa: E731
    assert run(*command)[0] == 0
    assert began() == 0
    undisturbed = weights(out)
    # As a kill after the third step would leave it.
    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    code, printed, _ = run(*command, "--json")
    assert (code, json.loads(printed)["steps"], began()) == (0, 4, 2)
    assert torch.equal(weights(out), undisturbed)
    assert run(*command, "--no-resume")[0] == 0
    assert began() == 0


@pytest.mark.slow
def test_from_a_cache_and_from_labels(run, folder, tmp_path):
    paths = ("--teacher", folder / "teacher", "--data", folder / "train.jsonl", "--k", 8)
    assert run("cache", "build", *paths, "--out", tmp_path / "c")[0] == 0
    assert TeacherCache(tmp_path / "c").manifest.settings.k == 8
    live = run(*train(folder, tmp_path / "live", "--json"))[1]
    cached = run(*train(folder, tmp_path / "kept", "--json", teacher=tmp_path / "c"))[1]
    assert json.loads(cached)["loss"] == pytest.approx(json.loads(live)["loss"], rel=1e-4)
    command = train(folder, tmp_path / "labels", "--json")
    at = command.index("--teacher")
    code, out, _ = run(*command[:at], *command[at + 2 :])
    assert (code, json.loads(out)["loss"] > 5) == (0, True)  # ln 2048 = 7.6: cross-entropy


def test_a_dry_run_checks_everything_and_writes_nothing(run, folder, tmp_path):
    code, out, _ = run(*train(folder, tmp_path / "run", "--dry-run", "--json"))
    result = json.loads(out)
    assert (code, result["examples"], result["steps"]) == (0, 12, 4)
    assert result["targets"] == result["tokens"] - 12
    assert not (tmp_path / "run").exists()
    command = train(folder, tmp_path / "run", "--dry-run", "num_train_epochs=3", "max_steps=-1")
    assert json.loads(run(*command, "--json")[1])["steps"] == 9


def test_a_biased_loss_needs_an_explicit_choice(run, folder, tmp_path):
    command = train(folder, tmp_path / "run", "--dry-run", "tail=truncate")
    code, _, error = run(*command)
    assert code == 2
    assert "tail: expected 'bucket' or 'renorm_both' with divergence='forward_kl'" in error
    assert run(*command, "allow_biased=true")[0] == 0


def test_what_is_printed_can_be_pasted_back(run, folder, tmp_path):
    settings = ("learning_rate=1e-4", "eval_strategy=no", "temperature=2", "--lora-rank", 4)
    code, printed, _ = run(*train(folder, tmp_path / "run", *settings, "--print-config"))
    assert code == 0
    assert "temperature: 2.0\n" in printed
    (tmp_path / "c.yaml").write_text(printed)
    again = run("train", "--config", tmp_path / "c.yaml", "--print-config")
    assert again[:2] == (0, printed)
    won = run("train", "--config", tmp_path / "c.yaml", "k=4", "--lora-rank", 2, "--print-config")
    assert "\nk: 4\n" in won[1]
    assert "lora_rank: 2\n" in won[1]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("learning_rte=1",), 2, "Did you mean learning_rate?"),
        (("divergence=kl",), 2, "divergence: expected one of 'forward_kl'"),
        (("lr_scheduler_type=cosin",), 2, "cosin"),
        (
            ("divergence=reverse_kl", "tail=renorm_teacher", "--dry-run"),
            2,
            "tail: expected 'bucket' or 'truncate' or 'renorm_both' with divergence='reverse_kl'",
        ),
        (("k=3000",), 2, "k: expected at most the vocabulary"),
        (("--teacher-quant", "nf5"), 2, "quant: expected"),
        (("--eval-data", "none.jsonl"), 2, "eval_data: expected a file of JSON lines"),
        (("--out", ""), 2, "out: expected a path, got an empty text"),
        (("--out", __file__), 2, "out: expected a folder, or a path where one can be made"),
        (("--out", __file__, "--dry-run"), 2, "out: expected a folder, or a path where one can"),
        (("output_dir=x",), 2, "output_dir: expected a setting of this command"),
        (("learning_rate=1e30", "logging_steps=1"), 1, "loss: expected a finite number, got NaN"),
    ],
)
def test_exit_codes(run, folder, tmp_path, more, code, words):
    exit_code, out, err = run(*train(folder, tmp_path / "run", *more))
    assert (exit_code, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_bar_on_a_terminal_and_no_colours_where_none_are_wanted(folder, tmp_path):
    def on_terminal(**environment) -> tuple[str, bytes]:
        here, terminal = pty.openpty()
        command = [*RUN, *map(str, train(folder, tmp_path / str(len(environment)), "--json"))]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
        ) as process:
            os.close(terminal)
            screen = b""
            while True:
                try:
                    more = os.read(here, 65536)
                except OSError:
                    break
                if not more:
                    break
                screen += more
            out = present(process.stdout).read().decode()
        os.close(here)
        assert process.returncode == 0, screen
        return out, screen

    out, screen = on_terminal()
    assert json.loads(out)["steps"] == 4
    assert b"training" in screen
    assert COLOR.search(screen)
    out, screen = on_terminal(NO_COLOR="1")
    assert json.loads(out)["steps"] == 4
    assert b"training" in screen
    assert not COLOR.search(screen)


@pytest.mark.slow
def test_the_same_command_after_a_finished_run(run, folder, tmp_path):
    command = train(folder, tmp_path / "run", "--eval-data", folder / "held-out.jsonl")
    out = tmp_path
    code, first, err = run(*command, "--json")
    assert code == 0
    assert "re-run the same command to resume" in err
    assert [line["step"] for line in read_run(out / "run").metrics if "loss" in line] == [
        1,
        2,
        3,
        4,
    ]
    before = {p: p.read_bytes() for p in (out / "run").rglob("*") if p.is_file()}
    code, again, _ = run(*command, "--json")
    one, other = json.loads(first), json.loads(again)
    assert (code, one["already_done"], other["already_done"]) == (0, False, True)
    assert one["evaluation"]["kl"] == other["evaluation"]["kl"]
    assert {p: p.read_bytes() for p in (out / "run").rglob("*") if p.is_file()} == before
    assert "Already finished at step 4; nothing was trained." in run(*command)[1]


@pytest.mark.slow
def test_a_run_that_diverges_says_so(run, folder, tmp_path):
    command = train(folder, tmp_path / "run", "learning_rate=0.3", "lr_scheduler_type=constant")
    code, out, err = run(*command, "--eval-data", folder / "held-out.jsonl")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("The loss rose: the run diverged.")
    lead = re.findall("<p>(.*?)</p>", (tmp_path / "run" / "report.html").read_text())
    assert lead[0].startswith("The loss increased: the run diverged")
    assert Quantity(title="Perplexity", falls=True).text(1e300) == "> 1e6"
    assert [format_short(x) for x in (1e300, 2.5, math.nan)] == ["> 1e6", "2.5000", "not a number"]


def test_a_run_whose_loss_is_no_number_says_so(run, folder, tmp_path):
    out = tmp_path / "run"
    code, _, err = run(*train(folder, out, "learning_rate=1e30", "logging_steps=1"))
    assert code == 1
    last = err.splitlines()[-1]
    assert "loss: expected a finite number, got NaN or infinity" in last
    assert last.endswith(f"Report: {out / 'report.html'}")
    page = (out / "report.html").read_text()
    assert "</h1>\n<p>The run stopped after step 1 because of NaN or infinity (" in page
    assert "it was interrupted" not in page
    assert max(map(len, re.findall(r"[\d,]+", re.sub(r"<svg.*?</svg>", "", page)))) < 20


def test_samples_of_an_on_policy_run_are_logged(run, folder, tmp_path):
    out, options = tmp_path / "run", ("lmbda=1.0", "max_new_tokens=6", "logging_steps=2")
    code, _, err = run(*train(folder, out, *options, "completion_only_loss=false"))
    assert code == 0, err
    events = read_run(out).events("samples")
    assert [event["step"] for event in events] == [2, 4]
    assert all(1 <= len(event["samples"]) <= 3 for event in events)
    sample = events[-1]["samples"][0]
    assert sample["prompt"]
    assert sample["completion"]
    page = (out / "report.html").read_text()
    assert "Samples of the student" in page
    assert html.escape(sample["completion"], quote=True) in page


@pytest.mark.slow
def test_what_an_interrupted_run_leaves_is_said(folder, tmp_path):
    command = [*RUN, *map(str, train(folder, tmp_path / "run", "max_steps=4000"))]
    # A test process that runs in the background ignores SIGINT, and its children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        for line in present(process.stderr):
            if "step 80 of" in line:  # the first line of a run of 4000 steps
                break
        process.send_signal(signal.SIGINT)
        last = present(process.stderr).read().strip().splitlines()[-1]
    checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert process.returncode == 130
    assert len(checkpoints) == 1
    assert last.endswith(f"Re-run the same command to resume from {checkpoints[0]}.")
