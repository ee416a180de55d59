"""An update that is not finite is stopped or skipped, and no such weight is ever saved."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastdistill.training.checkpoints import last_finished
from fastdistill.training.finite import nonfinite_weights
from helpers.nonfinite_scene import SAVING, spoils_loss
from helpers.present import present
from helpers.processes import run_ranks
from helpers.training import build, config, llama, peaked, ragged, train, weights


class SpoilsGradient(TrainerCallback):
    """Makes the gradient of one step NaN or infinite; the loss stays a number."""

    def __init__(self, step, value=math.nan):
        self.step, self.value = step, value
        self.seen = None

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == self.step - 1 and self.seen is None:
            weight = next(model.parameters())

            def spoil(gradient):
                return torch.full_like(gradient, self.value)

            self.seen = weight.register_hook(spoil)

    def on_step_end(self, args, state, control, **_):
        if self.seen is not None:
            self.seen.remove()


def finite(folder):
    saved = load_file(folder / "model.safetensors")
    return all(w.isfinite().all() for w in saved.values())


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4},
        {"optim": "adamw_torch"},
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, value, options):
    trainer = spoils_loss(build(tmp_path, **SAVING | options), 4, value)
    with pytest.raises(
        FloatingPointError, match=r"loss: expected a finite number, got NaN .* up to 4,"
    ):
        trainer.train()
    assert not nonfinite_weights(trainer.model)
    last = present(last_finished(tmp_path / "run"))
    assert last.name == "checkpoint-3"
    assert finite(last)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_a_gradient_alone_stops_too(tmp_path, value, norm):
    spoiling = SpoilsGradient(4, value)
    trainer = build(tmp_path, callbacks=[spoiling], max_grad_norm=norm, **SAVING)
    with pytest.raises(
        FloatingPointError, match=r"gradient of the loss: expected a finite number, .* up to 4,"
    ):
        trainer.train()
    assert finite(last_finished(tmp_path / "run"))


def test_a_skipped_update_changes_nothing_and_is_counted(tmp_path, caplog):
    """Neither weights nor moments move, and its figures are in no mean."""
    options = {"optim": "adamw_torch", "max_steps": 3, "logging_steps": 3, "weight_decay": 0.1}
    skipping = build(tmp_path / "a", nonfinite="skip", **options)
    moved = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    skipping.add_callback(Watch())
    spoils_loss(skipping, 2)
    with caplog.at_level(logging.WARNING, "fastdistill"):
        done = skipping.train()
    assert "Step 2 is skipped: its loss is not finite." in caplog.text
    assert torch.equal(moved[1], moved[2])
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(weights(skipping), moved[2])
    logged = next(e for e in skipping.state.log_history if "loss" in e)
    assert logged["skipped_steps"] == 1
    assert math.isfinite(logged["loss"])
    assert done.training_loss == pytest.approx(logged["loss"])
    first = train(tmp_path / "b", **options | {"max_steps": 1, "logging_steps": 1})
    one = next(e["loss"] for e in first.state.log_history if "loss" in e)
    assert logged["loss"] == pytest.approx(one, rel=0.3)


def test_a_gradient_can_be_skipped_as_well(tmp_path):
    trainer = build(tmp_path, nonfinite="skip", callbacks=[SpoilsGradient(2)], max_steps=4)
    trainer.train()
    assert not nonfinite_weights(trainer.model)
    assert trainer.state.global_step == 4


def test_a_custom_optimizer_is_no_way_around(tmp_path):
    model = llama(0)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    trainer = build(tmp_path, model=model, trainer={"optimizers": (optimizer, None)}, **SAVING)
    with pytest.raises(FloatingPointError, match="loss: expected a finite number"):
        spoils_loss(trainer, 4).train()
    assert finite(last_finished(tmp_path / "run"))


class SpoilsWeights(TrainerCallback):
    """As an optimizer does whose step overflows."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.inf


