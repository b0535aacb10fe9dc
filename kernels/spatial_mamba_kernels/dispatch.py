"""The choice between an operator's kernels and XLA.

It is made while a program is lowered, for the platform it is lowered for. Until
then a primitive stands for each pass; only then is a kernel's module imported,
and Pallas with it. So one traced program serves the CPU it was traced on, the
accelerator it runs on, and an ahead-of-time compile. What the forward pass
saves has the same shapes whatever is chosen.

An operator must choose while tracing where the choice decides what is saved:
XLA saves intermediates that the kernel recomputes
(`Operator.is_chosen_in_tracing`). Its kernel is a candidate only where programs
are traced for the kernel's platform, which is that of JAX's default device
(`traced_for`). A program that was traced for another platform has the same
values, by XLA. To compile ahead of time, make the target the default device.

A named implementation is not chosen: it is what runs, or fails to be lowered.

A GPU kernel is planned for the GPU that is JAX's default device, and for a
Hopper where that is no GPU. A lesser GPU refuses such a program when it is
compiled.

Nothing here is differentiated by JAX: kernels cannot be, and neither should a
choice between platforms.
"""

import importlib
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.export import is_symbolic_dim
from jax.extend.backend import get_default_device
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from spatial_mamba_kernels.gpu import device as gpu
from spatial_mamba_kernels.sharding import (
  check_shard_map,
  per_shard,
  split_axes,
)
from spatial_mamba_kernels.typing import Array

Arrays = tuple[Array, ...]
# The first may be a tuple of arrays.
Results = tuple[Any, ...]

# What `checkpoint_name` calls all that took a scan or a fusion of states to
# make, for the policies of `jax.checkpoint`.
CHECKPOINT_NAME = "spatial_mamba_kernels"

keep = partial(checkpoint_name, name=CHECKPOINT_NAME)

# The platform of each implementation that is a kernel.
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}


def traced_for() -> str:
  """Returns the platform that programs are traced for: "cpu", "cuda", "tpu".

  It is that of JAX's default device.
  """
  return "cuda" if gpu.is_default() else get_default_device().platform


class Passes(NamedTuple):
  """An operator and its derivative.

  Attributes:
    forward: (arrays, save=bool) -> (result, *saved), `saved` only if `save`.
    backward: (arrays, saved, cotangent of the result) -> those of `arrays`.
  """

  forward: Callable[..., Results]
  backward: Callable[[Arrays, Arrays, Any], Arrays]


class Kernel(NamedTuple):
  """What one device computes of its own images and channels.

  Attributes:
    plan: raises NotImplementedError, with the reason, for arrays that the
      kernel cannot serve. It is called while tracing on every platform, and
      once more while lowering.
    module: the name of the module that has the kernel's `run_forward` and
      `run_backward`; the latter returns partial sums.
    finish: (arrays, partial sums) -> cotangents of `arrays`.
    sums: dimensions of the partial sums (see `per_shard`).
    options: keyword arguments of `run_forward` and `run_backward`.
  """

  plan: Callable[[Arrays], Any]
  module: str
  finish: Callable[[Arrays, Arrays], Arrays]
  sums: Any
  options: Mapping[str, Any] = {}

  @property
  def passes(self) -> Passes:
    """The passes, from their module: nothing else imports Pallas."""
    module = importlib.import_module(self.module)
    return Passes(
      partial(module.run_forward, **self.options),
      partial(module.run_backward, **self.options),
    )


class Dimensions(NamedTuple):
  """Of what all kernels of an operator take and give (see `per_shard`).

  Attributes:
    arguments: those of the first one begin with the images and end with the
      channels.
    result: of the operator.
    saved: of what the forward pass saves for the backward pass.
  """

  arguments: Any
  result: Any
  saved: Any


