"""The model as a pure function of trees of arrays, for any other framework.

    python examples/pure_function.py

Parameters and statistics are nested dictionaries of `jax.Array`, so that
Equinox, Haiku, `jax.pmap`-style trainers and hand-written loops can hold them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import spatial_mamba_jax as smj

Tree = dict[Any, Any]


def split(model: smj.Classifier) -> tuple[Any, Tree, Tree]:
  """Returns (graphdef, parameters, statistics); the first is static."""
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def main() -> None:
  """Runs the model, and takes one step of gradient descent."""
  model = smj.create_model(
    "spatial_mamba_micro", num_classes=3, rngs=nnx.Rngs(0)
  )
  graphdef, params, stats = split(model)
  model.train()
  training_graphdef, *_ = split(model)

  def apply(params: Tree, stats: Tree, images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, nnx.State(params), nnx.State(stats))(images)

  def loss(params, stats, images, labels):
    model = nnx.merge(
      training_graphdef, nnx.State(params), nnx.State(stats), copy=True
    )
    logits = jax.nn.log_softmax(model(images))
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return -logits[jnp.arange(len(labels)), labels].mean(), stats

  @jax.jit
  def step(params, stats, images, labels):
    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, stats), gradients = gradient(params, stats, images, labels)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return params, stats, value

  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  print("logits", jax.jit(apply)(params, stats, images))
  for _ in range(2):
    params, stats, value = step(params, stats, images, jnp.array([0, 2]))
    print("loss", value)


if __name__ == "__main__":
  main()
