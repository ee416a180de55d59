"""A dry run fails where the run would, and what was typed for a setting is told apart."""

from __future__ import annotations

import json
import shutil

import pytest

from fastdistill.cli.settings import nearest
from fastdistill.training.config import DistillConfig
from helpers.command import files, last_values
from helpers.training import llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = files(tmp_path_factory.mktemp("files"))
    other = at / "other-words"
    llama(3).save_pretrained(other)
    shutil.copytree(at / "teacher", at / "pickled")
    for file in (at / "pickled").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    words = json.loads((at / "teacher" / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    a, b, *_ = sorted((word for word in vocab if word.isalpha()), key=vocab.get)
    vocab[a], vocab[b] = vocab[b], vocab[a]
    shutil.copytree(at / "teacher", at / "swapped")
    (at / "swapped" / "tokenizer.json").write_text(json.dumps(words))
    return at


def train_command(folder, out, **changes):
    named = {"student": "student", "teacher": "teacher", "data": "train.jsonl"} | changes
    options = [
        word for name, value in named.items() if value for word in (f"--{name}", folder / value)
    ]
    return (
        "train",
        *options,
        "--out",
        out,
        "k=8",
        "max_steps=1",
        "use_cpu=true",
        "per_device_train_batch_size=4",
        "show_panel=false",
    )


WRONG = {
    "k above the vocabulary": ({}, ("k=100000",)),
    "labels alone with a share of the teacher": ({"teacher": ""}, ("ce_weight=0.5",)),
    "samples without a teacher": ({"teacher": ""}, ("lmbda=0.5",)),
    "another tokenizer": ({"teacher": "swapped"}, ()),
    "weights that are pickles": ({"teacher": "pickled"}, ()),
    "a student of pickles": ({"student": "pickled"}, ()),
    "an unknown quantisation": ({}, ("teacher_quant=nf5",)),
    "a rank of nothing": ({}, ("--lora-rank", "0")),
    "a negative rank": ({}, ("lora_rank=-4",)),
    "a checkpoint that is not there": ({}, ("resume_from_checkpoint=nowhere",)),
    "an unknown arithmetic": ({}, ("teacher_compute=int9",)),
    "arithmetic of what is not quantised": ({}, ("teacher_compute=int8",)),
    "a metric that nothing evaluates": (
        {"eval-data": "held-out.jsonl"},
        (
            "metric_for_best_model=bleu",
            "load_best_model_at_end=true",
            "eval_strategy=steps",
            "save_strategy=steps",
        ),
    ),
    "no target within max_length": ({}, ("max_length=1",)),
    "sampling by a length that is not there": (
        {},
        ("train_sampling_strategy=batch_rebalance", "length_column_name=n", "lmbda=2"),
    ),
}


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("case", WRONG)
def test_a_dry_run_fails_as_the_run_does(run, folder, tmp_path, case):
    changes, more = WRONG[case]
    command = last_values(*train_command(folder, tmp_path / "run", **changes), *more)
    code, _, real = run(*command)
    dry_code, _, dry = run(*command, "--dry-run")
    last = [text.strip().splitlines()[-1] for text in (real, dry)]
    assert (code, dry_code) == (2, 2), last
    assert last[0] == last[1]


@pytest.mark.parametrize("more", [("resume_from_checkpoint=nowhere",), ("lora_rank=0",)], ids=str)
def test_a_refused_run_leaves_no_folder(run, folder, tmp_path, more):
    code, _, err = run(*train_command(folder, tmp_path / "run"), *more)
    assert code == 2
    assert f"{more[0].partition('=')[0]}: expected" in err
    assert not (tmp_path / "run").exists()


def test_without_a_look_at_the_data_neither_fails(run, folder, tmp_path):
    (folder / "unlearned.jsonl").write_text(
        json.dumps({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]})
        + "\n"
        + json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
        + "\n"
    )
    command = (
        *train_command(folder, tmp_path / "run", data="unlearned.jsonl"),
        "check_data=false",
        "check_signal=false",
    )
    assert run(*command, "--dry-run")[0] == run(*command)[0] == 0


def test_adapters_are_tried_without_weights(run, folder, tmp_path):
    pytest.importorskip("peft")
    code, out, err = run(
        *train_command(folder, tmp_path / "run"), "--lora-rank", 2, "--dry-run", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["dry_run"]


KNOWN = sorted(f for f in DistillConfig.__dataclass_fields__ if f != "output_dir")


@pytest.mark.parametrize(
    "key, meant",
    [
        ("lr", ["learning_rate"]),
        ("batch_size", ["per_device_train_batch_size"]),
        ("learning_rte", ["learning_rate"]),
        ("epochs", ["num_train_epochs"]),
        ("train_batch_size", ["per_device_train_batch_size"]),
        ("wd", ["weight_decay"]),
        ("eval_batch_size", ["per_device_eval_batch_size"]),
        ("temp", ["temperature"]),
        ("grad_accum_steps", ["gradient_accumulation_steps"]),
        ("max_step", ["max_steps"]),
        ("gas", ["gradient_accumulation_steps"]),
        ("num_epochs", ["num_train_epochs"]),
        ("zzz", []),
    ],
)
def test_what_a_wrong_key_may_stand_for(key, meant):
    assert nearest(key, KNOWN) == meant


@pytest.mark.parametrize(
    "typed, hint",
    [
        (("lr=1e-4",), "Did you mean learning_rate?"),
        (("batch_size=4",), "Did you mean per_device_train_batch_size?"),
        (("--learning_rate", "1e-4"), "--learning_rate. Write learning_rate=1e-4"),
        (("--learning-rate=1e-4",), "--learning-rate. Write learning_rate=1e-4"),
        (("--max_steps", "5"), "--max_steps. Write max_steps=5"),
        (("--lr", "1e-4"), "--lr. Write learning_rate=1e-4"),
        (("--fp16",), "--fp16. Write fp16=VALUE"),
        (("--lora_rank", "8"), "lora-rank"),
        (("--zzz", "8"), "No such option"),
    ],
)
def test_options_that_are_settings(run, folder, tmp_path, typed, hint):
    code, _, err = run(*train_command(folder, tmp_path / "run"), *typed)
    assert code == 2
    assert hint in err
