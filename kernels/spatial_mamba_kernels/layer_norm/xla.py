"""Layer normalisation in plain JAX, alone and gated.

Axis letters: B batch, H and W height and width, C channels.
"""

from spatial_mamba_kernels.activations import silu
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.normalization import normalize
from spatial_mamba_kernels.typing import Array, Float


def layer_norm(
  x: Float[Array, "B H W C"], scale: Float[Array, "C"], bias: Float[Array, "C"]
) -> Float[Array, "B H W C"]:
  """Layer normalisation of each token, in the dtype of `x`."""
  y, _, _ = normalize(x, scale, bias, axes=(3,))
  return y.astype(x.dtype)


def gated(
  x: Float[Array, "B H W C"],
  scale: Float[Array, "C"],
  bias: Float[Array, "C"],
  gate: Float[Array, "B H W C"],
  branch_scale: Float[Array, "B"],
) -> Float[Array, "B H W C"]:
  """See `spatial_mamba_kernels.gated_layer_norm`."""
  return drop_path(layer_norm(x, scale, bias) * silu(gate), branch_scale)
