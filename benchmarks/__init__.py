"""What the numbers in `docs/measurements.md` come from."""
