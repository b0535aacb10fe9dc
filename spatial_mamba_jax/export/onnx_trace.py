"""Conversion of a traced function, a jaxpr, to an ONNX graph.

What depends on no input is computed at export. Of the forms of an operator that
depend on the platform, a TPU's is taken: it has XLA's convolutions in place of
sums of shifted products. A linear recurrence is one of ONNX's `Scan`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim
from jax.extend.core import Literal
from spatial_mamba_kernels.normalization import EPSILON

from spatial_mamba_jax.export import onnx_elementwise, onnx_primitives
from spatial_mamba_jax.export.onnx_graph import (
  Graph,
  Tensor,
  computed,
  constant,
)
from spatial_mamba_jax.export.onnx_recurrence import (
  MOST_STATES,
  chunks_recurrence,
  linear_recurrence,
)


def convert(
  graph: Graph,
  jaxpr: Any,
  constants: Sequence[Any],
  arguments: Sequence[Tensor],
  wanted: Sequence[bool] | None = None,
) -> list[Tensor]:
  """Adds what a jaxpr computes to a graph.

  Args:
    graph: the graph.
    jaxpr: an open jaxpr.
    constants: arrays or tensors of its `constvars`.
    arguments: tensors of its `invars`.
    wanted: which of its results are used; None for all.

  Returns:
    Its results. What is not wanted may be anything.

  Raises:
    NotImplementedError: a primitive has no rule, or not for these operands.
  """
  known: dict[Any, Tensor] = dict(zip(jaxpr.invars, arguments, strict=True))
  for variable, array in zip(jaxpr.constvars, constants, strict=True):
    known[variable] = array if isinstance(array, Tensor) else constant(array)

  def read(atom: Any) -> Tensor:
    if isinstance(atom, Literal):
      aval: Any = atom.aval
      return constant(np.asarray(atom.val, aval.dtype))
    return known[atom]

  live = _live(jaxpr, wanted or [True] * len(jaxpr.outvars))
  for equation in jaxpr.eqns:
    used = [variable in live for variable in equation.outvars]
    if any(used):
      operands = list(map(read, equation.invars))
      results = _equation(graph, equation, operands, used)
      known.update(zip(equation.outvars, results, strict=True))
  return [
    read(atom) if isinstance(atom, Literal) or atom in live else _UNUSED
    for atom in jaxpr.outvars
  ]


# Stands for results that no output depends on.
_UNUSED = constant(np.zeros(0, np.float32))


def _live(jaxpr, wanted):
  """Returns the variables that the wanted results depend on."""
  live = {
    atom
    for atom, is_wanted in zip(jaxpr.outvars, wanted, strict=True)
    if is_wanted and not isinstance(atom, Literal)
  }
  for equation in reversed(jaxpr.eqns):
    if live.intersection(equation.outvars):
      live.update(x for x in equation.invars if not isinstance(x, Literal))
  return live


def _equation(graph, equation, xs, used):
  """Returns the results of an equation."""
  name, params = equation.primitive.name, equation.params
  if name in _CALLS:
    return _CALLS[name](graph, equation, xs, used)
  if all(x.is_constant for x in xs) and name not in onnx_primitives.LAZY:
    folded = _folded(equation, xs)
    if folded is not None:
      return folded
  if name in onnx_elementwise.RULES:
    return [onnx_elementwise.apply(graph, name, params, xs)]
  if name not in onnx_primitives.RULES:
    raise NotImplementedError(
      f"ONNX export has no rule for the primitive {name}"
    )
  results = onnx_primitives.RULES[name](graph, equation, *xs)
  return results if isinstance(results, list) else [results]


def _folded(equation, xs):
  """Computes an equation of constants.

  Returns:
    None if a size is symbolic, or if elements are repeated, which would take
    more of the file than their indices do.
  """
  if equation.primitive.name in onnx_elementwise.RULES:
    # Broadcasts stay lazy. A scalar is not broadcast.
    sizes = onnx_elementwise.joined_sizes(xs)
    arrays = [np.broadcast_to(x.value, sizes if x.sizes else ()) for x in xs]
  else:
    shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
    if any(is_symbolic_dim(size) for shape in shapes for size in shape):
      return None
    is_gather = equation.primitive.name == "gather"
    if is_gather and math.prod(shapes[-1]) > math.prod(shapes[0]):
      return None
    arrays = [
      np.broadcast_to(x.value, shape)
      for x, shape in zip(xs, shapes, strict=False)
    ]
  results = equation.primitive.bind(*arrays, **equation.params)
  if not equation.primitive.multiple_results:
    results = [results]
  return list(map(constant, results))


def _inlined(parameter: str) -> Callable[..., list[Tensor]]:
  """Returns the rule of a call whose jaxpr is this parameter."""

  def rule(graph, equation, xs, used):
    return _call(graph, equation.params[parameter], xs, used)

  return rule


def _call(graph, jaxpr, xs, used):
  if hasattr(jaxpr, "jaxpr"):
    return convert(graph, jaxpr.jaxpr, jaxpr.consts, xs, used)
  return convert(graph, jaxpr, (), xs, used)


def _custom_jvp(graph, equation, xs, used):
  body = equation.params["call_jaxpr"]
  (x, *_) = xs
  if _source(body)[0] == "silu" and not x.is_constant:
    value = graph.ordered(x, x.order)
    name = graph.node("Mul", value, graph.node("Sigmoid", value))
    return [Tensor(name, x.sizes, x.order)]
  # Softplus too is computed as it is traced: onnxruntime's is several times
  # slower, and other runtimes may lose small results.
  return _call(graph, body, xs, used)


def _source(jaxpr):
  """Returns the name of the traced function, and its file."""
  name, _, file = jaxpr.jaxpr.debug_info.func_src_info.partition(" at ")
  return name, file


def _custom_vjp(graph, equation, xs, used):
  body = equation.params["call_jaxpr"]
  name, file = _source(body)
  if name == "linear_recurrence":
    return [_recurrence(graph, equation, *xs)]
  if (
    name == "_result"
    and "normalization.py" in file
    and used == [True, False, False]
  ):
    axes = {x.params["axes"] for x in body.jaxpr.eqns if "axes" in x.params}
    if axes == {(len(xs[0].sizes) - 1,)} and not xs[0].is_constant:
      return [_layer_norm(graph, equation, *xs), _UNUSED, _UNUSED]
  return _call(graph, body, xs, used)


def _layer_norm(graph, equation, x, scale, bias):
  names = [
    graph.full(each, variable.aval.shape)
    for each, variable in zip((x, scale, bias), equation.invars, strict=True)
  ]
  name = graph.node("LayerNormalization", *names, axis=-1, epsilon=EPSILON)
  return computed(name, equation.invars[0].aval.shape)


def _cond(graph, equation, xs, used):
  index, *operands = xs
  if not index.is_constant:
    raise NotImplementedError("ONNX export has no rule for a condition")
  branch = equation.params["branches"][int(index.value)]
  return _call(graph, branch, operands, used)


def _platform_index(graph, equation, xs, used):
  """Returns the index of a TPU's form, or else of the default."""
  platforms = equation.params["platforms"]
  of_tpu = [i for i, names in enumerate(platforms) if names and "tpu" in names]
  return [constant(np.int32((of_tpu or [platforms.index(None)])[0]))]


