"""Values of a window of steps: means over its steps, and its speed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_jax.errors import say
from spatial_mamba_jax.hardware import by_kind
from spatial_mamba_jax.models.flops import TRAINING_FACTOR, count_flops
from spatial_mamba_jax.training.program import Program


def window_metrics(
  program: Program, window: Mapping[str, jax.Array], step: int
) -> dict[str, float]:
  """Returns the values to log, and "images", how many the window has.

  Args:
    program: the task and the schedule.
    window: `TrainState.window`, the sums over the steps.
    step: the last step of the window.
  """
  sums = {name: float(x) for name, x in jax.device_get(window).items()}
  # Optax passes Python scalars to JAX, which a transfer guard may forbid.
  with jax.transfer_guard("allow"):
    learning_rate = float(jnp.asarray(program.schedule(step - 1)))
  return {
    "loss": sums["loss"] / sums["steps"],
    **program.task.logged(sums),
    "grad_norm": sums["grad_norm"] / sums["steps"],
    "learning_rate": learning_rate,
    "images": sums["images"],
  }


def image_flops(program: Program) -> float:
  """Counts the model FLOPs of training on one image.

  They are those of the forward pass of the loss, times three. Recomputed
  activations, the teacher's predictions (MESA) and the optimizer do not count
  (arXiv 2204.02311). A linear probe has hardly a backward pass.

  Raises:
    NotImplementedError: the config names a kernel, which cannot be counted.
  """
  task, model = program.task, program.model
  # Without shardings, so that no mesh is needed.
  batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for name, x in program.batch_shapes.items()
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  prepared = jax.eval_shape(task.prepare, batch, key)

  def forward(weights, prepared, key):
    return model.apply(
      weights,
      lambda network: task.loss(network, prepared, key, None),
      train=True,
    )

  flops = count_flops(forward, model.shapes, prepared, key)
  factor = 1 if program.config.linear_probe else TRAINING_FACTOR
  return factor * flops / program.config.batch_size


def peak_flops(devices: Sequence[Any]) -> float | None:
  """Peak of all devices together; None where their kind is not known."""
  accelerator = by_kind(devices[0].device_kind)
  return accelerator.flops * len(devices) if accelerator else None


@dataclasses.dataclass(frozen=True)
class Speed:
  """Computes the speed of a window of steps.

  Attributes:
    image_flops: model FLOPs of training on an image; None if unknown.
    peak_flops: floating-point operations a second of all devices together;
      None if unknown.
  """

  image_flops: float | None
  peak_flops: float | None

  def of(self, images: float, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the values to log.

    Args:
      images: the number of images of a window; NaN if the speed is unknown.
      seconds: the seconds of each part of the window; see `Ledger`.

    Returns:
      `images_per_second`; `data_wait`, the share of time in which the loop
      waited for data; where known, `model_flops_per_second` of all devices
      together, and `mfu`, its share of their peak in bfloat16.
    """
    total = seconds["steps"] + seconds["input"]
    speed = {
      "images_per_second": images / total,
      "data_wait": seconds["input"] / total,
    }
    if self.image_flops is not None:
      flops = self.image_flops * speed["images_per_second"]
      speed["model_flops_per_second"] = flops
      if self.peak_flops is not None:
        speed["mfu"] = flops / self.peak_flops
    return speed


def speed_of(program: Program) -> Speed:
  """Counts FLOPs in the first process, which alone logs them."""
  flops = None
  if not jax.process_index():
    try:
      flops = image_flops(program)
    except NotImplementedError as error:
      say(f"model FLOPs are not logged: {error}")
  return Speed(flops, peak_flops(program.mesh.devices.flatten().tolist()))
