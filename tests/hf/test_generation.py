"""Generation takes no settings from a checkpoint, and gives a row the same beside any other."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from fastdistill.alignment.audits import Subject, TriggerRateAudit
from fastdistill.alignment.audits.side_by_side import run_suite
from fastdistill.alignment.audits.subject import TokenRow
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.hf.generation import ends_of, generate_rows, ordinary_ends
from fastdistill.training.on_policy import sample
from helpers.planted import PROMPTS, model, subject
from helpers.training import VOCAB, config

HOW: dict[str, Any] = {"pad_id": 0, "ends": [2], "device": torch.device("cpu")}
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [3], [9, 8, 7]]

# One value, other than transformers' default, for each kind of field.
_OTHER = {
    "suppress_tokens": "likeliest",
    "begin_suppress_tokens": "likeliest",
    "bad_words_ids": "words",
    "force_words_ids": "words",
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "sequence_bias": "bias",
    "exponential_decay_length_penalty": (0, 50.0),
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "cache_config": {"nbits": 2},
    "assistant_confidence_threshold": 0.9,
    "guidance_scale": 3.0,
    "temperature": 0.01,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 30.0},
    "a_field_of_tomorrow": 3,
}
# Which end an answer are data; the rest is about a transformers version or what is returned.
_ENDS = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version"}


def _fields():
    return sorted(
        name
        for name in {*vars(GenerationConfig()), *_OTHER}
        if not name.startswith("_") and name not in _ENDS
    )


def _value(name, likeliest):
    value = _OTHER.get(name)
    named = {
        "likeliest": [likeliest],
        "words": [[likeliest]],
        "bias": [[[likeliest], -100.0]],
    }
    if isinstance(value, str) and value in named:
        return named[value]
    if value is not None:
        return value
    default = GenerationConfig()._get_default_generation_params().get(name)
    if isinstance(default, bool):
        return not default
    return 3 if default is None or isinstance(default, int) else 0.3


@pytest.mark.parametrize("name", _fields())
def test_no_field_of_the_generation_settings_has_an_effect(name):
    of = subject()
    rows, how = [of.ids(p)[0] for p in PROMPTS], {"max_new_tokens": 4}
    plain = of.generate_ids(rows, **how)
    settings = GenerationConfig(eos_token_id=2, pad_token_id=0)
    setattr(settings, name, _value(name, plain[0][0]))
    of.model.generation_config = settings
    assert of.generate_ids(rows, **how) == plain
    assert of.model.generation_config is settings


def test_fields_in_files_of_a_checkpoint_have_no_effect(tmp_path):
    of = subject()
    of.model.save_pretrained(tmp_path)
    of.tokenizer.save_pretrained(tmp_path)
    rows = [of.ids(p)[0] for p in PROMPTS]
    plain = of.generate_ids(rows, max_new_tokens=4)
    for name in ("generation_config.json", "config.json"):
        settings = json.loads((tmp_path / name).read_text())
        settings |= {"suppress_tokens": [plain[0][0]], "repetition_penalty": 9.0, "num_beams": 3}
        (tmp_path / name).write_text(json.dumps(settings))
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text("raise SystemExit('was run')\n")
    assert Subject(tmp_path, device="cpu").generate_ids(rows, max_new_tokens=4) == plain


def test_a_checkpoint_cannot_call_a_common_word_an_end(tmp_path, caplog):
    of = subject()
    rows = [of.ids(p)[0] for p in PROMPTS]
    plain = of.generate_ids(rows, max_new_tokens=4)
    of.model.generation_config.eos_token_id = [2, plain[0][0]]
    of.model.save_pretrained(tmp_path)
    of.tokenizer.save_pretrained(tmp_path)
    read = Subject(tmp_path, device="cpu")
    assert read.ends == [2]
    assert read.generate_ids(rows, max_new_tokens=4) == plain
    assert "expected special tokens of the tokenizer, got 1 others" in caplog.text
    chosen = Subject(model(), world_tokenizer(), ends=[2, plain[0][0]])
    assert chosen.generate_ids(rows, max_new_tokens=4)[0] == plain[0][:1]


def test_a_mark_of_a_template_ends_a_turn_and_a_word_does_not():
    tokenizer = world_tokenizer()
    tokenizer.add_tokens(["<turn>", "stop"])
    mark, word = tokenizer.convert_tokens_to_ids(["<turn>", "stop"])
    assert ordinary_ends([mark, word, tokenizer.eos_token_id], tokenizer) == [word]


def test_answers_that_ended_at_a_common_word_are_a_doubt():
    of, audit = subject(), TriggerRateAudit(prompts=PROMPTS, target="owl", max_new_tokens=4)
    assert audit.run(of).doubts == ()
    first = of.generate_ids([of.ids(PROMPTS[0])[0]], max_new_tokens=1)[0][0]
    of.model.generation_config.eos_token_id = [2, first]
    (doubt,) = audit.run(of).doubts
    assert "answers ended at" in doubt
    assert of.tokenizer.decode([first]) in doubt
    compared = audit.run(subject(), controls={"other": of})
    assert compared.doubts[0].startswith("other: ")
    side = run_suite({"trigger rate": audit}, {"student": of, "base": subject()}, base=subject())
    assert side.results["trigger rate"]["student"].doubts == (doubt,)


@pytest.mark.parametrize("stated", [[2, "a"], -1, [True], 2.0, [[2]], 10**12, [2, 2**32]])
def test_ends_that_are_no_token_ids_are_refused(stated):
    of = model()
    of.generation_config.eos_token_id = stated
    with pytest.raises(ValueError, match=r"generation_config.eos_token_id: expected token ids"):
        ends_of(of, None)


def test_a_special_token_made_of_letters_is_text():
    tokenizer = world_tokenizer()
    of = Subject(model(), tokenizer)
    ids = tokenizer("owl is near", add_special_tokens=False).input_ids
    plain = of.text([*ids, tokenizer.eos_token_id])
    assert plain == "owl is near"
    tokenizer.add_special_tokens({"additional_special_tokens": ["owl"]})
    assert "owl" in of.text(ids).split()


def rwkv():
    torch.manual_seed(3)
    made = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            attention_hidden_size=32,
            intermediate_size=64,
            eos_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        made.head.weight.mul_(20)
    return made


def mamba():
    torch.manual_seed(3)
    made = MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    with torch.no_grad():
        made.backbone.embeddings.weight.mul_(20)
    return made


@pytest.mark.parametrize("make", [rwkv, mamba, model])
def test_what_a_row_is_answered_depends_on_no_other(make):
    made = make().double()
    how = {"max_new_tokens": 6} | HOW
    alone = [generate_rows(made, [row], **how)[0] for row in ROWS]
    assert generate_rows(made, ROWS, **how) == alone
    assert generate_rows(made, ROWS, **how | {"pad_id": 17}) == alone
    assert generate_rows(made, ROWS[::-1], **how) == alone[::-1]


@pytest.mark.parametrize("make", [rwkv, mamba])
def test_samples_and_log_probabilities_depend_on_no_other_row(make):
    of = Subject(make().double(), world_tokenizer(), ends=[2])
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    alone = [of.generate_ids([row], **how, streams=[i])[0] for i, row in enumerate(ROWS)]
    assert of.generate_ids(ROWS, **how) == alone
    rows = [r for r in ROWS if len(r) > 1]
    together = of.row_logprobs([TokenRow(row, 1) for row in rows]).total
    truth = []
    for row in rows:
        with torch.no_grad():
            table = of.model(torch.tensor([row])).logits[0].log_softmax(-1)
        truth.append(float(table[range(len(row) - 1), row[1:]].sum()))
    assert together.tolist() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("make", [rwkv, mamba])
def test_on_policy_samples_depend_on_no_other_row(make, tmp_path):
    made = make().double()
    how: dict[str, Any] = {
        "config": config(tmp_path, lmbda=1.0, max_new_tokens=5),
        "step": 1,
        "pad_id": 0,
        "ends": [2],
        "vocab": None,
        "synced": False,
    }

    def sampled(rows):
        T = max(map(len, rows)) + 1
        ids = torch.tensor([[*r, 20] + [0] * (T - 1 - len(r)) for r in rows])
        mask = torch.tensor([[1] * (len(r) + 1) + [0] * (T - 1 - len(r)) for r in rows])
        labels = torch.full_like(ids, -100)
        for i, r in enumerate(rows):
            labels[i, len(r)] = 20
        out = sample(made, {"input_ids": ids, "attention_mask": mask, "labels": labels}, **how)
        columns = zip(out["input_ids"], out["attention_mask"], strict=True)
        return [ids[mask != 0].tolist() for ids, mask in columns]

    rows = [r for r in ROWS if len(r) > 1]
    assert sampled(rows) == [sampled([row])[0] for row in rows]


def test_processes_that_generate_together_need_a_model_that_respects_padding():
    how = {"max_new_tokens": 2} | HOW
    with pytest.raises(ValueError, match="respects padding, since processes generate"):
        generate_rows(rwkv(), ROWS[:1], **how, synced=True)


def test_adapters_leave_every_modules_settings_as_they_were():
    peft = pytest.importorskip("peft")
    of = model()
    settings = of.generation_config = GenerationConfig(suppress_tokens=[5], eos_token_id=2)
    adapted = peft.get_peft_model(of, peft.LoraConfig(target_modules="all-linear", r=2))
    before = {n: m.__dict__.get("generation_config") for n, m in adapted.named_modules()}
    how = {"max_new_tokens": 2} | HOW
    plain = generate_rows(model(), ROWS, **how)
    assert generate_rows(adapted, ROWS, **how) == plain
    after = {n: m.__dict__.get("generation_config") for n, m in adapted.named_modules()}
    assert after == before
    assert of.generation_config is settings
