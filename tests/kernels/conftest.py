"""Arguments of the structure-aware SSM."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def ssm_arguments():
  """(batch, height, width, channels, states, dtype, images=) -> {name: array}.

  `images` is the type of what has one number or more a pixel.
  """

  def arguments(
    batch, height, width, channels, n, dtype=jnp.float32, images=None
  ):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    image, kind = (batch, height, width), images or dtype
    return {
      "u": normal(*image, channels, dtype=kind),
      "delta": normal(*image, channels, dtype=kind),
      "A": -jnp.exp(normal(channels, n)),
      "B": normal(*image, n, dtype=kind),
      "C": normal(*image, n, dtype=kind),
      "D": normal(channels),
      "kernels": normal(3, 3, 3, channels),
      "alpha": normal(3),
      "delta_bias": normal(channels),
    }

  return arguments
