"""The trainer: what an update is made of, from a batch to a checkpoint. DESIGN.md draws it."""

from ..runtime.optional import check_installed

check_installed("fastdistill.training", "train", "accelerate", "transformers")
