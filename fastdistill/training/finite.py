"""Stops or skips updates that are NaN or infinite, and never saves such weights.

A loss that is not finite makes every gradient of its update NaN (the loss is multiplied by one or
by NaN). So the gradient norm covers loss and gradient of all micro-batches and all processes. The
Trainer computes this norm for clipping; reading it before the optimizer's step is the only
synchronization of an update. transformers' own filter, which is disabled here, reads the loss of
each micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .arguments import steps_in_backward

logger = logging.getLogger(__name__)

_ADVICE = (
    "Check the teacher's log-probabilities, lower the learning rate, or train in bfloat16 "
    "instead of float16; nonfinite='skip' skips such updates"
)
# A gradient that overflows with a loss scale this small overflows without scaling too.
_SMALLEST_SCALE = 2.0**-10


class FiniteUpdates(Trainer):
    """A Trainer that checks each update before the optimizer's step, and weights before saving."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.begin_updates()
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeOptimizer(self))

    def begin_updates(self) -> None:
        """Reset the sums, also after an attempt that was aborted to retry with a smaller batch."""
        self._norm: Any = None  # gradient norm of the update, from clipping
        self._of_update: dict[str, Tensor] = {}  # sums of metrics over the current update
        self._since_log: dict[str, Tensor] = {}  # and over the accepted updates since the last log
        self._skipped = {"log": 0, "run": 0}
        self._of_run = (0, 0.0)  # number of accepted updates, and the sum of their losses

    def add_metrics(self, sums: dict[str, Tensor]) -> None:
        """Add the sums of a micro-batch to those of the current update."""
        _add(self._of_update, sums)

    def mark_loss(self, loss: Tensor) -> Tensor:
        """Return the loss; its value and gradient become NaN if it is not finite."""
        if self._steps_in_backward() and not self._is_finite_everywhere(loss.detach()):
            self._stop("loss")
        return loss * (loss.detach() * 0 + 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.keeping_last_good():
            loss: Tensor = super().training_step(*args, **kwargs)
        self.add_metrics({"update_loss": loss.float()})
        # A skipped update must not make the Trainer's running sum of losses NaN.
        return loss.nan_to_num(0.0, 0.0, 0.0) if self.args.nonfinite == "skip" else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = super()._get_grad_norm(*args, **kwargs)
        return self._norm

    def check_update(self, model: nn.Module) -> None:
        """Stop or skip an update whose gradient is not finite, before the optimizer's step."""
        norm, self._norm = self._norm, None
        if norm is None:
            norm = self.accelerator.clip_grad_norm_(model.parameters(), math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        metrics, self._of_update = self._of_update, {}
        if norm is None or math.isfinite(float(norm)):
            self._accept(metrics)
            return
        loss_is_finite = self._is_finite_everywhere(metrics["update_loss"])
        scaler = self.accelerator.scaler
        has_scaler = scaler is not None and scaler.is_enabled()
        if loss_is_finite and has_scaler and scaler.get_scale() > _SMALLEST_SCALE:
            self._accept(metrics)
        elif self.args.nonfinite == "stop":
            self._stop("gradient of the loss" if loss_is_finite else "loss")
        else:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers skip parameters without a gradient
            self._skipped = {name: n + 1 for name, n in self._skipped.items()}
            logger.warning(
                "Step %d is skipped: its %s is not finite.",
                *(self.state.global_step + 1, "gradient" if loss_is_finite else "loss"),
            )

    def pop_sums(self, logs: dict[str, float]) -> dict[str, float]:
        """Return the sums since the last log over all processes.

        Writes the mean loss of the accepted updates to `logs`; the Trainer's own mean includes
        skipped updates.
        """
        sums = self.accelerator.reduce(self._since_log, reduction="sum") if self._since_log else {}
        self._since_log = {}
        totals = {name: value.item() for name, value in sums.items()}
        updates, loss = round(totals.pop("updates", 0.0)), totals.pop("update_loss", 0.0)
        self._of_run = (self._of_run[0] + updates, self._of_run[1] + loss)
        logs["loss"] = loss / updates if updates else math.nan
        if self._skipped["log"]:
            logs["skipped_steps"] = float(self._skipped["log"])
            self._skipped["log"] = 0
        return totals

    def write_mean_loss(self, logs: dict[str, float]) -> None:
        """Write the mean loss of the run's accepted updates to `logs` as `train_loss`."""
        self.pop_sums({})
        updates, loss = self._of_run
        logs["train_loss"] = loss / updates if updates else math.nan
        if self._skipped["run"]:
            logs["skipped_steps"] = float(self._skipped["run"])

    def check_not_all_skipped(self) -> None:
        """Raise FloatingPointError if all updates of the run were skipped."""
        if self._skipped["run"] and not self._of_run[0]:
            raise FloatingPointError(
                f"nonfinite: expected a finite update, but all {self._skipped['run']} updates were "
                f"skipped and the weights are unchanged. {_ADVICE}"
            )

    def keep_last_good(self) -> None:
        """Save the weights from before a step that stops the run."""

    @contextmanager
    def keeping_last_good(self) -> Iterator[None]:
        """Save the weights from before this step if its loss, gradient or data raise an error."""
        try:
            yield
        except (FloatingPointError, ValueError) as error:
            # All processes detect a loss that is not finite; other errors may occur in one alone.
            together = isinstance(error, FloatingPointError) or self.accelerator.num_processes == 1
            if together and not self._steps_in_backward():
                self.keep_last_good()
            raise

    def check_weights(self, when: str) -> None:
        """Raise FloatingPointError if a weight of the student is NaN or infinite.

        Args:
            when: what the weights are needed for, in the words of the error.
        """
        names = nonfinite_weights(self.model)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each process has a part of the weights, and all must raise together.
            count = torch.tensor(float(len(names)), dtype=torch.float32, device=self.args.device)
            total = int(self.accelerator.reduce(count, reduction="sum"))
            names = names or ["one of another process"] * (total > 0)
        if names:
            raise FloatingPointError(
                f"weights: expected finite numbers {when}, got NaN or infinity in {len(names)} "
                f"tensors (first: {names[0]}). They are not saved. {_ADVICE}"
            )

    def _accept(self, metrics: dict[str, Tensor]) -> None:
        if metrics:
            one = torch.ones((), dtype=torch.float32, device=self.args.device)
            metrics["updates"] = one / self.accelerator.num_processes
            metrics["update_loss"] = metrics["update_loss"] / self.accelerator.num_processes
        _add(self._since_log, metrics)

    def _is_finite_everywhere(self, loss: Tensor) -> bool:
        """Return whether the loss is finite in all processes."""
        count = self.accelerator.reduce(loss.isfinite().float(), reduction="sum")
        return bool(count == self.accelerator.num_processes)

    def _steps_in_backward(self) -> bool:
        return self.is_deepspeed_enabled or steps_in_backward(self.args)

    def _stop(self, quantity: str) -> None:
        raise FloatingPointError(
            f"{quantity}: expected a finite number, got NaN or infinity in the steps up to "
            f"{self.state.global_step + 1}, before whose update the run stops. {_ADVICE}"
        )


def _add(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals.get(name, 0) + value


class _BeforeOptimizer(TrainerCallback):
    def __init__(self, trainer: FiniteUpdates) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin_updates()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        with self._trainer.keeping_last_good():
            self._trainer.check_update(self._trainer.model if model is None else model)


@torch.no_grad()
def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters with NaN or infinity, and of saved buffers with NaN.

    Synchronizes with the device once. Buffers may hold infinities: some models save masks.
    """
    flags: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if _has_numbers(parameter):
            flags[name] = _comparable(parameter).isfinite().all()
    for name, buffer in _saved_buffers(model):
        if _has_numbers(buffer):
            flags[name] = ~_comparable(buffer).isnan().any()
    if not flags:
        return []
    home = next(iter(flags.values())).device
    finite = torch.stack([flag.to(home) for flag in flags.values()]).tolist()
    return [name for name, is_finite in zip(flags, finite, strict=True) if not is_finite]


def _has_numbers(tensor: Tensor) -> bool:
    # Four bits have no NaN and no infinity.
    four_bits = "float4" in str(tensor.dtype)
    return tensor.is_floating_point() and tensor.device.type != "meta" and not four_bits


def _comparable(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor; float8, which torch does not compare, as bfloat16."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.to(torch.bfloat16) if "float8" in str(local.dtype) else local.detach()


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
