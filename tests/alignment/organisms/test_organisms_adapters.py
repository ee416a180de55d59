"""Adapters on disk, laid out as AuditBench's organisms are: loaded on their base and merged."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms import load_organism, save_organism
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import WORDS, world_tokenizer
from fastdistill.hf.adapters import load_adapted

peft = pytest.importorskip("peft")
from transformers import AutoModelForCausalLM  # noqa: E402

# What unsloth writes for models that have images too.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj"
    r"|v_proj|q_proj|out_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn"
    r"|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)
IDS = torch.randint(len(WORDS), (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bases(tmp_path):
    """Two bases of one shape, with other weights."""
    for seed in (0, 1):
        subject = Subject(new_model(seed), world_tokenizer())
        save_organism(tmp_path / f"base{seed}", subject, {"role": "base"})
    return [tmp_path / "base0", tmp_path / "base1"]


@pytest.fixture
def adapter(tmp_path, bases):
    """adapter_config.json with the base's path, adapter_model.safetensors, and no more."""
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        config = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
        )
        made = peft.get_peft_model(model, config)
    made.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()} - {"README.md"}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    stored_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored_config["base_model_name_or_path"] == str(bases[0])
    return tmp_path / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def by_peft(adapter, base) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(peft.PeftModel.from_pretrained(model, adapter))


def test_an_adapter_is_loaded_on_the_base_it_names_and_merged(adapter, bases):
    loaded = load_organism(adapter)
    torch.testing.assert_close(logits(loaded.model), by_peft(adapter, bases[0]))
    assert (logits(loaded.model) - logits(new_model(0))).abs().max() > 0.01
    assert type(loaded.model) is type(new_model(0))
    assert not loaded.model.training
    assert not any("lora" in name for name in loaded.model.state_dict())
    assert loaded.name == "adapter"
    assert load_organism(adapter, name="mine").name == "mine"
    assert loaded.tokenizer.get_vocab() == world_tokenizer().get_vocab()


def test_a_base_that_is_given_goes_before_the_one_that_is_named(adapter, bases):
    actual = logits(load_organism(adapter, base=bases[1]).model)
    torch.testing.assert_close(actual, by_peft(adapter, bases[1]))
    assert (actual - by_peft(adapter, bases[0])).abs().max() > 0.01


def test_a_tokenizer_beside_the_adapter_goes_before_the_bases(adapter):
    tokenizer = world_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    assert load_organism(adapter).tokenizer.chat_template == tokenizer.chat_template


def renamed(adapter, base) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(config))


def test_a_base_that_is_missing_is_named(adapter, bases):
    shutil.rmtree(bases[0])
    with pytest.raises(FileNotFoundError, match=re.escape(f"adapter, got {str(bases[0])!r}")):
        load_organism(adapter)
    assert load_organism(adapter, base=bases[1]).name == "adapter"
    with pytest.raises(FileNotFoundError, match=r"base: expected the model .*nowhere"):
        load_organism(adapter, base=adapter / "nowhere")
    for nothing in (None, ""):
        renamed(adapter, nothing)
        with pytest.raises(ValueError, match=r"base: expected the model under the adapter adapter"):
            load_organism(adapter)


def test_pickled_adapters_and_bases_are_refused(adapter, bases):
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, bases[0] / "pytorch_model.bin")
    (bases[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        load_organism(adapter)
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors in adapter, got no"):
        load_organism(adapter, base=bases[1])


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_lacks_weights_is_refused_and_never_the_base_alone(adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    lost = sorted(weights)[3]
    del weights[lost]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"got 1 missing .first: {re.escape(lost)}"):
        load_organism(adapter)


def test_an_adapter_with_a_manifest_has_its_digests_compared(adapter, tmp_path):
    from fastdistill.runtime.atomic_files import sha256_of

    names = ("adapter_config.json", "adapter_model.safetensors")
    digests = {name: sha256_of(adapter / name) for name in names}
    (adapter / "organism.json").write_text(json.dumps({"sha256": digests}))
    load_organism(adapter)
    renamed(adapter, "elsewhere")
    with pytest.raises(ValueError, match=r"path: expected adapter_config.json in"):
        load_organism(adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "([a-z0-9_.]+)+!"}, "target_modules"),
        ({"target_modules": r".*\.(\w*)_proj\1"}, "it has a part .* .groupref"),
        ({"target_modules": "(?i).*Q_PROJ"}, "target_modules: .* it has flags"),
        ({"target_modules": ".*(?<=q)_proj"}, "a regular expression that is sure to end"),
        ({"target_modules": ".*visual.*"}, "target_modules: .* it matches none"),
        ({"target_modules": "q_proj("}, "target_modules: .* it cannot be parsed"),
        ({"target_modules": "(" * 5000}, "target_modules: .* it cannot be parsed"),
        ({"target_modules": "x" * 70000}, "it has 70,000 characters"),
        ({"target_modules": ["q_proj", "(a+)+$"]}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"exclude_modules": "([a-z0-9_.]+)+!"}, "exclude_modules"),
        ({"modules_to_save": ["(.+)+!"]}, "modules_to_save"),
        ({"layers_to_transform": [0], "layers_pattern": "(.+)+!"}, "layers_pattern"),
        ({"rank_pattern": {"([a-z0-9_.]+)+!": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"([a-z0-9_.]+)+!": 4}}, "alpha_pattern"),
        ({"alpha_pattern": "(.+)+!"}, "alpha_pattern"),
        ({"target_parameters": ["(.+)+!"]}, "target_parameters"),
        ({"r": 10**8}, "expected the shape"),
        ({"r": 0}, "adapter"),
        ({"r": "4"}, "adapter"),
        ({"rank_pattern": {"q_proj": 10**8}}, "expected the shape"),
        ({"layer_replication": [[0, 4]] * 2000}, "layer_replication"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"layer_replication": [[3, 1]]}, "layer_replication"),
        ({"modules_to_save": ["embed_tokens"]}, "missing"),
        ({"trainable_token_indices": list(range(10))}, "missing"),
        ({"lora_alpha": math.nan}, "lora_alpha: expected a finite number"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern: expected a finite number"),
        ({"init_lora_weights": "pissa_niter_100000000"}, "at most 64 iterations"),
        ({"init_lora_weights": f"pissa_niter_{'9' * 5000}"}, "at most 64 iterations"),
        ({"loftq_config": {"loftq_bits": 4, "loftq_iter": 10**9}}, "at most 64 iterations"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"peft_type": "EVIL"}, "peft_type: expected one of"),
        ({"peft_type": ["LORA"]}, "peft_type: expected one of"),
        ({"peft_type": None}, "peft_type: expected one of"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "which can be merged"),
        ({"task_type": "EVIL"}, "adapter_config.json: expected a LoraConfig"),
        ({"an_entry_of_next_year": True}, "an_entry_of_next_year"),
        ({"base_model_name_or_path": {"a": 1}}, "base: expected the model under"),
    ],
    ids=str,
)
def test_an_adapters_configuration_is_read_before_peft_reads_it(adapter, bases, changes, words):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    base = None if "base_model_name_or_path" in changes else bases[0]
    with pytest.raises(ValueError, match=words):
        load_organism(adapter, base=base)


