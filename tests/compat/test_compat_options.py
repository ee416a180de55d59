"""Every option of TRL's configurations: used, or refused by name. A new one fails here."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from transformers import TrainingArguments

from fastdistill import compat
from helpers.training import llama

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
]

LOADING = "model_init_kwargs teacher_model_name_or_path teacher_model_init_kwargs disable_dropout"
# An option of TRL's own -> "used", or a value that is not its default and is refused.
GKD = dict.fromkeys(
    f"{LOADING} beta lmbda max_length max_new_tokens temperature".split(), "used"
) | {
    "trust_remote_code": True,
    "router_aux_loss_coef": 0.1,
    "chat_template_path": "/nowhere",
    "dataset_text_field": "words",
    "dataset_kwargs": {"add_special_tokens": False},
    "dataset_num_proc": 2,
    "eos_token": "<end>",
    "truncation_mode": "keep_end",
    "shuffle_dataset": True,
    "packing": True,
    "packing_strategy": "wrapped",
    "padding_free": True,
    "pad_to_multiple_of": 8,
    "eval_packing": True,
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "loss_type": "dft",
    "activation_offloading": True,
    "pad_token": "<pad>",
    "seq_kd": True,
}
DISTILLATION = dict.fromkeys(
    f"{LOADING} beta max_completion_length shuffle_dataset temperature top_p".split(), "used"
) | {
    "trust_remote_code": True,
    "teacher_model_revision": "main",
    "ds3_gather_for_generation": False,
    "pad_to_multiple_of": 8,
    "top_k": 5,
    "min_p": 0.1,
    "generation_kwargs": {"num_beams": 2},
    "chat_template_kwargs": {"enable_thinking": False},
    "repetition_penalty": 1.1,
    "cache_implementation": "static",
    "use_vllm": True,
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a",
    "vllm_server_base_url": "http://a",
    "vllm_server_host": "a",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 1,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 8,
    "vllm_tensor_parallel_size": 2,
    "max_tool_calling_iterations": 2,
    "log_completions": True,
    "num_completions_to_print": 2,
    "log_unique_prompts": True,
}
EVERY = [
    (kind, name)
    for kind, options in (("gkd", GKD), ("distillation", DISTILLATION))
    for name in options
]
CHATS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]}
] * 4


def of(kind):
    trl = pytest.importorskip("trl")
    if kind == "distillation":
        return trl.DistillationConfig, compat.DistillationTrainer, DISTILLATION
    from trl.experimental.gkd import GKDConfig

    return GKDConfig, compat.GKDTrainer, GKD


def settings(kind, folder, **options):
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    return of(kind)[0](str(folder), **(plain | options))


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_every_option_is_decided(kind):
    config, trainer, decided = of(kind)
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    own = {f.name for f in dataclasses.fields(config)} - inherited
    assert own == decided.keys(), "decide what these mean in fastdistill/compat/trl.py"
    assert trainer.used == {name for name, value in decided.items() if value == "used"}


@pytest.mark.parametrize("kind, name", EVERY)
def test_what_is_not_used_is_refused_by_name(tmp_path, kind, name):
    _, trainer, decided = of(kind)
    if decided[name] == "used":
        return
    args = settings(kind, tmp_path)
    setattr(args, name, decided[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected .* in our \w+Trainer, got"):
        trainer(llama(2), llama(1), args, train_dataset=CHATS)


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_an_option_of_tomorrow_is_refused_by_name(tmp_path, kind, monkeypatch):
    config, trainer, _ = of(kind)
    later = dataclasses.make_dataclass(
        "Later", [("of_tomorrow", int, 1)], bases=(config,), namespace={"__module__": "trl.later"}
    )
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    with pytest.raises(ValueError, match="of_tomorrow: expected 1 in our"):
        trainer(llama(2), llama(1), later(str(tmp_path), of_tomorrow=2, **plain))


def test_options_of_a_users_own_class_are_the_users(tmp_path):
    config, trainer, _ = of("gkd")
    mine = dataclasses.make_dataclass(
        "Mine", [("data_path", str, "a")], bases=(config,), namespace={"__module__": "my_script"}
    )
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False}
    with pytest.raises(ValueError, match="seq_kd: expected False"):
        trainer(llama(2), llama(1), mine(str(tmp_path), data_path="b", seq_kd=True, **plain))


def test_another_trainers_configuration_is_refused(tmp_path):
    _, trainer, _ = of("distillation")
    with pytest.raises(TypeError, match="args: expected TRL's configuration of GKDTrainer, got Di"):
        compat.GKDTrainer(llama(2), llama(1), settings("distillation", tmp_path))
    with pytest.raises(TypeError, match=r"expected TRL's configuration of Distill.*got Train"):
        trainer(llama(2), llama(1), TrainingArguments(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"model_init_kwargs": {"dtype": "float32"}},
            "model_init_kwargs: expected none with a model",
        ),
        (
            {"teacher_model_init_kwargs": {"dtype": "float32"}},
            "teacher_model_init_kwargs: expected",
        ),
        ({"max_completion_length": None}, "max_completion_length: expected an integer in our Dist"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False in our Distill"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False, got True"),
    ],
)
def test_used_options_that_would_be_dropped_are_refused(tmp_path, options, message):
    args = settings("distillation", tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        compat.DistillationTrainer(llama(2), llama(1), args, train_dataset=CHATS)


def test_a_revision_is_refused(tmp_path):
    llama(2).save_pretrained(tmp_path / "m")
    args = settings("gkd", tmp_path, model_init_kwargs={"revision": "abc"})
    with pytest.raises(ValueError, match="revision: expected none in the options of a model"):
        compat.GKDTrainer(str(tmp_path / "m"), llama(1), args, train_dataset=CHATS)


def test_the_order_of_prompts_is_as_it_was_asked_for(tmp_path):
    prompts = [{"input_ids": [5, 6, 7]}] * 4
    for shuffled, expected in ((False, "sequential"), (True, "random")):
        options = {"shuffle_dataset": shuffled, "max_completion_length": 8}
        args = settings("distillation", tmp_path, **options)
        trainer = compat.DistillationTrainer(llama(2), llama(1), args, train_dataset=prompts)
        assert trainer.args.train_sampling_strategy == expected


def test_options_of_losses():
    assert compat.FusedLinearJSD(accum_dtype=torch.float32).jsd_beta == 0.5
    with pytest.raises(ValueError, match=r"accum_dtype: expected None or torch.float32, got"):
        compat.FusedLinearJSD(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"beta: expected a number in \[0, 1\], got 1.5"):
        compat.TopKLogprobLoss(beta=1.5)
    loss, ids = compat.TopKLogprobLoss(), torch.arange(3).expand(1, 2, 3)
    hidden, weight = torch.randn(1, 2, 4), torch.randn(8, 4)
    logits, mask = torch.tensor([4.0, 2.0, 1.0]).expand(1, 2, 3), torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=r"teacher.logprobs: expected log-probabilities ≤ 0"):
        loss(weight, hidden, ids, logits, mask, torch.ones(1, 2, dtype=torch.long))
