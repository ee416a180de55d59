"""The sparse loss of a token, its statistics and its gradient, from the K logits and the rest.

token_loss.py has the equations; this kernel computes them for a named divergence, forward and in
closed form backward. A program owns BN rows and walks their K slots in tiles of SB three times: for
the log-sum-exps, for the sums of φ and ψ, and for the gradients. The label has a slot of its own,
behind the teacher's, or is one of the teacher's ids: K comparisons per token find out. No other id
repeats, so nothing is sorted. In fp32, 28 bytes per slot are read or written, half of them again
from L1 or L2.

nla and lk_hybrid need sums over all outcomes before their gradients (`combine` in divergences.py).
The second walk adds up PHI and ½|p − q|; the third has ψ of "lk_mix" with two factors per row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .divergences import LEAST_OVERLAP
from .triton_common import ABSENT, NEG
from .triton_divergences import lk_mix

LEAST = tl.constexpr(LEAST_OVERLAP)


@triton.jit
def add_exp(a, b):
    """log(e^a + e^b) of finite numbers."""
    highest = tl.maximum(a, b)
    return highest + tl.log(1.0 + tl.exp(tl.minimum(a, b) - highest))


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x, too: the rounding error of 1 + x is divided out."""
    b_one = 1.0 + x
    b_off = b_one - 1.0
    return tl.where(b_off == 0.0, x, tl.log(b_one) * (x / tl.where(b_off == 0.0, 1.0, b_off)))


