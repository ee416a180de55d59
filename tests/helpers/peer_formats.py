"""Random weights in the formats of compressed-tensors and FP8, and what they mean in fp64."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()


def settings(weights, written="pack-quantized", **others):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": written,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        **others,
    }


def packed(codes, bits):
    """int32 [rows, columns · bits / 32], rounded up, lowest bits first."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word)).long()
    words = torch.zeros(len(codes), codes.shape[1] // per_word, dtype=torch.int64)
    for i in range(per_word):
        words |= codes[:, i::per_word] << bits * i
    return words.where(words < 1 << 31, words - (1 << 32)).to(torch.int32)


def scales(*shape, dtype=BF16):
    return (torch.randn(shape) * 0.02).to(dtype)


def integers(bits, N, K, group=None, symmetric=True, dtype=BF16, written="pack", shuffled=False):
    """(tensors, weights of the scheme, values) of integers in groups, rows or one tensor."""
    half, strategy = 1 << bits - 1, "channel" if group == -1 else "group" if group else "tensor"
    G = K // group if strategy == "group" else 1
    q = torch.randint(-half, half, (N, K))
    scale = scales(1, dtype=dtype) if strategy == "tensor" else scales(N, G, dtype=dtype)
    zero = torch.randint(-half, half, scale.shape)
    groups = torch.arange(K) // (K // G)
    tensors = {"weight_scale": scale}
    if shuffled:
        groups = groups[torch.randperm(K)]
        tensors["weight_g_idx"] = groups.int()
    if written == "pack":
        tensors |= {"weight_packed": packed(q + half, bits), "weight_shape": torch.tensor([N, K])}
    else:
        tensors["weight"] = q.to(torch.int8)
    if not symmetric:
        by_rows = packed((zero + half).view(-1, G).t(), bits).t().contiguous()
        whole = strategy == "tensor" or written != "pack"
        tensors["weight_zero_point"] = zero.to(torch.int8) if whole else by_rows
    steps = q - (0 if symmetric else zero.view(-1, G).expand(N, G)[:, groups])
    args = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    args |= {"group_size": group if strategy == "group" else None}
    return tensors, args, steps * scale.double().view(-1, G).expand(N, G)[:, groups]


def fp8(N, K, strategy, dtype=BF16, tile=(128, 128)):
    codes = torch.randint(-127, 127, (N, K)).to(torch.int8)
    codes[codes == 127] = 0  # NaN
    weight = codes.view(torch.float8_e4m3fn).float().nan_to_num().to(torch.float8_e4m3fn)
    shape = {"tensor": (1,), "channel": (N, 1), "block": (-(-N // tile[0]), -(-K // tile[1]))}
    scale = scales(*shape[strategy], dtype=dtype)
    rows = torch.arange(N) // {"tensor": N, "channel": 1, "block": tile[0]}[strategy]
    columns = torch.arange(K) // (tile[1] if strategy == "block" else K)
    of_each = scale.double().view(-1, 1 if scale.dim() < 2 else scale.shape[1])[rows][:, columns]
    args = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    args |= {"block_structure": list(tile)} if strategy == "block" else {}
    return {"weight": weight, "weight_scale": scale}, args, weight.double() * of_each


def fp4(N, K, kind):
    codes = torch.randint(16, (N, K))
    byte = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    e2m1 = E2M1[codes % 8] * (1 - 2 * (codes // 8))
    args = {"num_bits": 4, "type": "float", "symmetric": True}
    if kind == "mxfp4":
        exponents = torch.randint(0, 255, (N, K // 32)).to(torch.uint8)
        exponents = exponents.clamp(100, 150) if N > 4 else exponents
        scale = (exponents.double() - 127).exp2()
        args |= {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        tensors = {"weight_packed": byte, "weight_scale": exponents}
        return tensors, args, e2m1 * scale.repeat_interleave(32, -1)
    stored = (torch.rand(N, K // 16) * 400).to(torch.float8_e4m3fn)
    divisor = torch.tensor([731.25])
    args |= {"strategy": "tensor_group", "group_size": 16}
    scale = (stored.float() / divisor).double()
    tensors = {"weight_packed": byte, "weight_scale": stored, "weight_global_scale": divisor}
    return tensors, args, e2m1 * scale.repeat_interleave(16, -1)


def fp8_blocks(N, K):
    """(the tensors of a layer of DeepSeek-V3's format, their values)"""
    tensors, _, expected = fp8(N, K, "block", FP32)
    return {"weight": tensors["weight"], "weight_scale_inv": tensors["weight_scale"]}, expected
