"""The items of a checkpoint, and how Orbax saves and restores them."""

import os
import pathlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.training.digests import write_digests
from spatial_mamba_jax.training.state import TrainState


class _Handler(ocp.CompositeCheckpointHandler):
  """Writes the digests of all files before a checkpoint gets its name."""

  on_written: Callable[[pathlib.Path], None]

  def finalize(self, directory: Any) -> None:
    super().finalize(directory)
    write_digests(pathlib.Path(directory))
    self.on_written(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class Items(ocp.args.Composite):
  """The items of a checkpoint: {name: arguments of its handler}."""


def make_checkpointer(
  on_written: Callable[[pathlib.Path], None], *, per_process: bool = False
) -> ocp.AsyncCheckpointer:
  """Creates what saves and restores `Items`, saving in the background.

  Args:
    on_written: called in the background, in the process that owns the
      directory, with the directory of a checkpoint whose files are all written.
    per_process: whether every process saves the data of its own devices to a
      directory of its own. Otherwise all processes share a directory, which the
      first one owns.
  """
  options = ocp.options.MultiprocessingOptions()
  tree_options: dict[str, Any] = {}
  if per_process:
    options = ocp.options.MultiprocessingOptions(
      primary_host=None, barrier_sync_key_prefix="per_process"
    )
    arrays = type_handlers.ArrayHandler(
      primary_host=None, replica_id=None, use_replica_parallel=False
    )
    tree_options["type_handler_registry"] = (
      type_handlers.create_type_handler_registry((jax.Array, arrays))
    )
  # Not the standard handler, which cannot restore a part of an item.
  trees = partial(
    ocp.PyTreeCheckpointHandler,
    multiprocessing_options=options,
    **tree_options,
  )
  json = partial(ocp.JsonCheckpointHandler, multiprocessing_options=options)
  # If directories were created in the background and one cannot be created,
  # threads would wait for it for minutes, and the process for these threads.
  # If every process creates its own, a process would write as soon as another
  # one has created its directories.
  async_options = ocp.options.AsyncOptions(
    create_directories_asynchronously=False
  )
  handler = _Handler(
    composite_options=ocp.CompositeOptions(
      multiprocessing_options=options, async_options=async_options
    ),
    ema=trees(),
    state=trees(),
    experiment=json(),
    # `CheckpointFiles` writes this item. Without a handler, Orbax would warn
    # about it.
    metrics=json(),
  )
  handler.on_written = on_written
  return ocp.AsyncCheckpointer(
    handler, multiprocessing_options=options, async_options=async_options
  )


def restore_like(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
  """Returns the arguments that restore a tree on the shardings of `like`."""
  args = ocp.checkpoint_utils.construct_restore_args(like)
  return ocp.args.PyTreeRestore(like, restore_args=args, **options)


def without_ema(state: TrainState) -> dict[str, Any]:
  """Returns the item "state" of a training state."""
  return {
    "step": state.step,
    "weights": state.weights,
    "opt_state": state.opt_state,
    "window": state.window,
    "bad_step": state.bad_step,
  }


def cause(error: Exception) -> str:
  """Returns the message of the operating system, or a truncated one."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = one_line(error)
  # TensorStore has "[os_error_code='28']", earlier "[OS error 28: ...]".
  if number := re.search(r"os.error\D{0,8}(\d+)", text, re.IGNORECASE):
    return os.strerror(int(number[1]))
  return text if len(text) <= 200 else f"{text[:197]}..."
