"""Losses at the head are the dense ones: selected, of a dense teacher, of labels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdistill.kernels.divergences import NAMES
from fastdistill.losses.topk import distill_topk
from fastdistill.training.histograms import EDGES, SCORES
from fastdistill.training.logs.run_files import read_run
from fastdistill.training.token_selection import TokenSelection
from helpers.training import build, flat, llama, peaked, ragged, step_losses, train, weights


def logits(model, rows):
    """Of every target, fp64, and its label and row."""
    tables, labels, where = [], [], []
    for n, row in enumerate(rows):
        keep = row["labels"][1:] != -100
        tables.append(model.double()(input_ids=row["input_ids"][None]).logits[0, :-1][keep])
        labels.append(row["labels"][1:][keep])
        where += [n] * int(keep.sum())
    return torch.cat(tables), torch.cat(labels), torch.tensor(where)


def step(loss, student):
    """Weights after one step of SGD at the tests' learning rate."""
    loss.backward()
    return torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in student.parameters()])


def divergence(p, q, name, beta):
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    m, mixed = beta * p + (1 - beta) * q, 0.1 * p + 0.9 * q
    overlap = torch.minimum(p, q).sum(-1)
    share = (-3 * overlap.detach()).exp()
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "hellinger": lambda: 1 - (p * q).sqrt().sum(-1),
        "skew_forward_kl": lambda: kl(p, mixed),
        "skew_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
        "nla": lambda: -overlap.log(),
        "lk_hybrid": lambda: share * kl(p, q) + (1 - share) * (1 - overlap),
        "argmax_ce": lambda: -q.gather(-1, p.argmax(-1, keepdim=True))[:, 0].log(),
    }[name]()


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("name", NAMES)
def test_a_dense_teacher_is_compared_over_the_whole_vocabulary(tmp_path, name):
    options = {"k": None, "divergence": name, "beta": 0.3, "ce_weight": 0.25, "temperature": 1.5}
    trainer = train(tmp_path, max_steps=1, t2_scale=True, **options)
    student = llama(0).double()
    z, labels, _ = logits(student, ragged())
    t = logits(peaked(), ragged())[0].detach()
    D = divergence((t / 1.5).softmax(-1), (z / 1.5).softmax(-1), name, 0.3)
    loss = (0.75 * 1.5**2 * D + 0.25 * F.cross_entropy(z, labels, reduction="none")).mean()
    assert step_losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert (weights(trainer) - step(loss, student)).abs().max() < 1e-6


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("k", [8, None])
def test_recomputed_logits_make_the_same_update(tmp_path, k):
    fused, again = (train(tmp_path, k=k, backward=b) for b in ("fused", "recompute"))
    assert (weights(fused) - weights(again)).abs().max() < 1e-7
    assert step_losses(fused) == pytest.approx(step_losses(again), rel=1e-6)


def test_dense_evaluation_is_exact(tmp_path):
    trainer = build(tmp_path, k=None, divergence="reverse_kl", eval_dataset=ragged(5))
    metrics = trainer.evaluate()
    z, labels, _ = logits(llama(0), ragged(5))
    t = logits(peaked(), ragged(5))[0]
    p, q = t.softmax(-1), z.softmax(-1)
    assert metrics["eval_loss"] == pytest.approx(
        divergence(p, q, "reverse_kl", 0).mean().item(), 1e-5
    )
    assert metrics["eval_kl"] == pytest.approx(
        divergence(p, q, "forward_kl", 0).mean().item(), 1e-5
    )
    overlap = torch.minimum(p, q).sum(-1).mean().item()
    assert metrics["eval_acceptance_rate"] == pytest.approx(overlap, 1e-5)
    assert metrics["eval_nll"] == pytest.approx(F.cross_entropy(z, labels).item(), 1e-5)
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert metrics["eval_agreement"] == pytest.approx(agree)


@pytest.mark.parametrize("options", [{}, {"k": None}, {"packing": True}], ids=str)
def test_histograms_count_every_target_by_its_scores(tmp_path, options):
    trainer = build(
        tmp_path, **{"k": 53} | options, eval_dataset=ragged(9), per_device_eval_batch_size=4
    )
    trainer.evaluate()
    z, labels, _ = logits(llama(0), ragged(9))
    p, q = logits(peaked(), ragged(9))[0].softmax(-1), z.softmax(-1)
    best = z.log_softmax(-1).topk(2).values
    expected = {
        "nll": F.cross_entropy(z, labels, reduction="none"),
        "forward_kl": divergence(p, q, "forward_kl", 0),
        "entropy": -(q * q.log()).sum(-1),
        "margin": best[:, 0] - best[:, 1],
    }
    assert set(expected) == set(SCORES)
    (event,) = read_run(tmp_path / "run").events("histograms")
    assert (event["of"], event["step"], event["edges"]) == ("eval", 0, list(EDGES))
    ends = torch.tensor([0.0, *EDGES, 1e9], dtype=torch.float64)
    for name, score in expected.items():
        counts = torch.histogram(score.detach().double(), ends).hist
        assert event["counts"][name] == counts.int().tolist(), name
        assert sum(event["counts"][name]) == len(labels)


