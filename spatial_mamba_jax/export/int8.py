"""Runs networks with int8 matrix products.

Every matrix product with a weight (projections, MLPs, the thin products of the
time steps, the head, and the convolutions of one pixel, which are products too)
and every full convolution (the stem's and the downsamplings') multiplies int8
and adds int32. Weights have a scale for each output channel, which is fixed
when the network is quantized; activations have one for each token, and of a
convolution for each image, which is measured in each call. Scans, depthwise
convolutions, norms and activations are computed as before.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.export import is_symbolic_dim
from jax.extend.core import Literal

from spatial_mamba_jax.export.network import Network, without_kernels

# Greatest absolute value of an int8, the same on both sides of 0.
_MOST = 127


class Quantized:
  """A network with int8 matrix products.

  Attributes:
    config: the architecture.
    deterministic: True; only inference is quantized.
  """

  def __init__(self, model: Network):
    self.config, self.deterministic = model.config, True
    self.model = without_kernels(model)
    self._run = jax.jit(self.traced)

  def __call__(self, images: Any) -> Any:
    """Computes what the network computes, for images of any size."""
    return self._run(images)

  def traced(self, images: Any) -> Any:
    """Computes the same within `jax.jit`, without a program of its own."""
    like = jax.ShapeDtypeStruct(jnp.shape(images), jnp.result_type(images))
    program, shape = jax.make_jaxpr(
      lambda images: self.model(images), return_shape=True
    )(like)
    results = _evaluate(program.jaxpr, program.consts, [images])
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def quantize(model: Network) -> Quantized:
  """Returns a network that multiplies int8 in place of floats.

      quantized = smj.quantize(model)
      logits = quantized(images)

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`, in eval
      mode.

  Raises:
    ValueError: the model is in training mode.
  """
  if not model.deterministic:
    raise ValueError("int8 is for inference: call model.eval() first")
  return Quantized(model)


def _evaluate(
  jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]
) -> list[Any]:
  """Evaluates a jaxpr, with int8 in place of products with constants."""
  known = dict(zip(jaxpr.constvars, constants, strict=True))
  known.update(zip(jaxpr.invars, arguments, strict=True))

  def read(atom):
    return atom.val if isinstance(atom, Literal) else known[atom]

  for equation in jaxpr.eqns:
    results = _equation(equation, [read(x) for x in equation.invars])
    known.update(zip(equation.outvars, results, strict=True))
  return [read(x) for x in jaxpr.outvars]


def _is_constant(x: Any) -> bool:
  return not isinstance(x, Tracer)


def _equation(equation: Any, values: list[Any]) -> list[Any]:
  name, params = equation.primitive.name, equation.params
  if name in _CALLS:
    body = params[_CALLS[name]]
    return _evaluate(
      getattr(body, "jaxpr", body), getattr(body, "consts", ()), values
    )
  if name == "kernel_by_platform":
    return _operator(equation, values)
  shapes = [x.aval.shape for x in equation.outvars]
  has_size = not any(is_symbolic_dim(size) for size in sum(shapes, ()))
  if has_size and all(map(_is_constant, values)):
    # What depends on weights alone, such as a folded BatchNorm.
    with jax.ensure_compile_time_eval():
      return _bound(equation, values)
  if name in _PRODUCTS and sum(map(_is_constant, values)) == 1:
    product = _PRODUCTS[name](params, *values)
    if product is not None:
      return [product.astype(equation.outvars[0].aval.dtype)]
  return _bound(equation, values)


def _bound(equation, values):
  results = equation.primitive.bind(*values, **equation.params)
  return results if equation.primitive.multiple_results else [results]


def _operator(equation, values):
  """Evaluates an operator's pass by its form in plain JAX."""
  run, tree, axes = (equation.params[x] for x in ("run", "tree", "axes"))

  def function(*leaves):
    return jax.tree.leaves(run(None, *jax.tree.unflatten(tree, leaves)))

  for in_axes in axes:
    function = jax.vmap(function, in_axes)
  traced = jax.make_jaxpr(function)(*(x.aval for x in equation.invars))
  return _evaluate(traced.jaxpr, traced.consts, values)


def _dot_general(params, x, y):
  numbers = params["dimension_numbers"]
  (left, right), _ = numbers
  one, one_scale = _rounded(x, left)
  other, other_scale = _rounded(y, right)
  total = lax.dot_general(one, other, numbers, preferred_element_type=jnp.int32)
  # The contracted axes of the scales have size 1.
  scale = lax.dot_general(one_scale, other_scale, numbers)
  return total.astype(scale.dtype) * scale


def _convolution(params, x, kernel):
  if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
    return None
  order = params["dimension_numbers"]
  x, x_scale = _rounded(x, order.lhs_spec[1:])
  kernel, kernel_scale = _rounded(kernel, order.rhs_spec[1:])
  total = lax.conv_general_dilated_p.bind(
    x, kernel, **{**params, "preferred_element_type": jnp.dtype(jnp.int32)}
  )
  batch, features, *_ = order.out_spec
  shape = [1] * total.ndim
  shape[batch] = x_scale.size
  scale = jnp.reshape(x_scale, shape)
  shape = [1] * total.ndim
  shape[features] = kernel_scale.size
  return total.astype(scale.dtype) * (scale * jnp.reshape(kernel_scale, shape))


def _rounded(x: Any, axes: Sequence[int]) -> tuple[Any, Any]:
  """Returns int8 values and their scale, one for all values along `axes`."""

  def rounded():
    wide = jnp.asarray(x).astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=tuple(axes), keepdims=True)
    scale = jnp.where(most > 0, most / _MOST, jnp.ones_like(most))
    return jnp.round(wide / scale).astype(jnp.int8), scale

  if _is_constant(x):
    with jax.ensure_compile_time_eval():
      return rounded()
  return rounded()


# {primitive: its function's parameter} of calls that are looked into.
_CALLS = {
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "jit": "jaxpr",
  "remat2": "jaxpr",
}
_PRODUCTS: dict[str, Callable[..., Any]] = {
  "conv_general_dilated": _convolution,
  "dot_general": _dot_general,
}
