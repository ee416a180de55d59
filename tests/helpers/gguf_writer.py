"""Shared by test_read_gguf and others."""

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
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_name(name):
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{PARTS[module]}.{kind}"
    _, _, block, part = module.split(".", 3)
    return f"blk.{block}.{PARTS[part]}.{kind}"


def write(
    file,
    family="llama",
    kind="Q4_0",
    head_kind=None,
    extra=(),
    fields=(),
    architecture=None,
    **sizes,
):
    """A tiny random model as llama.cpp's converter would write it. Returns its state dict."""
    gguf = pytest.importorskip("gguf")
    types = gguf.GGMLQuantizationType
    torch.manual_seed(0)
    sizes = SIZES | ({"head_dim": 32} if family == "qwen3" else {}) | sizes
    sizes |= {"vocab_size": 32064} if family == "phi3" else {}  # its padding is 32000
    config = CONFIG_MAPPING[family](**sizes)
    state = AutoModelForCausalLM.from_config(config).state_dict()
    writer = gguf.GGUFWriter(file, architecture or family)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"<{i}>" for i in range(96)])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    for key, value in fields:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            tensor = tensor + torch.randn_like(tensor)
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = tensor.view(heads, 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        stored = "F32" if tensor.dim() == 1 else kind
        if name == "lm_head.weight" and head_kind:
            stored = head_kind
        stored = types[stored]
        data = gguf.quantize(np.ascontiguousarray(tensor.numpy()), stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
