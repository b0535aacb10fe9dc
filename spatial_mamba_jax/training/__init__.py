"""The training loop: config, state, step, checkpoints."""
