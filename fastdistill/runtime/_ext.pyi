# The compiled module of csrc/bind.cpp. It may be absent: only backend.py imports it, and copes.
#
# Kernels take addresses (Tensor.data_ptr(), 0 for an absent tensor) of contiguous CPU memory and do
# not check them. `isa` is an index into isa_names(), or −1 for the model of AMX's tiles; dtypes are
# 0 fp32, 1 bf16, 2 fp16.

def cpu_features() -> dict[str, bool]: ...
def build_info() -> dict[str, str | bool]: ...
def isa_names() -> list[str]: ...
def best_isa() -> int: ...
def lut4_dequant(
    isa: int,
    threads: int,
    qdata: int,  # uint8 [ceil(count / 2)]
    scale: int,  # fp32 [ceil(count / block)]
    offset: int,  # fp32, as scale, or 0
    lut: int,  # fp32 [16]
    out: int,  # out_dtype [count]
    out_dtype: int,
    count: int,
    block: int,
) -> None: ...
def int8_dequant(
    isa: int,
    threads: int,
    qdata: int,  # int8 [count]
    scale: int,  # fp32 [ceil(count / block)]
    out: int,  # out_dtype [count]
    out_dtype: int,
    count: int,
    block: int,
) -> None: ...
def quantize_groups(
    isa: int,
    threads: int,
    x: int,  # x_dtype [rows, cols]
    x_dtype: int,
    q: int,  # int8 [rows, cols]
    scale: int,  # fp32 [rows, cols / group]
    sum: int,  # int32 [rows, cols / group], or 0
    rows: int,
    cols: int,
    group: int,
) -> None: ...
def int8_table(
    lut: int,  # fp32 [16]
    codes: int,  # int8 [16], written
) -> float: ...  # the unit
def lut4_gemm(
    isa: int,
    threads: int,
    x: int,  # x_dtype [M, K]
    x_dtype: int,
    qdata: int,  # uint8 [N, K / 2]
    codes: int,  # int8 [16]
    unit: float,
    scale: int,  # fp32 [N, K / wgroup]
    offset: int,  # fp32 [N, K / wgroup], or 0
    bias: int,  # fp32 [N], or 0
    out: int,  # x_dtype [M, N]
    M: int,
    N: int,
    K: int,
    wgroup: int,
    agroup: int,
) -> None: ...
def int8_gemm(
    isa: int,
    threads: int,
    x: int,  # x_dtype [M, K]
    x_dtype: int,
    qdata: int,  # int8 [N, K]
    scale: int,  # fp32 [N, K / wgroup]
    bias: int,  # fp32 [N], or 0
    out: int,  # x_dtype [M, N]
    M: int,
    N: int,
    K: int,
    wgroup: int,
    agroup: int,
) -> None: ...
def lse_topk(
    isa: int,
    threads: int,
    z: int,  # fp32 [rows, cols], rows row_stride elements apart
    rows: int,
    cols: int,
    row_stride: int,
    inv_temperature: float,
    k: int,
    ids: int,  # int64 [rows, k]
    values: int,  # fp32 [rows, k]
    lse_rest: int,  # fp32 [rows]
) -> None: ...
def int8_peak(isa: int, threads: int) -> float: ...  # GOP/s; 0 without instructions for int8
def sum_columns(
    isa: int,
    threads: int,
    u: int,  # fp32 [rows, n], rows `stride` elements apart
    rows: int,
    n: int,
    stride: int,
    inv_T: float,
    moments: int,  # 0 to 2
    top: int,  # fp32 [n], read and written
    sums: int,  # fp32 [moments + 1, n]
) -> None: ...
def softmax_columns(
    isa: int,
    threads: int,
    u: int,  # fp32 [rows, n], rows `stride` elements apart, in place
    rows: int,
    n: int,
    stride: int,
    inv_T: float,
    inv_cap: float,  # 0 without softcap
    lse: int,  # fp32 [n]
    factor: int,  # fp32 [n]
) -> None: ...
def sum_remainders(
    isa: int,
    threads: int,
    u: int,  # fp32 [rows, n], rows `stride` elements apart
    rows: int,
    n: int,
    stride: int,
    sums: int,  # fp32 [n], added to
) -> None: ...
def has_bf16_gemm(isa: int) -> bool: ...
def bf16_scratch(isa: int, threads: int, N: int, K: int) -> int: ...  # bytes
def bf16_gemm(
    isa: int,
    threads: int,
    a: int,  # fp32 or bf16 [M, K]: element [m, k] at m * a_row + k * a_k, one of them 1
    a_dtype: int,
    a_row: int,
    a_k: int,
    b: int,  # bf16 [N, K], in the same way
    b_row: int,
    b_k: int,
    out: int,  # fp32 or bf16 [M, N], rows out_stride elements apart
    out_dtype: int,
    out_stride: int,
    M: int,
    N: int,
    K: int,
    remainder: bool,
    add: bool,
    scratch: int,  # bf16_scratch bytes, aligned to 64
) -> None: ...