@pytest.mark.parametrize("saving", ["steps", "no"])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, saving):
    """Nor do they displace a good checkpoint, however few are kept."""
    options = SAVING | {"save_strategy": saving, "save_total_limit": 1, "max_steps": 4}
    trainer = build(tmp_path, callbacks=[SpoilsWeights(4)], **options)
    with pytest.raises(FloatingPointError, match=r"weights: expected finite numbers .* 1 tensors"):
        trainer.train()
    if saving == "steps":
        assert present(last_finished(tmp_path / "run")).name == "checkpoint-2"
    with pytest.raises(FloatingPointError, match="weights: expected finite numbers to save"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_buffer_that_is_saved_is_looked_at_too(tmp_path):
    model = llama(0)
    model.register_buffer("mean", torch.full((3,), math.nan))
    with pytest.raises(FloatingPointError, match=r"finite numbers before training.*mean"):
        build(tmp_path, model=model).train()


def test_what_has_no_part_in_a_checkpoint_or_is_a_mask_is_no_harm():
    model = llama(0)
    model.register_buffer("mask", torch.full((3,), -math.inf))
    model.register_buffer("unsaved", torch.full((3,), math.nan), persistent=False)
    assert nonfinite_weights(model) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits(tmp_path, dtype):
    """torch says of none of them whether it is finite."""
    model = llama(0)
    model.small = torch.nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    train(tmp_path, model=model)
    model.small.data = torch.full((3,), math.nan).to(dtype)
    assert nonfinite_weights(model) == ["small"]


def test_a_run_of_skipped_updates_is_no_run(tmp_path):
    trainer = build(tmp_path, nonfinite="skip", callbacks=[SpoilsGradient(1), SpoilsGradient(2)])
    with pytest.raises(FloatingPointError, match="all 2 updates were skipped"):
        trainer.train()


def test_a_student_that_is_no_number_is_refused_before_training(tmp_path):
    trainer = build(tmp_path)
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(FloatingPointError, match=r"finite numbers before training.*lm_head"):
        trainer.train()


def scaled(trainer, scale):
    """A loss scaler, as a GPU with fp16 has; here gradients are in float32."""
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return trainer


class OverflowsAbove(TrainerCallback):
    """A gradient that overflows while the scale is large."""

    def __init__(self, accelerator, most):
        self.accelerator, self.most = accelerator, most

    def on_train_begin(self, args, state, control, model=None, **_):
        def overflow(gradient):
            large = self.accelerator.scaler.get_scale() > self.most
            return gradient * (math.inf if large else 1.0)

        self.seen = next(model.parameters()).register_hook(overflow)


def test_overflow_that_a_loss_scaler_ends_goes_on(tmp_path):
    trainer = scaled(build(tmp_path, max_steps=6, max_grad_norm=1.0), 2.0**10)
    trainer.add_callback(OverflowsAbove(trainer.accelerator, 2.0**8))
    start = weights(trainer).clone()
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**8
    assert not torch.equal(weights(trainer), start)
    assert not nonfinite_weights(trainer.model)


def test_overflow_that_no_scale_ends_stops(tmp_path):
    trainer = scaled(build(tmp_path, max_steps=60, max_grad_norm=1.0), 4.0)
    trainer.add_callback(OverflowsAbove(trainer.accelerator, 0.0))
    with pytest.raises(FloatingPointError, match="gradient of the loss: expected a finite number"):
        trainer.train()
    assert 10 < trainer.state.global_step < 20


def test_a_loss_that_is_nan_under_a_loss_scaler_stops_at_once(tmp_path):
    trainer = spoils_loss(scaled(build(tmp_path, max_steps=6, max_grad_norm=1.0), 2.0**10), 2)
    with pytest.raises(FloatingPointError, match="loss: expected a finite number"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.slow
def test_an_attempt_with_a_larger_batch_leaves_no_figures(tmp_path):
    """auto_find_batch_size begins anew after an error of memory."""
    trainer = build(tmp_path, auto_find_batch_size=True, max_steps=2, logging_steps=2)
    before, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        loss = before(*args, **kwargs)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    tokens = [e["target_tokens"] for e in trainer.state.log_history if "target_tokens" in e]
    seen = sum(int((row["labels"][1:] != -100).sum()) for row in ragged())
    assert tokens[0] <= 2 * seen
    assert trainer._train_batch_size < 12


def test_no_micro_batch_waits_for_its_loss(tmp_path, monkeypatch):
    """transformers' filter reads every micro-batch's loss; the norm is read once in an update."""
    read = []
    isnan = torch.isnan

    def counted(x):
        read.append(x.shape)
        return isnan(x)

    monkeypatch.setattr(torch, "isnan", counted)
    train(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=4)
    assert torch.Size([]) not in read


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_skip_is_refused_with_layerwise_optimizers(tmp_path, optim):
    with pytest.raises(ValueError, match=r"nonfinite: expected 'stop' with .*layerwise"):
        config(tmp_path, nonfinite="skip", optim=optim, optim_target_modules="all-linear")


def test_skip_is_refused_where_weights_move_in_the_backward_pass(tmp_path):
    with pytest.raises(ValueError, match="nonfinite: expected 'stop' with DeepSpeed, LOMO"):
        config(tmp_path, nonfinite="skip", optim="lomo")
    with pytest.raises(ValueError, match="nonfinite: expected one of 'stop', 'skip', got 'go'"):
        config(tmp_path, nonfinite="go")


def test_a_teacher_that_goes_bad_leaves_the_weights_from_before(tmp_path):
    teacher = peaked()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[9] = math.inf
    rows = [{"input_ids": row["input_ids"].clamp(min=10)} for row in ragged(24)]
    rows[20]["input_ids"][1] = 9
    options = SAVING | {"per_device_train_batch_size": 4, "max_steps": 6}
    trainer = build(tmp_path, teacher=teacher, data=rows, k=None, check_signal=False, **options)
    with pytest.raises((FloatingPointError, ValueError)):
        trainer.train()
    step = trainer.state.global_step
    assert step == 0 or (present(last_finished(tmp_path / "run")).name == f"checkpoint-{step}")
    assert not nonfinite_weights(trainer.model)


WORKER = """
import os, sys
from pathlib import Path
from helpers.nonfinite_scene import SAVING, spoils_loss
from helpers.training import build
from fastdistill.training.checkpoints import last_finished

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
trainer = build(folder, **SAVING, per_device_train_batch_size=6)
if rank == 1:
    spoils_loss(trainer, 4)
try:
    trainer.train()
    found = "nothing"
except FloatingPointError as error:
    found = str(error)
(folder / f"rank-{rank}").write_text(found)
sys.stderr.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_all_processes_stop_where_one_has_no_number(tmp_path):
    run_ranks(2, WORKER, tmp_path, folder=tmp_path)
    for rank in range(2):
        message = (tmp_path / f"rank-{rank}").read_text()
        assert "loss: expected a finite number, got NaN or infinity in the steps up to 4" in message
    assert present(last_finished(tmp_path / "run")).name == "checkpoint-3"
