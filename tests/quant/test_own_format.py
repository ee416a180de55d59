"""Our own checkpoint format: what is written is read, and what does not fit is refused."""

import shutil

import pytest
import torch

from fastdistill.quant.formats import own_format
from fastdistill.quant.formats.detect import (
    CheckpointError,
    is_quantized_checkpoint,
    open_checkpoint,
)
from fastdistill.quant.schemes import Int8Weight, Lut4Weight, quantize
from helpers.stored import W, int4, nested_weight, read_all, store_own


def test_own_format_is_read_as_it_was_written(tmp_path):
    weights = {
        W: int4(perm=torch.randperm(32)),
        "a.weight": int4(),
        "b.weight": quantize(torch.randn(3, 7), "nf4"),
        "c.weight": quantize(torch.randn(5, 12), "int8"),
        "d.weight": nested_weight(tmp_path / "nested"),
    }
    path = store_own(tmp_path / "own", weights)
    checkpoint = open_checkpoint(path)
    assert checkpoint.method == "fastdistill"
    assert set(checkpoint.weights) == set(weights)
    assert is_quantized_checkpoint(path)
    for name, weight in weights.items():
        again = checkpoint.weights[name]()
        assert type(again) is type(weight)
        assert isinstance(again, (Lut4Weight, Int8Weight))
        assert isinstance(weight, (Lut4Weight, Int8Weight))
        assert (again.shape, again.block) == (weight.shape, weight.block)
        (ours, says), (theirs, wrote) = (own_format.tensors_of(name, w) for w in (again, weight))
        assert says == wrote
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
    shutil.move(path / "config.json", path / "other.json")
    assert open_checkpoint(path / "model.safetensors").method == "fastdistill"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(shape=[8, 30]), "qdata: expected 120 values"),
        (dict(shape=[8]), "two positive integers"),
        (dict(shape=[1, 1 << 39]), "qdata: expected"),
        (dict(block=0), "block: expected 1 to .*, got 0"),
        (dict(block=8), "scale: expected 32 values"),
        (dict(format="lut5"), "expected 'lut4' or 'int8', got 'lut5'"),
        (dict(format="int8"), r"qdata: expected \[8, 32\]"),
        (dict(nested_block=256), r"scale.codes'.*incomplete"),
        (dict(version=2), "version: expected at most 1, got 2.*pip install -U fastdistill"),
        (dict(version="1"), "version: expected an integer"),
    ],
)
def test_own_metadata_that_does_not_fit(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_all(store_own(tmp_path, {W: int4(perm=torch.arange(32))}, **changes))


def test_a_perm_that_is_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="perm: expected each of 0 to 31 once"):
        read_all(store_own(tmp_path, {W: int4(perm=torch.zeros(32, dtype=torch.int64))}))
