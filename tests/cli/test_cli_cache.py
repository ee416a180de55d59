"""fastdistill cache: built, looked at, verified; and what is wrong is said with the right code."""

from __future__ import annotations

import hashlib
import json

import pytest

from fastdistill import TeacherCache
from fastdistill.teachers.cache import build as cache_build


def build(folder, out, *more):
    paths = ("--teacher", folder / "teacher", "--data", folder / "train.jsonl", "--out", out)
    return ("cache", "build", *paths, "--k", 8, *more)


def test_build_info_verify(run, folder, tmp_path):
    code, out, err = run(*build(folder, tmp_path / "c", "temperatures=1,2", "--json"))
    assert code == 0
    summary = json.loads(out)
    cache = TeacherCache(tmp_path / "c")
    assert summary["tokens"] == cache.manifest.tokens
    assert summary["temperatures"] == [1.0, 2.0]
    assert "\x1b" not in err
    assert run("cache", "info", tmp_path / "c", "--json")[:2] == (0, out)
    code, out, _ = run("cache", "info", tmp_path / "c")
    assert code == 0
    assert "top 8 at T = 1, 2" in out
    code, out, _ = run("cache", "verify", tmp_path / "c")
    assert (code, out.startswith("1 files verified")) == (0, True)
    file = tmp_path / "c" / "00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    code, out, err = run("cache", "verify", tmp_path / "c")
    assert (code, out) == (1, "")
    assert "00000.safetensors is damaged" in err


def test_a_dry_run_says_the_size_and_writes_nothing(run, folder, tmp_path):
    command = build(folder, tmp_path / "c", "--json")
    code, out, _ = run(*command, "--dry-run")
    assert code == 0
    assert not (tmp_path / "c").exists()
    promised = json.loads(out)
    built = json.loads(run(*command)[1])
    assert promised["tokens"] == built["tokens"]
    assert promised["bytes"] == pytest.approx(built["bytes"], rel=0.2)


def test_a_chat_template_for_the_cache_and_the_run(run, folder, tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps(talk) + "\n")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    command = build(folder, tmp_path / "c", "--data", data, f"chat_template={template}", "--json")
    tokens = json.loads(run(*command)[1])["tokens"]
    assert json.loads(run(*command, "--dry-run")[1])["tokens"] == tokens
    digest = hashlib.sha256(template.read_bytes()).hexdigest()
    assert TeacherCache(tmp_path / "c").manifest.settings.chat_template_sha256 == digest
    train = ("train", "--student", folder / "student", "--teacher", tmp_path / "c", "--data", data)
    options = ("k=8", "use_cpu=true", f"chat_template={template}", "--dry-run", "--json")
    code, out, _ = run(*train, *options)
    assert (code, json.loads(out)["tokens"]) == (0, tokens)


def test_what_is_printed_can_be_pasted_back(run, folder, tmp_path):
    command = build(folder, tmp_path / "c", "temperatures=1,2", "max-length=20", "--print-config")
    code, printed, _ = run(*command)
    assert code == 0
    (tmp_path / "c.yaml").write_text(printed)
    again = run("cache", "build", "--config", tmp_path / "c.yaml", "--print-config")
    assert again[:2] == (0, printed)
    assert run("cache", "build", "--config", tmp_path / "c.yaml")[0] == 0
    assert TeacherCache(tmp_path / "c").manifest.settings.max_length == 20


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--k", "0"), "k: expected 1 to "),
        (("tmperatures=1",), "Did you mean temperatures?"),
        (("--teacher", "/none/here"), "expected"),
        (
            ("--teacher", "http://127.0.0.1:9"),
            "tokenizer: expected the teacher's tokenizer, to encode text",
        ),
        (("--data", "/none/here.jsonl"), "data: expected a file of JSON lines"),
        (("--targets", "best"), "targets: expected"),
        (("max_length=0",), "max_length: expected an integer of 1 or more or None, got 0"),
        (("--out", ""), "out: expected a path, got an empty text"),
        (("targets",), "expected key=value, got 'targets'"),
        (("--config", "/none.yaml"), "config: expected a YAML file"),
    ],
)
def test_a_wrong_request_is_exit_2(run, folder, tmp_path, more, words):
    code, out, err = run(*build(folder, tmp_path / "c", *more))
    assert (code, out) == (2, "")
    assert err.startswith("fastdistill: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_is_refused_before_a_dry_run_too(run, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("mine")
    for out, words in (
        (tmp_path / "file", "out: expected a folder, or a path where one can be made"),
        (tmp_path / "file" / "below", "out: expected a folder, or a path where one can be made"),
        (tmp_path / ("x" * 300), "out: expected a folder, or a path where one can be made"),
        (tmp_path / "model", "path: expected an empty folder or a cache"),
    ):
        for dry in ((), ("--dry-run",)):
            code, _, err = run(*build(folder, out, *dry))
            assert (code, words in err) == (2, True), err
            assert "finished files stay" not in err
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_a_dry_run_knows_what_a_build_was_begun_with(run, folder, tmp_path):
    assert run(*build(folder, tmp_path / "c"))[0] == 0
    assert run(*build(folder, tmp_path / "c", "--dry-run"))[0] == 0
    for dry in ((), ("--dry-run",)):
        code, _, err = run(*build(folder, tmp_path / "c", "--k", "3", *dry))
        assert (code, "got k=3" in err) == (2, True), err


def test_an_interrupted_build_says_what_it_leaves(run, folder, tmp_path, monkeypatch):
    command, answered = build(folder, tmp_path / "c", "shard_mb=0.005"), cache_build._answer_shard

    def interrupted(last):
        def at(index, *more):
            if index == last:
                raise KeyboardInterrupt
            return answered(index, *more)

        return at

    resume = "2 files are finished. Re-run the same command to resume."
    for last, left in ((0, "No file was finished."), (2, resume)):
        monkeypatch.setattr(cache_build, "_answer_shard", interrupted(last))
        code, out, err = run(*command)
        assert (code, out) == (130, "")
        assert f"cache build: stopped. {left}" in err
    monkeypatch.setattr(cache_build, "_answer_shard", answered)
    assert run(*command)[0] == 0
    assert run("cache", "verify", tmp_path / "c")[0] == 0


def test_no_cache_there(run, tmp_path):
    for verb in ("info", "verify"):
        code, _, err = run("cache", verb, tmp_path)
        assert (code, "expected the folder of a teacher cache" in err) == (2, True)


def test_a_full_disk_is_exit_1(run, folder, tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastdistill.teachers.cache.build.Writer.write", full)
    code, _, err = run(*build(folder, tmp_path / "c"))
    assert code == 1
    assert "finished files stay in" in err
