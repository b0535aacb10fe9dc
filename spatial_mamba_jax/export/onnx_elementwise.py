"""Elementwise primitives of JAX as nodes of an ONNX graph.

A rule takes the graph, the parameters of the equation and the names of the
operands. It returns the name of the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim
from onnx import helper

from spatial_mamba_jax.export.onnx_graph import Graph, Sizes, Tensor

Rule = Callable[..., str]


def _node(op: str, **attributes: Any) -> Rule:
  return lambda graph, params, *names: graph.node(op, *names, **attributes)


def _scalar(graph, value):
  return graph.constant(np.array(value, np.float32))


def _log1p(graph, params, x):
  """Computes log(w) + (x - (w - 1)) / w for w = 1 + x, rounded.

  ONNX has no log1p, and log(1 + x) loses small x: the time steps of an SSM are
  softplus(x), often 1e-3 and less. The second term is what w lost of x.
  """
  one = _scalar(graph, 1)
  w = graph.node("Add", x, one)
  lost = graph.node("Sub", x, graph.node("Sub", w, one))
  rest = graph.node("Div", lost, w)
  return graph.node("Add", graph.node("Log", w), rest)


def _expm1(graph, params, x):
  """Computes tanh(x / 2) * (exp(x) + 1), which is accurate for small x."""
  half = graph.node("Mul", x, _scalar(graph, 0.5))
  more = graph.node("Add", graph.node("Exp", x), _scalar(graph, 1))
  return graph.node("Mul", graph.node("Tanh", half), more)


def _erfc(graph, params, x):
  return graph.node("Sub", _scalar(graph, 1), graph.node("Erf", x))


def _rsqrt(graph, params, x):
  return graph.node("Reciprocal", graph.node("Sqrt", x))


def _square(graph, params, x):
  return graph.node("Mul", x, x)


def _integer_pow(graph, params, x):
  if params["y"] == 2:
    return _square(graph, params, x)
  return graph.node("Pow", x, _scalar(graph, params["y"]))


def _max(graph, params, x, y):
  for value, other in ((x, y), (y, x)):
    if _is(graph, other, 0):
      return graph.node("Relu", value)
  return graph.node("Max", x, y)


# Both forms of the exact GELU, as products: `spatial_mamba_kernels`' and JAX's.
# A tuple is a node, a word any value.
_GELUS = (
  ("x", ("Add", 0.5, ("Mul", 0.5, ("Erf", ("Mul", "x", 0.5**0.5))))),
  (
    ("Mul", 0.5, "x"),
    ("Sub", 1.0, ("Erf", ("Mul", ("Neg", "x"), 0.5**0.5))),
  ),
)


def _mul(graph, params, *names):
  for patterns in _GELUS:
    found: dict[str, str] = {}
    if _match(graph, names, patterns, found):
      return graph.node("Gelu", found["x"])
  return graph.node("Mul", *names)


def _match(graph, names, patterns, found):
  """Whether values are computed as patterns; fills {word: value}."""
  for name, pattern in zip(names, patterns, strict=True):
    if isinstance(pattern, str):
      if found.setdefault(pattern, name) != name:
        return False
    elif isinstance(pattern, float):
      if not _is(graph, name, np.float32(pattern)):
        return False
    else:
      op, *inner = pattern
      inputs = graph.made_by(name, op)
      if not inputs or not _match(graph, inputs, inner, found):
        return False
  return True


def _select_n(graph, params, which, *cases):
  if len(cases) != 2:
    raise NotImplementedError("ONNX export selects between two cases only")
  return graph.node("Where", which, cases[1], cases[0])


def _is(graph, name, number):
  array = graph.array(name)
  return array is not None and bool((array == number).all())


def _cast(graph, params, x):
  dtype = helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
  return graph.node("Cast", x, to=dtype)


# {primitive: rule}.
RULES: dict[str, Rule] = {
  "abs": _node("Abs"),
  "add": _node("Add"),
  "convert_element_type": _cast,
  "div": _node("Div"),
  "eq": _node("Equal"),
  "erf": _node("Erf"),
  "erfc": _erfc,
  "exp": _node("Exp"),
  "expm1": _expm1,
  "ge": _node("GreaterOrEqual"),
  "gt": _node("Greater"),
  "integer_pow": _integer_pow,
  "le": _node("LessOrEqual"),
  "log": _node("Log"),
  "log1p": _log1p,
  "logistic": _node("Sigmoid"),
  "lt": _node("Less"),
  "max": _max,
  "min": _node("Min"),
  "mul": _mul,
  "neg": _node("Neg"),
  "rsqrt": _rsqrt,
  "select_n": _select_n,
  "sqrt": _node("Sqrt"),
  "square": _square,
  "sub": _node("Sub"),
  "tanh": _node("Tanh"),
}


def apply(
  graph: Graph, name: str, params: dict[str, Any], xs: Sequence[Tensor]
) -> Tensor:
  """Computes an elementwise primitive, of which an operand is no constant."""
  unchanged = _unchanged(name, xs)
  if unchanged is not None:
    return unchanged
  orders = {x.order for x in xs if not x.is_constant and x.sizes}
  rank = max(len(x.sizes) for x in xs)
  order = orders.pop() if len(orders) == 1 else tuple(range(rank))
  names = [_operand(graph, x, order) for x in xs]
  result = RULES[name](graph, params, *names)
  return Tensor(result, joined_sizes(xs), order)


def joined_sizes(xs: Sequence[Tensor]) -> Sizes:
  """Returns the sizes of what tensors broadcast to."""
  every = [x.sizes for x in xs if x.sizes]
  return tuple(
    next((n for n in axis if is_symbolic_dim(n) or n != 1), 1)
    for axis in zip(*every, strict=True)
  )


def _operand(graph, x, order):
  if not isinstance(x.value, str) and x.value.size == 1:
    return graph.constant(x.value.reshape(()))
  return graph.ordered(x, order) if x.sizes else graph.plain(x)


def _unchanged(name: str, xs: Sequence[Tensor]) -> Tensor | None:
  """Returns the operand that is the result whatever the others are, if any."""
  if name == "select_n":
    which = set(_constants(xs[0]))
    return xs[1 + int(which.pop())] if len(which) == 1 else None
  neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1}.get(name)
  if neutral is None:
    return None
  x, y = xs
  if x.sizes and _constants(y) == [neutral]:
    return x
  if y.sizes and name in ("add", "mul") and _constants(x) == [neutral]:
    return y
  return None


def _constants(x):
  """Returns the distinct values of a constant; none of a computed value."""
  return [] if isinstance(x.value, str) else np.unique(x.value).tolist()
