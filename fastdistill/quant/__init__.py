"""Quantized models: 4- and 8-bit weights, their layers, and checkpoint formats.

Names are imported lazily, on first use.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy import lazy_names

if TYPE_CHECKING:
    from .fake import fake_quantize
    from .formats.detect import CheckpointError, is_quantized_checkpoint
    from .linear import Int8Linear, LUT4Linear
    from .loading import load_quantized
    from .model import quantize_model
    from .saving import save_quantized

__all__ = [
    "CheckpointError",
    "Int8Linear",
    "LUT4Linear",
    "fake_quantize",
    "is_quantized_checkpoint",
    "load_quantized",
    "quantize_model",
    "save_quantized",
]

_MODULE_OF = {
    "CheckpointError": "formats.detect",
    "Int8Linear": "linear",
    "LUT4Linear": "linear",
    "fake_quantize": "fake",
    "is_quantized_checkpoint": "formats.detect",
    "load_quantized": "loading",
    "quantize_model": "model",
    "save_quantized": "saving",
}

__getattr__ = lazy_names(__name__, _MODULE_OF)
