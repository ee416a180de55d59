"""The plugin of axolotl: its loss and gradient on packed rows, and a training by axolotl itself."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from fastdistill import linear_topk, topk_distill_loss
from helpers.text_scene import byte_level
from helpers.tolerances import GRADIENT, VALUE, assert_close
from helpers.training import llama

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TEXTS = ["the answer is 4.", "how are you 😀?", "naïve café", "a b c d e f g"]


@pytest.fixture(scope="module")
def plugin_module():
    pytest.importorskip("axolotl.integrations.base")
    import fastdistill.compat.axolotl_plugin

    return fastdistill.compat.axolotl_plugin


@pytest.fixture
def yaml_file(tmp_path):
    """Returns a function that writes axolotl's configuration, and the models and data it names."""
    tokenizer = byte_level()
    for name, seed in (("student", 1), ("teacher", 2)):
        llama(seed, vocab=400, scale=4.0).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [json.dumps({"text": text}) for text in TEXTS * 8]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))

    def write(**changes: Any) -> str:
        options = {
            "base_model": str(tmp_path / "student"),
            "plugins": ["fastdistill.compat.axolotl_plugin.DistillPlugin"],
            "fastdistill": {"teacher": str(tmp_path / "teacher"), "k": 16, "quant": "int8"},
            "datasets": [
                {"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "type": "completion"}
            ],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "run"),
            "sequence_len": 64,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "learning_rate": 5e-3,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "logging_steps": 1,
            "val_set_size": 0.25,
            "eval_strategy": "steps",
            "eval_steps": 6,
            "bf16": False,
            "use_tensorboard": False,
        } | changes
        (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(options))
        return str(tmp_path / "axolotl.yaml")

    return write


def train(path):
    """Runs what `axolotl train` runs with a file."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train as run

    PluginManager.get_instance().plugins.clear()  # the process has one
    cfg = load_cfg(path)
    return run(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl", "support": "student"}])
def test_axolotl_trains_a_student(plugin_module, yaml_file, tmp_path, options):
    teacher = {"teacher": str(tmp_path / "teacher"), "k": 16, **options}
    _, _, trainer = train(yaml_file(fastdistill=teacher))
    assert type(trainer).__name__ == "AxolotlDistillTrainer"
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    first, *_, last = (entry["eval_loss"] for entry in log if "eval_loss" in entry)
    assert abs(first - losses[0]) < 0.1 * losses[0]  # before the first update, on rows of the same
    assert last < 0.6 * first


def test_packed_rows_have_the_loss_of_their_sequences(plugin_module):
    student, teacher = llama(1).eval(), llama(2, scale=4.0).eval()
    student.config.use_cache = False  # as axolotl sets it
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 50, (1, n), generator=g) for n in (7, 4, 9)]
    packed = torch.cat([*sequences, torch.zeros(1, 4, dtype=torch.long)], -1)
    places = torch.cat([*(torch.arange(s.shape[1]) for s in sequences), torch.zeros(4).long()])
    inputs = {
        "input_ids": packed,
        "position_ids": places[None],
        "labels": torch.where(torch.arange(24) < 20, packed, -100),
    }

    plugin = plugin_module.DistillPlugin()
    options = {"k": 8, "divergence": "reverse_kl", "ce_weight": 0.25}
    cfg = SimpleNamespace(output_dir="run", fastdistill={"teacher": teacher, **options})
    plugin.pre_model_load(cfg)
    base = type("Base", (), {"compute_loss": lambda self, model, x, *rest: model(**x)["loss"]})
    trainer: Any = type("Trainer", (plugin_module._TrainsOnTeacher, base), {})()
    trainer.args, trainer.model = SimpleNamespace(device=torch.device("cpu")), student
    trainer.processing_class = None
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    plugin.post_trainer_create(cfg, trainer)
    loss = trainer.compute_loss(student, inputs, num_items_in_batch=20)
    loss.backward()
    gradient = student.model.embed_tokens.weight.grad.clone()

    student.zero_grad()
    total = torch.zeros(())
    for ids in sequences:
        hidden = student.model(input_ids=ids).last_hidden_state[0, :-1]
        with torch.no_grad():
            of_teacher = teacher.model(input_ids=ids).last_hidden_state[0, :-1]
            answers = linear_topk(of_teacher, teacher.lm_head.weight, 8)
        total = total + topk_distill_loss(
            hidden, student.lm_head.weight, answers, labels=ids[0, 1:], reduction="sum",
            divergence="reverse_kl", ce_weight=0.25,
        )  # fmt: off
    (total / 20).backward()
    assert_close(loss, total / 20, VALUE[torch.float32])
    assert_close(student.model.embed_tokens.weight.grad, gradient, GRADIENT[torch.float32])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fastdistill": None}, "fastdistill: expected a mapping with teacher in the YAML, got"),
        ({"fastdistill": {"teacher": "t", "kk": 1}}, "fastdistill: expected options among .* kk"),
        ({"use_eaft": True}, "use_eaft: expected none with fastdistill.compat.axolotl_plugin"),
        ({"context_parallel_size": 2}, "context_parallel_size: expected 1, with whole rows, got 2"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(plugin_module, changes, message):
    plugin = plugin_module.DistillPlugin()
    with pytest.raises(ValueError, match=message):
        plugin.register({"fastdistill": {"teacher": "t"}} | changes)
