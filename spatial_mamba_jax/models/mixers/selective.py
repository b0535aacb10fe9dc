"""The selective SSM of most mixers: its parameters, and how tokens select them.

Axis letters: B batch, L tokens, C channels of a block, D inner channels, R rank
of the time steps, N states a channel, K scans.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.shapes import at_least_float32
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.fields import choice, number
from spatial_mamba_jax.models import initializers
from spatial_mamba_jax.models.initializers import constant
from spatial_mamba_jax.models.layers import SequenceConv
from spatial_mamba_jax.models.mixers.base import (
  MAX_EXPANSION,
  MAX_STATES,
  MixerConfig,
)
from spatial_mamba_jax.models.mixers.scans import Path


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SelectiveConfig(MixerConfig):
  """The config of a mixer with selective SSMs.

  Attributes:
    d_state: N, states a channel.
    expand: inner channels, divided by the stage's channels.
    implementation: implementation of the SSM, None for the platform's best; see
      `spatial_mamba_kernels`.
  """

  d_state: int = number(16, least=1, most=MAX_STATES)
  expand: int = number(2, least=1, most=MAX_EXPANSION)
  implementation: str | None = choice(None, among=smk.IMPLEMENTATIONS)


class SelectiveSSM(nnx.Module):
  """A selective SSM (arXiv 2312.00752), or several over the same tokens.

  Linear functions of each token select the time steps, B and C.

  Attributes:
    x_proj: [D, R + 2 N], or [K, D, R + 2 N] for K scans; N less for each of B
      and C that is not selected.
    dt_proj: [R, D], or [K, R, D].
    dt_bias: [D], or [K, D].
    A_log: [D, N], or [K D, N].
    D: [D], or [K D].
  """

  def __init__(
    self,
    dim: int,
    inner: int,
    states: int,
    *,
    scans: int | None = None,
    selects: str = "BC",
    has_dt_init: bool = True,
    implementation: str | None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Initialises the parameters as Mamba does.

    Args:
      dim: C; R is a sixteenth of it, rounded up.
      inner: D.
      states: N.
      scans: K, or None for one scan whose parameters have no axis for it.
      selects: which of B and C the tokens select; the other one is 1.
      has_dt_init: whether the first time steps are 0.001 to 0.1. Otherwise the
        bias is 0.
      implementation: see `spatial_mamba_kernels.selective_ssm`.
      dtype: of activations.
      rngs: random streams.
    """
    rank, count = dt_rank(dim), scans or 1
    axis = () if scans is None else (scans,)
    param_dtype = at_least_float32(dtype)

    def uniform(fan_in, *shape):
      init = initializers.fan_in_uniform(fan_in)
      return nnx.Param(init(rngs.params(), (*axis, *shape), param_dtype))

    self.x_proj = uniform(inner, inner, rank + len(selects) * states)
    self.dt_proj = uniform(rank, rank, inner)
    bias = constant(0, (*axis, inner), param_dtype)
    if has_dt_init:
      bias = dt_bias(rngs.params(), bias.shape, param_dtype)
    self.dt_bias = nnx.Param(bias)
    self.A_log = nnx.Param(log_rates(count * inner, states, param_dtype))
    self.D = nnx.Param(constant(1, count * inner, param_dtype))
    self.scans, self.selects = scans, selects
    self.rank, self.inner, self.states = rank, inner, states
    self.implementation = implementation

  @property
  def projection(self) -> Float[Array, "D P"]:
    """The weights of `project`; P is K (R + 2 N)."""
    if self.scans is None:
      return self.x_proj[...]
    return jnp.moveaxis(self.x_proj[...], 0, 1).reshape(self.inner, -1)

  def project(self, u: Float[Array, "*B D"]) -> Float[Array, "*B P"]:
    """Returns what the tokens select, for all scans."""
    return u @ self.projection.astype(u.dtype)

  def split(self, projected: Float[Array, "*B P"]) -> list[Array]:
    """Returns what the tokens select for each scan, [..., R + 2 N]."""
    return jnp.split(projected, self.scans or 1, axis=-1)

  def operands(
    self, selected: Float[Array, "B L P"], scan: int = 0
  ) -> tuple[Array, Array, Array]:
    """Returns the time steps before bias and softplus, B and C of a scan."""
    low, *chosen = jnp.split(
      selected,
      [self.rank + i * self.states for i in range(len(self.selects))],
      axis=-1,
    )
    ones = jnp.ones((*low.shape[:-1], self.states), low.dtype)
    values = dict(zip(self.selects, chosen, strict=True))
    dt_proj = self._of(self.dt_proj[...], scan)
    delta = low @ dt_proj.astype(low.dtype)
    return delta, values.get("B", ones), values.get("C", ones)

  def scan(
    self,
    u: Float[Array, "B L D"],
    selected: Float[Array, "B L P"],
    scan: int = 0,
  ) -> Float[Array, "B L D"]:
    """Scans tokens with what they select: a part of `split`, in their order."""
    return self.run(u, *self.operands(selected, scan), scan=scan)

  def both_ways(
    self,
    path: Path,
    values: Float[Array, "B H W D"],
    selected: Sequence[Float[Array, "B H W P"]],
    scans: Sequence[int],
  ) -> list[Float[Array, "B L D"]]:
    """Scans along a path, and from its end to its beginning.

    Args:
      path: the path.
      values: the SSM's input.
      selected: what it selects for each of the two scans.
      scans: the indices of the two scans.

    Returns:
      The outputs of both, in the order of the path.
    """
    u = path.tokens(values)
    forward, backward = map(path.tokens, selected)
    first, second = scans
    y = self.scan(jnp.flip(u, 1), jnp.flip(backward, 1), second)
    return [self.scan(u, forward, first), jnp.flip(y, 1)]

  def run(
    self,
    u: Float[Array, "B L D"],
    delta: Float[Array, "B L D"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    *,
    scan: int = 0,
    bias_factor: int = 1,
  ) -> Float[Array, "B L D"]:
    """Scans tokens with these operands, `delta` before bias and softplus."""
    own = slice(scan * self.inner, (scan + 1) * self.inner)
    return smk.selective_ssm(
      u,
      delta,
      -jnp.exp(self.A_log[own]),
      B,
      C,
      self.D[own],
      delta_bias=bias_factor * self._of(self.dt_bias[...], scan),
      implementation=self.implementation,
    )

  def _of(self, array, scan):
    return array if self.scans is None else array[scan]


class MambaBranch(nnx.Module):
  """Mamba between its projections: causal convolution, SiLU, selective SSM."""

  def __init__(
    self,
    dim: int,
    inner: int,
    states: int,
    *,
    selects: str = "BC",
    has_dt_init: bool = True,
    implementation: str | None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Initialises the parameters; see `SelectiveSSM`."""
    self.conv = SequenceConv(inner, 4, is_causal=True, dtype=dtype, rngs=rngs)
    self.ssm = SelectiveSSM(
      dim,
      inner,
      states,
      selects=selects,
      has_dt_init=has_dt_init,
      implementation=implementation,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, tokens: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    return self.ssm.scan(*self.select(tokens))

  def select(self, tokens: Float[Array, "B L D"]) -> tuple[Array, Array]:
    """Returns the SSM's input, and what it selects."""
    u = jax.nn.silu(self.conv(tokens))
    return u, self.ssm.project(u)


def dt_rank(dim: int) -> int:
  """R, the rank of the time-step projection in a stage of `dim` channels."""
  return math.ceil(dim / 16)


@initializers.drawn
@partial(jax.jit, static_argnums=(1, 2))
def dt_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """Draws biases whose softplus is log-uniform in [0.001, 0.1]."""
  low, high = math.log(1e-3), math.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))


def log_rates(features: int, states: int, dtype: DTypeLike) -> Array:
  """Returns the first `A_log`, [features, states]: log(n) of state n >= 1."""
  log_n = np.log(np.arange(1, states + 1))
  return jax.device_put(np.tile(log_n, (features, 1)).astype(dtype))
