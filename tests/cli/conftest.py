"""The command line called in this process, and files for it."""

from __future__ import annotations

import pytest

from helpers.command import call, files


@pytest.fixture
def run(capsys, monkeypatch):
    """Returns (exit code, stdout, stderr) of `fastdistill …`."""
    return lambda *arguments: call(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with teacher, student, train.jsonl and held-out.jsonl."""
    return files(tmp_path_factory.mktemp("files"))
