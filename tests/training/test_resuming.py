"""Damaged, incomplete and finished checkpoints; runs that are interrupted; what cannot be saved."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fastdistill.training import checkpoints
from fastdistill.training.trainer import DistillTrainer
from helpers.interrupted import SAVING, StopAt
from helpers.present import present
from helpers.training import build, config, flat, llama, ragged, train, weights


def half(tmp_path, **options):
    """A run that stopped at step 4 of 6."""
    train(tmp_path, **SAVING | options, callbacks=[StopAt(4)])
    return tmp_path / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x40
    path.write_bytes(bytes(content))


class TestDamage:
    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize(
        "name",
        [
            "model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
            "config.json",
            "training_args.bin",
        ],
    )
    def test_a_flipped_bit_goes_back_to_the_checkpoint_before(self, tmp_path, name, caplog):
        folder = half(tmp_path)
        whole = train(tmp_path / "whole", **SAVING)
        flip(folder / "checkpoint-4" / name)
        again = build(tmp_path, **SAVING)
        with caplog.at_level(logging.WARNING, "fastdistill"):
            again.train(resume_from_checkpoint="auto")
        assert f"checkpoint-4 is not used: {name} is damaged" in caplog.text
        assert "the run resumes from checkpoint-2" in caplog.text
        assert torch.equal(weights(again), weights(whole))

    def test_a_damaged_checkpoint_that_is_named_is_refused(self, tmp_path):
        folder = half(tmp_path) / "checkpoint-4"
        flip(folder / "optimizer.pt")
        with pytest.raises(
            ValueError, match=r"a whole checkpoint, got .*: optimizer\.pt is damaged"
        ):
            build(tmp_path, **SAVING).train(resume_from_checkpoint=folder)

    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize("content", ["{", "[]", '{"global_step": "4"}', "[" * 10**5])
    def test_without_digests_json_is_still_read(self, tmp_path, content, caplog):
        """Checkpoints from before there were digests have sizes alone."""
        folder = half(tmp_path) / "checkpoint-4"
        (folder / "trainer_state.json").write_text(content)
        sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "finished.json"}
        (folder / "finished.json").write_text(json.dumps({"files": sizes}))
        again = build(tmp_path, **SAVING)
        with caplog.at_level(logging.WARNING, "fastdistill"):
            again.train(resume_from_checkpoint="auto")
        assert "checkpoint-4 is not used: trainer_state.json is damaged" in caplog.text
        assert again.state.global_step == 6

    def test_an_old_checkpoint_without_digests_is_resumed(self, tmp_path):
        folder = half(tmp_path) / "checkpoint-4"
        written = json.loads((folder / "finished.json").read_text())
        (folder / "finished.json").write_text(json.dumps({"files": written["files"]}))
        again = build(tmp_path, **SAVING)
        again.train(resume_from_checkpoint="auto")
        assert torch.equal(weights(again), weights(train(tmp_path / "whole", **SAVING)))

    @pytest.mark.fast_cases(2)
    @pytest.mark.parametrize(
        "content", ["{}", "[]", '{"files": []}', '{"files": {"../x": 1}}', '{"files": {"/x": 1}}']
    )
    def test_a_damaged_list_of_files(self, tmp_path, content):
        folder = half(tmp_path) / "checkpoint-4"
        (folder / "finished.json").write_text(content)
        assert checkpoints.completeness_error(folder) == "its finished.json is damaged"
        assert present(checkpoints.last_finished(tmp_path / "run")).name == "checkpoint-2"

    def test_the_mark_of_transformers_own_saving_does_not_count(self, tmp_path):
        (tmp_path / "checkpoint-is-incomplete.txt").write_text("in progress")
        (tmp_path / "model.bin").write_text("x")
        checkpoints.mark_complete(tmp_path)
        (tmp_path / "checkpoint-is-incomplete.txt").unlink()
        assert checkpoints.completeness_error(tmp_path) is None


class TestWithoutState:
    def test_weights_alone_are_nothing_to_go_on_from(self, tmp_path):
        half(tmp_path, save_only_model=True)
        with pytest.raises(ValueError, match=r"checkpoint-4, which lacks .*save_only_model=True"):
            build(tmp_path, **SAVING).train(resume_from_checkpoint="auto")
        folder = tmp_path / "run" / "checkpoint-4"
        with pytest.raises(
            ValueError, match=r"a whole checkpoint, got .*: it lacks the random state"
        ):
            build(tmp_path, **SAVING).train(resume_from_checkpoint=folder)

    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
    def test_a_file_that_was_deleted_to_save_space(self, tmp_path, name):
        folder = half(tmp_path) / "checkpoint-4"
        (folder / name).unlink()
        (folder / "finished.json").unlink()  # as a plain Trainer's folder
        with pytest.raises(ValueError, match=r"a whole checkpoint, got .*: it lacks"):
            build(tmp_path, **SAVING).train(resume_from_checkpoint=folder)
        again = build(tmp_path, **SAVING)
        again.train(resume_from_checkpoint="auto")
        assert torch.equal(weights(again), weights(train(tmp_path / "whole", **SAVING)))

    def test_the_weights_of_a_run_that_is_done_need_no_state(self, tmp_path):
        first = train(tmp_path, **SAVING, save_only_model=True)
        again = build(tmp_path, **SAVING, save_only_model=True)
        again.train(resume_from_checkpoint="auto")
        assert again.already_done
        assert torch.equal(weights(again), weights(first))


class TestDone:
    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_steps": -1, "num_train_epochs": 2},
            {"lr_scheduler_type": "constant"},
            {"save_strategy": "epoch"},
        ],
        ids=str,
    )
    def test_a_run_that_is_done_trains_no_further(self, tmp_path, options):
        first = train(tmp_path, **SAVING | options)
        log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        again = build(tmp_path, model=llama(0), **SAVING | options)
        done = again.train(resume_from_checkpoint="auto")
        assert again.already_done
        assert done.global_step == again.state.global_step == first.state.global_step
        assert torch.equal(weights(again), weights(first))
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
        assert not first.already_done

    def test_the_best_of_a_run_that_is_done_is_loaded_again(self, tmp_path):
        """save_total_limit=1 leaves the best and the last, or the run would train on."""
        options = SAVING | {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "student_mass",
            "save_total_limit": 1,
        }
        first = train(tmp_path, eval_dataset=ragged(4), **options)
        again = build(tmp_path, eval_dataset=ragged(4), **options)
        again.train(resume_from_checkpoint="auto")
        assert again.already_done
        assert again.args.save_total_limit == 1
        assert torch.equal(weights(again), weights(first))

    def test_more_steps_go_on(self, tmp_path):
        train(tmp_path, **SAVING)
        again = build(tmp_path, **SAVING | {"max_steps": 8})
        again.train(resume_from_checkpoint="auto")
        assert not again.already_done
        assert again.state.global_step == 8


class SignalAt(TrainerCallback):
    def __init__(self, step, number, times=1):
        self.step, self.number, self.times = step, number, times

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.01)


class TestInterrupts:
    LONG = SAVING | {"save_steps": 500, "gradient_accumulation_steps": 2}

    @pytest.fixture(autouse=True)
    def plain_handlers(self):
        """Python's own handlers: a test before may have left others, or SIGINT may be ignored."""
        plain: dict[signal.Signals, Any] = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: signal.SIG_DFL,
        }
        before = {number: signal.signal(number, handler) for number, handler in plain.items()}
        yield
        for number, handler in before.items():
            signal.signal(number, plain[number] if handler is None else handler)

    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize(
        ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
    )
    def test_a_signal_saves_and_then_stops(self, tmp_path, number, error):
        before = signal.getsignal(number)
        trainer = build(tmp_path, callbacks=[SignalAt(3, number)], **self.LONG)
        with pytest.raises(error) as raised:
            trainer.train()
        assert signal.getsignal(number) is before
        assert present(checkpoints.last_finished(tmp_path / "run")).name == "checkpoint-3"
        assert number == signal.SIGTERM or "checkpoint-3 is complete" in str(raised.value)
        again = build(tmp_path, **self.LONG)
        again.train(resume_from_checkpoint="auto")
        assert torch.equal(weights(again), weights(train(tmp_path / "whole", **self.LONG)))

    def test_where_only_better_ones_are_saved(self, tmp_path):
        """The figure of the step is not better, and what was trained is kept all the same."""
        options = self.LONG | {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "kl",
            "learning_rate": 0.0,
        }
        signalling = SignalAt(3, signal.SIGINT)
        trainer = build(tmp_path, callbacks=[signalling], eval_dataset=ragged(4), **options)
        with pytest.raises(KeyboardInterrupt, match="checkpoint-3 is complete"):
            trainer.train()
        assert present(checkpoints.last_finished(tmp_path / "run")).name == "checkpoint-3"

    def test_the_second_signal_does_not_wait(self, tmp_path):
        trainer = build(tmp_path, callbacks=[SignalAt(3, signal.SIGINT, 2)], **self.LONG)
        with pytest.raises(KeyboardInterrupt, match="in step 3; there is no checkpoint"):
            trainer.train()
        assert checkpoints.last_finished(tmp_path / "run") is None

    @pytest.mark.parametrize("options", [{"save_strategy": "no"}, {"save_on_interrupt": False}])
    def test_where_nothing_is_to_be_saved(self, tmp_path, options):
        trainer = build(tmp_path, callbacks=[SignalAt(3, signal.SIGINT)], **self.LONG | options)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not checkpoints.checkpoints(tmp_path / "run")

    def test_handlers_of_somebody_else_stay(self, tmp_path):
        seen = []
        before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        try:
            train(tmp_path, callbacks=[SignalAt(3, signal.SIGINT)], **self.LONG)
        finally:
            signal.signal(signal.SIGINT, before)
        assert seen == [1]


