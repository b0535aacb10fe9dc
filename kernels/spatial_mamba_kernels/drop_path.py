"""Stochastic depth: residual branches that are dropped in training."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.typing import Array, Float


def all_kept(x: ArrayLike) -> Float[Array, "B"]:
  """The scales of branches of which none is dropped."""
  return jnp.ones(jnp.shape(x)[:1], jnp.float32)


def drop_path(
  x: Float[Array, "B ..."], scale: Float[Array, "B"]
) -> Float[Array, "B ..."]:
  """A residual branch, times what was drawn for each image: 0 or more.

  Where that is 0 the result is, whatever is in the branch. Nothing is
  propagated back to `scale`.
  """
  scale = jax.lax.stop_gradient(scale)
  scale = scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(scale > 0, x * scale, 0)
