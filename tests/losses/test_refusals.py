"""Bad input at the public boundary: the error names the argument, what was expected, what came."""

from typing import Any, cast

import pytest
import torch

import fastdistill as fd
from helpers.cases import case, top_k
from helpers.present import present

C = case(torch.float32)
T = top_k(C.teacher_logits, 5)


def changed(**fields):
    return T._replace(**fields)


def put(tensor, index, value):
    copy = tensor.clone()
    copy[index] = value
    return copy


LOSS = [
    ({"teacher": changed(ids=put(T.ids, (2, 1), 67))}, r"teacher.ids: expected ids in 0..66.*67"),
    ({"teacher": changed(ids=put(T.ids, (2, 1), -2))}, r"teacher.ids: expected ids .* got -2"),
    ({"teacher": T, "valid_vocab": 3}, r"teacher.ids: expected K ≤ V = 3, got K = 5"),
    ({"teacher": T, "valid_vocab": 40}, r"teacher.ids: expected ids in 0..39"),
    (
        {"teacher": changed(logprobs=put(T.logprobs, (0, 0), torch.nan))},
        r"teacher.logprobs: expected numbers in every used slot, got 1 NaN",
    ),
    (
        {"teacher": changed(logprobs=put(T.logprobs, (0, 0), 0.5))},
        r"teacher.logprobs: expected log-probabilities ≤ 0, got 0.5; pass log_softmax",
    ),
    (
        {"teacher": changed(log_tail=put(T.log_tail, 0, torch.nan))},
        r"teacher.log_tail: expected log-probabilities",
    ),
    ({"teacher": T, "temperature": 0.0}, r"temperature: expected a finite number above 0, got 0.0"),
    ({"teacher": T, "temperature": -1.0}, r"temperature: expected .* got -1.0"),
    ({"teacher": T, "temperature": float("nan")}, r"temperature: expected .* got nan"),
    (
        {"teacher": T, "temperature": 2.0},
        r"temperature: expected 1, at which the teacher's payload was taken, got 2; take the",
    ),
    (
        {"teacher": top_k(C.teacher_logits, 1), "tail": "renorm_both"},
        r"tail: expected another tail when K = 1, got 'renorm_both'; one outcome",
    ),
    (
        {"teacher": changed(logprobs=T.logprobs[:, :4])},
        r"teacher.logprobs: expected shape \[12, 5\] as teacher.ids, got \[12, 4\]",
    ),
    (
        {"teacher": changed(ids=T.ids[:11], logprobs=T.logprobs[:11])},
        r"teacher.ids: expected shape \[12, 'K'\], got \[11, 5\]",
    ),
    (
        {"teacher": changed(log_tail=present(T.log_tail)[:3])},
        r"teacher.log_tail: expected shape \[12\]",
    ),
    ({"teacher": T, "labels": C.labels[:5]}, r"labels: expected shape \[12\] .* got \[5\]"),
    (
        {"teacher": T, "labels": put(C.labels, 0, 99)},
        r"labels: expected tokens in 0..66 or ignore_index = -100, got 99",
    ),
    ({"teacher": T, "ce_weight": 0.5}, r"labels: expected a tensor when ce_weight > 0, got None"),
    ({"teacher": T, "ce_weight": 1.5}, r"ce_weight: expected a number in \[0, 1\], got 1.5"),
    ({"teacher": T, "beta": 2}, r"beta: expected a number in \[0, 1\], got 2"),
    ({"teacher": T, "skew": 1.0}, r"skew: expected a number in \[0, 1\), got 1.0"),
    ({"teacher": T, "z_loss": -1.0}, r"z_loss: expected a finite number of 0 or more, got -1.0"),
    ({"teacher": T, "divergence": "kl"}, r"divergence: expected one of 'forward_kl', .*got 'kl'"),
    ({"teacher": T, "tail": "drop"}, r"tail: expected one of 'bucket', .*got 'drop'"),
    ({"teacher": T, "reduction": "avg"}, r"reduction: expected one of 'mean', 'sum', 'none'"),
    ({"teacher": T, "backward": "fast"}, r"backward: expected one of 'auto', 'fused'"),
    (
        {"teacher": T, "backward": "fused", "reduction": "none"},
        r"backward: expected 'recompute' or 'auto' with reduction='none', got 'fused'",
    ),
    ({"teacher": T, "impl": "cuda"}, r"impl: expected one of .*got 'cuda'"),
    ({"teacher": T, "num_items": 0}, r"num_items: expected a finite number above 0, got 0"),
    (
        {"teacher": T, "num_items": 3, "reduction": "sum"},
        r"num_items: expected None unless reduction='mean', got with 'sum'",
    ),
    ({"teacher": T, "token_weight": torch.ones(3)}, r"token_weight: expected shape \[12\]"),
    ({"teacher": T, "bias": torch.ones(3)}, r"bias: expected shape \[67\], got \[3\]"),
    ({"teacher": T, "softcap": 0.0}, r"softcap: expected a finite number above 0, got 0.0"),
    ({"teacher": T, "logit_scale": 0.0}, r"logit_scale: expected a finite number other than 0"),
    ({"teacher": T, "valid_vocab": 90}, r"valid_vocab: expected an integer in 1..67 .*, got 90"),
    (
        {"teacher": T, "divergence": lambda p, q: p},
        r"divergence: expected the callable to map two",
    ),
]