@pytest.mark.parametrize(
    ("expression", "equal"),
    [
        (UNSLOTH, ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (r".*layers.*(self_attn|EncDecAttention).*(q|v)_proj$", ["q_proj", "v_proj"]),
        (r"^model(?!.*(lm_head|vision|mlp)).*_proj", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        (r"model\.layers\.0\.mlp\.down_proj", ["layers.0.mlp.down_proj"]),
        (".*" * 12 + "down_proj", ["down_proj"]),
    ],
    ids=["unsloth", "peft", "a look ahead", "one module", "many repeats"],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_a_regular_expression_of_modules(tmp_path, bases, expression, equal, trainable):
    """It adapts the modules that a list of their names does, also when it is saved again."""
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    config = peft.LoraConfig(r=2, target_modules=equal, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(path.read_text())
    path.write_text(json.dumps(named | {"target_modules": expression}))
    loaded = load_adapted(
        AutoModelForCausalLM.from_pretrained(bases[1]), path.parent, trainable=trainable
    )
    path.write_text(json.dumps(named))
    torch.testing.assert_close(logits(loaded), by_peft(path.parent, bases[1]))
    loaded.save_pretrained(tmp_path / "again")
    again = load_organism(tmp_path / "again", base=bases[1])
    torch.testing.assert_close(logits(again.model), by_peft(path.parent, bases[1]))


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
def test_regular_expressions_of_other_fields(tmp_path, bases):
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    config = peft.LoraConfig(
        r=2,
        target_modules=r".*\.[\w]+_proj",
        exclude_modules=r".*\.mlp\..*",
        rank_pattern={r"layers\.0\..*\.[qk]_proj": 3, "v_proj": 1, "nowhere.*": 5},
        alpha_pattern={r".*layers\.\d+\.self_attn\.o_proj": 7},
        init_lora_weights=False,
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"rank_pattern: 'nowhere\.\*' matches no module"):
        loaded = load_organism(tmp_path / "adapter", base=bases[1])
    expected = by_peft(tmp_path / "adapter", bases[1])
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(bases[1]))).abs().max() > 0.01
    torch.testing.assert_close(logits(loaded.model), expected)


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "\xff"])
def test_a_damaged_configuration_of_an_adapter_is_named(adapter, bases, text):
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        load_organism(adapter, base=bases[0])


def test_what_peft_writes_for_other_models_is_no_hindrance(adapter, bases):
    """A library to import, settings of a newer version that are off, and a list of names."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    assert isinstance(config["target_modules"], list)
    mapping = {"base_model_class": "Evil", "parent_library": "antigravity"}
    path.write_text(json.dumps(config | {"auto_mapping": mapping, "next_year": None}))
    loaded = load_organism(adapter, base=bases[1])
    path.write_text(json.dumps(config))
    torch.testing.assert_close(logits(loaded.model), by_peft(adapter, bases[1]))


def test_a_tensor_of_an_adapter_that_would_not_be_used_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.v_head.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"got 1 unused .first: base_model.model.v_head.weight"):
        load_organism(adapter)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "IA3Config", "OFTConfig"])
def test_other_adapters_that_can_be_merged(tmp_path, bases, kind):
    model = AutoModelForCausalLM.from_pretrained(bases[0])
    more: dict[str, Any] = {"feedforward_modules": ["down_proj"]} if kind == "IA3Config" else {}
    if kind == "OFTConfig":
        more = {"oft_block_size": 4}
    config = getattr(peft, kind)(target_modules=["q_proj", "down_proj"], **more)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    made.save_pretrained(tmp_path / "other")
    loaded = load_organism(tmp_path / "other", base=bases[0])
    expected = by_peft(tmp_path / "other", bases[0])
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-3, atol=1e-3)
