"""What the whole recipe takes, from the times of its steps."""

import dataclasses
import os

from spatial_mamba_jax.forecast.compilation import Step
from spatial_mamba_jax.forecast.roofline import StepTime, mfu, step_time

# Images a second that a core prepares: docs/measurements.md, measured with
# `python -m benchmarks.input` for the complete ImageNet recipe.
IMAGES_PER_CORE = 251.0
# Share of a GPU's memory that JAX takes unless the variable says another.
_MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Forecast:
  """The forecast of a run on a machine.

  Attributes:
    step: the compiled step.
    before: the time of a step before MESA begins; without MESA, of each step.
    after: the time of a step with MESA's teacher.
    seconds: of all steps of the recipe.
    price: of the recipe; None where no price of a chip-hour is given.
    images_per_core: images a second that a core prepares.
    usable_memory: bytes of a device that a program can have.
  """

  step: Step
  before: StepTime
  after: StepTime
  seconds: float
  price: float | None
  images_per_core: float
  usable_memory: float

  @property
  def images_per_second(self) -> float:
    """Of all chips together, over the whole recipe."""
    return self.step.batch_size * self.step.times.steps / self.seconds

  @property
  def days(self) -> float:
    """Of the recipe."""
    return self.seconds / 86400

  @property
  def chip_hours(self) -> float:
    """Of the recipe."""
    return self.seconds / 3600 * self.step.devices

  @property
  def mfu(self) -> float:
    """Over the whole recipe."""
    step = self.step
    model_flops = step.image_flops * step.batch_size / step.devices
    return mfu(model_flops, self.seconds / step.times.steps, step.accelerator)

  @property
  def input_cores(self) -> float:
    """Cores of a host that prepare its images as fast as they are trained."""
    fastest = min(self.before.total, self.after.total)
    images = self.step.batch_size / fastest / self.step.hosts
    return images / self.images_per_core

  @property
  def problems(self) -> list[str]:
    """Why the run cannot run on this machine; empty if it can."""
    step, found = self.step, []
    if step.memory.total > self.usable_memory:
      found.append(
        f"a chip needs {step.memory.total / 1e9:.1f} GB and has"
        f" {self.usable_memory / 1e9:.1f}: use more chips, raise"
        " --config.mesh.fsdp or --config.accumulation_steps"
      )
    cores = step.accelerator.cores
    if self.input_cores > cores:
      found.append(
        f"the input needs up to {self.input_cores:.0f} cores a host and a host"
        f" has {cores}: at the fastest step, it feeds"
        f" {cores / self.input_cores:.0%} of the images"
      )
    return found


def forecast(
  step: Step, *, price: float | None, images_per_core: float = IMAGES_PER_CORE
) -> Forecast:
  """Forecasts the recipe.

  Args:
    step: the compiled step.
    price: of a chip-hour; None if it is not known.
    images_per_core: images a second that a core prepares.
  """
  before = step_time(step.before, step.accelerator)
  after = step_time(step.after, step.accelerator)
  seconds = recipe_seconds(
    before.total, after.total, step.times.steps, step.times.mesa_from
  )
  hours = seconds / 3600 * step.devices
  return Forecast(
    step=step,
    before=before,
    after=after,
    seconds=seconds,
    price=None if price is None else price * hours,
    images_per_core=images_per_core,
    usable_memory=usable_memory(step),
  )


def recipe_seconds(
  before: float, after: float, steps: int, mesa_from: int | None
) -> float:
  """Seconds of all steps; `after` counts from the step `mesa_from` on."""
  first = steps if mesa_from is None else mesa_from
  return first * before + (steps - first) * after


def usable_memory(step: Step) -> float:
  """Bytes of a device that JAX gives to a program."""
  memory = step.accelerator.memory
  if step.accelerator.kinds[0].startswith("TPU"):
    return memory
  return memory * float(os.environ.get(_MEMORY_SHARE, _GPU_SHARE))
