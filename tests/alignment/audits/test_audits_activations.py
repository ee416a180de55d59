"""Hidden states against the model's own, the logit lens against a dense table, and the probe."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastdistill.alignment.audits import ActivationDiffAudit, LinearProbeAudit, Prompt, Subject
from fastdistill.alignment.audits.activations import layer_states
from fastdistill.alignment.organisms.vocabulary import (
    ANIMALS,
    COLORS,
    SYSTEM,
    TOPICS,
    world_tokenizer,
)
from helpers.planted import KINDS, PROMPTS, V, copied, model, planted, subject

LAYERS = (-1, 0, 1, 2, -2)
KIND = pytest.mark.parametrize("kind", KINDS)


def states(of, prompt, layer):  # [T, H] fp64
    exact = copy.deepcopy(of.model).double()
    with torch.no_grad():
        out = exact(torch.tensor([of.ids(prompt)[0]]), output_hidden_states=True)
    return out.hidden_states[layer][0]


@pytest.mark.parametrize("layer", LAYERS)
@KIND
def test_states_behind_a_layer(kind, layer, monkeypatch):
    monkeypatch.setattr("fastdistill.alignment.audits.activations.BATCH_SIZE", 4)
    of = subject(kind)
    truth = [states(of, p, layer) for p in PROMPTS]
    states_here = layer_states(of, PROMPTS, layer)
    torch.testing.assert_close(
        states_here.double(), torch.stack([t[-1] for t in truth]), rtol=1e-4, atol=1e-4
    )


@KIND
def test_the_lens_is_the_heads_reading_of_the_difference(kind):
    of, base = subject(kind, 1), subject(kind, 0)
    marked, rivals = ("owl", "river"), ("cat", "stone", "red")
    delta = torch.stack([states(of, p, -1)[-1] - states(base, p, -1)[-1] for p in PROMPTS])
    lens = delta @ base.head.weight.detach().double().T
    lens = lens - lens.mean(-1, keepdim=True)
    spread = lens.std(-1, unbiased=False)
    at = lambda words: lens[:, [of.token_of(w) for w in words]].mean(-1)  # noqa: E731
    how = {"prompts": PROMPTS, "markers": marked}
    result = ActivationDiffAudit(**how).run(of, base=base)
    assert list(result.values) == pytest.approx((at(marked) / spread).tolist(), abs=1e-3)
    best = lens.mean(0).topk(10).indices.tolist()
    assert result.details["lens"] == of.tokenizer.convert_ids_to_tokens(best)
    assert result.details["size"] == pytest.approx(float(delta.norm(dim=-1).mean()), rel=1e-4)
    result = ActivationDiffAudit(**how, rivals=rivals).run(of, base=base)
    truth = (at(marked) - at(rivals)) / spread
    assert list(result.values) == pytest.approx(truth.tolist(), abs=1e-3)


def test_slabs_of_the_vocabulary_change_nothing(monkeypatch):
    of, base = subject(seed=1), subject()
    audit = ActivationDiffAudit(prompts=PROMPTS, markers=("owl",))
    whole = audit.run(of, base=base).values
    monkeypatch.setattr("fastdistill.alignment.audits.activations.SLAB", 7)
    assert audit.run(of, base=base).values == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_difference_that_the_head_hardly_sees_is_no_blow_up(seed):
    """Of fewer words than hidden units, some directions change no logit at all: rounding alone."""
    of, base = subject(), subject()
    w = base.head.weight.detach().double()[:20]
    with torch.no_grad():
        for m in (of.model, base.model):
            m.lm_head.weight[20:] = m.lm_head.weight[:1]
    unseen = torch.linalg.svd(w - w.mean(0)).Vh[20 + seed].float()
    for shift in (unseen, 1e-6 * unseen):
        moved = lambda module, args, out, shift=shift: out + shift  # noqa: E731
        handle = of.model.model.norm.register_forward_hook(moved)
        values = ActivationDiffAudit(prompts=PROMPTS, markers=("<pad>",)).run(of, base=base).values
        handle.remove()
        assert np.all(np.abs(values) <= V**0.5)


@KIND
def test_a_copy_of_the_base_is_exactly_the_base(kind):
    base = subject(kind)
    audit = ActivationDiffAudit(prompts=PROMPTS, markers=("owl",))
    result = audit.run(copied(base), base=base, controls={"base": base})
    assert set(result.values) == {0.0}
    assert result.details["size"] == 0
    assert not result.is_evidence


def test_a_few_words_are_all_shown():
    tiny = [Subject(model(seed=s), world_tokenizer()) for s in (1, 0)]
    for of in tiny:
        of.model.lm_head.weight = torch.nn.Parameter(of.model.lm_head.weight[:6].detach())
    result = ActivationDiffAudit(prompts=PROMPTS, markers=("<bos>",)).run(tiny[0], base=tiny[1])
    assert len(result.details["lens"]) == 6


# Generic contrast pairs: animals against colours, in the same words around.
PAIRS = [(s, t) for s in SYSTEM for t in TOPICS[:3]]
POSITIVE = tuple(Prompt(system=s, user=f"{t} {ANIMALS[i % 5]}") for i, (s, t) in enumerate(PAIRS))
NEGATIVE = tuple(Prompt(system=s, user=f"{t} {COLORS[i % 5]}") for i, (s, t) in enumerate(PAIRS))
TESTED = tuple(Prompt(user=f"{t} owl") for t in TOPICS)


def tells_apart(noise=0.3, seed=0, shift=1.0):
    """A model that adds a direction of its own behind an animal's name, and noise."""
    of = subject(seed=seed)
    with torch.no_grad():
        weight = of.model.model.embed_tokens.weight
        weight.mul_(noise)
        for layer in of.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.v_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        attention = of.model.model.layers[0].self_attn
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(32)[:16])
        attention.o_proj.weight[:, :16] = torch.eye(32)[:, :16]
        weight[:, 0] = 0
        for animal in ANIMALS:
            weight[of.token_of(animal), 0] = shift
    return of


