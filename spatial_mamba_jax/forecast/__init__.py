"""What a training run will cost, counted in its compiled program."""
