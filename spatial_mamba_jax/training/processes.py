"""What the processes of a run on several hosts must decide as one."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.training.config import TrainingError


def from_first_process(function: Callable[[], Any]) -> Any:
  """What a function returns in the first process, in every process.

  Args:
    function: called in the first process alone. It returns what JSON has.

  Raises:
    TrainingError: in every process, where the function raised a mistake.
  """
  if jax.process_count() == 1:
    return function()
  message = b""
  if not jax.process_index():
    try:
      outcome = {"result": function()}
    except (OSError, UserError) as error:
      outcome = {"error": str(error)}
    message = json.dumps(outcome).encode()
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
  content = np.zeros(size, np.uint8)
  content[: len(message)] = np.frombuffer(message, np.uint8)
  content = np.asarray(multihost_utils.broadcast_one_to_all(content))
  outcome = json.loads(content.tobytes())
  if "error" in outcome:
    raise TrainingError(outcome["error"])
  return outcome["result"]
