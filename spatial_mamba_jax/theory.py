"""Token mixers as matrices, for studies of what they compute.

Linear attention, Mamba and Spatial-Mamba map the L tokens of each channel by a
matrix that depends on the input (arXiv 2410.15091, section 4; for Mamba arXiv
2405.21060):

    y = M x,   M = sum over n of diag(C_n) F L_n diag(dt * B_n) + D I

L_n is lower triangular and decays from token s to token t; F mixes the states
of neighbours. Linear attention has no decay (A = 0, dt = 1) and F = I; Mamba
has F = I; Spatial-Mamba has both.

These matrices have L^2 entries a channel: use them for small images.
Axis letters: B batch, H and W height and width, L = H * W tokens, D channels, N
states.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from spatial_mamba_kernels.shapes import check_shapes
from spatial_mamba_kernels.typing import Array, Float


def mixing_matrix(
  dt: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  C: ArrayLike,
  *,
  D: ArrayLike | None = None,
  fusion: ArrayLike | None = None,
) -> Float[Array, "B D L L"]:
  """Returns the matrix M of each channel, with y = M x.

  Args:
    dt: [B, L, D], time steps, after softplus; ones for linear attention.
    A: [D, N], rates of decay, negative; zeros for linear attention, whose keys
      are `B` and whose queries are `C`.
    B: [B, L, N], the input projection of each token.
    C: [B, L, N], the observation of each token.
    D: [D], weights of the skip connection, or None for 0.
    fusion: [D, L, L], see `fusion_matrix`; None for the identity, as in Mamba.

  Returns:
    [B, D, L, L]: entry (t, s) is the weight of token s in output t.

  Raises:
    ValueError: the shapes are inconsistent.
  """
  arguments = {
    "dt": (dt, "B L D"),
    "A": (A, "D N"),
    "B": (B, "B L N"),
    "C": (C, "B L N"),
    "D": (D, "D"),
    "fusion": (fusion, "D L L"),
  }
  given = {k: pair for k, pair in arguments.items() if pair[0] is not None}
  dt, A, B, C, *_ = check_shapes("mixing_matrix", given)
  states = (
    decay_matrix(dt, A) * jnp.einsum("bsd,bsn->bdns", dt, B)[..., None, :]
  )
  if fusion is not None:
    states = jnp.einsum("dtr,bdnrs->bdnts", jnp.asarray(fusion), states)
  M = jnp.einsum("btn,bdnts->bdts", C, states)
  if D is None:
    return M
  skip = jnp.asarray(D)[None, :, None, None]
  return M + skip * jnp.eye(dt.shape[1], dtype=M.dtype)


def decay_matrix(dt: ArrayLike, A: ArrayLike) -> Float[Array, "B D N L L"]:
  """Returns by how much each token's state has decayed at each later token.

  Entry (t, s) is exp(A * (dt[s + 1] + ... + dt[t])) for s <= t, and 0 for
  s > t: the matrix of the recurrence h[t] = exp(dt[t] * A) * h[t - 1] + x[t].
  Every block below its diagonal has rank 1.

  Args:
    dt: [B, L, D], time steps, after softplus.
    A: [D, N], rates of decay.

  Raises:
    ValueError: the shapes are inconsistent.
  """
  dt, A = check_shapes("decay_matrix", {"dt": (dt, "B L D"), "A": (A, "D N")})
  until = jnp.cumsum(dt, axis=1)
  time = jnp.einsum("btd->bdt", until)
  time = time[..., :, None] - time[..., None, :]
  is_past = jnp.tri(dt.shape[1], dtype=bool)
  # Masked before the exponential, which would overflow for later tokens.
  time = jnp.where(is_past, time, 0)
  return jnp.exp(A[:, :, None, None] * time[:, :, None]) * is_past


def fusion_matrix(
  kernels: ArrayLike,
  alpha: ArrayLike,
  *,
  height: int,
  width: int,
  dilations: Sequence[int] = (1, 3, 5),
) -> Float[Array, "D L L"]:
  """Returns the state fusion (`smk.state_fusion`) as a matrix of each channel.

  Args:
    kernels: [M, 3, 3, D] (dilation, row, column, channel).
    alpha: [M], the weight of each dilation.
    height: H, rows of the image.
    width: W, its columns.
    dilations: M integers.

  Returns:
    [D, L, L]: entry (t, s) is the weight of the state of token s in the fused
    state of token t. A neighbour outside the image counts for the nearest pixel
    inside.

  Raises:
    ValueError: the shapes are inconsistent.
  """
  count = len(dilations)
  kernels, alpha = check_shapes(
    "fusion_matrix",
    {"kernels": (kernels, f"{count} 3 3 D"), "alpha": (alpha, str(count))},
  )
  row, column = jnp.divmod(jnp.arange(height * width), width)
  fused = jnp.zeros((kernels.shape[-1], row.size, row.size), kernels.dtype)
  for m, dilation in enumerate(dilations):
    for r in range(3):
      for c in range(3):
        above = jnp.clip(row + (r - 1) * dilation, 0, height - 1)
        left = jnp.clip(column + (c - 1) * dilation, 0, width - 1)
        weight = alpha[m] * kernels[m, r, c]
        neighbour = above * width + left
        fused = fused.at[:, jnp.arange(row.size), neighbour].add(
          weight[:, None]
        )
  return fused


def mixing_rows(
  mix: Callable[[Any, Any], Any],
  values: Float[Array, "B H W D"],
  operands: Any,
  tokens: Sequence[int] | Array,
) -> Float[Array, "T B H W D"]:
  """Returns rows of the matrix of any mixer, without the matrix.

  Args:
    mix: the `mix` of a `LinearMixer`, linear in its first argument and in each
      channel on its own. Several outputs of a channel are added.
    values: what it mixes. Only the shape matters.
    operands: the rest of its arguments.
    tokens: T indices of tokens, row by row of the image.

  Returns:
    For each token, the weight of every token in its output.
  """
  mixed, pullback = jax.vjp(lambda x: mix(x, operands), values)

  def row(token):
    _, height, width, _ = values.shape
    is_token = (jnp.arange(height * width) == token).astype(mixed.dtype)
    g = is_token.reshape(1, height, width, 1)
    return pullback(jnp.broadcast_to(g, mixed.shape))[0]

  return jax.lax.map(row, jnp.asarray(tokens))
