"""Flax NNX: create, train with a hand-written step, save, load, run.

    python examples/nnx_training.py

It needs only the models. Replace the random images by a batch of yours.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spatial_mamba_jax as smj

CLASSES = 3


@nnx.jit
def train_step(
  model: smj.Classifier,
  optimizer: nnx.Optimizer,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> jax.Array:
  """Updates the model in place; returns the loss before the update."""

  def loss(model):
    logits = model(images, rngs=nnx.Rngs(drop_path=key))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()

  value, gradients = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradients)
  return value


@nnx.jit
def apply(model: smj.Classifier, images: jax.Array) -> jax.Array:
  """Returns logits."""
  return model(images)


def main() -> None:
  """Overfits eight images."""
  overrides = {"num_classes": CLASSES, "drop_path_rate": 0.1}
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0), **overrides)
  images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
  labels = jnp.arange(8) % CLASSES
  optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
  model.train()
  for step in range(50):
    key = jax.random.fold_in(jax.random.key(2), step)
    loss = train_step(model, optimizer, images, labels, key)
    if step % 10 == 0:
      print(f"step {step}: loss {loss:.4f}")
  model.eval()

  # Saves NumPy arrays under the names of the authors' PyTorch model.
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory) / "weights.npz"
    np.savez(path, allow_pickle=False, **smj.convert.to_torch(model))
    loaded = smj.create_model(
      "spatial_mamba_micro", rngs=nnx.Rngs(3), **overrides
    )
    with np.load(path) as weights:
      smj.convert.from_torch(loaded, dict(weights))
  logits = apply(loaded, images)
  print("predicted", logits.argmax(-1), "of", labels)
  difference = jnp.abs(logits - apply(model, images)).max()
  print("largest difference after loading", difference)


if __name__ == "__main__":
  main()
