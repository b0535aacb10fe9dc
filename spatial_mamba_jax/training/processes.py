"""Decisions that all processes of a run on several hosts must share."""

import json
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.training.config import TrainingError


def from_first_process(function: Callable[[], Any]) -> Any:
  """Calls a function in the first process; returns its result in every process.

  Args:
    function: the function. Its result must be serialisable as JSON.

  Raises:
    Exception: in the first process, whatever the function raises.
    TrainingError: in the other processes, with the same message.
  """
  if jax.process_count() == 1:
    return function()
  message, raised = b"", None
  if not jax.process_index():
    try:
      outcome = {"result": function()}
    except Exception as error:  # The other processes wait for the outcome.
      outcome, raised = {"error": one_line(error)}, error
    message = json.dumps(outcome).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
  content = np.zeros(size, np.uint8)
  content[: len(message)] = np.frombuffer(message, np.uint8)
  content = np.asarray(multihost_utils.broadcast_one_to_all(content))
  outcome = json.loads(content.tobytes())
  if raised is not None:
    raise raised
  if "error" in outcome:
    raise TrainingError(outcome["error"])
  return outcome["result"]


def in_all_processes(numbers: Collection[int]) -> set[int]:
  """Returns those of each process's numbers that every process has.

  Args:
    numbers: integers of at least 0, of which the largest 64 count.
  """
  if jax.process_count() == 1:
    return set(numbers)
  mine = np.full(64, -1, np.int64)
  largest = sorted(numbers)[-mine.size :]
  mine[: len(largest)] = largest
  # As 32-bit words: without x64, JAX has no integers of 64 bits.
  words = multihost_utils.process_allgather(mine.view(np.int32))
  rows = np.asarray(words).view(np.int64)
  return set.intersection(*(set(row.tolist()) for row in rows)) - {-1}
