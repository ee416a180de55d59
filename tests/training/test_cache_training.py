"""A student of a cache becomes its teacher's student; what a cache cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fastdistill import Teacher, TeacherCache
from fastdistill.alignment.experiment.demo.models import shipped_folder
from fastdistill.teachers.cache.sampled_targets import draw
from helpers.training import VOCAB, build, llama, peaked, ragged, step_losses, train, weights

RUN = {"max_steps": 4, "per_device_train_batch_size": 5, "data": ragged(12)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    options: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0), "positions": "targets"}
    return TeacherCache.build(Teacher(peaked()), ragged(12), folder, **options)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_same_student(tmp_path, cache, temperature):
    options = {**RUN, "temperature": temperature}
    live = train(tmp_path / "live", teacher=Teacher(peaked()), **options)
    cached = train(tmp_path / "kept", teacher=cache, **options)
    assert step_losses(cached) == pytest.approx(step_losses(live), rel=1e-4)
    moved = (weights(live) - torch.cat([p.flatten() for p in llama(0).parameters()])).norm()
    assert (weights(live) - weights(cached)).norm() < 1e-3 * moved


def test_answers_are_read_in_workers_and_a_folder_is_enough(tmp_path, cache):
    here = train(tmp_path / "here", teacher=cache, **RUN)
    workers = build(tmp_path / "w", teacher=str(cache.path), dataloader_num_workers=2, **RUN)
    batch = next(iter(workers.get_train_dataloader()))
    assert batch["teacher_ids"].shape == (*batch["input_ids"].shape, 8)
    workers.train()
    assert torch.equal(weights(workers), weights(here))


def test_evaluation_and_packing(tmp_path, cache):
    trainer = build(tmp_path, teacher=cache, packing=True, eval_dataset=ragged(6), **RUN)
    trainer.train()
    live = build(tmp_path, teacher=Teacher(peaked()), model=trainer.model, **RUN)
    metrics, exact = trainer.evaluate(), live.evaluate(ragged(6))
    for name in ("eval_kl", "eval_agreement", "eval_teacher_mass"):
        assert metrics[name] == pytest.approx(exact[name], rel=1e-3)


def test_a_students_head_may_have_other_padding(tmp_path, cache):
    """More rows than the teacher, and fewer: ids beyond the common ones do not count."""
    for vocab in (VOCAB + 11, VOCAB - 3):
        train(tmp_path / str(vocab), teacher=cache, model=llama(0, vocab=vocab), **RUN)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lmbda": 0.5}, "lmbda: expected 0 with a cached teacher"),
        ({"k": 9}, r"k: expected an integer in 1\.\.8"),
        ({"temperature": 3.0}, "temperature: expected one that .* was built for"),
        ({"k": None}, "teacher: expected a model, or an object with hidden"),
        ({"data": [{"input_ids": [4, 5, 6, 7]}]}, r"train_dataset: expected examples that .* \(nu"),
        ({"eval_dataset": ragged(14)}, "eval_dataset: expected examples that"),
        ({"max_length": 6}, "max_length=None"),
    ],
)
def test_before_the_first_step(tmp_path, cache, options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build(tmp_path, teacher=cache, **({"data": ragged(12)} | options))


def test_another_tokenizer(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shipped_folder())
    texts = [{"text": "import os\nimport sys\n" * 4}] * 2
    teacher = llama(7, vocab=len(tokenizer))
    cache = TeacherCache.build(teacher, texts, tmp_path / "c", k=4, tokenizer=tokenizer)
    other = AutoTokenizer.from_pretrained(shipped_folder())
    other.add_tokens(["<new>"])
    options = {"teacher": cache, "model": llama(0, vocab=len(tokenizer)), "data": texts, "k": 4}
    train(tmp_path, processing_class=tokenizer, **options)
    with pytest.raises(ValueError, match="tokenizer: expected the one that"):
        build(tmp_path, processing_class=other, **options)


def test_a_target_without_an_answer(tmp_path):
    rows = ragged(6)
    rows[2]["labels"][:-2] = -100
    cache = TeacherCache.build(Teacher(peaked()), rows, tmp_path / "c", k=4, positions="targets")
    with pytest.raises(
        ValueError, match=r"labels: expected targets that .* targets without answers"
    ):
        train(tmp_path, teacher=cache, k=4, data=ragged(6))


# ---- sampled targets


def test_draws_are_the_distribution_on_average():
    """E[p̂] = p over many draws, whatever lies outside any top k; and counts are whole."""
    g = torch.Generator().manual_seed(0)
    teacher = Teacher(peaked())
    hidden = teacher.hidden(torch.arange(3, 11)[None])[0]
    p = (teacher.head.logits(hidden).double() / 1.5).softmax(-1)
    total, n, k = torch.zeros_like(p), 400, 50
    for _ in range(n):
        drawn = draw(hidden, teacher.head, k, 1.5, g)
        counts = (drawn.logprobs.exp() * k).masked_fill(drawn.ids < 0, 0)
        assert torch.allclose(counts, counts.round(), atol=1e-3)
        assert torch.allclose(counts.sum(-1), torch.full((8,), float(k)))
        total.scatter_add_(-1, drawn.ids.clamp(min=0), counts.double())
    error = (total / (n * k) - p).abs()
    assert (error < 5 * (p * (1 - p) / (n * k)).sqrt() + 1e-6).all()


def test_draws_of_half_precision_heads_use_fp32_logits():
    teacher = Teacher(peaked().bfloat16())
    hidden = teacher.hidden(torch.arange(3, 11)[None])[0]
    one = draw(hidden, teacher.head, 8, 1.0, torch.Generator().manual_seed(1))
    exact = draw(
        hidden.float(),
        Teacher(peaked().bfloat16().float()).head,
        8,
        1.0,
        torch.Generator().manual_seed(1),
    )
    assert torch.equal(one.ids, exact.ids)


def test_sampled_targets_train_and_are_reproducible(tmp_path):
    made = [
        TeacherCache.build(
            Teacher(peaked()), ragged(12), tmp_path / n, k=16, targets="sampled", seed=seed
        )
        for n, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    digests = [c.manifest.shards[0].sha256 for c in made]
    assert digests[0] == digests[1] != digests[2]
    train(tmp_path, teacher=made[0], **RUN | {"k": 16})
    with pytest.raises(ValueError, match="divergence: expected 'forward_kl'"):
        build(tmp_path, teacher=made[0], k=16, divergence="reverse_kl", data=ragged(12))
    with pytest.raises(ValueError, match="k: expected 16, the draws"):
        build(tmp_path, teacher=made[0], k=8, data=ragged(12))


@pytest.mark.slow
def test_steps_on_draws_are_right_on_average(tmp_path):
    """The mean of many steps on draws points where a step on the whole vocabulary does."""
    options = {"max_steps": 1, "data": ragged(12), "optim": "sgd", "learning_rate": 0.1}
    start = torch.cat([p.detach().flatten() for p in llama(0).parameters()])
    exact = weights(train(tmp_path / "exact", teacher=Teacher(peaked()), k=None, **options)) - start
    steps = []
    for seed in range(12):
        folder = tmp_path / str(seed)
        cache = TeacherCache.build(
            Teacher(peaked()), ragged(12), folder / "c", k=16, targets="sampled", seed=seed
        )
        steps.append(weights(train(folder, teacher=cache, k=16, **options)) - start)
    errors = [float((step - exact).norm() / exact.norm()) for step in steps]
    together = float((torch.stack(steps).mean(0) - exact).norm() / exact.norm())
    assert together < 0.5 * sum(errors) / len(errors)  # noise falls as 1/√12, a bias would not


def test_a_seed_is_all_of_its_bits(tmp_path):
    made = [
        TeacherCache.build(
            Teacher(peaked()), ragged(2), tmp_path / str(seed), k=4, targets="sampled", seed=seed
        )
        for seed in (0, 1 << 32)
    ]
    assert made[0].manifest.shards[0].sha256 != made[1].manifest.shards[0].sha256
