"""Runs `python -m spatial_mamba_jax.visualize`."""

import sys

from spatial_mamba_jax.visualize.command import main

if __name__ == "__main__":
  sys.exit(main())