class Operator:
  """A differentiable operator over a tuple of arrays.

  Args:
    name: of the scope in which a program has it.
    xla: (arrays, implementation=) -> result, differentiable, on any platform.
    kernels: {implementation: kernel}.
    dimensions: what all of these have in common.
    is_chosen_in_tracing: whether the choice decides what the forward pass
      saves, so that it must be made while tracing (see this module).
    saves: arrays -> shapes and types of what the kernels save. XLA computes the
      result anew in the backward pass, and saves zeros.
    passes: where the result is all that is saved, `xla` with that.
    is_named: whether what is made is called `CHECKPOINT_NAME`; not where it
      costs less to make it again than to keep it.
  """

  def __init__(
    self,
    name: str,
    xla: Callable[..., Any],
    kernels: Mapping[str, Kernel],
    dimensions: Dimensions,
    *,
    is_chosen_in_tracing: bool = False,
    saves: Callable[[Arrays], Any] = lambda arrays: (),
    passes: Passes | None = None,
    is_named: bool = True,
  ):
    self.name = name
    self.kernels = kernels
    self.is_chosen_in_tracing = is_chosen_in_tracing
    self._xla = xla
    self._dimensions = dimensions
    self._saves = saves
    self._saves_result = passes is not None
    self._is_named = is_named
    self._default = passes or Passes(self._anew_forward, self._anew_backward)
    self._chosen = jax.custom_vjp(self._forward, nondiff_argnums=(1,))
    self._chosen.defvjp(self._save, self._backward)

  def __call__(self, arrays: Arrays, implementation: str | None) -> Any:
    """Computes by the implementation named, or by the platform's best.

    Raises:
      NotImplementedError: the kernel named cannot serve.
    """
    if implementation is None:
      names = tuple(
        name for name in self._candidates() if self._serves(name, arrays)
      )
    elif implementation in self.kernels:
      self._check_served(implementation, arrays)
      names = (implementation,)
    elif implementation in PLATFORMS:
      raise NotImplementedError(f"{self.name} has no kernel {implementation}")
    else:
      names = ()
    if names:
      return self._chosen(arrays, (names, implementation is not None))
    return self._xla(arrays, implementation=implementation)

  def _candidates(self):
    if not self.is_chosen_in_tracing:
      return list(self.kernels)
    platform = traced_for()
    return [name for name in self.kernels if PLATFORMS[name] == platform]

  def _serves(self, name, arrays):
    return is_implemented(self._check_served, name, arrays)

  def _check_served(self, name, arrays):
    check_sizes_known(arrays)
    self.kernels[name].plan(arrays)
    self._axes(arrays)
    check_shard_map()

  def _axes(self, arrays):
    batch, *_, channels = arrays[0].shape
    return split_axes(batch, channels)

  def _forward(self, arrays, choice):
    (result,) = self._pass("forward", choice, save=False)(arrays)
    return result

  def _save(self, arrays, choice):
    results = self._pass("forward", choice, save=True)(arrays)
    result, *saved = keep(results) if self._is_named else results
    saved = (result,) if self._saves_result else tuple(saved)
    return result, (arrays, saved)

  def _backward(self, choice, residuals, g):
    return (self._pass("backward", choice)(*residuals, g),)

  def _pass(self, name, choice, **options):
    """A pass by name; differentiated once more, it is XLA's."""
    run = Run(self, name, tuple(options.items()), *choice)

    def chosen(*arguments):
      return run_by_platform(run, arguments)

    once_more = jax.custom_vjp(chosen)
    once_more.defvjp(
      lambda *arguments: (chosen(*arguments), arguments),
      lambda arguments, g: jax.vjp(partial(run, None), *arguments)[1](g),
    )
    return once_more

  def on(self, kernel: str | None) -> Passes:
    """The passes by a kernel's name, or XLA's."""
    return self._kernel(kernel) if kernel else self._default

  def _anew_forward(self, arrays, *, save):
    saved = self._saves(arrays) if save else ()
    zeros = (jnp.zeros(x.shape, x.dtype) for x in saved)
    return self._xla(arrays, implementation=None), *zeros

  def _anew_backward(self, arrays, saved, g):
    del saved
    function = partial(self._xla, implementation=None)
    return jax.vjp(function, arrays)[1](g)[0]

  def _kernel(self, name):
    """A kernel on whole arrays, which the mesh in force may have split."""
    kernel, dimensions = self.kernels[name], self._dimensions

    def forward(arrays, *, save):
      results = (dimensions.result,)
      if save and not self._saves_result:
        results += dimensions.saved
      run = per_shard(
        partial(kernel.passes.forward, save=save),
        (dimensions.arguments,),
        results,
        self._axes(arrays),
      )
      return run(arrays)

    def backward(arrays, saved, g):
      run = per_shard(
        kernel.passes.backward,
        (dimensions.arguments, dimensions.saved, dimensions.result),
        kernel.sums,
        self._axes(arrays),
      )
      cotangents = kernel.finish(arrays, run(arrays, saved, g))
      return tuple(
        cotangent.astype(array.dtype)
        for cotangent, array in zip(cotangents, arrays, strict=True)
      )

    return Passes(forward, backward)


