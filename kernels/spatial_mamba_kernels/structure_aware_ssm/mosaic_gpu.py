"""The structure-aware SSM on GPUs.

Where its rows fit a program it is one kernel forward (`gpu_fused`), and two
backward (`gpu_backward`, and for C `gpu_fused` once more): inputs come once for
each. Elsewhere it is made of the kernels of the scan and the fusion, and states
go through device memory.
"""

from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, is_implemented
from spatial_mamba_kernels.gpu import fusion, scan
from spatial_mamba_kernels.structure_aware_ssm import gpu_backward, gpu_fused
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import SUMMED, Share
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The operator on one device, and if `save` each row's last states.

  They are [H, N, B, D].
  """
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  weights = STENCIL.merge(kernels, alpha)
  if is_implemented(gpu_fused.share, u.shape, u.dtype, delta.dtype):
    A, B, C = A[:, 0], B[..., 0], C[..., 0]
    return gpu_fused.forward(u, delta, A, B, C, D, weights, bias, save=save)
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
  """How both kernels of the backward pass share columns; `gpu_fused.share`.

  Raises:
    NotImplementedError: one of them cannot.
  """
  gpu_fused.share(shape, image, delta, products=SUMMED)
  return gpu_backward.share(shape, image, delta)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Cotangents on one device; those of parameters as sums over some images.

  Returns:
    du, ddelta [B, H, W, D]; dB, dC [K, B, H, W, N], to be summed over K;
    [G, T, D], of the merged weights, and [G, N + 2, D], of A, delta_bias and D,
    to be summed over G.
  """
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  weights = STENCIL.merge(kernels, alpha)
  if is_implemented(share_backward, u.shape, u.dtype, delta.dtype):
    A, B, C = A[:, 0], B[..., 0], C[..., 0]
    (before,) = saved
    dC = gpu_fused.observation_backward(u, delta, A, B, weights, bias, g)
    du, ddelta, dB, dweights, parameters = gpu_backward.backward(
      u, delta, A, B, C, D, weights, bias, before, g
    )
    return du, ddelta, dB[..., None], dC[..., None], dweights, parameters
  # The states of all tokens are computed anew.
  h = _states(arrays)
  dweights, dC = fusion.weights_backward(
    h, weights, g, stencil=STENCIL, C=C[..., 0]
  )
  dh = fusion.states_backward(
    g, weights, stencil=STENCIL, dtype=jnp.float32, C=C[..., 0]
  )
  du, ddelta, dB, parameters = scan.scan_backward(
    *_tokens(arrays),
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
  batch, _, _, channels = image.shape
  return image.reshape(batch, -1, channels)


def _tokens(arrays):
  u, delta, A, B, *_, bias = arrays
  return _to_tokens(u), _to_tokens(delta), A, _to_tokens(B), bias


def _states(arrays):
  """[B, H, W, D]."""
  return scan.scan(*_tokens(arrays)).reshape(arrays[0].shape)
