"""The tensor names of llama.cpp, and what its converter changes, by general.architecture."""

from __future__ import annotations

from typing import Any, NamedTuple

_ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
_PROJECTIONS = _ATTENTION | {"attn_norm.weight": "input_layernorm.weight"}
_MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_LLAMA = _PROJECTIONS | _MLP | {"ffn_norm.weight": "post_attention_layernorm.weight"}
_QKV_BIASES = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
_QK_NORMS = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
_POST_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_GEMMA = _PROJECTIONS | _MLP | _POST_NORMS | {"ffn_norm.weight": "pre_feedforward_layernorm.weight"}
# transformers stacks gate and up, [E, 2 I, H].
GATE_UP = "mlp.experts.gate_up_proj"
GATE_UP_BIAS = f"{GATE_UP}_bias"
_WB = ("weight", "bias")
_EXPERTS = _PROJECTIONS | {
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_exps.weight": GATE_UP,
    "ffn_up_exps.weight": GATE_UP,
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
# Mixtral, as written before and since experts are stacked; "*" is the number of an expert.
_MIXTRAL = _EXPERTS | {
    "ffn_gate.*.weight": GATE_UP,
    "ffn_up.*.weight": GATE_UP,
    "ffn_down.*.weight": "mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
}
# Qwen3.5: linear attention in most layers, and norms around both attentions.
_QWEN35 = (
    _PROJECTIONS
    | _QK_NORMS
    | {
        "post_attention_norm.weight": "post_attention_layernorm.weight",
        "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
        "attn_gate.weight": "linear_attn.in_proj_z.weight",
        "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
        "ssm_beta.weight": "linear_attn.in_proj_b.weight",
        "ssm_conv1d.weight": "linear_attn.conv1d.weight",
        "ssm_norm.weight": "linear_attn.norm.weight",
        "ssm_out.weight": "linear_attn.out_proj.weight",
        "ssm_a": "linear_attn.A_log",
        "ssm_dt.bias": "linear_attn.dt_bias",
    }
)
# LFM2: short convolutions in most layers.
_LFM2 = {
    **{f"attn_{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkv"},
    **{f"attn_{x}_norm.weight": f"self_attn.{x}_layernorm.weight" for x in "qk"},
    "attn_output.weight": "self_attn.out_proj.weight",
    "attn_norm.weight": "operator_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    **{
        f"shortconv.{module}.{part}": f"conv.{module}.{part}"
        for module in ("conv", "in_proj", "out_proj")
        for part in _WB
    },
}
# gpt-oss has a bias everywhere, and stacks the biases of its experts, too.
_GPT_OSS = {
    **{f"attn_{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkv" for part in _WB},
    **{f"attn_output.{part}": f"self_attn.o_proj.{part}" for part in _WB},
    **{f"ffn_gate_inp.{part}": f"mlp.router.{part}" for part in _WB},
    "attn_sinks.weight": "self_attn.sinks",
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_exps.weight": GATE_UP,
    "ffn_up_exps.weight": GATE_UP,
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_exps.bias": GATE_UP_BIAS,
    "ffn_up_exps.bias": GATE_UP_BIAS,
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}
NEXTN = "nextn_predict_layers"  # the last layers of a file, for multi-token prediction
MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class Family(NamedTuple):
    """An architecture that is read.

    Args:
        model_type: of transformers.
        layer: the tensors of a layer. A "*" in the parameter is the number of a row.
        model: the tensors outside the layers.
        interleaved: the rows of the query and key projections alternate between the two halves of
            each head's rotary dimensions (LlamaModel.permute of convert_hf_to_gguf.py).
        norms_plus_one: norms are stored as w + 1, except ssm_norm.
        alternating: transformers stores the experts transposed, and the rows of gate and up
            alternate there.
    """

    model_type: str
    layer: dict[str, str]
    model: dict[str, str] = MODEL
    interleaved: bool = False
    norms_plus_one: bool = False
    alternating: bool = False


FAMILIES = {
    "llama": Family("llama", _LLAMA, interleaved=True),  # and Mistral, SmolLM
    "smollm3": Family("smollm3", _LLAMA, interleaved=True),
    "granite": Family("granite", _LLAMA, interleaved=True),
    "olmo2": Family("olmo2", _ATTENTION | _MLP | _QK_NORMS | _POST_NORMS),
    "qwen2": Family("qwen2", _LLAMA | _QKV_BIASES),
    "qwen2moe": Family("qwen2_moe", _EXPERTS | _SHARED_EXPERT | _QKV_BIASES),
    "qwen3": Family("qwen3", _LLAMA | _QK_NORMS),
    "qwen3moe": Family("qwen3_moe", _EXPERTS | _QK_NORMS),
    "qwen35": Family("qwen3_5_text", _QWEN35 | _MLP, norms_plus_one=True),
    "qwen35moe": Family(
        "qwen3_5_moe_text", _EXPERTS | _SHARED_EXPERT | _QWEN35, norms_plus_one=True
    ),
    "minimax-m2": Family(
        "minimax_m2",
        _EXPERTS | _QK_NORMS | {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
    ),
    "lfm2": Family(
        "lfm2",
        _LFM2,
        {name: parameter for name, parameter in MODEL.items() if name != "output_norm.weight"}
        | {"token_embd_norm.weight": "model.embedding_norm.weight"},
    ),
    "gpt-oss": Family("gpt_oss", _GPT_OSS, alternating=True),
    "gemma2": Family("gemma2", _GEMMA, norms_plus_one=True),
    "gemma3": Family("gemma3_text", _GEMMA | _QK_NORMS, norms_plus_one=True),
    "phi3": Family(
        "phi3",
        {
            "attn_norm.weight": "input_layernorm.weight",
            "attn_qkv.weight": "self_attn.qkv_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "ffn_norm.weight": "post_attention_layernorm.weight",
            "ffn_up.weight": "mlp.gate_up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
    ),
    "stablelm": Family(
        "stablelm",
        _LLAMA
        | _QKV_BIASES
        | {f"attn_{x}_norm.weight": f"self_attn.{x}_layernorm.norms.*.weight" for x in "qk"}
        | {
            "attn_norm.bias": "input_layernorm.bias",
            "ffn_norm.bias": "post_attention_layernorm.bias",
        },
        MODEL | {"output_norm.bias": "model.norm.bias"},
    ),
}
_MIXTURES = ("gpt-oss", "minimax-m2", "qwen2moe", "qwen3moe", "qwen35moe")
MIXTRAL = Family("mixtral", _MIXTRAL, interleaved=True)  # its architecture is "llama", too


def has_experts(fields: dict[str, Any], name: str) -> bool:
    """Return whether a file of this general.architecture is a mixture of experts."""
    if name == "llama":
        return bool(fields.get("llama.expert_count"))
    return name in _MIXTURES


def family_of(fields: dict[str, Any], name: str) -> Family:
    """Return the family of a file of this general.architecture, which is one of FAMILIES."""
    return MIXTRAL if name == "llama" and has_experts(fields, name) else FAMILIES[name]
