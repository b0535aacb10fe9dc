"""A trace of some steps of a run, for XProf and TensorBoard."""

import pathlib
import re
from typing import Any

import jax

from spatial_mamba_jax.errors import say
from spatial_mamba_jax.fields import show
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.goodput import Ledger


def parse_steps(text: str | None) -> range:
  """Parses "100:110", the steps 100 to 110, both included; None is no steps.

  Raises:
    TrainingError: the text is not of this form.
  """
  if text is None:
    return range(0)
  match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
  steps = range(int(match[1]), int(match[2]) + 1) if match else range(0)
  if not steps or not steps[0]:
    raise TrainingError(
      "--profile_steps must be the first and the last step of the trace, like"
      f" 100:110, got {show(text)}"
    )
  return steps


class StepTrace:
  """Traces some steps in the first process, whose devices stand for all."""

  def __init__(
    self,
    steps: range,
    directory: pathlib.Path,
    ledger: Ledger,
    *,
    done: int,
    total: int,
  ):
    """Starts no trace yet.

    Args:
      steps: the steps to trace, counted from 1; empty for none.
      directory: the log directory of TensorBoard.
      ledger: to which the time of starting and writing the trace goes.
      done: the steps already taken. If all of `steps` are among these, a line
        says that there is no trace; if some are, the others are traced.
      total: the steps of the run.

    Raises:
      TrainingError: the run has fewer steps.
    """
    self._directory, self._ledger, self._is_on = directory, ledger, False
    self._steps = steps[max(0, done + 1 - steps.start) :]
    if not steps:
      return
    name = f"--profile_steps={steps[0]}:{steps[-1]}"
    if steps[-1] > total:
      raise TrainingError(f"{name}: the run has {total} steps")
    if jax.process_index():
      self._steps = range(0)
    elif not self._steps:
      say(f"{name}: the run is at step {done} already; no trace is written")

  def before(self, step: int, state: Any) -> None:
    """Starts the trace if it begins with this step, after `state`."""
    if self._steps and step == self._steps[0]:
      jax.block_until_ready(state)
      with self._ledger.during("profile"):
        options = jax.profiler.ProfileOptions()
        # Calls of Python functions would be most of the trace.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._directory, profiler_options=options)
        self._is_on = True

  def after(self, step: int, state: Any) -> None:
    """Ends the trace if this step, which computes `state`, is its last."""
    if self._is_on and step == self._steps[-1]:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes the trace if one is being made."""
    if self._is_on:
      with self._ledger.during("profile"):
        self._is_on = False
        jax.profiler.stop_trace()
      say(f"the trace is in {self._directory}: tensorboard --logdir shows it")
