"""One training run: its options, data and model, folder, checkpoints and summary."""