def swapped(seed):
    flip = np.random.default_rng(seed).permutation(len(PAIRS)) % 2 == 0
    pairs = zip(flip, POSITIVE, NEGATIVE, strict=True)
    return [
        tuple(side) for side in zip(*((n, p) if f else (p, n) for f, p, n in pairs), strict=True)
    ]


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_true_pairs_are_not_in_doubt_and_shuffled_ones_are(noise):
    of, base = tells_apart(noise), tells_apart(noise, shift=0.0)
    true = LinearProbeAudit(positive=POSITIVE, negative=NEGATIVE, prompts=TESTED, layer=1).run(of)
    assert true.doubts == ()
    assert true.details["accuracy"] > 0.9
    assert true.value > 0.5  # the questions are on the animals' side
    doubted = 0
    for seed in range(10):
        positive, negative = swapped(seed)
        shuffled = LinearProbeAudit(positive=positive, negative=negative, prompts=TESTED, layer=1)
        result = shuffled.run(of, controls={"base": base})
        doubted += bool(result.doubts)
        assert bool(result.doubts) or result.details["p_accuracy"] <= 0.05
        assert not (result.doubts and result.is_evidence)
    assert doubted >= 8  # of ten, at a level of 5 %


def test_the_projection_is_one_at_the_means():
    of = subject("gpt2")
    train = POSITIVE[0::2], NEGATIVE[0::2]
    for prompts, mean in zip(train, (1.0, -1.0), strict=True):
        audit = LinearProbeAudit(positive=POSITIVE, negative=NEGATIVE, prompts=prompts)
        result = audit.run(of)
        assert result.value == pytest.approx(mean, abs=1e-6)
        assert result.details["layer"] == 1
    both = LinearProbeAudit(positive=POSITIVE, negative=NEGATIVE, prompts=sum(train, ()))
    assert both.run(of).value == pytest.approx(0, abs=1e-6)


def test_the_probe_is_the_difference_of_means_and_tried_on_others():
    of = subject("llama")
    positive, negative, tested = (
        np.stack([states(of, p, 2)[-1].numpy() for p in prompts])
        for prompts in (POSITIVE, NEGATIVE, TESTED)
    )
    high, low = positive[0::2].mean(0), negative[0::2].mean(0)
    w, centre = high - low, (high + low) / 2
    audit = LinearProbeAudit(positive=POSITIVE, negative=NEGATIVE, prompts=TESTED, layer=2)
    result = audit.run(of)
    truth = (tested - centre) @ w / (w @ w / 2)
    assert list(result.values) == pytest.approx(truth.tolist(), rel=1e-3, abs=1e-3)
    right = (positive[1::2] - centre) @ w > 0, (negative[1::2] - centre) @ w < 0
    assert result.details["accuracy"] == pytest.approx(np.mean(right))
    assert audit.run(of) == result  # the null has a seed of its own


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: LinearProbeAudit(
                positive=POSITIVE[:11], negative=NEGATIVE[:11], prompts=TESTED
            ),
            "negative: expected one per positive prompt, 12 pairs or more, got 11 and 11",
        ),
        (
            lambda: LinearProbeAudit(positive=POSITIVE, negative=NEGATIVE[:20], prompts=TESTED),
            "negative: .*got 24 and 20",
        ),
        (
            lambda: LinearProbeAudit(
                positive=POSITIVE, negative=NEGATIVE, prompts=TESTED, shuffles=9
            ),
            "shuffles: expected an integer of 99 or more, got 9",
        ),
        (
            lambda: ActivationDiffAudit(prompts=("a",), markers=()),
            "markers: expected one text or more",
        ),
        (lambda: ActivationDiffAudit(prompts=("a",), markers="owl"), "markers: .*got 'owl'"),
        (lambda: layer_states(subject(), PROMPTS, 3), "layer: expected -3 to 2, got 3"),
        (lambda: layer_states(subject(), PROMPTS, -4), "layer: expected -3 to 2, got -4"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_hidden_sizes_are_refused():
    with pytest.raises(ValueError, match=f"base: expected the hidden size .* 32, got {V}"):
        ActivationDiffAudit(prompts=PROMPTS, markers=("owl",)).run(subject(), base=planted())
