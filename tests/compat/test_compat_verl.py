"""Our losses in verl: its registry, its engine's outputs, its final loss, and a tiny training."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from helpers.present import present
from helpers.tolerances import VALUE, assert_close

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

V, K, LENGTHS, PROMPTS = 12, 4, (5, 3), (2, 1)  # two packed rows: tokens, and those of the prompt
MODES = ["fastdistill_forward_kl", "fastdistill_reverse_kl"]


@pytest.fixture(scope="module")
def verl():
    pytest.importorskip("verl.trainer.distillation.losses")
    import verl.trainer.distillation.losses

    import fastdistill.compat.verl

    assert set(MODES) <= set(verl.trainer.distillation.losses.DISTILLATION_LOSS_REGISTRY)
    assert fastdistill.compat.verl.DIVERGENCES.keys() == set(MODES)
    return verl


def jagged(values):
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    return torch.nested.nested_tensor_from_jagged(values, offsets=offsets)


def micro_batch(teacher_logits):
    """A batch as verl's FSDP engine gets it, with the teacher's top K at every token."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    best = teacher_logits.log_softmax(-1).topk(K)
    tokens = torch.arange(sum(LENGTHS)) % V
    rows = [row.unbind() for row in torch.split(tokens, list(LENGTHS))]
    parts = [
        torch.nested.as_nested_tensor([torch.stack(r[a:b]) for r, (a, b) in x], layout=torch.jagged)
        for x in (
            [(r, (0, n)) for r, n in zip(rows, PROMPTS, strict=True)],
            [(r, (n, None)) for r, n in zip(rows, PROMPTS, strict=True)],
        )
    ]
    batch = TensorDict(
        {
            "input_ids": jagged(tokens),
            "prompts": parts[0],
            "responses": parts[1],
            "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
            "teacher_ids": jagged(best.indices.int()),
            "teacher_logprobs": jagged(best.values.float()),
        },
        batch_size=[],
    )
    tensordict_utils.assign_non_tensor(
        batch,
        use_remove_padding=True,
        pad_mode=DatasetPadMode.NO_PADDING,
        use_fused_kernels=False,
        distillation_use_topk=True,
        distillation_only=True,
        max_response_len=3,
        dp_size=1,
        batch_num_tokens=5,
        global_batch_size=2,
    )
    return batch


def settings(verl, mode, **options):
    from verl.workers.config import DistillationLossConfig

    options = {"use_task_rewards": False, "use_policy_gradient": False, "topk": K} | options
    loss = DistillationLossConfig(loss_mode=mode, log_prob_min_clamp=None, **options)
    assert present(loss.loss_settings).use_topk
    config = SimpleNamespace(
        strategy="fsdp", loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None
    )
    step = verl.trainer.distillation.losses.distillation_ppo_loss
    return functools.partial(
        step, config=config, distillation_config=SimpleNamespace(distillation_loss=loss)
    )


def loss_of(step, batch, logits):
    """Returns what verl's FSDP engine and loss compute from the logits [T, V] of a packed row."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = object.__new__(FSDPEngineWithLMHead)
    engine.use_ulysses_sp = False
    arguments = {
        "input_ids_rmpad_rolled": batch["input_ids"].values().roll(-1),
        "temperature_rmpad": torch.ones(sum(LENGTHS)),
        "temperature_is_one": True,
        "pad_size": 0,
    }
    output = SimpleNamespace(logits=logits[None])
    model_output = engine.prepare_model_outputs(output, arguments, batch, step)
    return step(model_output=model_output, data=batch)


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_the_mean_over_the_tokens_of_responses(verl, mode):
    g = torch.Generator().manual_seed(0)
    teacher, logits = (torch.randn(sum(LENGTHS), V, generator=g).double() * 2 for _ in "ab")
    loss, metrics = loss_of(settings(verl, mode), micro_batch(teacher), logits.float())
    best = teacher.log_softmax(-1).topk(K)
    p, q = best.values.exp(), logits.softmax(-1).gather(-1, best.indices)
    # The token before each of a response predicts it: rows 1 to 3, and 5 to 6.
    responses = [1, 2, 3, 5, 6]
    masses = {"student_mass": q.sum(-1), "teacher_mass": p.sum(-1)}
    means = {name: mass[responses].mean().item() for name, mass in masses.items()}
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    a, b = (p, q) if mode == "fastdistill_forward_kl" else (q, p)
    assert_close(loss, (a * (a / b).log()).sum(-1)[responses].mean(), VALUE[torch.float32])
    assert {k: metrics[f"distillation/{k}"] for k in means} == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_tiny_training_reaches_the_teacher(verl, mode):
    g = torch.Generator().manual_seed(0)
    teacher, logits = (torch.randn(sum(LENGTHS), V, generator=g) for _ in "ab")
    step, batch = settings(verl, mode), micro_batch(teacher)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    losses = []
    for _ in range(60):
        loss, _ = loss_of(step, batch, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 < 0.1 < losses[0]
    assert present(logits.grad)[4].abs().max() == 0  # the last token of a row predicts nothing


def test_other_losses_are_verls_own(verl):
    batch, logits = micro_batch(torch.randn(8, V)), torch.randn(8, V)
    _, metrics = loss_of(settings(verl, "forward_kl_topk"), batch, logits)
    assert "distillation/overlap_ratio" in metrics


def test_options_that_it_does_not_have_are_refused_by_name(verl):
    batch, logits = micro_batch(torch.randn(8, V)), torch.randn(8, V)
    step = settings(verl, MODES[0], use_chunked_topk=True)
    with pytest.raises(ValueError, match=r"use_chunked_topk: expected False with loss_mode=fastd"):
        loss_of(step, batch, logits)
    step.keywords["distillation_config"].distillation_loss = SimpleNamespace(
        loss_mode=MODES[0], log_prob_min_clamp=-10.0
    )
    with pytest.raises(ValueError, match=r"log_prob_min_clamp: expected null with loss_mode=.*-10"):
        loss_of(step, batch, logits)
    step.keywords["config"].strategy = "megatron"
    with pytest.raises(ValueError, match=r"strategy: expected one of fsdp, .*, got megatron"):
        loss_of(step, batch, logits)
    with pytest.raises(ValueError, match="use_fused_kernels: expected False with loss_mode=fastd"):
        step(model_output={"log_probs": logits}, data=batch)
