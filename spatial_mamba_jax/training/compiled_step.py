"""A compiled train step as a file, so that a run starts without compiling.

The file holds a line of JSON, which says what the step was compiled for, and
what JAX serialised. Loading a file can run any code: load only your own.
"""

import dataclasses
import hashlib
import json
import pathlib
import pickle
from importlib.metadata import version
from typing import Any

import jax
import spatial_mamba_kernels
from jax.experimental import serialize_executable

import spatial_mamba_jax
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.experiment import differences, program_fields
from spatial_mamba_jax.training.program import Program


def compile_step(program: Program) -> jax.stages.Compiled:
  """Compiles the train step of a program."""
  shapes = program.state_shapes, program.batch_shapes
  return program.train_step.lower(*shapes).compile()


def save_step(
  path: pathlib.Path, program: Program, compiled: jax.stages.Compiled
) -> None:
  """Writes a compiled train step.

  Raises:
    TrainingError: the platform cannot serialise programs.
  """
  try:
    payload, _, _ = serialize_executable.serialize(compiled)
  # JAX and its plugins raise these where a platform does not serialise.
  except (RuntimeError, ValueError, pickle.PicklingError) as error:
    kind = program.mesh.devices.flat[0].device_kind
    raise TrainingError(
      f"{path}: a program for {kind} cannot be saved: {one_line(error)[:200]}"
    ) from error
  header = _description(program) | {
    "sha256": hashlib.sha256(payload).hexdigest()
  }
  write_whole(path, json.dumps(header).encode() + b"\n" + payload)


def load_step(path: pathlib.Path, program: Program) -> jax.stages.Compiled:
  """Reads a compiled train step for the devices of a program.

  Args:
    path: a file that `save_step` wrote.
    program: the program of the run.

  Returns:
    The train step, (state, batch) -> state.

  Raises:
    TrainingError: it is no such file, or it was compiled for something else;
      the message says for what.
  """
  line, _, payload = path.read_bytes().partition(b"\n")
  try:
    header = json.loads(line)
    digest = header.pop("sha256")
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise TrainingError(f"{path} has no compiled train step") from error
  if digest != hashlib.sha256(payload).hexdigest():
    raise TrainingError(f"{path} is damaged: forecast --save it again")
  now = json.loads(json.dumps(_description(program)))
  if different := differences(header, now):
    raise TrainingError(
      f"{path} was compiled for another run: {'; '.join(different[:3])}; save"
      " it again, or train without --compiled"
    )
  return _load(path, payload, program)


def _load(path, payload, program):
  arguments = program.state_shapes, program.batch_shapes
  devices = list(program.mesh.devices.flat)
  try:
    return serialize_executable.deserialize_and_load(
      payload,
      jax.tree.structure((arguments, {})),
      jax.tree.structure(arguments[0]),
      devices[0].client,
      devices,
    )
  # What a pickle raises is open.
  except Exception as error:
    raise TrainingError(
      f"{path} does not load on {devices[0].device_kind}:"
      f" {one_line(error)[:300]}; train without --compiled"
    ) from error


def _description(program: Program) -> dict[str, Any]:
  """Returns {name: value} of what a compiled step depends on.

  Not known are the source of a task outside of this package, the versions of
  libtpu and CUDA, and XLA's flags.
  """
  device = program.mesh.devices.flat[0]
  slices = {getattr(x, "slice_index", 0) for x in program.mesh.devices.flat}
  times = dataclasses.asdict(program.times)
  return {
    **program_fields(program.config),
    **{f"times.{x}": times[x] for x in ("steps", "warmup", "mesa_from")},
    "jax": jax.__version__,
    "jaxlib": version("jaxlib"),
    "source": _source_digest(),
    "device": device.device_kind,
    "mesh": dict(program.mesh.shape),
    "slices": len(slices),
    "x64": jax.config.read("jax_enable_x64"),
  }


def _source_digest() -> str:
  """Returns a digest of the source of this package and of the kernels."""
  digest = hashlib.sha256()
  for package in (spatial_mamba_jax, spatial_mamba_kernels):
    root = pathlib.Path(package.__path__[0])
    for path in sorted(root.rglob("*.py")):
      digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return digest.hexdigest()
