"""Compiles the train step for a machine that is not there, and counts it."""

import dataclasses
import math
from typing import Any

import jax

from spatial_mamba_jax.errors import UserError, one_line
from spatial_mamba_jax.forecast import hlo
from spatial_mamba_jax.forecast.collectives import collectives_of, total
from spatial_mamba_jax.forecast.roofline import Work, sent_by_device
from spatial_mamba_jax.forecast.topology import (
  accelerator_of,
  as_default_device,
  devices_of,
  domain_of,
)
from spatial_mamba_jax.hardware import Accelerator
from spatial_mamba_jax.models.flops import TRAINING_FACTOR, jaxpr_flops
from spatial_mamba_jax.training.config import Schedule, TrainConfig
from spatial_mamba_jax.training.program import Program, make_program
from spatial_mamba_jax.training.sharding import make_mesh
from spatial_mamba_jax.training.speed import image_flops


class DoesNotFitError(UserError):
  """The compiler found no room for the program in device memory."""

  status = 1  # The exit status of the command.


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a device holds during a step.

  Attributes:
    parameters: the parameters, and the statistics of BatchNorm.
    moments: the optimizer's.
    average: the moving average of the weights.
    batch: the device's part of the batch, and the sums of the log.
    temporaries: activations, gradients and gathered parameters, at their peak,
      and the program itself.
  """

  parameters: int
  moments: int
  average: int
  batch: int
  temporaries: int

  @property
  def total(self) -> int:
    """Bytes of all."""
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled train step, counted.

  Attributes:
    target: the machine; see `topology`.
    accelerator: the figures of its devices.
    devices: how many there are.
    hosts: how many hosts have them.
    mesh: {axis: size}.
    times: the durations of the run, in steps.
    batch_size: images a step.
    image_flops: model FLOP of training on an image.
    memory: of a device.
    before: work of a device in a step before MESA; the same as `after` without.
    after: work of a device in a step with MESA's teacher.
    collectives: {kind: (runs, bytes that a device sends)} in a step.
    asynchronous: collectives in the program that other work may overlap.
    scheduled: all collectives in the program.
    program: the program that was compiled.
    compiled: what JAX compiled.
  """

  target: str
  accelerator: Accelerator
  devices: int
  hosts: int
  mesh: dict[str, int]
  times: Schedule
  batch_size: int
  image_flops: float
  memory: Memory
  before: Work
  after: Work
  collectives: dict[str, tuple[int, float]]
  asynchronous: int
  scheduled: int
  program: Program
  compiled: jax.stages.Compiled


def count_step(
  config: TrainConfig, target: str, *, train_examples: int
) -> Step:
  """Compiles the train step of an experiment, and counts its work.

  Args:
    config: the experiment.
    target: the machine; see `topology`.
    train_examples: the number of records in the training split.

  Raises:
    DoesNotFitError: the step needs more memory than a device has.
    UserError: nothing here compiles for the machine, or the config does not fit
      it.
  """
  accelerator, devices = accelerator_of(target), devices_of(target)
  program = make_program(
    config, make_mesh(config.mesh, devices), train_examples=train_examples
  )
  try:
    flops_of_image = image_flops(program)
  except NotImplementedError as error:  # Of a kernel that the config names.
    raise UserError(f"there is no forecast: {one_line(error)}") from error
  with (
    as_default_device(target),
    jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh),
  ):
    traced = program.train_step.trace(
      program.state_shapes, program.batch_shapes
    )
    step_flops = jaxpr_flops(traced.jaxpr.jaxpr)
    compiled = _compile(traced.lower(), target)
  text = compiled.as_text()
  assert text is not None
  teacher = _teacher_flops(program, flops_of_image)
  count = len(devices)
  domains = [domain_of(x) for x in program.mesh.devices.flat]
  after = _work(hlo.Program(text), step_flops / count, domains)
  before = _work(
    hlo.Program(text, cheapest=True), (step_flops - teacher) / count, domains
  )
  found = collectives_of(hlo.Program(text))
  return Step(
    target=target,
    accelerator=accelerator,
    devices=count,
    hosts=math.ceil(count / accelerator.host_devices),
    mesh=dict(program.mesh.shape),
    times=program.times,
    batch_size=config.batch_size,
    image_flops=flops_of_image,
    memory=_memory(program, compiled),
    before=before,
    after=after,
    collectives=total(found),
    asynchronous=sum(each.is_async for each in found),
    scheduled=len(found),
    program=program,
    compiled=compiled,
  )


def _compile(lowered, target):
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = one_line(error)
    if "RESOURCE_EXHAUSTED" not in text:
      raise
    raise DoesNotFitError(
      f"the step does not fit {target}: {text[:400]}"
    ) from error


def _teacher_flops(program, flops_of_image):
  """FLOP of MESA's teacher in a step: one forward pass."""
  if program.times.mesa_from is None:
    return 0.0
  return flops_of_image / TRAINING_FACTOR * program.config.batch_size


def _work(program, flops, domains):
  link, network = sent_by_device(collectives_of(program), domains)
  memory = float(hlo.total_bytes(program.launches()))
  return Work(flops=flops, memory=memory, link=link, network=network)


def _memory(program, compiled):
  plan = compiled.memory_analysis()
  assert plan is not None
  state = program.state_shapes
  parts = {
    "parameters": _bytes(state.weights),
    "moments": _bytes(state.opt_state),
    "average": _bytes(state.ema),
  }
  outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
  return Memory(
    **parts,
    batch=max(plan.argument_size_in_bytes - sum(parts.values()), 0),
    temporaries=plan.temp_size_in_bytes
    + plan.generated_code_size_in_bytes
    + max(outputs, 0),
  )


def _bytes(shapes: Any) -> int:
  """Bytes of a device's shards."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(shapes)
  )
