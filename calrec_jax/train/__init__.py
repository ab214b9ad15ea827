"""Training: optimiser, pure step, checkpoints, and the loop that ties them to a run folder."""
