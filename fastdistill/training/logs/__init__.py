"""What a run writes down: metrics, settings, the first batch, the model card."""
