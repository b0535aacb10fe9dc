"""Device memory of a run: planned by the compiler, and measured."""

from collections.abc import Sequence
from typing import Any

import jax


def planned_line(step: jax.stages.Compiled) -> str:
  """Returns a line about the memory that a training step needs on a device."""
  plan = step.memory_analysis()
  if plan is None:
    return "memory per device: the platform does not tell what a step needs"
  inputs = plan.argument_size_in_bytes
  # The new state is written over the old one.
  outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
  rest = plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
  return (
    f"memory per device: planned {_size(inputs + outputs + rest)}"
    f" ({_size(inputs)} for state and batch, {_size(rest)} for"
    " intermediate values and the program)"
  )


def measured_line(devices: Sequence[Any]) -> str | None:
  """Returns a line about the memory in use; None where devices do not tell.

  Args:
    devices: the devices of this process. The line is about the fullest one.
  """
  known = [stats for x in devices if (stats := x.memory_stats())]
  if not known:
    return None
  fullest = max(known, key=lambda stats: stats.get("peak_bytes_in_use", 0))
  peak = fullest.get("peak_bytes_in_use", 0)
  line = f"memory per device: at most {_size(peak)} in use so far"
  if limit := fullest.get("bytes_limit"):
    line += f", of {_size(limit)}"
  return line


def _size(count: float | int) -> str:
  return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
