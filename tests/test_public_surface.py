"""What `fastdistill` exports, with which arguments: outside code calls these by name."""

import doctest
import inspect
from typing import Any

import pytest
import torch

import fastdistill as fd
from helpers.present import present

SPARSE = [
    "hidden",
    "weight",
    "teacher",
    "labels",
    "divergence",
    "beta",
    "skew",
    "eta",
    "tail",
    "allow_biased",
    "temperature",
    "t2_scale",
    "ce_weight",
    "z_loss",
    "token_weight",
    "ignore_index",
    "reduction",
    "num_items",
    "bias",
    "logit_scale",
    "softcap",
    "valid_vocab",
    "group",
    "impl",
    "backward",
    "grad_filter_eps",
    "check",
]
SIGNATURES = {
    "topk_distill_loss": SPARSE,
    "topk_distill": SPARSE,
    "linear_lse_gather": [
        "hidden",
        "weight",
        "ids",
        "bias",
        "logit_scale",
        "softcap",
        "temperature",
        "valid_vocab",
        "with_entropy",
        "group",
        "impl",
        "check",
    ],
    "linear_distill_loss": [
        "hidden",
        "weight",
        "teacher_hidden",
        "teacher_weight",
        "k",
        "support",
        "t2d",
        "outside",
        "labels",
        "divergence",
        "beta",
        "skew",
        "eta",
        "temperature",
        "t2_scale",
        "ce_weight",
        "z_loss",
        "token_weight",
        "ignore_index",
        "reduction",
        "num_items",
        "bias",
        "logit_scale",
        "softcap",
        "teacher_bias",
        "teacher_logit_scale",
        "teacher_softcap",
        "valid_vocab",
        "group",
        "impl",
        "backward",
    ],
    "acceptance_length": ["acceptance_rate", "ratio"],
    "dpace_weights": ["nll", "block_size", "alpha", "mask"],
    "linear_logprobs_at": [
        "hidden",
        "weight",
        "ids",
        "bias",
        "logit_scale",
        "softcap",
        "temperature",
        "valid_vocab",
        "impl",
        "check",
    ],
    "linear_topk": [
        "hidden",
        "weight",
        "k",
        "bias",
        "logit_scale",
        "softcap",
        "temperature",
        "valid_vocab",
        "impl",
    ],
    "token_scores": [
        "hidden",
        "weight",
        "labels",
        "teacher",
        "bias",
        "logit_scale",
        "softcap",
        "temperature",
        "valid_vocab",
        "ignore_index",
        "impl",
        "check",
    ],
}
DEFAULTS = {
    "divergence": "forward_kl",
    "beta": 0.5,
    "skew": 0.1,
    "eta": 3.0,
    "tail": "bucket",
    "temperature": 1.0,
    "t2_scale": False,
    "ce_weight": 0.0,
    "z_loss": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "impl": "auto",
    "backward": "auto",
    "logit_scale": 1.0,
    "softcap": None,
}
EXPORTED = {
    *SIGNATURES,
    "CacheError",
    "DistillConfig",
    "DistillOutput",
    "DistillTrainer",
    "FidelityReport",
    "Int8Linear",
    "LUT4Linear",
    "LinearDistillLoss",
    "MappedTeacher",
    "OpenAISampler",
    "RoutedTeacher",
    "SelectedLogits",
    "SelfTeacher",
    "ServedTeacher",
    "Teacher",
    "TeacherCache",
    "TokenMap",
    "TokenScores",
    "TopK",
    "TopKDistillLoss",
    "VLLMHiddenStates",
    "compat",
    "load_teacher",
    "quantize_model",
    "save_quantized",
}


def test_exports():
    assert set(fd.__all__) == EXPORTED
    assert all(getattr(fd, name) is not None for name in EXPORTED)
    assert set(dir(fd)) >= EXPORTED


def test_signatures():
    for name, expected in SIGNATURES.items():
        parameters = inspect.signature(getattr(fd, name)).parameters
        assert list(parameters) == expected, name
        for argument, default in DEFAULTS.items():
            if argument in parameters:
                assert parameters[argument].default == default, (name, argument)


def test_outputs():
    assert fd.TopK._fields == ("ids", "logprobs", "log_tail", "temperature")
    assert fd.SelectedLogits._fields == ("logits", "lse_rest", "entropy", "lse")
    assert fd.DistillOutput._fields[:6] == (
        "loss",
        "per_token",
        "divergence",
        "teacher_mass",
        "student_mass",
        "lse",
    )
    assert fd.TokenScores._fields == (
        "lse",
        "entropy",
        "varentropy",
        "max_logprob",
        "argmax",
        "margin",
        "nll",
        "label_rank",
        "forward_kl",
        "teacher_mass",
        "student_mass",
        "hellinger",
        "acceptance_rate",
    )


def test_every_public_callable_says_what_it_takes():
    for name in SIGNATURES:
        doc = inspect.getdoc(getattr(fd, name))
        assert doc, name
        if name != "topk_distill_loss":  # which points at topk_distill
            assert "Returns:" in doc, name
            assert "Raises:" in doc, name


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_example_of_a_docstring_runs(name):
    names = {"torch": torch, **{n: getattr(fd, n) for n in SIGNATURES}}
    example = doctest.DocTestParser().get_doctest(
        present(inspect.getdoc(getattr(fd, name))), names, name, None, None
    )
    assert example.examples, "no example"
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0


def test_a_wrong_keyword_of_a_sparse_loss_is_a_type_error():
    functions: list[Any] = [fd.topk_distill_loss, fd.topk_distill]
    for function in functions:
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            function(None, None, None, temprature=2.0)
