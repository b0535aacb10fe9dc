"""The choice between an operator's kernels and XLA.

`implementation=None` is resolved while a program is lowered, for the platform
of the lowering. Until then a primitive represents each pass of an operator. The
lowering imports the kernel's module, and Pallas with it. So one traced program
serves the CPU it was traced on, the accelerator it runs on, and ahead-of-time
compilation. The residuals have the same shapes for every choice.

Some operators must choose while tracing, because the choice decides which
residuals are saved: XLA saves intermediates that the kernel recomputes
(`Operator.is_chosen_in_tracing`). Their kernels are candidates only if JAX's
default device has the kernel's platform (`traced_for`). A program traced for
another platform computes the same values by XLA. To compile ahead of time, make
the target the default device.

A named implementation runs on every platform, or its lowering fails.

GPU kernels are planned for JAX's default device if it is a GPU, and for a
Hopper otherwise. Compilation fails on a GPU that lacks what the plan uses.

JAX differentiates neither the kernels nor the choice: each operator defines its
backward pass.
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
# Results of a pass; the first may itself be a tuple of arrays.
Results = tuple[Any, ...]

# Name of the results of scans, fusions and large products, for the policies of
# `jax.checkpoint`.
CHECKPOINT_NAME = "spatial_mamba_kernels"

keep = partial(checkpoint_name, name=CHECKPOINT_NAME)

# {implementation: platform} of the kernels.
PLATFORMS = {"mosaic_tpu": "tpu", "mosaic_gpu": "cuda"}


def traced_for() -> str:
  """Returns the platform of JAX's default device: "cpu", "cuda" or "tpu"."""
  return "cuda" if gpu.is_default() else get_default_device().platform


class Passes(NamedTuple):
  """The forward and the backward pass of an operator.

  Attributes:
    forward: (arrays, save=bool) -> (result, *saved); `saved` only if `save`.
    backward: (arrays, saved, cotangent of the result) -> cotangents of the
      arrays.
  """

  forward: Callable[..., Results]
  backward: Callable[[Arrays, Arrays, Any], Arrays]


class Kernel(NamedTuple):
  """A kernel that computes the images and channels of one device.

  Attributes:
    plan: raises NotImplementedError, with the reason, for arrays that the
      kernel cannot serve. It is called while tracing, on every platform, and
      again while lowering.
    module: name of the module with `run_forward` and `run_backward`. The latter
      returns partial sums.
    finish: (arrays, partial sums) -> cotangents of `arrays`.
    sums: dimensions of the partial sums; see `per_shard`.
    options: keyword arguments of `run_forward` and `run_backward`.
  """

  plan: Callable[[Arrays], Any]
  module: str
  finish: Callable[[Arrays, Arrays], Arrays]
  sums: Any
  options: Mapping[str, Any] = {}

  @property
  def passes(self) -> Passes:
    """Imports the module, and Pallas with it, and returns its passes."""
    module = importlib.import_module(self.module)
    return Passes(
      partial(module.run_forward, **self.options),
      partial(module.run_backward, **self.options),
    )


class Dimensions(NamedTuple):
  """Dimensions of the arrays of an operator; see `per_shard`.

  Attributes:
    arguments: dimensions of each argument. The first argument's begin with the
      images and end with the channels.
    result: dimensions of the result.
    saved: dimensions of the residuals.
  """

  arguments: Any
  result: Any
  saved: Any


class Operator:
  """A differentiable operator over a tuple of arrays.

  Args:
    name: name of the operator's scope in programs and profiles.
    xla: (arrays, implementation=) -> result; differentiable, on every platform.
    kernels: {implementation: kernel}.
    dimensions: dimensions of the arrays of all kernels.
    is_chosen_in_tracing: whether the choice decides which residuals are saved,
      and so must be made while tracing; see this module.
    saves: (arrays) -> shapes and types of the kernels' residuals. The XLA form
      saves zeros in their place, and its backward pass recomputes the result.
    passes: the passes of the XLA form if the result is the only residual.
    is_named: whether results and residuals get the name `CHECKPOINT_NAME`;
      False if recomputing them costs less than saving them.
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
    self._default = passes or Passes(self._xla_forward, self._xla_backward)
    self._chosen = jax.custom_vjp(self._forward, nondiff_argnums=(1,))
    self._chosen.defvjp(self._save, self._backward)

  def __call__(self, arrays: Arrays, implementation: str | None) -> Any:
    """Computes the result with the named implementation, or with the best.

    Raises:
      NotImplementedError: the named kernel cannot serve the arrays.
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
    """Returns a pass, whose own derivative is that of the XLA form."""
    run = OperatorPass(self, name, tuple(options.items()), *choice)

    def chosen(*arguments):
      return run_by_platform(run, arguments)

    xla = run._replace(kernels=(), named=False)
    differentiable = jax.custom_vjp(chosen)
    differentiable.defvjp(
      lambda *arguments: (chosen(*arguments), arguments),
      lambda arguments, g: jax.vjp(partial(xla, None), *arguments)[1](g),
    )
    return differentiable

  def on(self, kernel: str | None) -> Passes:
    """Returns the passes of a kernel by its name, or of the XLA form."""
    return self._kernel(kernel) if kernel else self._default

  def _xla_forward(self, arrays, *, save):
    saved = self._saves(arrays) if save else ()
    zeros = (jnp.zeros(x.shape, x.dtype) for x in saved)
    return self._xla(arrays, implementation=None), *zeros

  def _xla_backward(self, arrays, saved, g):
    del saved
    function = partial(self._xla, implementation=None)
    return jax.vjp(function, arrays)[1](g)[0]

  def _kernel(self, name):
    """Returns a kernel's passes over arrays that the mesh in force shards."""
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


class OperatorPass(NamedTuple):
  """The forward or the backward pass of an operator in a traced program.

  Attributes:
    operator: the operator.
    name: "forward" or "backward".
    options: keyword arguments of the pass, as pairs.
    kernels: names of the kernels that can serve.
    named: whether the caller named the kernel, for every platform.
  """

  operator: Operator
  name: str
  options: tuple[tuple[str, Any], ...]
  kernels: tuple[str, ...]
  named: bool

  def __call__(
    self, platform: str | None, arrays: Arrays, *rest: Any
  ) -> Results:
    """Runs the pass with the platform's kernel, or with the XLA form."""
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
  """Raises NotImplementedError if a size is symbolic (`jax.export`)."""
  shapes = [x.shape for x in arrays]
  if any(map(is_symbolic_dim, itertools.chain(*shapes))):
    raise NotImplementedError(
      f"a kernel needs sizes that are known, not symbolic ones: {shapes}"
    )


def is_implemented(check: Callable[..., Any], *arguments: Any) -> bool:
  """Returns whether a check passes without a NotImplementedError."""
  try:
    check(*arguments)
  except NotImplementedError:
    return False
  return True


@partial(jax.jit, static_argnums=0)
def run_by_platform(run: OperatorPass, arguments: Any) -> Any:
  """Runs a pass with the best implementation for the platform of lowering."""
  if run.named:
    return run(None, *arguments)
  leaves, tree = jax.tree.flatten(arguments)
  results = _primitive.bind(*leaves, run=run, tree=tree, axes=())
  shapes = jax.eval_shape(partial(run, None), *arguments)
  return jax.tree.unflatten(jax.tree.structure(shapes), results)


_primitive = Primitive("kernel_by_platform")
_primitive.multiple_results = True


def _flat(run, tree, axes, platform):
  """Returns the pass over a flat list of arrays, mapped over some axes.

  A mapped pass is that of the XLA form: kernels take no further leading axis.
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
