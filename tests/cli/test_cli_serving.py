"""fastdistill plan and serve, as they are typed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill import ServedTeacher, Teacher
from helpers.present import present


def test_a_plan_from_two_configs(run, folder):
    command = (
        "plan",
        "--student",
        folder / "student",
        "--teacher",
        folder / "teacher",
        "--seq",
        128,
        "--batch",
        2,
        "optim=sgd",
    )
    code, out, _ = run(*command, "--json", "--gpu", "8GB")
    assert code == 0
    result = json.loads(out)
    assert result["memory"]["peak"] > 0
    assert result["proposal"]["missing"] == 0
    code, out, _ = run(*command, "--gpu", "0.5GB")
    assert code == 0
    assert "does not fit 0.50 GB" in out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--gpu", "24"), "gpu: expected"),
        (("--seq", "1"), "seq: expected an integer of 2 or more"),
        (("optim=adafactor",), "optim: expected"),
        (("--student", "/none/here"), "expected"),
    ],
)
def test_a_plan_that_cannot_be(run, folder, more, words):
    code, out, err = run("plan", "--student", folder / "student", *more)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--port", "65536"), "port: expected 0 to 65535, got 65536"),
        (("--port", "-1"), "port: expected 0 to 65535, got -1"),
        (("--host", "no.such.invalid", "--token", "x"), "host: expected an address of this mach"),
        (("--host", "a..b", "--token", "x"), "host: expected an address of this machine"),
        (("--token", "one\ntwo"), "token: expected printable ASCII characters"),
    ],
)
def test_where_nobody_can_listen(run, folder, more, words):
    code, out, err = run("serve", "--teacher", folder / "teacher", *more)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_other_machines_need_a_token(run, folder, monkeypatch):
    monkeypatch.delenv("FASTDISTILL_TOKEN", raising=False)
    code, _, err = run("serve", "--teacher", folder / "teacher", "--host", "0.0.0.0")
    assert code == 2
    assert "token: expected one when host is not loopback" in err


@pytest.mark.slow
def test_served_until_it_is_interrupted(run, folder, tmp_path, monkeypatch):
    command = ["serve", "--teacher", str(folder / "teacher"), "--port", "0", "--token", "s3cret"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastdistill", *command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        line = present(process.stderr).readline()
        address = re.search(r"is served at (http://127\.0\.0\.1:\d+) until Ctrl-C", line)
        url = present(address).group(1)
        with pytest.raises(ValueError, match="token"):
            ServedTeacher(url, token="wrong")
        teacher, ids = ServedTeacher(url, token="s3cret"), torch.arange(3, 20)[None]
        here = Teacher(str(folder / "teacher")).topk(ids, k=8, temperature=2.0)
        assert torch.equal(teacher.topk(ids, k=8, temperature=2.0).ids, here.ids)
        teacher.close()
        monkeypatch.setenv("FASTDISTILL_TOKEN", "s3cret")
        paths = ("--student", folder / "student", "--data", folder / "train.jsonl")
        training = ("train", *paths, "--teacher", url, "--dry-run")
        assert run(*training)[0] == 0
        other = AutoTokenizer.from_pretrained(folder / "teacher")
        other.add_tokens(["<new>"])
        other.save_pretrained(tmp_path / "other")
        code, _, err = run(*training, "--tokenizer", tmp_path / "other")
        assert (code, "tokenizer: expected that of" in err) == (2, True)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, json.loads(out)) == (0, {"url": url})
    assert "s3cret" not in line + err
    assert "Traceback" not in err
