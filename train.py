"""Trains: `python train.py --config=configs/digits.py --workdir=runs/digits`.

Every field of the config can be overridden (`--config.length="10 epochs"`,
`--config.optimizer.learning_rate=1e-3`); `spatial_mamba_jax/training/config.py`
and `spatial_mamba_jax/data/config.py` explain them. The same command resumes a
run that was stopped.
"""

import signal
import sys
import time

STARTED = time.time()  # Before packages are imported.


def main() -> int:
  """Trains as the flags say; returns the exit status."""
  from absl import flags

  from spatial_mamba_jax.training import command_line
  from spatial_mamba_jax.training.loop import train
  from spatial_mamba_jax.training.profiling import parse_steps

  profile_steps = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace for XProf, such as 100:110."
  )
  compiled = flags.DEFINE_string(
    "compiled", None, "A compiled train step, of forecast --save=FILE."
  )

  def run() -> None:
    train(
      command_line.config(),
      command_line.workdir(),
      started=STARTED,
      profile_steps=parse_steps(profile_steps.value),
      compiled=compiled.value,
    )

  command_line.own_process()
  return command_line.run(run, __doc__)


if __name__ == "__main__":
  # While packages are imported, Ctrl-C ends the process without a traceback.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  # Not at the top: workers import this file, and packages may be missing.
  try:
    from spatial_mamba_jax.errors import run_command
  except ModuleNotFoundError as error:
    sys.stderr.write(
      f'train.py: {error.name} is missing: pip install ".[train]"\n'
    )
    sys.exit(2)

  sys.exit(run_command("train.py", main))