def _recurrence(graph, equation, decay, drive, first=None):
  """h[t] = decay[t] * h[t - 1] + drive[t] along axis 1."""
  shape, dtype = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
  decay, drive = graph.full(decay, shape), graph.full(drive, shape)
  carried = None if first is None else graph.carried_state(first)
  if carried is not None:
    first, count = carried
    result = chunks_recurrence(graph, decay, drive, first, shape, count, dtype)
    return computed(result, shape)
  if first is not None:
    first = graph.full(first, (shape[0], *shape[2:]))
  result = linear_recurrence(graph, decay, drive, first, shape, dtype)
  return computed(result, shape)


def _chunks(graph, equation, fixed, carry, scanned, used):
  """A loop over chunks of tokens, of `selective_ssm`, without a loop.

  The chunks are taken as images of a larger batch. Only the linear recurrence
  depends on the chunk before, and computes that itself.
  """
  body, count = equation.params["jaxpr"], equation.params["length"]
  first, *inner = [x.aval.shape for x in body.jaxpr.invars[len(fixed) :]]
  tokens = []
  for x, shape in zip(scanned, inner, strict=True):
    outer = count, *shape
    whole = computed(graph.full(x, outer), outer)
    tokens.append(graph.reshape(whole, shape))
  name = graph.unique("carry")
  graph.carry(name, graph.full(*carry, first), count)
  arguments = *fixed, computed(name, first), *tokens
  with graph.batch_times(count):
    last, y = convert(graph, body.jaxpr, body.consts, arguments, used)
    results = [
      computed(graph.full(x, variable.aval.shape), variable.aval.shape)
      for x, variable in zip((last, y), body.jaxpr.outvars, strict=True)
      if x is not _UNUSED
    ]
  results = [graph.reshape(x, (count, *x.sizes)) for x in results]
  if not used[0]:
    return [_UNUSED, *results]
  last, *rest = results
  last = onnx_primitives.sliced(graph, last, {0: (count - 1, count, 1)})
  return [graph.reshape(last, first), *rest]


