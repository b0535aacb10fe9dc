"""Primitives of JAX that change shapes, reduce or multiply, as ONNX nodes.

A rule takes the graph, the equation and the operands. It returns the result, or
a list of results.
"""

import string
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.export import is_symbolic_dim

from spatial_mamba_jax.export.onnx_graph import (
  Graph,
  Sizes,
  Tensor,
  computed,
  constant,
)

Rule = Callable[..., Any]


def _in(equation, index=0) -> Sizes:
  return equation.invars[index].aval.shape


def _out(equation) -> Sizes:
  return equation.outvars[0].aval.shape


def _is_one(size) -> bool:
  return not is_symbolic_dim(size) and size == 1


def _without_ones(sizes):
  return [size for size in sizes if not _is_one(size)]


def reshape(graph: Graph, equation: Any, x: Tensor) -> Tensor:
  """Reshapes; broadcasts stay lazy if only axes of size 1 come and go."""
  old, new = _in(equation), _out(equation)
  if _without_ones(old) == _without_ones(new):
    pairs = zip(old, x.sizes, strict=True)
    kept = iter([stored for size, stored in pairs if not _is_one(size)])
    sizes = [1 if _is_one(size) else next(kept) for size in new]
    return graph.reshape(x, sizes)
  if all(map(_is_one, x.sizes)):
    return graph.reshape(x, [1] * len(new))
  if x.sizes != old:
    x = computed(graph.full(x, old), old)
  return graph.reshape(x, new)


def _broadcast_in_dim(graph, equation, x):
  sizes = [1] * len(_out(equation))
  for axis, size in zip(
    equation.params["broadcast_dimensions"], x.sizes, strict=True
  ):
    sizes[axis] = size
  return graph.reshape(x, sizes)


def _transpose(graph, equation, x):
  permutation = equation.params["permutation"]
  if not isinstance(x.value, str):
    return constant(np.transpose(x.value, permutation))
  sizes = tuple(x.sizes[axis] for axis in permutation)
  order = tuple(permutation.index(axis) for axis in x.order)
  return Tensor(x.value, sizes, order)


def sliced(
  graph: Graph,
  x: Tensor,
  ranges: dict[int, tuple[int, int, int]],
) -> Tensor:
  """Slices axes: {axis: (start, end, step)}. Broadcast axes stay as they are.

  The end is exclusive, and -1 is before the first element.
  """
  ranges = {
    axis: limits
    for axis, limits in ranges.items()
    if not _is_one(x.sizes[axis])
  }
  if not ranges:
    return x
  if not isinstance(x.value, str):
    places = [range(*ranges.get(i, (n,))) for i, n in enumerate(x.sizes)]
    return constant(x.value[np.ix_(*places)])
  sizes = list(x.sizes)
  for axis, (start, end, step) in ranges.items():
    sizes[axis] = len(range(start, end, step))
  starts, ends, steps = (
    list(column) for column in zip(*ranges.values(), strict=True)
  )
  # ONNX counts negative ends from the last element.
  lowest = np.iinfo(np.int64).min + 1
  ends = [lowest if end < 0 else end for end in ends]
  axes = [x.order.index(axis) for axis in ranges]
  vectors = map(graph.integers, (starts, ends, axes, steps))
  name = graph.node("Slice", x.value, *vectors)
  return Tensor(name, tuple(sizes), x.order)


def _slice(graph, equation, x):
  params = equation.params
  old = _in(equation)
  steps = params["strides"] or [1] * len(old)
  limits = zip(
    params["start_indices"], params["limit_indices"], steps, strict=True
  )
  return sliced(
    graph,
    x,
    {
      axis: each
      for axis, each in enumerate(limits)
      if each[1:] != (old[axis], 1) or each[0] != 0
    },
  )


def _rev(graph, equation, x):
  old = _in(equation)
  axes = equation.params["dimensions"]
  return sliced(graph, x, {axis: (old[axis] - 1, -1, -1) for axis in axes})


