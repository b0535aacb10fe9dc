"""Layer normalisation as GPU kernels that read each array once."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.dispatch import Arrays, Results
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.gpu.tokens import Tokens
from spatial_mamba_kernels.normalization import EPSILON
from spatial_mamba_kernels.typing import Array

# Values of an image loaded at a time by all programs: enough to keep a device's
# memory busy. With more, more programs would write sums.
LOADED = 2**20


def run_forward(arrays: Arrays, *, save: bool, is_gated: bool) -> Results:
  """Returns the operator's result on one device; saves nothing."""
  del save
  forward: Any = _gated_forward if is_gated else _residual_forward
  return forward(*arrays)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Any, *, is_gated: bool
) -> Arrays:
  """Returns the cotangents of images and, [1, C], of scale and bias."""
  del saved
  backward: Any = _gated_backward if is_gated else _residual_backward
  return backward(*arrays, g)


def _residual_forward(x, scale, bias):
  """Returns x, and x normalised."""
  (y,) = _call(
    _forward_kernel, [x], [scale, bias], [x], name="residual_layer_norm_forward"
  )
  return ((x, y),)


def _residual_backward(x, scale, bias, cotangents):
  del bias
  return _call(
    _backward_kernel,
    [x, *cotangents],
    [scale],
    [x],
    sums=2,
    name="residual_layer_norm_backward",
  )


def _gated_forward(x, scale, bias, gate, branch_scale):
  return _call(
    _gated_forward_kernel,
    [x, gate],
    [scale, bias],
    [x],
    branch_scale=branch_scale,
    name="gated_layer_norm_forward",
  )


def _gated_backward(x, scale, bias, gate, branch_scale, dy):
  return _call(
    _gated_backward_kernel,
    [x, gate, dy],
    [scale, bias],
    [x, gate],
    sums=2,
    branch_scale=branch_scale,
    name="gated_layer_norm_backward",
  )


def _call(
  kernel: Callable[..., None],
  images: Sequence[Array],
  parameters: Sequence[Array],
  results: Sequence[Array],
  *,
  sums: int = 0,
  branch_scale: Array | None = None,
  name: str,
) -> Arrays:
  """Runs a kernel over tokens.

  Args:
    kernel: (tokens, *images, branch_scale, *parameters, *results, *sums).
    images: each [B, H, W, C].
    parameters: each [C].
    results: images of the results' shapes and types.
    sums: how many results are sums over tokens.
    branch_scale: [B], or None.
    name: of the kernel.

  Returns:
    The results, and [1, C] for each of the sums.
  """
  x = images[0]
  tokens = Tokens(x.shape[-1])
  flat = [gpu.flat_tokens(image, tokens.count) for image in images]
  scales = []
  if branch_scale is not None:
    scales.append(gpu.token_scales(branch_scale, x, tokens.count))
  length = len(flat[0])
  programs = _programs(tokens, length)
  shape = programs, tokens.channels
  done = plgpu.kernel(
    partial(kernel, tokens),
    out_type=[
      *(jax.ShapeDtypeStruct((length, x.shape[-1]), x.dtype) for x in results),
      *(jax.ShapeDtypeStruct(shape, jnp.float32) for _ in range(sums)),
    ],
    grid=(programs,),
    grid_names=("program",),
    kernel_name=name,
    compiler_params=tokens.compiler_params(sums=sums > 0),
  )(*flat, *scales, *(x.astype(jnp.float32) for x in parameters))
  made, totals = done[: len(results)], done[len(results) :]
  return (
    *(gpu.like(x, y) for x, y in zip(results, made, strict=True)),
    *(jnp.sum(x, axis=0, keepdims=True) for x in totals),
  )


def _programs(tokens, length):
  """Returns how many programs share so many tokens."""
  return min(length // tokens.count, LOADED // math.prod(tokens.shape))


def _each(
  tokens: Tokens, length: int, step: Callable[..., Any], *values: Any
) -> Any:
  """Calls a function for each tile of a program's tokens.

  Args:
    tokens: the tile.
    length: tokens of all programs.
    step: (slice of tokens, *carry) -> carry, or None without any.
    *values: the first carry.

  Returns:
    The last carry.
  """
  program, programs = lax.axis_index("program"), _programs(tokens, length)
  steps = (length // tokens.count - program + programs - 1) // programs

  def run(i, values):
    first = (program + i * programs) * tokens.count
    return step(pl.ds(first, tokens.count), *values) or ()

  return lax.fori_loop(0, steps, run, values)


def _sum(tokens, length, step, results):
  """Calls `_each` with sums by token of a tile; stores the sums over tokens."""
  zeros = (tokens.zeros() for _ in results)
  totals = _each(tokens, length, step, *zeros)
  for total, result in zip(totals, results, strict=True):
    sums = jnp.sum(total, axis=0)
    gpu.store(result.at[lax.axis_index("program")], sums)


def _forward_kernel(tokens, x, scale, bias, y):
  scale, bias = tokens.parameters(scale), tokens.parameters(bias)

  def step(own):
    normalized, _ = _normalize(tokens, tokens.load(x, own))
    tokens.store(y, own, normalized * scale + bias)

  _each(tokens, len(x), step)


def _backward_kernel(tokens, x, dx_after, dy, scale, dx, dscale, dbias):
  scale = tokens.parameters(scale)

  def step(own, dscale, dbias):
    normalized, rstd = _normalize(tokens, tokens.load(x, own))
    g = tokens.load(dy, own)
    to_x = _to_input(tokens, normalized, rstd, g * scale)
    tokens.store(dx, own, tokens.load(dx_after, own) + to_x)
    return dscale + g * normalized, dbias + g

  _sum(tokens, len(x), step, (dscale, dbias))


def _gated_forward_kernel(tokens, x, gate, branch_scale, scale, bias, y):
  scale, bias = tokens.parameters(scale), tokens.parameters(bias)

  def step(own):
    normalized, _ = _normalize(tokens, tokens.load(x, own))
    z = tokens.load(gate, own)
    gated = (normalized * scale + bias) * z * gpu.sigmoid(z)
    tokens.store(y, own, _drop_path(gated, tokens.scales(branch_scale, own)))

  _each(tokens, len(x), step)


def _gated_backward_kernel(
  tokens, x, gate, dy, branch_scale, scale, bias, dx, dgate, dscale, dbias
):
  scale, bias = tokens.parameters(scale), tokens.parameters(bias)

  def step(own, dscale, dbias):
    normalized, rstd = _normalize(tokens, tokens.load(x, own))
    z = tokens.load(gate, own)
    share = gpu.sigmoid(z)
    dgated = _drop_path(tokens.load(dy, own), tokens.scales(branch_scale, own))
    slope = share * (1 + z * (1 - share))
    tokens.store(dgate, own, dgated * (normalized * scale + bias) * slope)
    g = dgated * z * share
    tokens.store(dx, own, _to_input(tokens, normalized, rstd, g * scale))
    return dscale + g * normalized, dbias + g

  _sum(tokens, len(x), step, (dscale, dbias))


def _normalize(tokens, x):
  """Returns x normalised, and one over the standard deviation."""
  centred = x - tokens.means(x)
  rstd = lax.rsqrt(tokens.means(centred * centred) + EPSILON)
  return centred * rstd, rstd


def _to_input(tokens, normalized, rstd, g):
  """Returns the cotangents of x, given `g` of the normalised x."""
  along = tokens.means(g * normalized)
  return rstd * (g - tokens.means(g) - normalized * along)


def _drop_path(x, scale):
  return jnp.where(scale > 0, x * scale, 0)
