"""Operators that are a kernel on some platforms and XLA's on all others.

Nothing here is differentiated by JAX: kernels cannot be, and neither should a
choice between platforms. Which one runs is known when a program is lowered, so
what the forward pass keeps has the same shapes on all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spatial_mamba_kernels.sharding import (
  is_within_shard_map,
  per_shard,
  split_axes,
)
from spatial_mamba_kernels.typing import Array

Arrays = tuple[Array, ...]

# What `checkpoint_name` calls all that took a convolution or a scan to make,
# for the policies of `jax.checkpoint`.
CHECKPOINT_NAME = "spatial_mamba_kernels"

keep = partial(checkpoint_name, name=CHECKPOINT_NAME)


class Passes(NamedTuple):
  """An operator and its derivative.

  Attributes:
    forward: (arrays, save=bool) -> (result, *saved), `saved` only if `save`.
    backward: (arrays, saved, cotangent of the result) -> those of `arrays`.
  """

  forward: Callable[..., Arrays]
  backward: Callable[[Arrays, Arrays, Array], Arrays]


class Kernel(NamedTuple):
  """What one device computes of its own images and channels.

  Attributes:
    plan: raises NotImplementedError, with the reason, for arrays that the
      kernel cannot serve.
    passes: the backward one returns partial sums.
    finish: (arrays, partial sums) -> cotangents of `arrays`.
    arguments: dimensions of `arrays` (see `per_shard`); those of the first one
      begin with the images and end with the channels.
    result: dimensions of the result.
    saved: dimensions of what the backward pass is given as saved.
    sums: dimensions of the partial sums.
    saves_result: it is the result, which the forward pass then returns once.
  """

  plan: Callable[[Arrays], Any]
  passes: Passes
  finish: Callable[[Arrays, Arrays], Arrays]
  arguments: Any
  result: Any
  saved: Any
  sums: Any
  saves_result: bool = False


class Operator:
  """A differentiable operator over a tuple of arrays.

  Args:
    xla: (arrays, implementation=) -> result, differentiable, on any platform.
    mosaic_tpu: the kernel for TPUs.
    passes: `xla` with what the kernel saves; without, the result is computed
      anew in the backward pass.
  """

  def __init__(
    self,
    xla: Callable[..., Array],
    mosaic_tpu: Kernel,
    passes: Passes | None = None,
  ):
    self._xla = xla
    self._kernel = mosaic_tpu
    self._tpu = _sharded(mosaic_tpu)
    self._default = passes or self._recomputing()
    self._chosen = jax.custom_vjp(self._forward, nondiff_argnums=(1,))
    self._chosen.defvjp(self._save, self._backward)

  def __call__(self, arrays: Arrays, implementation: str | None) -> Array:
    """Computes by the implementation named, or by the platform's best.

    Raises:
      NotImplementedError: the kernel named cannot serve.
    """
    if implementation in (None, "mosaic_tpu"):
      try:
        self._check_served(arrays)
      except NotImplementedError:
        if implementation:
          raise
      else:
        return self._chosen(arrays, implementation)
    return self._xla(arrays, implementation=implementation)

  def _check_served(self, arrays):
    self._kernel.plan(arrays)
    _axes(self._kernel, arrays)
    if not is_within_shard_map():
      return
    message = "a kernel needs check_vma=False of the shard_map that it is in"
    if any(jax.typeof(x).manual_axis_type.varying for x in arrays):
      raise NotImplementedError(message)
    try:  # Arrays that every device has whole do not tell.
      jax.eval_shape(partial(self._tpu.forward, save=False), arrays)
    except ValueError as error:
      raise NotImplementedError(message) from error

  def _forward(self, arrays, implementation):
    (result,) = self._by_platform("forward", implementation, save=False)(arrays)
    return result

  def _save(self, arrays, implementation):
    forward = self._by_platform("forward", implementation, save=True)
    result, *saved = keep(forward(arrays))
    saved = (result,) if self._kernel.saves_result else tuple(saved)
    return result, (arrays, saved)

  def _backward(self, implementation, residuals, g):
    return (self._by_platform("backward", implementation)(*residuals, g),)

  def _by_platform(self, name, implementation, **options):
    """A pass by name; differentiated once more, it is XLA's."""
    kernel = partial(getattr(self._tpu, name), **options)
    default = partial(getattr(self._default, name), **options)

    def chosen(*arguments):
      if implementation == "mosaic_tpu":
        return kernel(*arguments)
      return jax.lax.platform_dependent(*arguments, tpu=kernel, default=default)

    once_more = jax.custom_vjp(chosen)
    once_more.defvjp(
      lambda *arguments: (chosen(*arguments), arguments),
      lambda arguments, g: jax.vjp(default, *arguments)[1](g),
    )
    return once_more

  def _recomputing(self):
    def forward(arrays, *, save):
      shapes = jax.eval_shape(partial(self._tpu.forward, save=save), arrays)
      saved = (jnp.zeros(x.shape, x.dtype) for x in shapes[1:])
      return self._xla(arrays, implementation=None), *saved

    def backward(arrays, saved, g):
      del saved
      function = partial(self._xla, implementation=None)
      return jax.vjp(function, arrays)[1](g)[0]

    return Passes(forward, backward)


def _sharded(kernel: Kernel) -> Passes:
  """The kernel on whole arrays, which the mesh in force may have split."""
  # Jitted, so that a kernel is traced once for all blocks of a stage.
  run_forward = jax.jit(kernel.passes.forward, static_argnames="save")
  run_backward = jax.jit(kernel.passes.backward)

  def forward(arrays, *, save):
    results = (kernel.result,)
    if save and not kernel.saves_result:
      results += kernel.saved
    run = per_shard(
      partial(run_forward, save=save),
      (kernel.arguments,),
      results,
      _axes(kernel, arrays),
    )
    return run(arrays)

  def backward(arrays, saved, g):
    run = per_shard(
      run_backward,
      (kernel.arguments, kernel.saved, kernel.result),
      kernel.sums,
      _axes(kernel, arrays),
    )
    cotangents = kernel.finish(arrays, run(arrays, saved, g))
    return tuple(
      cotangent.astype(array.dtype)
      for cotangent, array in zip(cotangents, arrays, strict=True)
    )

  return Passes(forward, backward)


def _axes(kernel, arrays):
  batch, *_, channels = arrays[0].shape
  return split_axes(batch, channels)
