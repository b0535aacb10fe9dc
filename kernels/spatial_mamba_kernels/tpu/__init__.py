"""What TPU kernels of several operators share; see `rows`."""