def _gather(graph, equation, x, indices):
  """Takes one slice, or elements along one axis, at constant indices."""
  numbers, old = equation.params["dimension_numbers"], _in(equation)
  slices = equation.params["slice_sizes"]
  if not indices.is_constant or numbers.operand_batching_dims:
    raise NotImplementedError("ONNX export needs constant indices in gather")
  where, gone = indices.value, numbers.collapsed_slice_dims
  if where.ndim == 1:
    starts = dict(zip(numbers.start_index_map, where.tolist(), strict=True))
    part = sliced(
      graph,
      x,
      {
        axis: (start, start + slices[axis], 1)
        for axis, start in starts.items()
        if slices[axis] != old[axis]
      },
    )
    kept = [size for axis, size in enumerate(part.sizes) if axis not in gone]
    return graph.reshape(part, kept)
  axis, *more = numbers.start_index_map
  others = [i for i in range(len(old)) if i != axis]
  if (
    more
    or where.ndim != 2
    or gone != (axis,)
    or numbers.offset_dims != tuple(others)
    or any(slices[i] != old[i] for i in others)
  ):
    raise NotImplementedError("ONNX export gathers along one axis only")
  if _is_one(x.sizes[axis]):
    return x
  places = graph.integers(where[:, 0].tolist())
  name = graph.node("Gather", graph.plain(x), places, axis=axis)
  return computed(name, [*x.sizes[:axis], len(where), *x.sizes[axis + 1 :]])


def _split(graph, equation, x):
  axis, sizes = equation.params["axis"], equation.params["sizes"]
  if _is_one(x.sizes[axis]):
    return [x] * len(sizes)
  names = graph.nodes(
    "Split",
    [graph.ordered(x, x.order), graph.integers(sizes)],
    len(sizes),
    axis=x.order.index(axis),
  )
  return [
    Tensor(name, (*x.sizes[:axis], size, *x.sizes[axis + 1 :]), x.order)
    for name, size in zip(names, sizes, strict=True)
  ]


def _concatenate(graph, equation, *xs):
  axis, sizes = equation.params["dimension"], _out(equation)
  if len(xs) == 3 and _are_edges(graph, axis, equation, *xs):
    pads = np.zeros((2, len(sizes)), int)
    pads[:, axis] = _in(equation)[axis], _in(equation, 2)[axis]
    x = graph.plain(xs[1])
    pads = graph.integers(pads.ravel().tolist())
    return computed(graph.node("Pad", x, pads, mode="edge"), sizes)
  names = [graph.full(x, _in(equation, index)) for index, x in enumerate(xs)]
  return computed(graph.node("Concat", *names, axis=axis), sizes)


def _are_edges(graph, axis, equation, first, x, last):
  """Whether the outer operands repeat the first and the last slice of x."""
  ends = first, last
  if x.sizes != _in(equation, 1) or not all(
    _is_one(end.sizes[axis]) and isinstance(end.value, str) for end in ends
  ):
    return False
  length = x.sizes[axis]
  edges = [
    graph.plain(sliced(graph, x, {axis: (start, start + 1, 1)}))
    for start in (0, length - 1)
  ]
  return edges == [graph.plain(end) for end in ends]


def _stack(graph, equation, *xs):
  axis = equation.params["axis"]
  old = _in(equation)
  sizes = (*old[:axis], 1, *old[axis:])
  parts = [
    graph.plain(graph.reshape(computed(graph.full(x, old), old), sizes))
    for x in xs
  ]
  return computed(graph.node("Concat", *parts, axis=axis), _out(equation))


def _reduction(op: str) -> Rule:
  def rule(graph, equation, x):
    axes = graph.integers(equation.params["axes"])
    name = graph.full(x, _in(equation))
    return computed(graph.node(op, name, axes, keepdims=0), _out(equation))

  return rule