class Run(NamedTuple):
  """A pass of an operator, as a program has it until it is lowered.

  Attributes:
    operator: whose pass it is.
    name: of the pass.
    options: of the pass, as pairs.
    kernels: names of those that can serve.
    named: the caller named the only one, for whatever platform.
  """

  operator: Operator
  name: str
  options: tuple[tuple[str, Any], ...]
  kernels: tuple[str, ...]
  named: bool

  def __call__(
    self, platform: str | None, arrays: Arrays, *rest: Any
  ) -> Results:
    """Runs the pass as a platform does it best, or XLA."""
    passes = self.operator.on(self._kernel_for(platform, arrays))
    run = getattr(passes, self.name)
    with jax.named_scope(self.operator.name):
      return run(arrays, *rest, **dict(self.options))

  def _kernel_for(self, platform, arrays):
    if self.named:
      return self.kernels[0]
    for name in self.kernels:
      plan = self.operator.kernels[name].plan
      if PLATFORMS[name] == platform and is_implemented(plan, arrays):
        return name
    return None


def check_sizes_known(arrays: Arrays) -> None:
  """Raises NotImplementedError where a size is only a symbol (`jax.export`)."""
  shapes = [x.shape for x in arrays]
  if any(map(is_symbolic_dim, itertools.chain(*shapes))):
    raise NotImplementedError(
      f"a kernel must know the sizes that it will meet, not symbols: {shapes}"
    )


def is_implemented(check: Callable[..., Any], *arguments: Any) -> bool:
  """Whether a check does not raise NotImplementedError."""
  try:
    check(*arguments)
  except NotImplementedError:
    return False
  return True


@partial(jax.jit, static_argnums=0)
def run_by_platform(run: Run, arguments: Any) -> Any:
  """Runs a pass as the platform lowered for does it best."""
  if run.named:
    return run(None, *arguments)
  leaves, tree = jax.tree.flatten(arguments)
  results = _primitive.bind(*leaves, run=run, tree=tree, axes=())
  shapes = jax.eval_shape(partial(run, None), *arguments)
  return jax.tree.unflatten(jax.tree.structure(shapes), results)


_primitive = Primitive("kernel_by_platform")
_primitive.multiple_results = True


def _flat(run, tree, axes, platform):
  """The pass over a list of arrays, mapped over these axes of them.

  Mapped, it is XLA's: a TPU kernel cannot have an axis before any argument's.
  """

  def function(*leaves):
    where = None if axes else platform
    return jax.tree.leaves(run(where, *jax.tree.unflatten(tree, leaves)))

  for in_axes in axes:
    function = jax.vmap(function, in_axes)
  return function


@_primitive.def_impl
def _eagerly(*leaves, **parameters):
  with jax.disable_jit(False):
    return jax.jit(partial(_primitive.bind, **parameters))(*leaves)


@_primitive.def_abstract_eval
def _shapes(*leaves, run, tree, axes):
  return jax.make_jaxpr(_flat(run, tree, axes, None))(*leaves).out_avals


def _lowering(platform):
  def function(*leaves, run, tree, axes):
    return _flat(run, tree, axes, platform)(*leaves)

  return mlir.lower_fun(function, multiple_results=True)


mlir.register_lowering(_primitive, _lowering(None))
for _platform in PLATFORMS.values():
  mlir.register_lowering(_primitive, _lowering(_platform), platform=_platform)


def _batch(leaves, dimensions, *, run, tree, axes):
  axes = (*axes, tuple(dimensions))
  results = _primitive.bind(*leaves, run=run, tree=tree, axes=axes)
  return results, [0] * len(results)


batching.primitive_batchers[_primitive] = _batch
