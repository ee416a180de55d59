"""The trainer: what an update is made of, from a batch to a checkpoint. DESIGN.md draws it."""
