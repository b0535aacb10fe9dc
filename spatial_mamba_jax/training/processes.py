"""What the processes of a run on several hosts must decide as one."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.training.config import TrainingError


def from_first_process(function: Callable[[], Any]) -> Any:
  """What a function returns in the first process, in every process.

  Args:
    function: called in the first process alone. It returns what JSON has.

  Raises:
    Exception: in the first process, what the function raised.
    TrainingError: in the others, with the same message.
  """
  if jax.process_count() == 1:
    return function()
  message, raised = b"", None
  if not jax.process_index():
    try:
      outcome = {"result": function()}
    except Exception as error:  # The others wait for whatever it is.
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