def _dot_general(graph, equation, x, y):
  """A matrix product of the last axis, or else an Einstein sum."""
  (contracted, batched) = equation.params["dimension_numbers"]
  sizes, old = _out(equation), (_in(equation), _in(equation, 1))
  names = graph.full(x, old[0]), graph.full(y, old[1])
  last = len(old[0]) - 1
  is_last = [list(axes) for axes in contracted] == [[last], [0]]
  if is_last and len(old[1]) == 2 and not batched[0]:
    return computed(graph.node("MatMul", *names), sizes)
  letters = iter(string.ascii_lowercase)
  words = [[next(letters) for _ in shape] for shape in old]
  for left, right in (*_pairs(contracted), *_pairs(batched)):
    words[1][right] = words[0][left]
  shared = [words[0][axis] for axis in batched[0]]
  gone = {words[0][axis] for axis in contracted[0]}
  rest = [c for word in words for c in word if c not in {*shared, *gone}]
  left, right = map("".join, words)
  rule = f"{left},{right}->{''.join(shared + rest)}"
  return computed(graph.node("Einsum", *names, equation=rule), sizes)


def _pairs(axes):
  return zip(*axes, strict=True)


def _convolution(graph, equation, x, kernel):
  params, order = equation.params, equation.params["dimension_numbers"]
  if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
    raise NotImplementedError("ONNX export has no transposed convolution")
  if x.sizes != _in(equation):
    x = computed(graph.full(x, _in(equation)), _in(equation))
  axes = order.lhs_spec[2:]
  # ONNX's padding is not negative.
  cut = {
    axis: (-min(before, 0), x.sizes[axis] + min(after, 0), 1)
    for axis, (before, after) in zip(axes, params["padding"], strict=True)
    if min(before, after) < 0
  }
  # Transposed before it is cut: several convolutions may read it.
  name = graph.ordered(x, order.lhs_spec)
  sizes = tuple(x.sizes)
  x = sliced(graph, Tensor(name, sizes, tuple(order.lhs_spec)), cut)
  pads = [
    (max(before, 0), max(after, 0)) for before, after in params["padding"]
  ]
  name = graph.node(
    "Conv",
    str(x.value),
    graph.ordered(kernel, order.rhs_spec),
    strides=list(params["window_strides"]),
    dilations=list(params["rhs_dilation"]),
    pads=[each[end] for end in (0, 1) for each in pads],
    group=params["feature_group_count"],
  )
  return Tensor(name, _out(equation), tuple(order.out_spec))


def _reduce_precision(graph, equation, x):
  info = np.finfo(equation.invars[0].aval.dtype)
  params = equation.params
  if (params["exponent_bits"], params["mantissa_bits"]) != (
    info.nexp,
    info.nmant,
  ):
    raise NotImplementedError("ONNX export rounds to no lower precision")
  return x


def _same(graph, equation, *xs):
  return list(xs)


# {primitive: rule}.
RULES: dict[str, Rule] = {
  "broadcast_in_dim": _broadcast_in_dim,
  "concatenate": _concatenate,
  "conv_general_dilated": _convolution,
  "copy": _same,
  "dot_general": _dot_general,
  "gather": _gather,
  "name": _same,
  "optimization_barrier": _same,
  "reduce_max": _reduction("ReduceMax"),
  "reduce_min": _reduction("ReduceMin"),
  "reduce_precision": _reduce_precision,
  "reduce_sum": _reduction("ReduceSum"),
  "reshape": reshape,
  "rev": _rev,
  "slice": _slice,
  "split": _split,
  "squeeze": reshape,
  "stack": _stack,
  "stop_gradient": _same,
  "transpose": _transpose,
}
# Those that rearrange constants by themselves, and keep broadcasts lazy.
LAZY = frozenset({"broadcast_in_dim", "reshape", "squeeze", "transpose"})