@triton.jit
def add_tile(b_max, b_sum, b_x):
    """The running maximum and sum of exponentials of each row, with one more tile [BN, SB]."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    return b_new, b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_x - b_new[:, None]), 1)


@triton.jit
def log_probs(b_z, b_lp, m_ids, b_lse, b_mass, floor, RENORM: tl.constexpr):
    """(log p, log q) of a tile; both are the floor in empty slots."""
    if RENORM:
        b_lp = tl.minimum(tl.maximum(b_lp - b_mass[:, None], floor), 0.0)
        b_lp = tl.where(m_ids, b_lp, floor)
    return b_lp, tl.where(m_ids, b_z - b_lse[:, None], floor)


@triton.jit
def token_loss(
    p_z,
    p_ids,
    p_teacher_ids,
    p_lp,
    p_log_tail,
    p_label,
    p_coef,
    p_lse_rest,
    p_mean_rest,
    p_lse_base,
    p_per_token,
    p_D,
    p_mass,
    p_lse,
    p_nll,
    p_entropy,
    p_g_slots,
    p_g_rest,
    p_g_base,
    n,
    K,
    S,
    T: tl.float64,
    w: tl.float64,
    rest: tl.float64,
    log_w: tl.float64,
    log_rest: tl.float64,
    eta: tl.float64,
    floor: tl.float64,
    outside: tl.float64,
    on_ids: tl.float64,
    constant: tl.float64,
    on_D: tl.float64,
    on_ce: tl.float64,
    on_z: tl.float64,
    on_slots: tl.float64,
    cap: tl.float64,
    CAP: tl.constexpr,
    PHI: tl.constexpr,
    COMBINED: tl.constexpr,
    TAIL: tl.constexpr,
    CONSTANT: tl.constexpr,
    BASE_GRAD: tl.constexpr,
    BN: tl.constexpr,
    SB: tl.constexpr,
):
    """ℓ, its statistics and d(Σ coef · ℓ) of each row. token_loss.py has the equations.

    Args:
        p_z: [n, S], z of the slots, NEG if absent. S = K, or K + 1 with a slot of the label.
        p_ids: int64 [n, S], −1 in slots that get no gradient.
        p_teacher_ids: int64 [n, K], distinct, −1 in empty slots. p_lp: [n, K]. p_log_tail: [n].
        p_label: int64 [n] or None, negative without a label. p_coef: [n].
        p_lse_rest: [n]. p_mean_rest: [n], needed for p_entropy. p_lse_base: [n] or None (T = 1).
        p_per_token, p_D, p_mass: [n], receive ℓ, D and the student's mass on the ids. p_lse, p_nll,
            p_entropy: [n] or None.
        p_g_slots: [n, S] or None, receives d(W x). p_g_rest: [n], d lse_rest. p_g_base: [n] or
            None, d lse_base.
        w, rest, log_w, log_rest: of PHI. eta: of lk_hybrid. floor: the smallest log p. outside,
            on_ids, constant: terms of the divergence, 0 for tails without them.
        on_D, on_ce, on_z: factors of D, of the cross-entropy and of lse₁².
        on_slots: logit_scale / T.
        PHI: a function of triton_divergences.py; overlap for nla, forward_kl for lk_hybrid.
        COMBINED: "nla", "lk_hybrid" or None.
        CONSTANT: whether constant is not 0. BASE_GRAD: whether on_ce or on_z is not 0.

    Program i owns rows [i·BN, (i + 1)·BN) and walks the slots in tiles of SB.
    """
    DT: tl.constexpr = p_z.dtype.element_ty
    RENORM: tl.constexpr = TAIL == "renorm_teacher" or TAIL == "renorm_both"
    BOTH: tl.constexpr = TAIL == "renorm_both"
    BUCKET: tl.constexpr = TAIL == "bucket"
    T = tl.full([], T, DT)
    w = tl.full([], w, DT)
    rest = tl.full([], rest, DT)
    log_w = tl.full([], log_w, DT)
    log_rest = tl.full([], log_rest, DT)
    floor = tl.full([], floor, DT)
    none = tl.full([], NEG, DT)  # a constant would be rounded to fp32
    outside = tl.full([], outside, DT)
    on_ids = tl.full([], on_ids, DT)
    on_ce = tl.full([], on_ce, DT)
    on_z = tl.full([], on_z, DT)
    o_rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_rows = o_rows < n
    b_rest = tl.load(p_lse_rest + o_rows, mask=m_rows, other=0.0)
    b_label = tl.full([BN], -1, tl.int64)
    if p_label is not None:
        b_label = tl.load(p_label + o_rows, mask=m_rows, other=-1)

    b_max = tl.full([BN], NEG, DT)
    b_sum = tl.zeros([BN], DT)
    b_base_max = b_max
    b_base_sum = b_sum
    b_lp_max = b_max
    b_lp_sum = b_sum
    b_z_label = b_sum
    b_n_label = tl.zeros([BN], tl.int32)
    for i_slot in range(0, K, SB):
        o_slots = i_slot + tl.arange(0, SB)
        m_in = m_rows[:, None] & (o_slots < K)[None, :]
        b_z = tl.load(p_z + o_rows[:, None] * S + o_slots[None, :], mask=m_in, other=none)
        b_max, b_sum = add_tile(b_max, b_sum, b_z)
        if p_lse_base is not None:
            b_u = tl.where(b_z < ABSENT, none, b_z * T)
            b_base_max, b_base_sum = add_tile(b_base_max, b_base_sum, b_u)
        if RENORM or p_label is not None:
            b_ids = tl.load(
                p_teacher_ids + o_rows[:, None] * K + o_slots[None, :], mask=m_in, other=-1
            )
            if RENORM:
                b_lp = tl.load(p_lp + o_rows[:, None] * K + o_slots[None, :], mask=m_in, other=none)
                b_lp = tl.where(b_ids >= 0, b_lp.to(DT), none)
                b_lp_max, b_lp_sum = add_tile(b_lp_max, b_lp_sum, b_lp)
            if p_label is not None:
                m_label = (b_ids >= 0) & (b_ids == b_label[:, None])
                b_z_label += tl.sum(tl.where(m_label, b_z, 0.0), 1)
                b_n_label += tl.sum(m_label.to(tl.int32), 1)
    b_lse_slots = b_max + tl.log(b_sum)
    b_mass = b_lp_max
    if RENORM:
        b_mass += tl.log(b_lp_sum)
    b_lse_tail = b_rest
    m_new = (b_label >= 0) & (b_n_label == 0)
    b_z_new = tl.full([BN], NEG, DT)
    if p_label is not None:
        b_z_new = tl.load(p_z + o_rows * S + K, mask=m_rows & m_new, other=none)
        b_z_label = tl.where(m_new, b_z_new, b_z_label)
        b_lse_tail = add_exp(b_rest, b_z_new)
    b_full = add_exp(b_lse_tail, b_lse_slots)
    b_lse = b_full
    if BOTH:
        b_lse = b_lse_slots
    b_lse1 = b_full
    b_rest1 = b_rest
    if p_lse_base is not None:
        b_rest1 = tl.load(p_lse_base + o_rows, mask=m_rows, other=0.0)
        b_u_new = tl.where(b_z_new < ABSENT, none, b_z_new * T)
        b_lse1 = add_exp(add_exp(b_rest1, b_u_new), b_base_max + tl.log(b_base_sum))

    b_D = tl.zeros([BN], DT)
    b_psi_sum = b_D
    b_inside = b_D
    b_z_mean = b_D
    b_tv = b_D
    b_overlap_sum = b_D
    b_p_sum = tl.zeros([BN], tl.float64)
    for i_slot in range(0, K, SB):
        o_slots = i_slot + tl.arange(0, SB)
        m_in = m_rows[:, None] & (o_slots < K)[None, :]
        o_tile = o_rows[:, None] * K + o_slots[None, :]
        b_z = tl.load(p_z + o_rows[:, None] * S + o_slots[None, :], mask=m_in, other=none)
        m_ids = tl.load(p_teacher_ids + o_tile, mask=m_in, other=-1) >= 0
        b_lp = tl.load(p_lp + o_tile, mask=m_in, other=0.0).to(DT)
        b_lp, b_lq = log_probs(b_z, b_lp, m_ids, b_lse, b_mass, floor, RENORM)
        b_phi, b_psi = PHI(b_lp, b_lq, w, rest, log_w, log_rest)
        b_q = tl.where(m_in, tl.exp(b_lq), 0.0)
        if TAIL == "truncate":
            b_phi += on_ids * (tl.exp(b_lp) - b_q)
            b_psi -= on_ids * b_q
        b_D += tl.sum(tl.where(m_in, b_phi, 0.0), 1)
        b_psi_sum += tl.sum(tl.where(m_in, b_psi, 0.0), 1)
        b_inside += tl.sum(b_q, 1)
        if COMBINED is not None:
            b_phi, b_psi = lk_mix(b_lp, b_lq, 0.0, 1.0, log_w, log_rest)
            b_tv += tl.sum(tl.where(m_in, b_phi, 0.0), 1)
            b_overlap_sum += tl.sum(tl.where(m_in, b_psi, 0.0), 1)
        if CONSTANT:
            b_p_sum += tl.sum(tl.where(m_in, tl.exp(b_lp.to(tl.float64)), 0.0), 1)
        if p_mean_rest is not None:
            b_z_mean += tl.sum(tl.exp(b_z - b_full[:, None]) * b_z, 1)  # NEG adds 0

    b_q_tail = tl.zeros([BN], DT)
    b_psi_tail = b_q_tail
    if not BOTH:
        # From whichever form is exact: see log_tail_of in token_loss.py.
        b_lq_tail = tl.where(b_inside < 0.5, log1p(-tl.minimum(b_inside, 0.5)), b_lse_tail - b_full)
        b_q_tail = tl.exp(b_lq_tail)
        b_psi_tail = outside * b_q_tail
        b_D += b_psi_tail
        if BUCKET:
            # If the ids cover the vocabulary, the bucket holds rounding error only.
            m_none = b_lse_tail < ABSENT
            b_lp_tail = tl.load(p_log_tail + o_rows, mask=m_rows, other=0.0).to(DT)
            b_lp_tail = tl.where(m_none, floor, b_lp_tail)
            b_lq_tail = tl.where(m_none, floor, b_lq_tail)
            b_phi, b_psi_tail = PHI(b_lp_tail, b_lq_tail, w, rest, log_w, log_rest)
            b_D += b_phi
            if COMBINED is not None:
                b_phi, b_overlap = lk_mix(b_lp_tail, b_lq_tail, 0.0, 1.0, log_w, log_rest)
                b_tv += b_phi
                b_overlap_sum += b_overlap
            if CONSTANT:
                b_p_sum += tl.exp(b_lp_tail.to(tl.float64))
        b_psi_sum += b_psi_tail
    if COMBINED is not None:
        if COMBINED == "nla":
            # Each form of D is exact where the other one cancels; a NaN stays.
            b_alpha = tl.where(-b_D < LEAST, LEAST, -b_D)
            b_D = tl.where(
                b_alpha < 0.5, -tl.log(b_alpha), -log1p(-tl.where(b_tv > 0.75, 0.75, b_tv))
            )
            b_on_kl = tl.zeros([BN], DT)
            b_on_overlap = 1.0 / b_alpha
        else:
            b_on_kl = tl.exp(tl.full([], eta, DT) * (b_tv - 1.0))
            b_on_overlap = 1.0 - b_on_kl
            b_D = b_on_kl * b_D + b_on_overlap * b_tv
        if BOTH:
            b_D = tl.where(b_mass < ABSENT, 0.0, b_D)  # a row without ids has no outcome
        b_psi_sum = b_on_kl * b_psi_sum + b_on_overlap * b_overlap_sum
        if BUCKET:
            b_phi, b_psi_tail = lk_mix(b_lp_tail, b_lq_tail, b_on_kl, b_on_overlap, log_w, log_rest)
    if CONSTANT:
        b_D += (tl.full([], constant, tl.float64) * (1.0 - b_p_sum)).to(DT)
    b_per_token = b_D * tl.full([], on_D, DT)
    b_label_ce = tl.zeros([BN], DT)
    if p_label is not None:
        b_nll = tl.where(b_label >= 0, b_lse1 - b_z_label * T, 0.0)
        b_label_ce = tl.where(b_label >= 0, on_ce, 0.0)
        if p_nll is not None:
            tl.store(p_nll + o_rows, b_nll, mask=m_rows)
        if BASE_GRAD:
            b_per_token += on_ce * b_nll
    if BASE_GRAD:
        b_per_token += on_z * b_lse1 * b_lse1
    tl.store(p_per_token + o_rows, b_per_token, mask=m_rows)
    tl.store(p_D + o_rows, b_D, mask=m_rows)
    tl.store(p_mass + o_rows, tl.exp(b_lse_slots - b_full), mask=m_rows)
    if p_lse is not None:
        tl.store(p_lse + o_rows, b_lse1, mask=m_rows)
    if p_mean_rest is not None:
        b_z_mean += tl.exp(b_z_new - b_full) * b_z_new
        b_mean_rest = tl.load(p_mean_rest + o_rows, mask=m_rows, other=0.0)
        b_z_mean += tl.exp(b_rest - b_full) * b_mean_rest
        tl.store(p_entropy + o_rows, b_full - b_z_mean, mask=m_rows)

    if p_g_slots is not None:
        b_coef = tl.load(p_coef + o_rows, mask=m_rows, other=0.0).to(DT)
        b_on_D = b_coef * tl.full([], on_D, DT)
        b_label_ce *= b_coef
        b_on_lse = b_label_ce + b_coef * (2.0 * on_z * b_lse1)
        on_slots = tl.full([], on_slots, DT)
        T_over_c = tl.full([], 0.0, DT)
        if CAP:
            T_over_c = T / tl.full([], cap, DT)
        b_g_sum = tl.zeros([BN], DT)
        for i_slot in range(0, K, SB):
            o_slots = i_slot + tl.arange(0, SB)
            m_in = m_rows[:, None] & (o_slots < K)[None, :]
            o_tile = o_rows[:, None] * K + o_slots[None, :]
            b_z = tl.load(p_z + o_rows[:, None] * S + o_slots[None, :], mask=m_in, other=none)
            b_ids = tl.load(p_teacher_ids + o_tile, mask=m_in, other=-1)
            b_lp = tl.load(p_lp + o_tile, mask=m_in, other=0.0).to(DT)
            m_ids = b_ids >= 0
            b_lp, b_lq = log_probs(b_z, b_lp, m_ids, b_lse, b_mass, floor, RENORM)
            if COMBINED is None:
                _phi, b_psi = PHI(b_lp, b_lq, w, rest, log_w, log_rest)
            else:
                _phi, b_psi = lk_mix(
                    b_lp, b_lq, b_on_kl[:, None], b_on_overlap[:, None], log_w, log_rest
                )
            b_q = tl.exp(b_lq)
            if TAIL == "truncate":
                b_psi -= on_ids * b_q
            b_g = tl.where(m_ids, b_psi - b_q * b_psi_sum[:, None], 0.0)
            b_g_sum += tl.sum(b_g, 1)
            b_g *= b_on_D[:, None]
            if BASE_GRAD:
                b_g += (T * b_on_lse)[:, None] * tl.exp(b_z * T - b_lse1[:, None])
                if p_label is not None:
                    m_label = m_ids & (b_ids == b_label[:, None])
                    b_g -= tl.where(m_label, (T * b_label_ce)[:, None], 0.0)
            b_g *= on_slots
            if CAP:
                b_y = tl.where(b_z > ABSENT, b_z * T_over_c, 0.0)
                b_g *= 1.0 - b_y * b_y
            o_out = o_rows[:, None] * S + o_slots[None, :]
            m_held = (tl.load(p_ids + o_out, mask=m_in, other=-1) >= 0) & (b_z > ABSENT)
            tl.store(p_g_slots + o_out, tl.where(m_held, b_g, 0.0), mask=m_in)
        # The gradients of a softmax sum to 0; the smaller side of that sum is exact.
        b_g_tail = b_psi_tail - b_q_tail * b_psi_sum
        b_g_tail = tl.where(b_q_tail > 0.5, -b_g_sum, b_g_tail)
        if BOTH:
            b_g_tail = tl.zeros([BN], DT)
        b_g_tail *= b_on_D
        b_g_rest = b_g_tail * tl.exp(b_rest - b_lse_tail)
        if p_label is not None:
            b_g = b_g_tail * tl.exp(b_z_new - b_lse_tail)
            if BASE_GRAD:
                b_g += T * (b_on_lse * tl.exp(b_z_new * T - b_lse1) - b_label_ce)
            b_g *= on_slots
            if CAP:
                b_y = tl.where(b_z_new > ABSENT, b_z_new * T_over_c, 0.0)
                b_g *= 1.0 - b_y * b_y
            m_held = tl.load(p_ids + o_rows * S + K, mask=m_rows & m_new, other=-1) >= 0
            b_g = tl.where(m_held & (b_z_new > ABSENT), b_g, 0.0)
            tl.store(p_g_slots + o_rows * S + K, b_g, mask=m_rows)
        if BASE_GRAD:
            b_g_base = b_on_lse * tl.exp(b_rest1 - b_lse1)
            if p_g_base is not None:
                tl.store(p_g_base + o_rows, b_g_base, mask=m_rows)
            else:
                b_g_rest += b_g_base
        tl.store(p_g_rest + o_rows, b_g_rest, mask=m_rows)


@triton.jit
def merge_slots(
    p_ids,
    p_z,
    p_g,
    p_distinct,
    p_g_slots,
    n,
    S,
    on_slots: tl.float64,
    on_y: tl.float64,
    CAP: tl.constexpr,
    BN: tl.constexpr,
    SB: tl.constexpr,
):
    """d(W x) of distinct slots from d z: the first slot of an id gets the sum, others are empty.

    Args:
        p_ids: int64 [n, S], −1 in empty slots. p_z, p_g: [n, S], z and d z.
        p_distinct: int64 [n, S], receives the ids, −1 in slots that repeat one. p_g_slots: [n, S].
        on_slots: logit_scale / T. on_y: T / softcap.

    Program i owns rows [i·BN, (i + 1)·BN); it compares each slot with every other, in order.
    """
    DT: tl.constexpr = p_z.dtype.element_ty
    o_rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_rows = o_rows < n
    for i_slot in range(0, S, SB):
        o_slots = i_slot + tl.arange(0, SB)
        m_in = m_rows[:, None] & (o_slots < S)[None, :]
        o_tile = o_rows[:, None] * S + o_slots[None, :]
        b_ids = tl.load(p_ids + o_tile, mask=m_in, other=-1)
        m_first = b_ids >= 0
        b_g = tl.zeros([BN, SB], DT)
        for i_other in range(S):
            b_id = tl.load(p_ids + o_rows * S + i_other, mask=m_rows, other=-1)
            m_same = b_ids == b_id[:, None]
            b_part = tl.load(p_g + o_rows * S + i_other, mask=m_rows, other=0.0)
            b_g += tl.where(m_same, b_part[:, None], 0.0)
            m_first = m_first & ((o_slots <= i_other)[None, :] | (b_ids != b_id[:, None]))
        b_z = tl.load(p_z + o_tile, mask=m_in, other=0.0)
        m_held = m_first & (b_z > ABSENT)
        b_g *= tl.full([], on_slots, DT)
        if CAP:
            b_y = tl.where(m_held, b_z * tl.full([], on_y, DT), 0.0)
            b_g *= 1.0 - b_y * b_y
        tl.store(p_distinct + o_tile, tl.where(m_first, b_ids, -1), mask=m_in)
        tl.store(p_g_slots + o_tile, tl.where(m_held, b_g, 0.0), mask=m_in)
