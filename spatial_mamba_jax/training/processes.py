"""Decisions that all processes of a run on several hosts must share."""

import json
from collections.abc import Callable
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
