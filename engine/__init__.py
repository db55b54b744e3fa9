"""What every trainer shares: configuration, distribution, optimiser, checkpoints, report and the training loop."""
