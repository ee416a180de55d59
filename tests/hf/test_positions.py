"""How long a row may be, and whether padding is respected: measured, family by family."""

from __future__ import annotations

import pytest
import torch

from fastdistill.hf.positions import respects_padding, row_limit
from helpers.position_models import FAMILIES, WITHOUT_LIMIT, build
from helpers.present import present

IGNORES_MASKS = {"rwkv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_whether_generate_respects_padding(family, dtype):
    model = build(family, dtype)
    habits, training = model.generation_config, model.train().training
    assert respects_padding(model) == (family not in IGNORES_MASKS)
    assert model.generation_config is habits
    assert model.training == training


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_row(family):
    limit = row_limit("student", build(family))
    if family in WITHOUT_LIMIT:
        assert limit is None
        return
    assert limit is not None
    assert limit.tokens == 40
    limit.check(40, "train_dataset", 0)
    with pytest.raises(ValueError, match=r"train_dataset: expected rows of at most 40 .* got 41 "):
        limit.check(41, "train_dataset", 7)


def test_a_table_counts_and_not_what_the_configuration_says():
    model = build("opt")
    model.config.max_position_embeddings = 1000
    # Of 42 rows, two stand before the first position.
    assert present(row_limit("teacher", model)).tokens == 40


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}, 160),
        ({"rope_type": "linear", "factor": 2.0}, 80),
        ({"rope_type": "dynamic", "factor": 3.0}, 120),
        ({"rope_type": "default"}, 40),
    ],
)
def test_scaled_rotary_positions_reach_further(rope, tokens):
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **rope})
    assert present(row_limit("student", model)).tokens == tokens


def test_a_limit_that_is_known_to_be_wrong_is_set_in_the_configuration():
    model = build("llama")
    with pytest.raises(ValueError, match=r"set model\.config\.max_position_embeddings first"):
        present(row_limit("student", model)).check(100, "eval_dataset", 3)
    model.config.max_position_embeddings = 100
    present(row_limit("student", model)).check(100, "eval_dataset", 3)
