"""Measured shapes: LM heads of published models, and the suites built from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """N tokens, H hidden, V vocabulary, K teacher ids per token (0: a dense teacher)."""

    N: int
    H: int
    V: int
    K: int


class HeadShape(NamedTuple):
    H: int
    V: int


HEADS = {
    "qwen3-0.6b": HeadShape(1024, 151936),
    "qwen3-1.7b": HeadShape(2048, 151936),
    "qwen3-8b": HeadShape(4096, 151936),
    "llama-3.1-8b": HeadShape(4096, 128256),
    "gemma-3-4b": HeadShape(2560, 262208),
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# A dense teacher covers all tokens, a label is one token; other ops take any K.
FIXED_K = {"dense_loss": 0, "dense_jsd": 0, "label_loss": 1}
# Linear layers have no teacher either.
FIXED_K |= {"dequant_nf4": 0, "linear_nf4": 0, "linear_int8": 0}
QUICK = Shape(N=128, H=64, V=8000, K=16)
GATE = Shape(N=96, H=128, V=4000, K=16)


class Entry(NamedTuple):
    """One case of a suite; with `compiled`, contenders that compile for the shape run too."""

    op: str
    shape: Shape
    dtype: str
    compiled: bool = True


def entry(
    op: str, head: str, tokens: int, k: int, dtype: str = "bf16", *, compiled: bool = True
) -> Entry:
    H, V = HEADS[head]
    return Entry(op, Shape(tokens, H, V, FIXED_K.get(op, k)), dtype, compiled)


def label(of: Shape) -> str:
    """The name of the model with N and K."""
    names = [name for name, head in HEADS.items() if head == (of.H, of.V)]
    head = names[0] if names else f"H={of.H} V={of.V}"
    return f"{head} N={of.N}" + (f" K={of.K}" if of.K else "")


def _sparse_loss() -> tuple[Entry, ...]:
    """CPU results of the README: both sparse losses in both precisions."""
    ops = ("topk_loss", "renorm_both")
    return tuple(
        entry(op, "qwen3-0.6b", 1024, 64, dtype) for dtype in ("bf16", "fp32") for op in ops
    )


def _heads() -> tuple[Entry, ...]:
    """Loss and scores at three sizes, all ops at the main one, then other heads, N and K.

    The order is by importance, for a run that is out of time. Nothing is compiled.
    """
    main, small = "llama-3.1-8b", "qwen3-0.6b"
    sizes = ((main, 8192), (small, 2048), (main, 512))
    sweep = [(op, head, n, 64) for head, n in sizes for op in ("topk_loss", "scoring")]
    sweep += [(op, main, 8192, 64) for op in ("linear_topk", "renorm_both_zipf", "topk_loss_zipf")]
    sweep += [(op, main, 8192, 64) for op in ("renorm_both", "label_loss")]
    sweep += [(op, main, 8192, 0) for op in ("dense_jsd", "dense_loss")]
    sweep += [("linear_topk", small, 2048, 64), ("topk_loss", small, 512, 64)]
    others = [head for head in HEADS if head != main]
    sweep += [("topk_loss", head, 8192, 64) for head in others]
    sweep += [("topk_loss", main, n, 64) for n in (2048, 32768)]
    sweep += [("topk_loss", main, 8192, k) for k in (1, 8, 256)]
    sweep += [("scoring", head, 8192, 64) for head in others]
    sweep += [("label_loss", head, 8192, 1) for head in others]
    sweep += [("renorm_both", head, 8192, 64) for head in others]
    sweep += [("dense_jsd", head, 8192, 0) for head in others]
    sweep += [("linear_topk", "qwen3-8b", 8192, k) for k in (64, 256)]
    sweep += [("scoring", main, 32768, 64), ("topk_loss", "gemma-3-4b", 32768, 64)]
    entries = [entry(*line, compiled=False) for line in sweep]
    return (*entries, entry("topk_loss", small, 2048, 64, "fp32", compiled=False))


def _heads_compiled() -> tuple[Entry, ...]:
    """All contenders at the main shape, with torch.compile, which takes longer than measuring."""
    ops = "topk_loss scoring renorm_both label_loss dense_jsd linear_topk dense_loss".split()
    return tuple(entry(op, "llama-3.1-8b", 8192, 64) for op in ops)


def _topk_product() -> tuple[Entry, ...]:
    """The top 64 next to the product with the head alone: Qwen3-0.6B, then SmolLM2's vocabulary."""
    sizes = ((1024, 151936), (1024, 49152), (576, 49152))
    return tuple(
        Entry("linear_topk", Shape(1024, H, V, 64), "bf16", compiled=False) for H, V in sizes
    )


def _quantized() -> tuple[Entry, ...]:
    """Layers of a teacher: 1 and 16 tokens with cold weights, then prefill."""
    sizes = [(1, 2048, 2048), (16, 2048, 8192), (256, 2048, 8192), (512, 4096, 4096)]
    shapes = [Shape(N, H, V, 0) for N, H, V in sizes]
    entries = [Entry("dequant_nf4", Shape(1, 4096, 4096, 0), "bf16")]
    entries += [Entry(op, s, "bf16") for op in ("linear_nf4", "linear_int8") for s in shapes]
    return (*entries, Entry("row_topk", Shape(128, 1, 151936, 64), "fp32"))


def _quantized_gpu() -> tuple[Entry, ...]:
    """Layers of Llama-3.1-8B at prefill."""
    mlp = [Shape(N, 4096, 14336, 0) for N in (8192, 1024)]
    entries = [Entry("dequant_nf4", Shape(1, 4096, 14336, 0), "bf16")]
    return (*entries, *(Entry(op, s, "bf16") for op in ("linear_nf4", "linear_int8") for s in mlp))


SUITES = {
    "sparse_loss": _sparse_loss(),
    "heads": _heads(),
    "heads_compiled": _heads_compiled(),
    "topk_product": _topk_product(),
    "quantized": _quantized(),
    "quantized_gpu": _quantized_gpu(),
}
