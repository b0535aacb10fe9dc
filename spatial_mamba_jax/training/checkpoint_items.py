"""The items of a checkpoint, and how Orbax saves and restores them."""

import pathlib
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from spatial_mamba_jax.training.digests import write_digests


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
  on_written: Callable[[pathlib.Path], None],
) -> ocp.AsyncCheckpointer:
  """Creates what saves and restores `Items`, saving in the background.

  Args:
    on_written: called in the background, in the first process, with the
      directory of a checkpoint whose files are all written.
  """
  handler = _Handler(
    ema=ocp.StandardCheckpointHandler(),
    # Not the standard handler, which cannot restore a part of an item.
    state=ocp.PyTreeCheckpointHandler(),
    experiment=ocp.JsonCheckpointHandler(),
    # `CheckpointFiles` writes this item. Without a handler, Orbax would warn
    # about it.
    metrics=ocp.JsonCheckpointHandler(),
  )
  handler.on_written = on_written
  return ocp.AsyncCheckpointer(
    handler,
    # If True and a directory cannot be created, threads wait for it for
    # minutes, and the process waits for these threads.
    async_options=ocp.options.AsyncOptions(
      create_directories_asynchronously=False
    ),
  )


def restore_like(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
  """Returns the arguments that restore a tree on the shardings of `like`."""
  args = ocp.checkpoint_utils.construct_restore_args(like)
  return ocp.args.PyTreeRestore(like, restore_args=args, **options)
