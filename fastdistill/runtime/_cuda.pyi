# The compiled module of csrc/cuda_quant.cu. It may be absent: only backend.py imports it.
#
# Kernels take addresses (Tensor.data_ptr(), 0 for an absent tensor) of contiguous memory of the
# current device, and the address of the stream to run on; they return at once and check no address.
# A launch that fails raises RuntimeError with CUDA's words, a value out of range ValueError.
# Kinds: 0 fp32, 1 bf16, 2 fp16, 3 fp8-e4m3fn, 4 int8.

def build_info() -> dict[str, list[int] | str]: ...  # archs, cuda
def lut4_dequant(
    qdata: int,  # uint8 [ceil(count / 2)]
    scale: int,  # fp32 [ceil(count / block)]
    offset: int,  # fp32, as scale, or 0
    lut: int,  # fp32 [16]
    out: int,  # [count] of out_kind
    out_kind: int,
    count: int,
    block: int,
    cols: int,
    row_inv: int,  # fp32 [ceil(count / cols)] for kinds 3 and 4, or 0
    stream: int,
) -> None: ...
def lut4_dequant_nested(
    qdata: int,
    absmax: int,  # uint8 [blocks], blocks = ceil(count / block)
    code: int,  # fp32 [256]
    nested_absmax: int,  # fp32 [ceil(blocks / nested_block)]
    nested_offset: int,  # fp32 [1]
    nested_block: int,
    offset: int,
    lut: int,
    out: int,
    out_kind: int,
    count: int,
    block: int,
    cols: int,
    row_inv: int,
    stream: int,
) -> None: ...
def quantize_rows(
    x: int,  # [rows, cols] of x_dtype, a kind up to 2
    x_dtype: int,
    q: int,  # [rows, cols] of q_kind, 3 or 4
    q_kind: int,
    scale: int,  # fp32 [rows]
    rows: int,
    cols: int,
    stream: int,
) -> None: ...
