"""A model's accuracy over a whole split."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from spatial_mamba_jax.data import DataConfig, Source, evaluation_batches
from spatial_mamba_jax.training.sharding import shard_batch
from spatial_mamba_jax.training.state import Arrays, Weights


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The outcome.

  Attributes:
    top1: share of images whose label scores highest.
    top5: share of images whose label is among the five highest.
    loss: mean cross-entropy, in nats.
    images: images counted.
    unreadable: images of this process that could not be read.
  """

  top1: float
  top5: float
  loss: float
  images: int
  unreadable: int

  def __str__(self) -> str:
    line = (
      f"top-1 {100 * self.top1:.2f}%  top-5 {100 * self.top5:.2f}%"
      f"  loss {self.loss:.4f}  images {self.images}"
    )
    return line + f"  unreadable {self.unreadable}" * bool(self.unreadable)


def evaluate(
  eval_step: Callable[[Weights, dict[str, jax.Array]], Arrays],
  weights: Weights,
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  mesh: Mesh,
) -> Evaluation:
  """Evaluates every image of a source once.

  Args:
    eval_step: from `make_eval_step`, jitted.
    weights: those to evaluate, replicated over the mesh.
    source: the images.
    config: their transforms.
    batch_size: images a step, over all processes and devices.
    mesh: the devices.
  """
  sums: dict[str, float] = {}
  with evaluation_batches(
    source,
    config,
    batch_size=batch_size // jax.process_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ) as batches:
    # One step behind, so that the device works while the next batch is read.
    parts = (eval_step(weights, shard_batch(batch, mesh)) for batch in batches)
    for part, _ in itertools.pairwise(itertools.chain(parts, (None,))):
      # float64 on the host: float32 stops counting at 2**24.
      for name, value in jax.device_get(part).items():
        sums[name] = sums.get(name, 0.0) + float(value)
    unreadable = len(batches.unreadable)
  images = max(sums["images"], 1)
  return Evaluation(
    top1=sums["top1"] / images,
    top5=sums["top5"] / images,
    loss=sums["loss"] / images,
    images=int(sums["images"]),
    unreadable=unreadable,
  )