def test_histograms_of_labels_alone_have_no_divergence(tmp_path):
    trainer = build(tmp_path, teacher=None, ce_weight=1.0, eval_dataset=ragged(3))
    trainer.evaluate()
    trainer.predict(ragged(5))
    trainer.log({"eval_other": 1.0})
    (event,) = read_run(tmp_path / "run").events("histograms")
    assert set(event["counts"]) == {"nll", "entropy", "margin"}


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("k", [53, None])
@pytest.mark.parametrize("words", ["entropy top 0.3", "forward_kl weight", "nll >= 3.97"])
def test_selected_tokens_are_trained_on_at_their_weights(tmp_path, k, words):
    trainer = train(tmp_path, max_steps=1, token_selection=words, k=k)
    student = llama(0).double()
    z, labels, rows = logits(student, ragged())
    t = logits(peaked(), ragged())[0].detach()
    D = divergence(t.softmax(-1), z.softmax(-1), "forward_kl", 0)
    score = {
        "entropy": -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        "forward_kl": D,
        "nll": F.cross_entropy(z, labels, reduction="none"),
    }[words.split()[0]].detach()
    w = torch.zeros_like(score)
    for row in rows.unique():
        mine = rows == row
        n = int(mine.sum())
        if "top" in words:
            m = -(-3 * n // 10)
            w[mine.nonzero()[:, 0][score[mine].topk(m).indices]] = n / m
        elif "weight" in words:
            w[mine] = score[mine] / score[mine].mean()
        else:
            w[mine] = (score[mine] >= 3.97).double()
    loss = (w * D).mean()
    assert 0 < (w > 0).sum() <= len(w)
    assert step_losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert (weights(trainer) - step(loss, student)).abs().max() < 1e-6
    share = trainer.state.log_history[0]["selected"]
    assert share == pytest.approx((w > 0).double().mean().item())


def test_unselected_tokens_never_reach_the_loss(tmp_path, monkeypatch):
    from fastdistill.training import loss as objective

    seen = []
    whole = distill_topk

    def watched(hidden, *args, **options):
        seen.append(len(hidden))
        return whole(hidden, *args, **options)

    monkeypatch.setattr(objective, "distill_topk", watched)
    train(tmp_path, max_steps=1, token_selection=TokenSelection(score="entropy", share=0.2))
    assert seen == [29]  # of 122 targets


def test_a_function_selects(tmp_path):
    trainer = train(tmp_path, token_selection=lambda s: (s.entropy < 0).float())
    assert torch.equal(weights(trainer), flat(llama(0)))  # nothing is selected: nothing moves
    assert trainer.state.log_history[0]["selected"] == 0.0
    half = train(tmp_path, max_steps=1, token_selection=lambda s: torch.full_like(s.entropy, 0.5))
    assert step_losses(half)[0] == pytest.approx(step_losses(train(tmp_path))[0] / 2, rel=1e-6)


def test_selection_needs_no_teacher_for_the_students_own_scores(tmp_path):
    trainer = train(tmp_path, teacher=None, ce_weight=1.0, token_selection="nll top 0.5")
    assert 0.4 < trainer.state.log_history[0]["selected"] < 0.7


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_labels_alone_with_z_loss(tmp_path, z_loss):
    trainer = train(tmp_path, teacher=None, ce_weight=1.0, z_loss=z_loss, max_steps=1)
    student = llama(0).double()
    z, labels, _ = logits(student, ragged())
    loss = F.cross_entropy(z, labels) + z_loss * z.logsumexp(-1).square().mean()
    assert step_losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert (weights(trainer) - step(loss, student)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": None},
        {"tail": "renorm_both"},
        {"tail": "renorm_both", "ce_weight": 0.5},
        {"token_selection": "entropy top 0.5"},
        {"token_selection": lambda s: s.entropy * 0},
        {"teacher": None, "ce_weight": 1.0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_ranks_without_targets_report_what_the_others_do(tmp_path, options):
    """Figures are summed over processes by name: one name less on a rank, and all of them hang."""
    trainer = build(tmp_path, **options)
    sums = []
    for rows in (ragged(2), [{"input_ids": [5, 6], "labels": [-100, -100]}]):
        inputs = trainer.data_collator(rows)
        trainer._since_log = {}
        trainer.compute_loss(trainer.model.train(), inputs).backward()
        sums.append(trainer._since_log)
    assert list(sums[0]) == list(sums[1])
    assert all(value == 0 for value in sums[1].values())
