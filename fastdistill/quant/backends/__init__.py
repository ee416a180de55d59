"""How quantized weights are expanded and multiplied: native, torch and Triton."""
