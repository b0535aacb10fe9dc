"""Forms of the selective scan that are measured, but are not in the library.

`chunked` is in JAX. `torch_loop` and `torch_prefix` are in PyTorch, which need
not be installed. All take `u`, `delta`, `A`, `B` and `delta_bias`, as
`spatial_mamba_kernels.selective_scan` does, and return the states [B, L, D, N].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from spatial_mamba_kernels.recurrence import recur, shift
from spatial_mamba_kernels.selective_scan.xla import discretise
from spatial_mamba_kernels.typing import Array


def chunked(
  u: Array, delta: Array, A: Array, B: Array, delta_bias: Array
) -> Array:
  """Scans chunks of some sqrt(L) tokens side by side.

  A first loop over the tokens of all chunks finds what each chunk does to a
  state. A parallel prefix over the chunks gives the state before each of them.
  A second loop computes all states.
  """
  return _recurrence(*discretise(u, delta, A, B, delta_bias)).mT


@jax.custom_vjp
def _recurrence(decay, drive):
  return _scan(decay, drive, reverse=False)


def _recurrence_fwd(decay, drive):
  h = _recurrence(decay, drive)
  return h, (decay, h)


def _recurrence_bwd(residuals, g):
  decay, h = residuals
  ddrive = _scan(shift(decay, -1), g, reverse=True)
  return ddrive * shift(h, 1), ddrive


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _scan(decay, drive, *, reverse):
  batch, length, *rest = drive.shape
  size = 2 ** math.ceil(math.log2(length) / 2)
  count = math.ceil(length / size)

  def split(x, padding):
    widths = [(0, 0)] * x.ndim
    widths[1] = 0, count * size - length
    padded = jnp.pad(x, widths, constant_values=padding)
    return padded.reshape(batch, count, size, *rest)

  decay, drive = split(decay, 1), split(drive, 0)
  before = _states_before_chunks(decay, drive, reverse=reverse)
  # Each chunk is an image of its own.
  h = recur(
    decay.reshape(batch * count, size, *rest),
    drive.reshape(batch * count, size, *rest),
    before.reshape(batch * count, *rest),
    "sequential",
    reverse=reverse,
  )
  return h.reshape(batch, count * size, *rest)[:, :length]


def _states_before_chunks(decay, drive, *, reverse):
  size = drive.shape[2]

  def step(i, carry):
    product, h = carry
    t = size - 1 - i if reverse else i
    a, b = (
      jax.lax.dynamic_index_in_dim(x, t, 2, keepdims=False)
      for x in (decay, drive)
    )
    return a * product, a * h + b

  zeros = jnp.zeros_like(drive[:, :, 0])
  product, h = jax.lax.fori_loop(0, size, step, (zeros + 1, zeros))
  after = recur(product, h, None, "associative", reverse=reverse)
  return shift(after, -1 if reverse else 1)


def torch_loop(u: Any, delta: Any, A: Any, B: Any, delta_bias: Any) -> Any:
  """Computes one token after the other, as a plain loop in Python."""
  import torch  # pyright: ignore[reportMissingImports]

  decay, drive = _torch_discretise(u, delta, A, B, delta_bias)
  h, states = torch.zeros_like(drive[:, 0]), []
  for a, b in zip(decay.unbind(1), drive.unbind(1), strict=True):
    h = a * h + b
    states.append(h)
  return torch.stack(states, 1)


def torch_prefix(u: Any, delta: Any, A: Any, B: Any, delta_bias: Any) -> Any:
  """Doubles the tokens that each state has seen, log2(L) times."""
  import torch  # pyright: ignore[reportMissingImports]

  decay, h = _torch_discretise(u, delta, A, B, delta_bias)
  by = 1
  while by < h.shape[1]:
    h = torch.cat((h[:, :by], h[:, by:] + decay[:, by:] * h[:, :-by]), 1)
    decay = torch.cat((decay[:, :by], decay[:, by:] * decay[:, :-by]), 1)
    by *= 2
  return h


def _torch_discretise(u, delta, A, B, delta_bias):
  import torch  # pyright: ignore[reportMissingImports]

  u, delta, B = (x.float() for x in (u, delta, B))
  dt = torch.nn.functional.softplus(delta + delta_bias)
  decay = torch.exp(dt[..., None] * A)
  return decay, (dt * u)[..., None] * B[:, :, None]
