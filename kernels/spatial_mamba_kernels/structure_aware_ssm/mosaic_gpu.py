"""The structure-aware SSM on GPUs.

If its rows fit into a program, it is one kernel forward (`gpu_fused`) and two
backward (`gpu_backward`, and `gpu_fused` for C); each reads its inputs once.
Otherwise it is composed of the kernels of the scan and the fusion, and the
states go through device memory.
"""

from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, is_implemented
from spatial_mamba_kernels.gpu import (
  fusion,
  fusion_backward,
  scan,
  scan_backward,
)
from spatial_mamba_kernels.structure_aware_ssm import gpu_backward, gpu_fused
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import (
  SUMMED,
  Scanned,
  Share,
)
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y [B, H, W, D] on one device and, if `save`, each row's last state.

  The last states are [H, N, B, D].
  """
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  weights = STENCIL.merge(kernels, alpha)
  if is_implemented(gpu_fused.share, u.shape, u.dtype, delta.dtype):
    scanned = Scanned(u, delta, A[:, 0], B[..., 0], weights, bias)
    return tuple(gpu_fused.forward(scanned, C[..., 0], D, save=save))
  h = _states(arrays)
  y = fusion.fuse(
    h,
    weights,
    stencil=STENCIL,
    dtype=u.dtype,
    observe=(C[..., 0], D, u),
  )
  if not save:
    return (y,)
  return y, h[:, :, -1].swapaxes(0, 1)[:, None]


def share_backward(shape: tuple[int, ...], image: Any, delta: Any) -> Share:
  """Returns how `gpu_backward` shares columns, if both kernels can serve.

  Args:
    shape: of the images, [B, H, W, D].
    image: type of the images.
    delta: type of the time steps.

  Raises:
    NotImplementedError: one of them cannot serve.
  """
  gpu_fused.share(shape, image, delta, products=SUMMED)
  return gpu_backward.share(shape, image, delta)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device, partial sums for all but u and delta.

  Returns:
    du, ddelta [B, H, W, D]; dB, dC [K, B, H, W, N], to be summed over K; those
    of the merged weights, [G, T, D], and of A, delta_bias and D, [G, N + 2, D],
    to be summed over G.
  """
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  weights = STENCIL.merge(kernels, alpha)
  if is_implemented(share_backward, u.shape, u.dtype, delta.dtype):
    scanned = Scanned(u, delta, A[:, 0], B[..., 0], weights, bias)
    dC = gpu_fused.observation_backward(scanned, g)
    du, ddelta, dB, dweights, parameters = gpu_backward.backward(
      scanned, C[..., 0], D, saved[0], g
    )
    return du, ddelta, dB[..., None], dC[..., None], dweights, parameters
  # Recompute the states of all tokens.
  h = _states(arrays)
  dweights, dC = fusion_backward.weights_backward(
    h, weights, g, stencil=STENCIL, C=C[..., 0]
  )
  dh = fusion_backward.states_backward(
    g, weights, stencil=STENCIL, dtype=jnp.float32, C=C[..., 0]
  )
  du, ddelta, dB, parameters, _ = scan_backward.scan_backward(
    *_tokens(arrays),
    None,
    _to_tokens(h)[:, :, None],
    _to_tokens(dh)[:, :, None],
    skip=(D, _to_tokens(g)),
  )
  return (
    du.reshape(u.shape),
    ddelta.reshape(u.shape),
    dB.reshape(len(dB), *C.shape),
    dC[..., None],
    dweights,
    parameters,
  )


def _to_tokens(image):
  """Reshapes [B, H, W, D] to [B, L, D]."""
  batch, _, _, channels = image.shape
  return image.reshape(batch, -1, channels)


def _tokens(arrays):
  """Returns the arguments of the scan, with tokens [B, L, ...]."""
  u, delta, A, B, *_, bias = arrays
  return _to_tokens(u), _to_tokens(delta), A, _to_tokens(B), bias


def _states(arrays):
  """Returns the states, [B, H, W, D]."""
  return scan.scan(*_tokens(arrays)).reshape(arrays[0].shape)