class Strange(LlamaForCausalLM):
    """Weights that share memory, which the model does not declare."""

    def __init__(self, config):
        super().__init__(config)
        self.more = nn.Linear(4, 4)
        self.model.layers[1].mlp.up_proj.weight = self.model.layers[0].mlp.up_proj.weight


class NotSaved(PreTrainedTokenizerFast):
    def save_pretrained(self, *args, **kwargs):
        raise TypeError("cannot be written")


def tokenizer(kind=PreTrainedTokenizerFast):
    return kind(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))


class TestSaving:
    def test_a_generation_config_that_cannot_be_saved(self, tmp_path):
        model = llama(0)
        model.generation_config.temperature = 0.6
        with pytest.raises(
            ValueError, match=r"model: expected an object that can be saved, got .*do_sam"
        ):
            build(tmp_path, model=model, save_strategy="steps")

    def test_a_published_one_that_contradicts_itself_is_saved_back(self, tmp_path):
        """Also after the Trainer took the tokenizer's special tokens over."""
        llama(0).save_pretrained(tmp_path / "student")
        path = tmp_path / "student" / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6}))
        words = tokenizer()
        words.pad_token = "a"
        trainer = train(tmp_path, model=str(tmp_path / "student"), processing_class=words, **SAVING)
        trainer.save_model()
        saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
        assert saved["temperature"] == 0.6

    def test_weights_that_share_memory(self, tmp_path):
        with pytest.raises(ValueError, match=r"can be saved, got .*shared"):
            build(tmp_path, model=Strange(llama(0).config), save_strategy="steps")

    def test_a_tokenizer_that_cannot_be_saved(self, tmp_path):
        with pytest.raises(
            ValueError, match="processing_class: expected an object that can be saved"
        ):
            build(tmp_path, processing_class=tokenizer(NotSaved), save_strategy="steps")

    def test_a_folder_that_cannot_be_written_to(self, tmp_path, monkeypatch):
        def read_only(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryDirectory", read_only)
        with pytest.raises(OSError, match="output_dir: expected a folder to save in"):
            build(tmp_path, save_strategy="steps")

    def test_nothing_is_left_behind(self, tmp_path):
        build(tmp_path, processing_class=tokenizer(), save_strategy="steps")
        assert list((tmp_path / "run").iterdir()) == []


def stored(tmp_path, dtype):
    llama(0).to(dtype).save_pretrained(tmp_path / "student")
    return str(tmp_path / "student")


class TestDtype:
    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_student_from_a_path_has_float32_weights(self, tmp_path, dtype):
        options = {"max_steps": 20, "learning_rate": 1e-5, "optim": "adamw_torch"}
        trainer = train(tmp_path, model=stored(tmp_path, dtype), **options)
        start = flat(llama(0).to(dtype)).float()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert (weights(trainer) != start).float().mean() > 0.9

    def test_another_one_is_an_explicit_choice(self, tmp_path, caplog):
        path = stored(tmp_path, torch.float16)
        with caplog.at_level(logging.WARNING, "fastdistill"):
            trainer = build(tmp_path, model=path, dtype="bfloat16")
        assert trainer.model.dtype == torch.bfloat16
        assert "The student's weights are bfloat16 without a float32 copy" in caplog.text
        assert build(tmp_path, model=path, dtype="auto").model.dtype == torch.float16
        with pytest.raises(ValueError, match="dtype: expected None with a model that is loaded"):
            build(tmp_path, dtype="float32")
        with pytest.raises(ValueError, match="dtype: expected one of 'float32'"):
            config(tmp_path, dtype="int8")
        with pytest.raises(ValueError, match="dtype: expected None with a dtype in model_init_kw"):
            config(tmp_path, dtype="auto", model_init_kwargs={"dtype": "float32"})

    def test_weights_under_adapters_stay_as_they_are_stored(self, tmp_path):
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = build(tmp_path, model=stored(tmp_path, torch.bfloat16), peft_config=adapters)
        trained = {p.requires_grad: p.dtype for p in trainer.model.parameters()}
        assert trained == {False: torch.bfloat16, True: torch.float32}

    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_default_dtype_changes_nothing(self, tmp_path, dtype):
        def run(place):
            trainer = build(place, model=student, teacher=teacher, eval_dataset=ragged(5))
            trainer.train()
            return weights(trainer), trainer.evaluate()["eval_kl"], trainer.state.log_history

        student, teacher = llama(0), llama(7, hidden=48, scale=20.0)
        want = run(tmp_path / "a")
        student = llama(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            got = run(tmp_path / "b")
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(got[0], want[0])
        assert got[1] == want[1]
        assert [e.get("loss") for e in got[2]] == [e.get("loss") for e in want[2]]

    @pytest.mark.slow
    def test_the_default_device_changes_nothing(self, tmp_path):
        want = train(tmp_path / "a")
        student = llama(0)
        teacher = llama(7, hidden=48, scale=20.0)
        torch.set_default_device("meta")
        try:
            got = DistillTrainer(
                student, teacher, config(tmp_path / "b"), train_dataset=ragged_on_cpu()
            )
            got.train()
        finally:
            torch.set_default_device(None)
        assert torch.equal(weights(got), weights(want))


def ragged_on_cpu():
    with torch.device("cpu"):
        return ragged()
