"""An MLP in plain JAX."""

from spatial_mamba_kernels.activations import gelu
from spatial_mamba_kernels.dispatch import keep
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float


def mlp(
  x: Float[Array, "B H W C"],
  w1: Float[Array, "C F"],
  b1: Float[Array, "F"],
  w2: Float[Array, "F C"],
  b2: Float[Array, "C"],
  residual: Float[Array, "B H W C"],
  branch_scale: Float[Array, "B"],
) -> Float[Array, "B H W C"]:
  """See `spatial_mamba_kernels.mlp`."""
  branch = _linear(gelu(keep(_linear(x, w1, b1))), w2, b2)
  return residual + drop_path(branch, branch_scale)


def _linear(x, weights, bias):
  y = x @ weights.astype(x.dtype)
  return y + with_rank_of(y, bias.astype(x.dtype))
