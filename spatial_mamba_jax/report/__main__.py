"""Runs `python -m spatial_mamba_jax.report WORKDIR`."""

import sys

from spatial_mamba_jax.report import main

if __name__ == "__main__":
  sys.exit(main())
