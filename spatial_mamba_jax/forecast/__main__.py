"""Runs `python -m spatial_mamba_jax.forecast --config=FILE --topology=NAME`."""

import sys

from spatial_mamba_jax.errors import run_command


def main() -> int:
  """Runs the command; returns its exit status."""
  # The name in messages, and where the flags are listed by --help.
  sys.argv[0] = "forecast"
  # Not at the top: packages may be missing.
  from spatial_mamba_jax.forecast import command

  return command.main()


if __name__ == "__main__":
  sys.exit(run_command("forecast", main))
