"""The load-balancing loss of a mixture of experts, which transformers adds to its own loss.

    L = (Σ_m loss_m + c · n_m · aux_m) / Σ_m n_m

over the micro-batches m of an update. loss_m is the sum over the n_m targets, aux_m the aux_loss
of the model (Switch Transformers, eq. 4–6), and c = router_aux_loss_coef. With one micro-batch,
c · aux is added to the mean.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from ..runtime import checks
from .loss import EVAL_COLUMNS, LossResult

logger = logging.getLogger(__name__)


def router_coefficient(model: nn.Module) -> float | None:
    """Return the weight of the student's router loss, or None if its configuration has it off.

    Raises:
        ValueError: output_router_logits is True, and there is no router_aux_loss_coef.
    """
    config: Any = getattr(model, "config", None)
    parts = [config]
    if hasattr(config, "get_text_config"):
        parts.append(config.get_text_config())
    if not any(getattr(part, "output_router_logits", False) for part in parts):
        return None
    coefficients = [getattr(part, "router_aux_loss_coef", None) for part in reversed(parts)]
    coefficient = next((c for c in coefficients if c is not None), None)
    if coefficient is None:
        hint = "set it, or set output_router_logits=False to train without the router's loss"
        checks.fail("model", "config.router_aux_loss_coef with output_router_logits", None, hint)
    return float(coefficient)


def warn_without_router_loss(model: nn.Module) -> None:
    """Log a warning if a mixture trains while its configuration leaves the router's loss out."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "router_aux_loss_coef", None) and router_coefficient(model) is None:
        logger.warning(
            "The student is a mixture of experts and is trained without its router's loss, which "
            "balances the experts. Set model.config.output_router_logits = True to add it with "
            "the weight router_aux_loss_coef=%g.",
            config.router_aux_loss_coef,
        )


def add_router_loss(
    result: LossResult, output: Any, *, coefficient: float, targets: int
) -> LossResult:
    """Return `result`, a sum over `targets`, plus the router's loss of a model's output.

    `router_aux_loss` is logged as a sum. Its mean is aux, without the coefficient.
    """
    aux = _aux_of(output)
    weighted = coefficient * targets * aux.to(result.loss)
    logged = result.sums.get("selected", result.sums["tokens"])
    sums = result.sums | {
        "loss": result.sums["loss"] + weighted.detach().float(),
        "router_aux_loss": aux.detach().float().to(logged) * logged,
    }
    return result._replace(loss=result.loss + weighted, sums=sums)


def add_router_columns(
    measured: tuple[Tensor, Tensor], output: Any, *, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Return `Loss.measure` of a batch, with the router's loss of its output in each row.

    A row counts the aux of its batch once for each target, as the loss of an update does.
    """
    rows, counts = measured
    tokens, loss, aux = (EVAL_COLUMNS.index(n) for n in ("tokens", "loss", "router_aux_loss"))
    rows[:, aux] = _aux_of(output).to(rows) * rows[:, tokens]
    rows[:, loss] += coefficient * rows[:, aux]
    return rows, counts


def _aux_of(output: Any) -> Tensor:
    aux = getattr(output, "aux_loss", None)
    if aux is None:
        checks.fail(
            "model",
            "an output with aux_loss, since config.output_router_logits is True",
            type(output).__name__,
            "set config.output_router_logits to False to train without the router's loss",
        )
    assert isinstance(aux, Tensor)
    return aux
