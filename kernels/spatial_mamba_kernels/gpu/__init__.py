"""What GPU kernels of several operators share; see `threads`."""
