"""A killed run leaves a checkpoint to resume from, and ends as an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from fastdistill.training import checkpoints, output_lock
from helpers.present import present
from helpers.processes import forkserver
from helpers.training import build, flat, llama, ragged, train, weights

SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
LONG = {**SAVING, "max_steps": 30, "save_total_limit": 2, "per_device_train_batch_size": 4}
MIXED = {"lmbda": 0.4, "max_new_tokens": 4, "token_selection": "entropy top 0.5"}


def dropping(seed):
    """A student with dropout: its random stream has to be resumed too."""
    model = llama(seed)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resumed_weights_are_those_of_an_undisturbed_run(tmp_path, stop):
    options = {**SAVING, **MIXED, "max_steps": 8, "per_device_train_batch_size": 4}
    whole = train(tmp_path / "whole", model=dropping(0), **options)
    again = build(tmp_path / "again", model=dropping(0), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "run" / f"checkpoint-{stop}"))
    assert torch.equal(weights(again), weights(whole))


def folder(tmp_path, step, finished=True):
    made = tmp_path / f"checkpoint-{step}"
    made.mkdir()
    (made / "model.bin").write_bytes(b"x" * step)
    if finished:
        checkpoints.mark_complete(made)
    return made


def test_only_what_is_whole_counts(tmp_path):
    whole, open_, short, gone = (folder(tmp_path, s, s != 20) for s in (10, 20, 30, 40))
    (short / "model.bin").write_bytes(b"x")
    (gone / "model.bin").unlink()
    assert checkpoints.completeness_error(whole) is None
    assert "has no finished.json" in present(checkpoints.completeness_error(open_))
    assert checkpoints.completeness_error(short) == "model.bin has 1 bytes, not 30"
    assert checkpoints.completeness_error(gone) == "model.bin is missing"
    assert checkpoints.last_finished(tmp_path) == whole
    assert checkpoints.to_resume_from(True, tmp_path) == str(whole)
    assert checkpoints.to_resume_from("auto", tmp_path) == str(whole)
    with pytest.raises(ValueError, match=r"a whole checkpoint, got .*: model\.bin is missing"):
        checkpoints.to_resume_from(gone, tmp_path)
    assert checkpoints.to_resume_from(open_, tmp_path) == str(open_)  # of another trainer, perhaps
    (whole / "finished.json").write_text("{")
    assert "damaged" in present(checkpoints.completeness_error(whole))


@pytest.mark.parametrize(
    "change",
    [
        *({"files": {"model.bin": "10"}}, {"files": {"model.bin": {}}}, {"files": [1]}),
        *({"sha256": {"model.bin": 3}}, {"sha256": {"other": "x"}}, {"files": {"\0": 1}}),
        *({"files": {"x" * 5000: 1}}, {"files": {"../checkpoint-20/model.bin": 20}}, {"files": 0}),
        *({"files": {"/etc/passwd": 1}, "sha256": {"/etc/passwd": "x"}}, {"files": None}),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_damaged_list_of_files_is_no_traceback(tmp_path, change):
    whole, _ = folder(tmp_path, 10), folder(tmp_path, 20)
    record = json.loads((whole / "finished.json").read_text())
    (whole / "finished.json").write_text(json.dumps(record | change))
    for find in (checkpoints.completeness_error, checkpoints.integrity_error):
        assert re.search(r"is damaged|is missing", present(find(whole)))


def test_nothing_to_resume_from(tmp_path):
    assert checkpoints.to_resume_from(None, tmp_path) is None
    assert checkpoints.to_resume_from("auto", tmp_path) is None
    with pytest.raises(ValueError, match=r"expected a finished checkpoint in '.*', got none;"):
        checkpoints.to_resume_from(True, tmp_path)
    folder(tmp_path, 3, finished=False)
    with pytest.raises(ValueError, match=r"got checkpoint-3, but it has no finished\.json"):
        checkpoints.to_resume_from(True, tmp_path)
    assert checkpoints.to_resume_from("auto", tmp_path) is None


def test_the_oldest_go_and_the_best_stays(tmp_path):
    for step in (1, 2, 10, 20):
        folder(tmp_path, step)
    steps = lambda: [int(p.name[11:]) for p in checkpoints.checkpoints(tmp_path)]  # noqa: E731
    checkpoints.keep_last(tmp_path, None, None, 20)
    assert steps() == [1, 2, 10, 20]
    checkpoints.keep_last(tmp_path, 3, None, 20)
    assert steps() == [2, 10, 20]
    checkpoints.keep_last(tmp_path, 2, str(tmp_path / "checkpoint-2"), 20)
    assert steps() == [2, 20]
    checkpoints.keep_last(tmp_path, 1, str(tmp_path / "checkpoint-2"), 20)
    assert steps() == [2, 20]
    checkpoints.keep_last(tmp_path, 1, None, 20)
    assert steps() == [20]


def test_an_earlier_run_of_more_steps_does_not_push_out_what_is_new(tmp_path):
    """A run that is begun anew has fewer steps than the checkpoints that lie there."""
    train(tmp_path, **SAVING, max_steps=4, save_total_limit=2)
    train(tmp_path, **SAVING, max_steps=2, save_total_limit=2)
    folders = checkpoints.checkpoints(tmp_path / "run")
    assert [p.name for p in folders] == ["checkpoint-1", "checkpoint-2"]


def test_a_clock_that_goes_back_costs_no_new_checkpoint(tmp_path):
    """A checkpoint that was written last may have the oldest files."""
    for age, step in enumerate((1, 2, 3)):
        made = folder(tmp_path, step)
        for path in (made, made / "finished.json"):
            os.utime(path, (1e9 - age, 1e9 - age))
        checkpoints.keep_last(tmp_path, 2, None, step)
    assert [p.name for p in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_foreign_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-best", "checkpoint-1-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints.checkpoints(tmp_path) == []


def test_a_checkpoint_on_another_disk_is_only_unlinked(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    elsewhere.mkdir(), run.mkdir()
    (run / "checkpoint-1").symlink_to(folder(elsewhere, 1), target_is_directory=True)
    folder(run, 2)
    checkpoints.keep_last(run, 1, None, 2)
    assert [p.name for p in checkpoints.checkpoints(run)] == ["checkpoint-2"]
    assert (elsewhere / "checkpoint-1" / "model.bin").exists()


def test_a_limit_is_kept_and_remembered(tmp_path):
    train(tmp_path, **SAVING, max_steps=4, save_total_limit=2)
    folders = checkpoints.checkpoints(tmp_path / "run")
    assert [p.name for p in folders] == ["checkpoint-3", "checkpoint-4"]
    args = torch.load(folders[-1] / "training_args.bin", weights_only=False)
    assert args.save_total_limit == 2


def test_a_function_in_the_arguments_does_not_stop_a_checkpoint(tmp_path):
    train(tmp_path, **SAVING, token_selection=lambda scores: scores.entropy)
    saved = tmp_path / "run" / "checkpoint-2" / "training_args.bin"
    assert "lambda" in torch.load(saved, weights_only=False).token_selection


def test_a_checkpoint_being_written_is_none(tmp_path, monkeypatch):
    """Killed at any file: what is there does not pass for a checkpoint."""
    trainer = build(tmp_path, **SAVING)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()
    assert checkpoints.last_finished(tmp_path / "run") is None
    assert trainer.args.save_total_limit is None


@pytest.mark.parametrize("save", ["save", "_save_rng_state"])
def test_a_full_disk_is_called_one(tmp_path, monkeypatch, save):
    """torch speaks of a position in its file."""

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    trainer = build(tmp_path, **SAVING)
    monkeypatch.setattr(torch if save == "save" else trainer, save, full)
    words = r"No space left on device; make room, then start again: '.*checkpoint-1'"
    with pytest.raises(OSError, match=words):
        trainer.train()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    with pytest.raises(RuntimeError, match="unexpected pos"):  # of something else
        trainer.train()


def test_two_runs_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "_SECONDS", 0.1)
    one, other = (build(tmp_path, **SAVING) for _ in range(2))

    class StartsTheOther(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with pytest.raises(ValueError, match="output_dir: expected a folder that no other pro"):
                other.train()

    one.add_callback(StartsTheOther())
    one.train()
    assert not (tmp_path / "run" / output_lock.LOCK).exists()
    other.train()


def _run(place):
    """One attempt, in a process of its own."""
    torch.set_num_threads(1)
    data = [dict(row) for row in ragged(20)]
    trainer = build(place, model=dropping(0), data=data, **LONG, **MIXED)
    (place / "started").touch()
    trainer.train(resume_from_checkpoint="auto")
    torch.save(weights(trainer), place / "weights.tmp")
    os.replace(place / "weights.tmp", place / "weights.pt")


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """kill -9, start again, ten times; then the weights of a run that nobody touched."""
    processes = forkserver()
    moments = random.Random(7)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, killed):
        place.mkdir()
    started = time.monotonic()
    processes_run(processes, whole, None)
    seconds = time.monotonic() - started
    kills = steps = 0
    while kills < 10:
        (killed / "started").unlink(missing_ok=True)
        kills += processes_run(processes, killed, moments.uniform(0, seconds / 8))
        last = checkpoints.last_finished(killed / "run")
        reached = 0 if last is None else int(last.name[11:])
        assert reached >= steps  # nothing that was finished is ever lost
        steps = reached
        if (killed / "weights.pt").exists():
            shutil.rmtree(killed)
            killed.mkdir()
            steps = 0
    processes_run(processes, killed, None)
    one, other = (torch.load(place / "weights.pt") for place in (whole, killed))
    assert torch.equal(one, other)
    assert not torch.equal(one, flat(llama(0)))
    saved = LlamaForCausalLM.from_pretrained(checkpoints.last_finished(killed / "run"))
    assert torch.equal(flat(saved), other)
    state = present(checkpoints.last_finished(killed / "run")) / "trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == 30


def processes_run(processes, place, after):
    """Run it; kill it `after` seconds of training, if given. Whether it was killed."""
    process = processes.Process(target=_run, args=(place,))
    process.start()
    if after is not None:
        deadline = time.monotonic() + 120
        while not (place / "started").exists() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.join(after)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    process.join(240)
    assert process.exitcode in ((0,) if after is None else (0, -signal.SIGKILL))
    return process.exitcode != 0
