"""The structure-aware SSM by the kernel of the platform lowered for.

Nothing here is differentiated by JAX: kernels cannot be, and neither should a
choice between platforms. What the forward pass keeps is its inputs and one
state a row; the backward pass computes the rest again.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.sharding import (
  BATCH,
  CHANNELS,
  WHOLE,
  per_shard,
  split_axes,
)
from spatial_mamba_kernels.structure_aware_ssm import mosaic_tpu, xla
from spatial_mamba_kernels.typing import Array

Arrays = tuple[Array, ...]

# Jitted, so that a kernel is traced once for all blocks of a stage.
_run_forward = jax.jit(mosaic_tpu.run_forward, static_argnames="save")
_run_backward = jax.jit(mosaic_tpu.run_backward)

_IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
_TOKENS = (BATCH, WHOLE, WHOLE, WHOLE)
_ARGUMENTS = (
  _IMAGE,
  _IMAGE,
  (CHANNELS, WHOLE),
  _TOKENS,
  _TOKENS,
  (CHANNELS,),
  (WHOLE, WHOLE, WHOLE, CHANNELS),
  (WHOLE,),
  (CHANNELS,),
)
_SAVED = (WHOLE, WHOLE, BATCH, WHOLE, CHANNELS)
_PARTIAL_TOKENS = (CHANNELS, *_TOKENS)
_PARTIAL_PARAMETERS = (BATCH, WHOLE, CHANNELS)


def check_served(arrays: Arrays) -> None:
  """Raises a NotImplementedError with the reason where no kernel can serve."""
  mosaic_tpu.plan(arrays)
  batch, *_, channels = arrays[0].shape
  split_axes(batch, channels)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def structure_aware_ssm(arrays: Arrays, implementation: str | None) -> Array:
  """The operator by "mosaic_tpu", or by what is best where it runs for None.

  Args:
    arrays: u, delta, A, B, C, D, kernels, alpha, delta_bias.
    implementation: None or "mosaic_tpu".
  """
  (y,) = _by_platform(
    implementation, _tpu(arrays, save=False), _xla_forward, arrays
  )
  return y


def _forward(arrays, implementation):
  kernel = _tpu(arrays, save=True)
  _, saved = jax.eval_shape(kernel, arrays)

  def without_kernel(arrays):
    return *_xla_forward(arrays), jnp.zeros(saved.shape, saved.dtype)

  y, saved = _by_platform(implementation, kernel, without_kernel, arrays)
  return y, (arrays, saved)


def _backward(implementation, residuals, g):
  def without_kernel(arrays, saved, g):
    del saved
    return jax.vjp(_xla_forward, arrays)[1]((g,))[0]

  return (
    _by_platform(
      implementation,
      _tpu_backward,
      without_kernel,
      *residuals,
      g,
    ),
  )


structure_aware_ssm.defvjp(_forward, _backward)


def _by_platform(implementation, kernel, without_kernel, *arguments):
  if implementation == "mosaic_tpu":
    return kernel(*arguments)
  return jax.lax.platform_dependent(
    *arguments, tpu=kernel, default=without_kernel
  )


def _xla_forward(arrays):
  return (xla.structure_aware_ssm(*arrays, implementation=None),)


def _tpu(arrays, *, save):
  """The forward kernel, each device computing its own part."""
  u = arrays[0]
  return per_shard(
    partial(_run_forward, save=save),
    (_ARGUMENTS,),
    (_IMAGE, _SAVED) if save else (_IMAGE,),
    split_axes(u.shape[0], u.shape[-1]),
  )


def _tpu_backward(arrays, saved, g):
  batch, *_, channels = g.shape
  kernel = per_shard(
    _run_backward,
    (_ARGUMENTS, _SAVED, _IMAGE),
    (_IMAGE, _IMAGE, _PARTIAL_TOKENS, _PARTIAL_TOKENS, _PARTIAL_PARAMETERS),
    split_axes(batch, channels),
  )
  du, ddelta, dB, dC, parameters = kernel(arrays, saved, g)
  _, unmerge = jax.vjp(mosaic_tpu.merged_weights, *arrays[6:8])
  taps, states = len(mosaic_tpu.TAPS), dB.shape[-1]
  dweights, dA, (dD, dbias) = jnp.split(
    jnp.sum(parameters, axis=0), (taps, taps + states)
  )
  dkernels, dalpha = unmerge(dweights)
  cotangents = (
    du,
    ddelta,
    dA.T,
    jnp.sum(dB, axis=0),
    jnp.sum(dC, axis=0),
    dD,
    dkernels,
    dalpha,
    dbias,
  )
  return tuple(
    cotangent.astype(array.dtype)
    for cotangent, array in zip(cotangents, arrays, strict=True)
  )
