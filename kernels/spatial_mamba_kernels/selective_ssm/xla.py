"""The selective SSM in plain JAX, for every platform XLA compiles for."""

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from spatial_mamba_kernels.observation import observe
from spatial_mamba_kernels.selective_scan import states as scan
from spatial_mamba_kernels.shapes import state_dtype
from spatial_mamba_kernels.typing import Array, Float, Size

# Bytes of the states that are in memory at once, which a CPU's cache can hold.
# On 2 cores, with 16 states a channel, forward and backward took a third to a
# half of the time that they took in chunks of 128 tokens.
_CHUNK_BYTES = 2**21
# Fewest and most tokens of a chunk; of fewer the loop would cost too much.
_SHORTEST, _LONGEST = 8, 64


def selective_ssm(
  u: Float[Array, "B L D"],
  delta: Float[Array, "B L D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B L N"],
  C: Float[Array, "B L N"],
  D: Float[Array, " D"],
  delta_bias: Float[Array, " D"],
  *,
  implementation: str | None,
) -> Float[Array, "B L D"]:
  """Scans chunk by chunk; the backward pass recomputes the states of each."""

  @jax.checkpoint
  def chunk(first, tokens):
    u, delta, B, C = tokens
    h = scan(u, delta, A, B, delta_bias, first, implementation=implementation)
    return h[:, -1].mT, observe(C, h, D, u)

  tokens = u, delta, B, C
  batch, length, channels = u.shape
  size = chunk_length(batch, length, channels * A.shape[1])
  if is_symbolic_dim(length) or length <= size:
    return chunk(None, tokens)[1]
  whole = length - length % size
  chunks = jax.tree.map(lambda x: _chunks(x[:, :whole], size), tokens)
  zeros = jnp.zeros_like(u[:, 0], state_dtype(u, delta, A, B))
  first = jnp.broadcast_to(zeros[..., None], (*zeros.shape, A.shape[1]))
  last, y = jax.lax.scan(chunk, first, chunks)
  y = jnp.moveaxis(y, 0, 1).reshape(batch, whole, -1)
  if whole < length:
    _, rest = chunk(last, tuple(x[:, whole:] for x in tokens))
    y = jnp.concatenate((y, rest), axis=1)
  return y


def chunk_length(batch: Size, length: Size, states: int) -> int:
  """Returns how many tokens a chunk has; a divisor of `length` if possible.

  Args:
    batch: number of images.
    length: number of tokens.
    states: number of states of a token, of all channels.
  """
  if is_symbolic_dim(batch) or is_symbolic_dim(length):
    return _LONGEST
  tokens = _CHUNK_BYTES // (4 * batch * states)
  most = min(max(tokens, _SHORTEST), _LONGEST)
  # Two chunks at least: into a single one, XLA fuses what computes its
  # operands, and a CPU then computes that anew for each state (5 times slower
  # after a convolution of 7 x 7).
  if length >= 2 * _SHORTEST:
    most = min(most, length // 2)
  for size in range(most, most // 2, -1):
    if length % size == 0:
      return size
  return most


def _chunks(x: Float[Array, "B L C"], size: int) -> Float[Array, "K B T C"]:
  batch, length, channels = x.shape
  x = x.reshape(batch, length // size, size, channels)
  return jnp.moveaxis(x, 1, 0)
