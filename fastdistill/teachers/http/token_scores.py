"""vLLM's log-probabilities of given tokens: POST /inference/v1/generate, from vLLM 0.32.

The server needs --enable-scale-out. prompt_logprob_token_ids [[id, …], …] has a row for every token
of the prompt except the last, and −1 in empty slots. prompt_token_id_logprobs of the answer is a
.npy file in base64, in fp32 and of the same shape. The server ignores the temperature.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.token_loss import first_slots
from ...losses.types import TopK
from ...runtime.json_text import JSONError, parse_json
from ...runtime.printable import printable
from .response_checks import WrongAnswer

_HEADER = re.compile(
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \(([\d, ]{1,100})\), \} *\n"
)
_FLOOR = 2.0**-24  # of the tail's probability


def scores_request(row: list[int], ids: Tensor) -> dict[str, Any]:  # [T, K]
    """Return the request for the log-probabilities of ids after each token of a row."""
    sampling = {
        "temperature": 0.0,  # of the new token, which is ignored
        "max_tokens": 1,
        "detokenize": False,
        "prompt_logprob_token_ids": ids.tolist(),
    }
    # The appended token does not affect the answers, so any token will do.
    return {"token_ids": [*row, row[-1]], "sampling_params": sampling}


def read_scores(body: bytes, ids: Tensor, temperature: float, url: str) -> TopK:  # [T, K]
    """Return the answers at ids; repeated ids become empty slots, and the tail is 1 − Σ p."""
    try:
        text = parse_json(body, url, dict)["prompt_token_id_logprobs"]
        array = _array(base64.b64decode(text, validate=True), tuple(ids.shape))
    except (JSONError, KeyError, TypeError, ValueError) as error:
        raise WrongAnswer(
            f"{url}: expected prompt_token_id_logprobs with fp32 of shape {[*ids.shape]}, got "
            f"{printable(body[:80])} ({printable(error, 80)})"
        ) from None
    empty = ~first_slots(ids)
    logprobs = torch.from_numpy(array).masked_fill(empty, -torch.inf)
    listed = logprobs.double().exp().sum(-1)
    tail = torch.log1p(-listed.clamp(max=1 - _FLOOR)).float()
    return TopK(ids.masked_fill(empty, -1), logprobs, tail, temperature)


def _array(content: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the array of a .npy file of version 1.0, as numpy.save writes one.

    The header is a Python literal. It is compared with the expected one, and not evaluated."""
    size = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + size], content[10 + size :]
    if content[:8] != b"\x93NUMPY\x01\x00" or not (match := _HEADER.fullmatch(header)):
        raise ValueError("no .npy file of little-endian fp32")
    if [int(n) for n in match[1].replace(b",", b" ").split()] != [*shape]:
        raise ValueError(f"shape {match[1].decode()}")
    return np.frombuffer(data, "<f4").reshape(shape).copy()
