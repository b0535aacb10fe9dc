"""The operators by themselves, with nothing but JAX.

    python examples/kernels_only.py

A structure-aware state space model over an image of random tokens: as one fused
operator, as separate operators, and its gradient.
"""

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk


def main() -> None:
  """Runs the fused operator, and the scan and the fusion separately."""
  batch, height, width, channels, states = 2, 8, 8, 4, 1
  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape: int) -> jax.Array:
    return jax.random.normal(next(keys), shape)

  image = (batch, height, width)
  u, delta = normal(*image, channels), normal(*image, channels)
  B, C = normal(*image, states), normal(*image, states)
  A = -jnp.exp(normal(channels, states))  # Negative: states decay.
  D = normal(channels)
  # (dilation 1, 3 or 5; row; column; channel), and a weight for each dilation.
  kernels, alpha = normal(3, 3, 3, channels), jnp.full(3, 1 / 3)

  @jax.jit
  def fused(u):
    return smk.structure_aware_ssm(u, delta, A, B, C, D, kernels, alpha)

  @jax.jit
  def in_parts(u):
    def tokens(x):
      return x.reshape(batch, height * width, -1)

    h = smk.selective_scan(tokens(u), tokens(delta), A, tokens(B))
    h = h[..., 0].reshape(u.shape)  # The only state.
    return C * smk.state_fusion(h, kernels, alpha) + D * u

  print("output", fused(u).shape)
  print("largest difference", jnp.abs(fused(u) - in_parts(u)).max())
  gradient = jax.jit(jax.grad(lambda u: jnp.sum(fused(u) ** 2)))(u)
  print("norm of the gradient", jnp.linalg.norm(gradient))


if __name__ == "__main__":
  main()
