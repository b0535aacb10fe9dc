"""Stochastic depth: training drops residual branches at random."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.typing import Array, Float


def all_kept(x: ArrayLike) -> Float[Array, "B"]:
  """Returns scales of 1, which drop no branch."""
  return jnp.ones(jnp.shape(x)[:1], jnp.float32)


def drop_path(
  x: Float[Array, "B ..."], scale: Float[Array, "B"]
) -> Float[Array, "B ..."]:
  """Multiplies each image's residual branch by its scale, which is 0 or more.

  Where the scale is 0 the result is 0, even if the branch is not finite. The
  cotangent of `scale` is 0.
  """
  scale = jax.lax.stop_gradient(scale)
  scale = scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(scale > 0, x * scale, 0)
