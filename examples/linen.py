"""Flax Linen, with `init` and `apply` as in big_vision, by Flax's own bridge.

    python examples/linen.py

The model becomes a Linen module with explicit variables. The statistics of
BatchNorm are the collection `batch_stats`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge

import spatial_mamba_jax as smj


class Classifier(nnx.Module):
  """The model in one mode. It takes a key, because `rngs` are Linen's own."""

  def __init__(self, *, train: bool, rngs: nnx.Rngs, **overrides: Any):
    self.model = smj.create_model("spatial_mamba_micro", rngs=rngs, **overrides)
    if train:
      self.model.train()

  def __call__(
    self, images: jax.Array, key: jax.Array | None = None
  ) -> jax.Array:
    rngs = None if key is None else nnx.Rngs(drop_path=key)
    return self.model(images, rngs=rngs)


def main() -> None:
  """Initialises and runs the model, and takes one step of gradient descent."""
  options = {"num_classes": 3, "drop_path_rate": 0.1}
  model = bridge.to_linen(Classifier, train=False, **options)
  training_model = bridge.to_linen(Classifier, train=True, **options)

  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  print({name: len(jax.tree.leaves(tree)) for name, tree in variables.items()})
  apply = jax.jit(model.apply)
  print("logits", apply(variables, images))

  @jax.jit
  def train_step(variables, images, labels, key):
    def loss(params):
      logits, updates = training_model.apply(
        {**variables, "params": params},
        images,
        key,
        mutable=["batch_stats"],
      )
      likelihoods = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
      return -likelihoods.mean(), updates

    params = variables["params"]
    gradients, updates = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return {**variables, **updates, "params": params}

  labels = jnp.array([0, 2])
  variables = train_step(variables, images, labels, jax.random.key(2))
  print("logits", apply(variables, images))


if __name__ == "__main__":
  main()
