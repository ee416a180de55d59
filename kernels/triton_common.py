"""Shared by all Triton kernels: names and the shape of a logit. Launched by gpu_launch.py.

    u = c · tanh(s / c),   s = logit_scale · (raw + b)        (raw = W x from the library GEMM)

Slabs are token-major, [n, v]: one program owns one row. Scalars of a head are fp64 arguments that
the kernel casts to the type of the logits, so a new temperature or scale compiles nothing.

Names inside a kernel:

    p_x    pointer: a tensor argument, or an address in it that belongs to this program
    d_x    tensor descriptor (a tile is loaded by its offsets)
    ld_x   elements from one row of p_x to the next
    n_x    run-time count; n, v, H, S are the rows, columns, hidden size and slots of the call
    i_x    scalar index or position: of the program, of a loop
    o_x    block of offsets: columns, rows, slots
    m_x    mask or condition
    b_x    value in registers: a loaded or computed block, or a scalar of the row
    CAPS   compile-time constant; BN, BV, BH, SB are tile sizes in rows, columns, hidden, slots

Kernels are launched by keyword. A pointer documented as optional may be None; that compiles a
variant without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .token_loss import ABSENT as _ABSENT
from .token_loss import LEAST_LOG_Q as _LEAST_LOG_Q
from .token_loss import NEG as _NEG

NEG = tl.constexpr(_NEG)
LEAST_LOG_Q = tl.constexpr(_LEAST_LOG_Q)
ABSENT = tl.constexpr(_ABSENT)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def shape_logits(b_raw, p_bias, o_cols, m_cols, scale, cap, CAP: tl.constexpr):
    """u of raw products, in their type; o_cols are the columns in the bias."""
    b_u = b_raw
    if p_bias is not None:
        b_u += tl.load(p_bias + o_cols, mask=m_cols, other=0.0).to(b_raw.dtype)
    b_u *= scale
    if CAP:
        c = tl.full([], cap, b_raw.dtype)
        b_exp = tl.exp(-2.0 * tl.abs(b_u) / c)  # tanh |y| = (1 − e) / (1 + e): no overflow
        b_u = tl.where(b_u < 0.0, -c, c) * ((1.0 - b_exp) / (1.0 + b_exp))
    return b_u


@triton.jit
def log_q_of(b_u, inv_T, b_lse, m_cols):
    """log q, finite where a bias is −∞, and 0 in other columns; a NaN stays."""
    b_lq = tl.where(m_cols, b_u * inv_T - b_lse, 0.0)
    return tl.where(b_lq < LEAST_LOG_Q, LEAST_LOG_Q, b_lq)


@triton.jit
def round_to(x, to: tl.constexpr):
    """x in the type `to`, rounded to nearest even (the interpreter truncates to bfloat16)."""
    if INTERPRETED and to == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= -65536
        return bits.to(tl.float32, bitcast=True).to(to)
    else:
        return x.to(to)
