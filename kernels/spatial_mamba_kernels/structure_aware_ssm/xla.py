"""The structure-aware SSM in plain JAX, composed of the scan and the fusion."""

from spatial_mamba_kernels.observation import observe
from spatial_mamba_kernels.selective_scan import states as scan
from spatial_mamba_kernels.state_fusion import fuse
from spatial_mamba_kernels.taps import DILATIONS
from spatial_mamba_kernels.typing import Array, Float


def structure_aware_ssm(
  u: Float[Array, "B H W D"],
  delta: Float[Array, "B H W D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B H W N"],
  C: Float[Array, "B H W N"],
  D: Float[Array, " D"],
  kernels: Float[Array, "3 3 3 D"],
  alpha: Float[Array, " 3"],
  delta_bias: Float[Array, " D"],
  *,
  implementation: str | None,
) -> Float[Array, "B H W D"]:
  """See `spatial_mamba_kernels.structure_aware_ssm`."""
  batch, height, width, _ = u.shape

  def tokens(x):
    return x.reshape(batch, height * width, -1)

  states = scan(
    tokens(u),
    tokens(delta),
    A,
    tokens(B),
    delta_bias,
    implementation=implementation,
  )
  states = states.reshape(batch, height, width, *states.shape[2:])
  fused = fuse(states, kernels, alpha, DILATIONS)
  return observe(C, fused, D, u)
