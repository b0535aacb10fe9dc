"""Floating-point operations of a model, counted in its jaxpr.

Counted are the multiply-adds of matrix products, of convolutions and of linear
recurrences, 2 FLOP each: the convention of papers, and of "model FLOPs" in MFU
(arXiv 2204.02311). Elementwise arithmetic (norms, activations, residuals) is
not counted. The count is the same for every implementation of an operator, and
for every platform.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params

# FLOP for each state of a recurrence h = decay * h + drive: its multiply-add,
# the input's (drive = B * u) and the output's (y = C * h).
_RECURRENCE = 6
# FLOP of a training step over FLOP of the forward pass: the backward pass has
# two products for each product of the forward pass.
TRAINING_FACTOR = 3
# Primitives of Pallas kernels.
_KERNELS = ("pallas_call", "mpmd_map")


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
  """Counts the FLOP of one call.

      count_flops(model, jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))

  A loop counts once for each iteration; a `while` of unknown length counts
  once. Of a conditional, the costliest branch counts. For training, count the
  forward pass and multiply by `TRAINING_FACTOR`.

  Args:
    function: a forward pass over arrays. It is traced, and computes nothing.
    *arguments: arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    NotImplementedError: the function has a Pallas kernel, whose FLOP are
      unknown. Operators that name no implementation have none.
  """
  return count_work(function, *arguments).flops


def jaxpr_flops(jaxpr: Any) -> float:
  """Counts the FLOP of a traced function, as `count_flops` does.

  Recurrences of a backward pass are left out.
  """
  return float(_of(jaxpr)[0])


class Work(NamedTuple):
  """What a forward pass computes.

  Attributes:
    flops: see `count_flops`.
    activations: elements of the results of matrix products and convolutions,
      as fvcore and timm count activations.
  """

  flops: float
  activations: float


def count_work(function: Callable[..., Any], *arguments: Any) -> Work:
  """Counts FLOP and activations of one call; see `count_flops`."""
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  return Work(*map(float, _of(jaxpr)))


def _of(jaxpr) -> np.ndarray:
  """Returns FLOP and activations of a traced function."""
  return sum(map(_equation, jaxpr.eqns), np.zeros(2))


def _equation(equation) -> np.ndarray:
  name, params = equation.primitive.name, equation.params
  if name in _PRODUCTS:
    return np.array([_PRODUCTS[name](equation), equation.outvars[0].aval.size])
  if name == "kernel_by_platform":
    return _operator(equation)
  if name == "custom_vjp_call" and _is_recurrence(params["call_jaxpr"]):
    return np.array([_RECURRENCE * equation.outvars[0].aval.size, 0])
  if name in _KERNELS:
    raise NotImplementedError(
      "the FLOP of a Pallas kernel are unknown: name no implementation"
    )
  work = [_of(inner) for inner in jaxprs_in_params(params)]
  if name == "cond":
    return np.max([np.zeros(2), *work], axis=0)
  return params.get("length", 1) * sum(work, np.zeros(2))


def _dot_general(equation):
  left, _ = (x.aval.shape for x in equation.invars)
  (contracted, _), _ = equation.params["dimension_numbers"]
  size = math.prod(left[axis] for axis in contracted)
  return 2 * equation.outvars[0].aval.size * size


def _convolution(equation):
  _, kernel = (x.aval.shape for x in equation.invars)
  # The first axis of the kernel in `rhs_spec` is that of the output channels.
  features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  taps = math.prod(kernel) // features
  return 2 * equation.outvars[0].aval.size * taps


_PRODUCTS = {
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
}


def _operator(equation):
  """Of an operator's pass: that of its form in plain JAX."""
  run, tree, axes = (equation.params[x] for x in ("run", "tree", "axes"))

  def function(*leaves):
    return run(None, *jax.tree.unflatten(tree, leaves))

  for in_axes in axes:
    function = jax.vmap(function, in_axes)
  return np.array(count_work(function, *(x.aval for x in equation.invars)))


def _is_recurrence(jaxpr):
  name, *_ = jaxpr.jaxpr.debug_info.func_src_info.split(" at ")
  return name == "linear_recurrence"