def _is_of_chunks(equation):
  """Whether a loop is that of `selective_ssm`, and of few states a token."""
  name, file = _source(equation.params["jaxpr"])
  if name != "chunk" or "selective_ssm" not in file:
    return False
  carried = equation.outvars[0].aval.shape
  return math.prod(carried[1:]) <= MOST_STATES


def _scan(graph, equation, xs, used):
  """A loop; unrolled if it runs over constants, the weights of alike blocks."""
  params = equation.params
  body, first = params["jaxpr"], params["num_consts"]
  middle = first + params["num_carry"]
  fixed, carry, scanned = xs[:first], xs[first:middle], xs[middle:]
  if all(x.is_constant for x in scanned):
    return _unrolled(graph, equation, fixed, carry, scanned, used)
  if _is_of_chunks(equation):
    return _chunks(graph, equation, fixed, carry, scanned, used)
  avals = [x.aval for x in body.jaxpr.invars[first:]]
  names = [graph.unique("carry") for _ in avals]
  infos, arguments = [], []
  for name, aval in zip(names, avals, strict=True):
    infos.append(graph.info(name, aval.shape, aval.dtype))
    arguments.append(computed(name, aval.shape))
  inputs = [
    graph.full(x, variable.aval.shape)
    for x, variable in zip(xs[first:], equation.invars[first:], strict=True)
  ]
  graph.begin_body()
  results = convert(graph, body.jaxpr, body.consts, (*fixed, *arguments))
  outputs = []
  for x, variable in zip(results, body.jaxpr.outvars, strict=True):
    shape, dtype = variable.aval.shape, variable.aval.dtype
    outputs.append(graph.info(graph.copy(graph.full(x, shape)), shape, dtype))
  direction = int(params["reverse"])
  names = graph.nodes(
    "Scan",
    inputs,
    len(outputs),
    body=graph.end_body(infos, outputs),
    num_scan_inputs=len(scanned),
    scan_input_directions=[direction] * len(scanned),
    scan_output_directions=[direction] * (len(outputs) - len(carry)),
  )
  return [
    computed(name, variable.aval.shape)
    for name, variable in zip(names, equation.outvars, strict=True)
  ]


def _unrolled(graph, equation, fixed, carry, scanned, used):
  params = equation.params
  body, outputs = params["jaxpr"], []
  steps = range(params["length"])
  for step in reversed(steps) if params["reverse"] else steps:
    parts = [constant(x.value[min(step, len(x.value) - 1)]) for x in scanned]
    results = convert(graph, body.jaxpr, body.consts, (*fixed, *carry, *parts))
    carry = results[: len(carry)]
    outputs.append(results[len(carry) :])
  columns = list(zip(*outputs, strict=True))
  if not all(x.is_constant for column in columns for x in column):
    raise NotImplementedError(
      "ONNX export needs a loop over weights without outputs"
    )
  if params["reverse"]:
    columns = [column[::-1] for column in columns]
  return [
    *carry,
    *(constant(np.stack([x.value for x in column])) for column in columns),
  ]


# {primitive: rule} of those that call functions.
_CALLS: dict[str, Callable[..., list[Tensor]]] = {
  "cond": _cond,
  "custom_jvp_call": _custom_jvp,
  "custom_vjp_call": _custom_vjp,
  "jit": _inlined("jaxpr"),
  "platform_index": _platform_index,
  "remat2": _inlined("jaxpr"),
  "scan": _scan,
}
