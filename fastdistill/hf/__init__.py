"""Everything that touches transformers: heads, checkpoints, tokenizers, encoding and collation."""
