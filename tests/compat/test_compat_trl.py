"""TRL's trainers and ours, one import line apart, make the same updates."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaForCausalLM

from fastdistill import compat
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from helpers.present import present
from helpers.training import flat
from helpers.trl_scene import TALKS, model, settings

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = [
    # Theirs: configurations name activation checkpointing by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,
]


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = shipped_teacher()[1]
    made.pad_token = made.eos_token
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl")


def both(theirs, ours, config, data, tokenizer):
    """(losses, weights) of two trainers that differ in their class alone."""
    from datasets import Dataset

    results = []
    for kind in (theirs, ours):
        trainer = kind(
            model=model(tokenizer, 0),
            teacher_model=model(tokenizer, 7, hidden=48, scale=10.0),
            args=config(),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, flat(trainer.model)))
    return results


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd(tmp_path, trl, tokenizer, beta):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def config():
        return settings(GKDConfig, tmp_path, lmbda=0.0, beta=beta)

    theirs, ours = both(GKDTrainer, compat.GKDTrainer, config, TALKS, tokenizer)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert (ours[1] - theirs[1]).abs().max() < 1e-6
    assert (ours[1] - flat(model(tokenizer, 0))).abs().max() > 1e-5


@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
def test_distillation(tmp_path, trl, tokenizer, beta, temperature):
    """A nucleus of one token: both sample the same, and what they learn from it can be compared."""
    prompts = [{"prompt": talk["messages"][:1]} for talk in TALKS]

    def config():
        return settings(
            trl.DistillationConfig,
            tmp_path,
            beta=beta,
            temperature=temperature,
            top_p=1e-6,
            max_completion_length=6,
            max_steps=1,
            shuffle_dataset=False,
            train_sampling_strategy="sequential",
        )

    theirs, ours = both(
        trl.DistillationTrainer, compat.DistillationTrainer, config, prompts, tokenizer
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert (ours[1] - theirs[1]).abs().max() < 1e-6
    assert (ours[1] - flat(model(tokenizer, 0))).abs().max() > 1e-5


def test_on_policy_gkd_runs(tmp_path, trl, tokenizer):
    from trl.experimental.gkd import GKDConfig

    trainer = compat.GKDTrainer(
        model(tokenizer, 0),
        model(tokenizer, 7, hidden=48),
        settings(GKDConfig, tmp_path, lmbda=1.0, max_new_tokens=4, temperature=0.7),
        train_dataset=TALKS,
        processing_class=tokenizer,
    )
    assert trainer.args.sampling_temperature == 0.7
    assert trainer.args.temperature == 1.0
    trainer.train()
    assert present(trainer.panel).sampled


def test_what_has_no_counterpart_is_refused_by_name(tmp_path, trl, tokenizer):
    from trl.experimental.gkd import GKDConfig

    student, teacher = model(tokenizer, 0), model(tokenizer, 7)
    with pytest.raises(ValueError, match="seq_kd: expected False in our GKDTrainer, got True"):
        compat.GKDTrainer(student, teacher, settings(GKDConfig, tmp_path, seq_kd=True))
    with pytest.raises(ValueError, match="top_k: expected 0 in our DistillationTrainer, got 5"):
        compat.DistillationTrainer(
            student, teacher, settings(trl.DistillationConfig, tmp_path, top_k=5)
        )
    with pytest.raises(ValueError, match="formatting_func: expected None in our GKDTrainer"):
        compat.GKDTrainer(student, teacher, settings(GKDConfig, tmp_path), formatting_func=str)
    with pytest.raises(TypeError, match="args: expected TRL's configuration, got NoneType"):
        compat.GKDTrainer(student, teacher)


def test_paths_and_dropout(tmp_path, trl, tokenizer):
    from trl.experimental.gkd import GKDConfig

    for seed, name in ((0, "student"), (7, "teacher")):
        model(tokenizer, seed).to(torch.bfloat16).save_pretrained(tmp_path / name)
    args = settings(
        GKDConfig,
        tmp_path,
        max_new_tokens=4,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = compat.GKDTrainer(
        str(tmp_path / "student"), args=args, train_dataset=TALKS, processing_class=tokenizer
    )
    assert trainer.model.dtype == torch.float32  # as TRL loads it
    assert trainer.teacher.model.dtype == torch.float32

    class Drops(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.drop = torch.nn.Dropout(0.5)

    dropping = Drops(model(tokenizer, 0).config)
    compat.GKDTrainer(
        dropping,
        model(tokenizer, 7),
        args=settings(GKDConfig, tmp_path, max_new_tokens=4),
        train_dataset=TALKS,
        processing_class=tokenizer,
    )
    assert dropping.drop.p == 0.0