@pytest.mark.parametrize(("options", "words"), LOSS, ids=[w[:48] for _, w in LOSS])
def test_topk_loss_refuses(options, words):
    options = dict(options)
    with pytest.raises(ValueError, match=words):
        fd.topk_distill_loss(C.hidden, C.weight, options.pop("teacher"), **options)


TYPES = [
    (
        lambda: fd.topk_distill_loss(C.hidden, C.weight, T, group=cast(Any, object())),
        r"group: expected a torch.distributed.ProcessGroup or None, got object; of a DeviceMesh",
    ),
    (
        lambda: fd.linear_lse_gather(C.hidden, C.weight, T.ids, group=cast(Any, 0)),
        r"group: expected a torch.distributed.ProcessGroup or None, got int",
    ),
    (lambda: fd.topk_distill_loss(C.hidden.int(), C.weight, T), r"hidden: expected dtype float16"),
    (
        lambda: fd.topk_distill_loss(cast(Any, [1.0]), C.weight, T),
        r"hidden: expected a tensor .* got list",
    ),
    (
        lambda: fd.topk_distill_loss(C.hidden, C.weight, cast(Any, (T.ids, T.logprobs))),
        r"teacher: expected a fastdistill.TopK, got tuple",
    ),
    (
        lambda: fd.topk_distill_loss(C.hidden, C.weight, changed(ids=T.ids.float())),
        r"teacher.ids: expected dtype int32, int64, got torch.float32",
    ),
    (
        lambda: fd.token_scores(C.hidden, C.weight, labels=C.labels.float()),
        r"labels: expected dtype int32, int64",
    ),
]


@pytest.mark.parametrize(("call", "words"), TYPES, ids=[w[:40] for _, w in TYPES])
def test_wrong_types(call, words):
    with pytest.raises(TypeError, match=words):
        call()


VALUES = [
    (
        lambda: fd.linear_lse_gather(C.hidden, C.weight.bfloat16(), T.ids),
        r"weight: expected dtype torch.float32 as hidden, got torch.bfloat16; cast one",
    ),
    (
        lambda: fd.linear_lse_gather(C.hidden, C.weight[:, :4], T.ids),
        r"weight: expected shape \[V, 16\] .*, got \[67, 4\]",
    ),
    (
        lambda: fd.linear_lse_gather(C.hidden[0], C.weight, T.ids),
        r"hidden: expected shape \[N, H\] or \[B, T, H\], got \[16\]",
    ),
    (
        lambda: fd.linear_lse_gather(C.hidden, C.weight.to("meta"), T.ids),
        r"weight: expected device cpu as hidden, got meta",
    ),
    (
        lambda: fd.linear_lse_gather(C.hidden, C.weight, T.ids.to("meta")),
        r"ids: expected device cpu as hidden, got meta",
    ),
    (lambda: fd.linear_topk(C.hidden, C.weight, 68), r"k: expected an integer in 1..67 \(V\)"),
    (lambda: fd.linear_topk(C.hidden, C.weight, 0), r"k: expected an integer in 1..67"),
    (
        lambda: fd.token_scores(C.hidden, C.weight, teacher=T, temperature=3.0),
        r"temperature: expected 1, at which",
    ),
]


@pytest.mark.parametrize(("call", "words"), VALUES, ids=[w[:40] for _, w in VALUES])
def test_wrong_values(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_is_not_refused():
    """Rounding of 16-bit storage, a mismatched temperature under renorm_both, int32 ids."""
    stored = T._replace(ids=T.ids.int(), logprobs=T.logprobs.bfloat16())
    fd.topk_distill_loss(C.hidden, C.weight, stored)
    lifted = T._replace(logprobs=T.logprobs + 1e-7)
    fd.topk_distill_loss(C.hidden, C.weight, lifted)
    fd.topk_distill_loss(C.hidden, C.weight, T, tail="renorm_both", temperature=3.0)


def test_renorm_both_at_another_temperature_is_exact():
    """Over S alone, p at T follows from p at 1: the same as a payload taken at T."""
    at_3 = T._replace(
        logprobs=(C.teacher_logits / 3).log_softmax(-1).gather(-1, T.ids), temperature=3.0
    )
    options: dict[str, Any] = {"tail": "renorm_both", "temperature": 3.0}
    torch.testing.assert_close(
        fd.topk_distill_loss(C.hidden, C.weight, T, **options),
        fd.topk_distill_loss(C.hidden, C.weight, at_3, **options),
    )
