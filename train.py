"""Trains: `python train.py --config=configs/digits.py --workdir=runs/digits`.

Every field of the config can be overridden (`--config.epochs=10`). A run that
was stopped is resumed by the same command.
"""

import sys

from spatial_mamba_jax.training import command_line
from spatial_mamba_jax.training.loop import train


def main() -> None:
  """Trains as the flags say."""
  train(command_line.config(), command_line.workdir())


if __name__ == "__main__":
  sys.exit(command_line.run(main))
