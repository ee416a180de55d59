"""Tiny .gguf files, written as llama.cpp's converter would. Shared by test_read_gguf and others."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
ARCHITECTURES = {"mixtral": "llama"}
MIXTURE = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
YARN = dict(
    rope_type="yarn",
    rope_theta=500000.0,
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=16.0,
    beta_slow=2.0,
    truncate=False,
)
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=16, tie_word_embeddings=True)
LINEAR = dict(  # Qwen3.5: three heads of values for each of keys
    head_dim=32,
    partial_rotary_factor=0.5,
    full_attention_interval=2,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
)
OWN_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": dict(head_dim=32),
    "gemma2": GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=1.0),
    "gemma3": GEMMA,
    "phi3": dict(pad_token_id=0),  # it is 32000 otherwise, outside the vocabulary
    "stablelm": dict(use_qkv_bias=True),
    "mixtral": LOCAL,
    "smollm3": dict(pad_token_id=0, num_hidden_layers=4),  # the fourth has no rotary embedding
    "granite": dict(
        attention_multiplier=0.125,
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
    ),
    "lfm2": dict(
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"], norm_eps=1e-6
    ),
    "gpt-oss": LOCAL | dict(head_dim=32, sliding_window=16, rope_parameters=YARN),
    "minimax-m2": LOCAL | dict(head_dim=32, rotary_dim=16),
    "qwen2moe": MIXTURE,
    "qwen3moe": MIXTURE | dict(head_dim=32, norm_topk_prob=True),
    "qwen35": LINEAR,
    "qwen35moe": LINEAR | MIXTURE,
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT_OSS_PARTS = PARTS | {
    "mlp.router": "ffn_gate_inp",
    "post_attention_layernorm": "post_attention_norm",
}
QWEN35_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
LFM2_PARTS = {
    **PARTS,
    **{f"conv.{part}": f"shortconv.{part}" for part in ("conv", "in_proj", "out_proj")},
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "ffn_norm": "ffn_norm",
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
}
GATE_UP = "mlp.experts.gate_up_proj"
# Where the fp16 numbers of a block are.
HALVES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def config_of(family, **sizes):
    """The config of the model that `write` stores."""
    theta: dict[str, Any] = (
        {} if family in ("stablelm", "nemotron") else {"rope_theta": 500000.0, "rms_norm_eps": 1e-6}
    )
    sizes = SIZES | theta | OWN_SIZES.get(family, {}) | sizes
    return CONFIG_MAPPING[MODEL_TYPES.get(family, family)](max_position_embeddings=128, **sizes)


def gguf_name(name, family="llama"):
    parts = GEMMA_PARTS if family.startswith(("gemma", "olmo2")) else PARTS
    parts = GPT_OSS_PARTS if family == "gpt-oss" else parts
    parts = QWEN35_PARTS if family.startswith("qwen35") else parts
    parts = LFM2_PARTS if family == "lfm2" else parts
    module, _, kind = name.rpartition(".")
    if name.endswith("_proj"):  # the experts of a mixture
        module, kind = name, "weight"
    if not module.startswith("model.layers."):
        return f"{parts[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{parts[part]}.{kind}"


def blocks(tensor, kind):
    """The bytes of a tensor; of a type that gguf only reads, random ones with small scales."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    if kind.name not in HALVES:
        return gguf.quantize(np.ascontiguousarray(tensor.numpy()), kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(tensor.numel())
    data = rng.integers(0, 256, (tensor.numel() // values, size), dtype=np.uint8)
    for at in HALVES[kind.name]:
        scale = rng.standard_normal((len(data), 1)).astype(np.float16) / 4096
        data[:, at : at + 2] = scale.view(np.uint8)
    return data.reshape(*tensor.shape[:-1], -1)


def of_linear_attention(name, tensor, config):
    """A tensor as it is stored: Qwen3.5's linear attention with its heads of values in turn."""
    if ".conv.conv." in name:  # LFM2's convolution
        return tensor.squeeze(1)
    if ".linear_attn." not in name:
        return tensor
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    first = 2 * keys * config.linear_key_head_dim
    leaf = name.split(".linear_attn.")[1]

    def in_turn(part):
        return part.unflatten(0, (keys, values // keys, -1)).transpose(0, 1).flatten(0, 2)

    if leaf == "A_log":
        return -in_turn(tensor).exp()
    if leaf.startswith(("in_proj_qkv", "conv1d")):
        flat = tensor.reshape(len(tensor), -1)
        return torch.cat([flat[:first], in_turn(flat[first:])])
    if leaf.startswith("out_proj"):
        return in_turn(tensor.t()).t().contiguous()
    return tensor if leaf.startswith("norm") else in_turn(tensor)


def stored(name, tensor, family, config, single_experts=False):
    """Yield the (name, tensor)s of a file for one of the model."""
    if family in ("granite", "llama", "mixtral", "smollm3") and name.endswith(
        ("q_proj.weight", "k_proj.weight")
    ):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        halves = tensor.view(heads, 2, -1, tensor.shape[1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    plus_one = family.startswith(("gemma", "nemotron", "qwen35"))
    if plus_one and name.endswith("norm.weight") and "linear_attn" not in name:
        tensor = tensor + 1
    block = name.split(".")[2] if ".layers." in name else ""
    tensor = of_linear_attention(name, tensor, config)
    whole = {"sinks": "attn_sinks.weight", "e_score_correction_bias": "exp_probs_b.bias"}
    whole |= {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}
    if (leaf := name.rpartition(".")[2]) in whole:
        yield f"blk.{block}.{whole[leaf]}", tensor
        return
    if family == "gpt-oss" and ".experts." in name:
        kind = "bias" if name.endswith("_bias") else "weight"
        rows = tensor if kind == "bias" else tensor.transpose(1, 2)
        parts = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if "gate_up" in name else {"down": rows}
        for part, stack in parts.items():
            yield f"blk.{block}.ffn_{part}_exps.{kind}", stack.contiguous()
        return
    experts = {"down": tensor} if name.endswith("experts.down_proj") else {}
    if name.endswith(GATE_UP):
        experts = dict(zip(("gate", "up"), tensor.chunk(2, 1), strict=True))
    for part, whole in experts.items():
        if single_experts:
            for number, expert in enumerate(whole):
                yield f"blk.{block}.ffn_{part}.{number}.weight", expert
        else:
            yield f"blk.{block}.ffn_{part}_exps.weight", whole.contiguous()
    if experts:
        return
    if "_layernorm.norms." in name:  # of all heads, by the first
        return
    elif name.endswith("shared_expert_gate.weight"):
        yield gguf_name(name, family), tensor[0]
    else:
        yield gguf_name(name, family), tensor


def write(
    file,
    family="llama",
    kind="Q4_0",
    head_kind=None,
    extra=(),
    fields=(),
    architecture=None,
    parts=1,
    kinds=(),
    single_experts=False,
    **sizes,
):
    """A tiny random model in `parts` files. Returns its state dict.

    `kinds` are the types of some tensors by a part of their names, such as ffn_down."""
    gguf = pytest.importorskip("gguf")
    types = gguf.GGMLQuantizationType
    torch.manual_seed(0)
    config = config_of(family, **sizes)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    written = {}
    for name, tensor in state.items():
        if tensor.dim() == 1:
            state[name] = tensor = tensor + torch.randn_like(tensor)
        for gguf_name, part in stored(name, tensor, family, config, single_experts):
            plain = part.dim() == 1 or gguf_name.endswith(".bias")
            plain = plain or "ffn_gate_inp" in gguf_name or "conv1d" in gguf_name
            plain = plain or ".shortconv.conv." in gguf_name
            own = [value for key, value in dict(kinds).items() if f".{key}." in gguf_name]
            own += [head_kind] if head_kind and gguf_name == "output.weight" else []
            of = "F32" if plain else [*own, kind][0]
            written[gguf_name] = (blocks(part, of), types[of])
    for block in range(config.num_hidden_layers if getattr(config, "qk_layernorm", False) else 0):
        for x in "qk":
            norms = [n for n in state if f"layers.{block}.self_attn.{x}_layernorm" in n]
            stack = torch.stack([state[name] for name in norms])
            written[f"blk.{block}.attn_{x}_norm.weight"] = (stack.numpy(), types.F32)
    written |= {name: (data, types.F32) for name, data in extra}
    names = list(written)
    for number in range(parts):
        own = names[number::parts]
        path = file if parts == 1 else part_of(file, number, parts)
        writer = gguf.GGUFWriter(path, architecture or ARCHITECTURES.get(family, family))
        if number == 0:
            _fields(writer, family, config, fields)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(names))
        for name in own:
            data, of = written[name]
            writer.add_tensor(name, data, raw_dtype=of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return state


def part_of(file, number, parts):
    """The path of a part of a split file, counted from 0."""
    return file.with_name(f"{file.stem}-{number + 1:05}-of-{parts:05}.gguf")


def _fields(writer, family, config, fields):
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if family != "qwen35moe":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    heads = config.num_key_value_heads
    writer.add_head_count_kv([0, heads] if family == "lfm2" else heads)
    writer.add_vocab_size(config.vocab_size)
    if family == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_rope_dimension_count(4)  # a quarter of a head
    else:
        rms_eps = config.norm_eps if family == "nemotron" else config.rms_norm_eps
        writer.add_layer_norm_rms_eps(rms_eps)
        writer.add_rope_freq_base(10000.0 if family == "nemotron" else 500000.0)
    if "head_dim" in OWN_SIZES.get(family, {}):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    _of_family(writer, family, config)
    for key, value in fields:
        adders = {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
        if key in writer.kv_data[0]:
            del writer.kv_data[0][key]
        adders.get(type(value), writer.add_uint32)(key, value)


def _of_family(writer, family, config):
    if family in ("phi3", "smollm3"):
        writer.add_pad_token_id(config.pad_token_id)
    if family == "gpt-oss" or family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family.endswith("moe") or "num_local_experts" in OWN_SIZES.get(family, {}):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family.endswith("moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family in ("gpt-oss", "minimax-m2"):
        writer.add_expert_feed_forward_length(config.intermediate_size)
    if family == "gpt-oss":
        writer.add_string("gpt-oss.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(YARN["factor"])
        writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(YARN["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(YARN["beta_slow"])
    if family == "lfm2":
        writer.add_uint32("lfm2.shortconv.l_cache", config.conv_L_cache)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_residual_scale(config.residual_multiplier)
    if family == "minimax-m2":
        writer.add_rope_dimension_count(config.rotary_dim)
        writer.add_uint32("minimax-m2.expert_gating_func", 2)
    if family.startswith("qwen35"):
        writer.add_rope_dimension_count(16)
        writer.add_array(f"{family}.rope.dimension_sections", [11, 11, 10, 0])
        writer.add_full_attention_interval(2)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    if family in ("qwen2moe", "qwen35moe"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
