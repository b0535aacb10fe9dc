"""Checkpoints on a fast disk of each host, copied to the working directory."""

import hashlib
import json
import pathlib
import shutil
import uuid
from contextlib import suppress
from typing import Any

import jax

from spatial_mamba_jax.errors import reason, say
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.processes import from_first_process
from spatial_mamba_jax.training.save_clock import Save
from spatial_mamba_jax.training.state import TrainState

# Local checkpoints kept. If a run is killed when only some of its processes
# have finished one, all still have the one before.
_KEPT = 2
# First part of the name of a run's directory on a local disk.
_PREFIX = "spatial_mamba_jax"


class TieredCheckpoints(Checkpoints):
  """The checkpoints of a run, saved on the disks of its hosts first.

  Every process saves what its devices hold to its host's disk. A copy goes to
  the working directory in the background, unless the copy before it is still
  being written. A checkpoint that the run waits for is always in the working
  directory. A run resumes from the newest checkpoint of both tiers.
  """

  def __init__(
    self, shared: pathlib.Path, local: pathlib.Path, *, keep_last: int
  ):
    """Opens both tiers.

    Args:
      shared: the directory of the shared checkpoints.
      local: the directory of this process on its host.
      keep_last: how many of the newest shared checkpoints to keep.

    Raises:
      TrainingError: a directory cannot be written.
    """
    super().__init__(shared, keep_last=keep_last)
    self._local_directory = local
    try:
      self._local = Checkpoints(local, keep_last=_KEPT, per_process=True)
    except TrainingError as error:
      raise TrainingError(
        f"config.local_checkpoint_dir: {error}; choose another directory, or"
        " leave it out"
      ) from error

  def __exit__(self, kind: object, *error: object) -> None:
    try:
      self._local.__exit__(kind, *error)
    finally:
      super().__exit__(kind, *error)
    if kind is None and self._is_copied():
      _remove(self._local_directory)

  def _is_copied(self):
    """Whether the working directory has all that is needed."""
    return max(self.steps(), default=0) >= max(self._local.steps(), default=0)

  def newest(self) -> int | None:
    """Returns the newest step that is undamaged in either tier."""
    local = self._local.newest()
    return from_first_process(
      lambda: self._files.first_whole(
        [step for step in self.steps()[::-1] if step > (local or 0)],
        otherwise=local,
      )
    )

  def set_aside_after(self, step: int) -> None:
    """Renames newer checkpoints of both tiers, and a damaged copy of `step`."""
    self._local.set_aside_after(step)
    super().set_aside_after(step)
    if self._is_local(step):  # `newest` has not checked the copy.
      from_first_process(lambda: self._files.set_aside_if_damaged(step))

  def save(
    self, state: TrainState, experiment: dict[str, Any], *, wait: bool = False
  ) -> None:
    """Starts to save a state on the local disk, and a copy in the workdir."""
    self._local.save(state, experiment)
    if wait or not self.is_writing():
      super().save(state, experiment, wait=wait)

  def check(self) -> None:
    """Raises a SaveError if a save of either tier has failed."""
    self._local.check()
    super().check()

  def wait(self) -> None:
    """Waits until all that was begun is on disk, in both tiers."""
    self._local.wait()
    super().wait()

  def finished_save(self) -> Save | None:
    """Returns the cost of a finished save of either tier."""
    if save := self._local.finished_save():
      return save._replace(is_local=True)
    return super().finished_save()

  def experiment(self, step: int) -> dict[str, Any]:
    """Returns the experiment of a checkpoint of either tier."""
    if self._is_local(step):
      return self._local.experiment(step)
    return super().experiment(step)

  def restore_state(self, step: int, like: TrainState) -> TrainState:
    """Restores a state, from the local disk if it is there."""
    if not self._is_local(step):
      return super().restore_state(step, like)
    if not jax.process_index():
      say(f"step {step} is restored from {self._local_directory}")
    return self._local.restore_state(step, like)

  def _is_local(self, step: int) -> bool:
    return step in self._local.steps()


def open_checkpoints(
  config: TrainConfig, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> Checkpoints:
  """Opens the checkpoints of a run, in two tiers if its config says so.

  Raises:
    UserError: a directory cannot be written or is not of this machine.
  """
  shared, keep_last = workdir / "checkpoints", config.keep_last
  if not config.local_checkpoint_dir:
    return Checkpoints(shared, keep_last=keep_last)
  root = local_path(config.local_checkpoint_dir, "config.local_checkpoint_dir")
  local = _directory(root, workdir, mesh)
  return TieredCheckpoints(shared, local, keep_last=keep_last)


def _directory(
  root: pathlib.Path, workdir: pathlib.Path, mesh: jax.sharding.Mesh
) -> pathlib.Path:
  """Returns the directory of this process on its host's disk.

  It belongs to one run, and to one place of its devices in the mesh: what a
  process saves there is of no use to another one.

  Args:
    root: the directory that the user chose for all runs.
    workdir: the working directory, which stores the identity of the run.
    mesh: the devices.

  Raises:
    TrainingError: the identity cannot be written.
  """
  run = root / f"{_PREFIX}-{from_first_process(lambda: _identity(workdir))}"
  places = [device.process_index for device in mesh.devices.flat]
  mesh_name = _digest(json.dumps([list(mesh.shape.items()), places]))
  if not jax.process_index():
    say(f"local checkpoints are in {run}")
    others = {path.name for path in run.glob("*-*")}
    if any(not name.startswith(mesh_name) for name in others):
      say(f"{run} also has some of another mesh, which this one cannot use")
  return run / f"{mesh_name}-{jax.process_index()}"


def _remove(directory: pathlib.Path) -> None:
  """Removes a process's directory, and those of other meshes beside it."""
  mesh_name = directory.name.partition("-")[0]
  for path in directory.parent.glob("*-*"):
    if path == directory or not path.name.startswith(mesh_name):
      shutil.rmtree(path, ignore_errors=True)
  with suppress(OSError):  # Other processes of the host may have files.
    directory.parent.rmdir()


def _identity(workdir: pathlib.Path) -> str:
  """Returns the name of the run in `workdir`; a copy of it has another name."""
  path = workdir / "run_id"
  try:
    if not path.exists():
      write_whole(path, uuid.uuid4().hex)
    return _digest(f"{workdir.resolve()} {path.read_text()}")
  except (OSError, ValueError) as error:
    cause = reason(error, path) if isinstance(error, OSError) else str(error)
    raise TrainingError(f"{path} cannot be used: {cause}; remove it") from error


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]
