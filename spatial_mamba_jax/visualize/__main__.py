"""Runs `python -m spatial_mamba_jax.visualize`."""

import sys

from spatial_mamba_jax.errors import run_command


def _main() -> int:
  # Imported here, so that a missing package becomes one line of error.
  from spatial_mamba_jax.visualize.command import main

  return main()


if __name__ == "__main__":
  sys.exit(run_command("visualize", _main))
