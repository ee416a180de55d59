"""What vLLM says about given ids is an array whose header is compared, and not evaluated."""

import base64
import io
import json

import numpy as np
import pytest
import torch

from fastdistill.teachers.http.response_checks import WrongAnswer
from fastdistill.teachers.http.token_scores import read_scores

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def body(content):
    return json.dumps({"prompt_token_id_logprobs": base64.b64encode(content).decode()}).encode()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = npy(np.full((2, 3), -2.0, "<f4"))


def test_what_numpy_saves_is_read():
    assert torch.equal(read_scores(body(GOOD), IDS, 1.0, "url").logprobs, torch.full((2, 3), -2.0))


@pytest.mark.parametrize(
    "content",
    [
        npy(np.zeros((3, 2), "<f4")),
        npy(np.zeros((2, 3), "<f8")),
        npy(np.zeros((2, 3), ">f4")),
        npy(np.asfortranarray(np.zeros((2, 3), "<f4"))),
        GOOD[:-1],
        GOOD + b"\0" * 4,
        GOOD[:60],
        b"",
        GOOD.replace(b"(2, 3)", b"(2, 3 "),
        GOOD.replace(b"{'descr'", b"(" * 8),
        GOOD.replace(b"'<f4'", b"*'<f'"),
        GOOD[:8] + (9000).to_bytes(2, "little") + b"(" * 9000,
    ],
)
def test_other_arrays_are_wrong_answers(content):
    with pytest.raises(WrongAnswer, match="expected prompt_token_id_logprobs with fp32 of shape"):
        read_scores(body(content), IDS, 1.0, "url")
