"""Students of every kind make the same update: compiled, packed, adapted, quantised."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from helpers.families import build as family
from helpers.tolerances import relative
from helpers.training import VOCAB, build, flat, llama, peaked, ragged, step_losses, train, weights

peft = pytest.importorskip("peft")

CUT = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)


def lora(**options):
    torch.manual_seed(0)
    return peft.LoraConfig(
        r=4,
        target_modules=options.pop("target_modules", ["q_proj", "v_proj"]),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


def same(a, b):
    assert step_losses(a) == pytest.approx(step_losses(b), rel=1e-5)
    assert (weights(a) - weights(b)).abs().max() < 1e-6


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, reentrant):
    how = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    same(train(tmp_path, **how), train(tmp_path))


@pytest.mark.slow
def test_a_compiled_body_changes_nothing(tmp_path):
    compiled = train(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **CUT)
    same(compiled, train(tmp_path))
    assert compiled.args.torch_compile
    assert compiled.model.model._compiled_call_impl is not None
    assert not hasattr(compiled.model_wrapped, "_orig_mod")  # the head stays outside
    assert list(compiled.model.state_dict()) == list(llama(0).state_dict())


@pytest.mark.slow
def test_a_compiled_body_is_traced_once_for_all_batches(tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    trainer = build(tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=6)
    trainer.model.model.compile(backend=backend)
    trainer.train()
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_model_that_is_compiled_as_a_whole_is_refused(tmp_path):
    """Its error came from the compiler, at the first batch."""
    for options in (
        {"model": torch.compile(llama(0), backend="eager")},
        {"teacher": torch.compile(peaked(), backend="eager")},
    ):
        with pytest.raises(TypeError, match="not compiled as a whole, got OptimizedModule"):
            build(tmp_path, **options)
    teacher = peaked()
    teacher.base_model.compile(backend="eager")
    train(tmp_path, teacher=teacher)


def test_packing_changes_nothing(tmp_path):
    same(train(tmp_path, packing=True, **CUT), train(tmp_path))


def test_packed_rows_carry_no_padding(tmp_path):
    trainer = build(tmp_path, packing=True)
    seen = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trainer.train()
    assert seen == [(1, sum(len(row["input_ids"]) for row in ragged()))] * 2


def test_models_that_carry_a_state_are_not_packed(tmp_path):
    from transformers import AutoModelForCausalLM, MambaConfig

    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="packing: expected False for MambaForCausalLM"):
        build(tmp_path, model=mamba, packing=True)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("name", ["gemma2", "qwen3", "granite", "cohere", "gpt2"])
def test_families_train_packed_as_padded(tmp_path, name):
    dropout = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0} if name == "gpt2" else {}
    runs = [
        train(tmp_path, model=family(name, **dropout), packing=packing, learning_rate=1e-3)
        for packing in (False, True)
    ]
    assert (weights(runs[0]) - weights(runs[1])).abs().max() < 1e-6
    assert (weights(runs[0]) - flat(family(name, **dropout))).abs().max() > 1e-5


def test_adapters_learn_and_nothing_else_does(tmp_path):
    trainer = train(tmp_path, peft_config=lora())
    start = peft.get_peft_model(llama(0), lora()).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, start[name]) == ("lora_" not in name), name
    same(trainer, train(tmp_path, peft_config=lora(), packing=True, **CUT))
    same(trainer, train(tmp_path, peft_config=lora(), **{CHECKPOINTING: True}))


def test_an_adapted_model_is_saved_as_adapter_and_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "max_steps": 3}
    whole = train(tmp_path / "a", peft_config=lora(), **options)
    folder = tmp_path / "a" / "run" / "checkpoint-1"
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    again = build(tmp_path / "b", peft_config=lora(), **options)
    again.train(resume_from_checkpoint=folder)
    assert torch.equal(weights(again), weights(whole))


def test_the_loss_of_an_adapted_student_is_that_of_its_merged_weights(tmp_path):
    adapted = peft.get_peft_model(llama(0), lora())
    merged = peft.get_peft_model(llama(0), lora()).merge_and_unload()
    a, b = (build(tmp_path, model=m, eval_dataset=ragged(5)).evaluate() for m in (adapted, merged))
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)


def test_what_peft_must_not_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would skip an adapter on lm_head"):
        build(tmp_path, peft_config=lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="would skip an adapter on lm_head"):
        build(tmp_path, peft_config=lora(modules_to_save=["lm_head"]))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="got PROMPT_TUNING: it adds tokens before the row"):
        build(tmp_path, peft_config=prompt)
    with pytest.raises(TypeError, match=r"expected a peft.PeftConfig such as LoraConfig, got dict"):
        build(tmp_path, peft_config={})
    with pytest.raises(ValueError, match="expected None with a model that already has adapters"):
        build(tmp_path, model=peft.get_peft_model(llama(0), lora()), peft_config=lora())


def test_a_student_from_a_path(tmp_path):
    llama(0).save_pretrained(tmp_path / "student")
    same(train(tmp_path, model=str(tmp_path / "student")), train(tmp_path))
    half = build(tmp_path, model=tmp_path / "student", model_init_kwargs={"dtype": "bfloat16"})
    assert half.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="model_init_kwargs: expected None with a model"):
        build(tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(TypeError, match="model: expected a causal language model, or its path"):
        build(tmp_path, model=7)
    with pytest.raises(FileNotFoundError, match="where nothing exists"):
        build(tmp_path, model=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "attention"),
    [
        ({"bf16": True, "max_length": 512}, "eager"),
        ({"bf16": True, "max_length": 513}, "sdpa"),
        ({"bf16": True}, "sdpa"),
        ({"bf16": True, "max_length": 512, "packing": True}, "sdpa"),
        ({"max_length": 512}, "sdpa"),
        (
            {
                "bf16": True,
                "max_length": 512,
                "model_init_kwargs": {"attn_implementation": "sdpa"},
            },
            "sdpa",
        ),
    ],
)
def test_short_rows_in_bfloat16_on_a_cpu_take_the_faster_attention(tmp_path, options, attention):
    llama(0).save_pretrained(tmp_path / "student")
    trainer = build(tmp_path, model=tmp_path / "student", **options)
    assert trainer.model.config._attn_implementation == attention


@pytest.mark.peers
class TestQuantised:
    """QLoRA: a frozen 4-bit student under adapters."""

    @pytest.fixture(autouse=True)
    def bitsandbytes(self):
        pytest.importorskip("bitsandbytes")

    def student(self, tmp_path, **options):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "s")
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return AutoModelForCausalLM.from_pretrained(tmp_path / "s", quantization_config=how)

    def gradient(self, model):
        model.get_input_embeddings().weight.requires_grad_(True)
        model.train().zero_grad()
        model(input_ids=torch.arange(20)[None]).logits.logsumexp(-1).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    def test_adapters_on_four_bits(self, tmp_path, caplog):
        caplog.set_level(logging.ERROR)
        runs = [
            train(tmp_path, model=self.student(tmp_path), peft_config=lora(), **how)
            for how in ({}, CUT | {"packing": True}, {CHECKPOINTING: True})
        ]
        for other in runs[1:]:
            assert step_losses(other) == pytest.approx(step_losses(runs[0]), rel=1e-4)

    def test_gradients_survive_an_evaluation(self, tmp_path):
        """bitsandbytes on CPUs with AVX512-BF16 repacks weights when it evaluates, which rounds
        their scales to bfloat16; its backward then read something else: gradients were 94 % off."""
        model = self.student(tmp_path)
        expected = self.gradient(model)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(8)[None])
        trainer = build(tmp_path, model=model, peft_config=lora(), eval_dataset=ragged(3))
        trainer.evaluate()
        base = trainer.model.get_base_model()
        with trainer.model.disable_adapter():
            assert relative(self.gradient(base), expected) < 0.02

    @pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
    @pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
    def test_optimisers_in_eight_bits(self, tmp_path, optim):
        trainer = train(tmp_path, optim=optim)
        assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")
        assert step_losses(trainer)[1] < step_losses(trainer)[0]
