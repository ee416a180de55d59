"""A resumed run has all weights of its checkpoint, and trains what it is asked to train."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    TrainerCallback,
)

from fastdistill.training.checkpoints import checkpoints
from helpers.training import VOCAB, build, llama, peaked, ragged, train, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "max_steps": 4}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def qwen_moe():
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, **sizes, num_experts=4, num_experts_per_tok=2)
    )


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))


def half_mixtral():
    return mixtral().to(torch.bfloat16)


def made(make):
    torch.manual_seed(0)
    return make()


class StopsAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("make", [mixtral, qwen_moe, bloom, half_mixtral])
class TestFamilies:
    """transformers stores experts one by one and holds them in one tensor."""

    @pytest.mark.fast_cases(1)
    def test_resumed_as_undisturbed(self, tmp_path, make):
        whole = train(tmp_path / "whole", model=made(make), **SAVING)
        train(tmp_path, model=made(make), callbacks=[StopsAt(2)], **SAVING)
        again = build(tmp_path, model=made(make), **SAVING)
        again.train(resume_from_checkpoint="auto")
        assert torch.equal(weights(again), weights(whole))
        done = build(tmp_path, model=made(make), **SAVING)
        done.train(resume_from_checkpoint="auto")
        assert done.already_done
        assert torch.equal(weights(done), weights(whole))
        assert {p.dtype for p in done.model.parameters()} == {whole.model.dtype}

    @pytest.mark.fast_cases(1)
    def test_the_best_is_the_one_that_was_saved(self, tmp_path, make):
        options = SAVING | {
            "eval_strategy": "steps",
            "save_steps": 1,
            "eval_steps": 1,
            "optim": "sgd",
            "metric_for_best_model": "kl",
            "load_best_model_at_end": True,
            "learning_rate": 20.0,
        }
        trainer = train(tmp_path, model=made(make), eval_dataset=ragged(4), **options)
        assert trainer.evaluate()["eval_kl"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options, task_type="CAUSAL_LM")


class TestOtherStudents:
    def three_layers(self):
        return type(llama(0))(type(llama(0).config)(**SMALL | {"num_hidden_layers": 3}))

    @pytest.mark.parametrize("steps", [4, 6])  # done, and to be gone on with
    def test_a_student_with_more_layers(self, tmp_path, steps):
        train(tmp_path, **SAVING)
        again = build(tmp_path, model=self.three_layers(), **SAVING | {"max_steps": steps})
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*lacks 9 weights"):
            again.train(resume_from_checkpoint="auto")

    @pytest.mark.fast_cases(2)
    @pytest.mark.parametrize(
        ("peft_config", "words"),
        [
            (lora(target_modules=["v_proj"]), "lacks 4 weights"),
            (lora(target_modules=["q_proj", "v_proj"]), "lacks 4 weights"),
            (lora(r=4), "size mismatch"),
            (None, "has an adapter, the student whole weights"),
        ],
        ids=["other", "more", "rank", "none"],
    )
    def test_other_adapters(self, tmp_path, peft_config, words):
        train(tmp_path, peft_config=lora(), **SAVING)
        again = build(tmp_path, peft_config=peft_config, **SAVING)
        with pytest.raises(ValueError, match=f"^resume_from_checkpoint: .*{words}"):
            again.train(resume_from_checkpoint="auto")

    def test_adapters_in_a_run_of_whole_weights(self, tmp_path):
        train(tmp_path, **SAVING)
        again = build(tmp_path, peft_config=lora(), **SAVING)
        with pytest.raises(ValueError, match="has whole weights, the student an adapter"):
            again.train(resume_from_checkpoint="auto")


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_a_file_cut_short_in_a_copy_is_named(tmp_path, name):
    """Without the list of digests, as other trainers leave their checkpoints."""
    train(tmp_path, **SAVING)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run" / "checkpoint-2", copy)
    (copy / "finished.json").unlink()
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected the .* but: "):
        build(tmp_path, **SAVING).train(resume_from_checkpoint=copy)


class TestOtherSettings:
    @pytest.mark.fast_cases(3)
    @pytest.mark.parametrize(
        "option",
        [
            {"learning_rate": 1e-4},
            {"weight_decay": 0.1},
            {"adam_beta2": 0.95},
            {"optim": "sgd"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("checkpoint", ["auto", "checkpoint-2"])
    def test_what_the_optimizer_would_pass_over_is_refused(self, tmp_path, option, checkpoint):
        train(tmp_path, **SAVING | {"max_steps": 2})
        (name,) = option
        again = build(tmp_path, **SAVING | option)
        checkpoint = tmp_path / "run" / checkpoint if checkpoint == "checkpoint-2" else checkpoint
        with pytest.raises(
            ValueError, match=f"^{name}: expected the value that checkpoint-2 was trained"
        ):
            again.train(resume_from_checkpoint=checkpoint)
        assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]

    CHANGES = (
        {"divergence": "reverse_kl"},
        {"temperature": 2.0},
        {"seed": 7},
        {"per_device_train_batch_size": 6},
        {"data": ragged(9)},
        {"lr_scheduler_type": "linear"},
    )

    @pytest.mark.fast_cases(1)
    @pytest.mark.parametrize("change", CHANGES, ids=[next(iter(c)) for c in CHANGES])
    def test_a_run_that_is_done_is_not_passed_off_as_another(self, tmp_path, change):
        train(tmp_path, **SAVING)
        log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match=r"the run that finished at step 4.* got "):
            build(tmp_path, **SAVING | change).train(resume_from_checkpoint="auto")
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log

    def test_teachers_are_told_apart_by_their_folders(self, tmp_path, monkeypatch):
        for name in ("a", "b"):
            peaked().save_pretrained(tmp_path / name)
        train(tmp_path, teacher=str(tmp_path / "a"), **SAVING)
        monkeypatch.chdir(tmp_path)
        same = build(tmp_path, teacher="a", **SAVING)
        same.train(resume_from_checkpoint="auto")
        assert same.already_done
        with pytest.raises(ValueError, match=r"teacher: got .*b', not .*a'"):
            build(tmp_path, teacher="b", **SAVING).train(resume_from_checkpoint="auto")

    def test_what_is_used_from_here_on_is_told(self, tmp_path, caplog):
        train(tmp_path, **SAVING | {"max_steps": 2})
        again = build(tmp_path, **SAVING | {"temperature": 2.0})
        with caplog.at_level(logging.WARNING):
            again.train(resume_from_checkpoint="auto")
        assert again.state.global_step == 4
        assert (
            "at step 2 with settings that differ from the checkpoint: temperature: got 2.0, not 1.0"
            in (caplog.text)
        )

    def test_what_changes_no_weight_is_no_other_run(self, tmp_path):
        train(tmp_path, **SAVING)
        manner = {"logging_steps": 2, "save_total_limit": 3, "show_panel": True, "packing": True}
        again = build(tmp_path, **SAVING | manner)
        again.train(resume_from_checkpoint="auto")
        assert again.already_done

    def test_fewer_steps_than_were_done(self, tmp_path):
        train(tmp_path, **SAVING)
        again = build(tmp_path, **SAVING | {"max_steps": 3})
        with pytest.raises(ValueError, match=r"at most the run's 3 steps, got one of step 4"):
            again.train(resume_from_checkpoint="auto")

    def test_a_callers_optimizer_is_the_callers(self, tmp_path):
        def optimizers(model):
            made = torch.optim.SGD(model.parameters(), lr=1e-2)
            return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)

        for steps, rate in ((2, 1e-2), (4, 1e-3)):
            model = llama(0)
            again = build(
                tmp_path,
                model=model,
                trainer={"optimizers": optimizers(model)},
                **SAVING | {"max_steps": steps, "learning_rate": rate},
            )
            again.train(resume_from_checkpoint="auto")
        assert again.state.global_step == 4
