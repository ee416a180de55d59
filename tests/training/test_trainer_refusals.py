"""What cannot train rightly is refused before the first update, in words that help."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fastdistill.training.config import DistillConfig
from fastdistill.training.trainer import DistillTrainer
from helpers.training import VOCAB, config, llama


def test_what_a_trainer_refuses(tmp_path):
    student = llama(0)
    with pytest.raises(ValueError, match=r"teacher: expected a teacher, got None with ce_weight=0"):
        DistillTrainer(student, None, config(tmp_path))
    with pytest.raises(ValueError, match=r"expected another model, got the student itself"):
        DistillTrainer(student, student, config(tmp_path))
    with pytest.raises(ValueError, match=rf"k: expected at most the vocabulary's {VOCAB}"):
        DistillTrainer(student, llama(7), config(tmp_path, k=VOCAB + 1))
    with pytest.raises(TypeError, match=r"teacher: expected a model, a path, or an object"):
        DistillTrainer(student, object(), config(tmp_path))
    with pytest.raises(TypeError, match=r"args: expected a DistillConfig, got dict"):
        DistillTrainer(student, llama(7), cast(Any, {}))


def test_config_works_as_it_stands(tmp_path):
    args = DistillConfig(str(tmp_path))
    assert (args.k, args.divergence, args.tail, args.impl) == (64, "forward_kl", "bucket", "auto")
    assert args.prediction_loss_only


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, r"k: expected an integer of 1 or more or None, got 0"),
        ({"divergence": "kl"}, r"divergence: expected one of 'forward_kl', .*, got 'kl'"),
        ({"tail": "drop"}, r"tail: expected one of 'bucket', .*, got 'drop'"),
        ({"impl": "fast"}, r"impl: expected one of .*, got 'fast'"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number above 0, got nan"),
        ({"beta": 1.5}, r"beta: expected a number in \[0, 1\], got 1.5"),
        ({"ce_weight": -0.1}, r"ce_weight: expected a number in \[0, 1\]"),
        ({"tail": "renorm_both", "k": 1}, r"tail: expected a tail other than 'renorm_both'"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor: expected 0.0, got 0.1"),
        ({"use_liger_kernel": True}, r"use_liger_kernel: expected False"),
    ],
)
def test_config_says_what_it_expected(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        DistillConfig(str(tmp_path), **options)


def test_config_refuses_another_type(tmp_path):
    with pytest.raises(TypeError, match=r"beta: expected a number, got '0.5'"):
        DistillConfig(str(tmp_path), beta=cast(Any, "0.5"))
