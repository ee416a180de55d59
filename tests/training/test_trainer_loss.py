"""A loss of one's own: what it is called with, which update it makes, and what stays as it was."""

from __future__ import annotations

import pytest
import torch

from fastdistill.losses.linear_head import linear_lse_gather
from fastdistill.losses.types import TopK
from fastdistill.training.loss import Loss, LossResult, TeacherHidden
from fastdistill.training.targets import Targets
from helpers.training import build, config, llama, peaked, ragged, step_losses, train, weights


class Squared:
    """Σ nll² over the targets, and the sum of their numbers; keeps what it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, hidden, head, targets, answers, *, labels_count=True):
        self.seen.append((hidden.shape, head, targets, answers, labels_count))
        at = linear_lse_gather(hidden, head.weight, targets.labels[:, None], **head.options())
        loss = (at.lse - at.logits[:, 0]).square().sum()
        tokens = torch.tensor(float(len(targets.labels)))
        named = targets.labels.float().sum()
        return LossResult(loss, None, {"tokens": tokens, "loss": loss.detach(), "label": named})


def squared(model, rows):
    """The mean of nll² over all targets, from all logits, with its gradient."""
    errors = []
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"][1:]
        nll = -model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        errors.append(nll[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100].square())
    return torch.cat(errors).mean()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("size", "accumulated"), [(12, 1), (5, 3), (1, 12)])
def test_the_update_is_the_gradient_of_its_mean_over_targets(tmp_path, size, accumulated):
    own = Squared()
    trainer = train(
        tmp_path,
        teacher=None,
        ce_weight=1.0,
        max_steps=1,
        trainer={"loss": own},
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
    )
    model = llama(0)
    wanted = squared(model, ragged())
    wanted.backward()
    assert step_losses(trainer)[0] == pytest.approx(wanted.item(), rel=1e-5)
    expected = torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in model.parameters()])
    assert (weights(trainer) - expected).abs().max() < 1e-6
    assert len(own.seen) == accumulated
    labels = torch.cat([row["labels"][1:] for row in ragged()])
    mean = labels[labels != -100].float().mean().item()
    assert trainer.state.log_history[0]["label"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("teacher", "settings", "kind"),
    [
        ("default", {"k": 8}, TopK),
        ("default", {"k": None}, TeacherHidden),
        (None, {"ce_weight": 1.0}, type(None)),
    ],
)
def test_it_is_called_as_the_loss_of_the_settings_is(tmp_path, teacher, settings, kind):
    own = Squared()
    train(tmp_path, teacher=teacher, max_steps=1, trainer={"loss": own}, **settings)
    ((shape, head, targets, answers, labels_count),) = own.seen
    count = sum(int((row["labels"][1:] != -100).sum()) for row in ragged())
    assert shape == (count, 32)
    assert head.weight.shape == (53, 32)
    assert isinstance(targets, Targets)
    assert len(targets.labels) == count
    assert isinstance(answers, kind)
    assert labels_count is True


def test_it_is_told_when_the_labels_are_samples(tmp_path):
    own = Squared()
    rows = [{"input_ids": row["input_ids"][:6]} for row in ragged()]
    train(
        tmp_path,
        data=rows,
        max_steps=1,
        lmbda=1.0,
        max_new_tokens=3,
        trainer={"loss": own},
    )
    assert [call[-1] for call in own.seen] == [False]


def test_passing_the_settings_loss_changes_nothing(tmp_path):
    plain = train(tmp_path / "a")
    same = train(tmp_path / "b", trainer={"loss": Loss(config(tmp_path))})
    assert torch.equal(weights(plain), weights(same))
    assert step_losses(plain) == step_losses(same)


def test_evaluation_is_still_the_one_of_the_settings(tmp_path):
    def evaluated(name, **how):
        trainer = build(tmp_path / name, eval_dataset=ragged(5), trainer=how)
        return {k: v for k, v in trainer.evaluate().items() if "_per_" not in k and "time" not in k}

    own = Squared()
    assert evaluated("a") == evaluated("b", loss=own)
    assert own.seen == []


def test_it_has_to_be_a_function(tmp_path):
    with pytest.raises(TypeError, match="loss: expected a function or None, got str"):
        build(tmp_path, teacher=peaked(), trainer={"loss": "dpo"})
