"""The linear recurrence h[t] = decay[t] * h[t - 1] + drive[t] in ONNX.

onnxruntime takes about 1 us for each node of each step of a `Scan`. A long
recurrence is therefore cut into chunks of about the square root of its length,
which are scanned side by side: each step computes one token of every chunk. A
second `Scan` carries the state from chunk to chunk. For 3136 tokens of 128
channels this takes a fifth of the time of one step a token.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.export.onnx_graph import (
  Graph,
  Size,
  Tensor,
  computed,
  constant,
)

# Fewest tokens of a recurrence that is cut, and most states of a token. With
# fewer tokens or more states, the products of the chunks cost more time than
# the steps that they save.
_SHORTEST, MOST_STATES = 128, 1024
# Fewest tokens of a chunk, and fewest chunks. A length without such a divisor
# is not cut.
_FEWEST = 4


def linear_recurrence(
  graph: Graph,
  decay: str,
  drive: str,
  first: str | None,
  shape: Sequence[Size],
  dtype: Any,
) -> str:
  """Adds a recurrence along axis 1 to a graph.

  Args:
    graph: the graph.
    decay: name of a value of this shape.
    drive: name of a value of this shape.
    first: name of the state before the first token, without axis 1; None for 0.
    shape: the sizes of the states.
    dtype: the dtype of the states.

  Returns:
    The name of the states.
  """
  batch, length, *rest = shape
  token = batch, *rest
  start = first or _filled(graph, 0, token, dtype)
  size = chunk_size(length)
  is_short = length < _SHORTEST or math.prod(rest) > MOST_STATES
  if not is_short and size >= _FEWEST:
    return _in_chunks(graph, start, decay, drive, shape, size, dtype)

  def step(state, decay, drive):
    after = _after(graph, state, decay, drive)
    return [after], [after]

  _, states = _loop(graph, step, [start], [decay, drive], token, dtype, axis=1)
  return states


def chunk_size(length: int) -> int:
  """Returns the largest divisor up to the square root."""
  sizes = range(1, math.isqrt(length) + 1)
  return max(size for size in sizes if length % size == 0)


def _in_chunks(graph, start, decay, drive, shape, size, dtype):
  batch, length, *rest = shape
  count = length // size
  cut = batch, count, size, *rest
  others = range(3, len(cut))
  tokens = [
    graph.ordered(
      graph.reshape(computed(x, shape), cut),
      (2, 0, 1, *others),
    )
    for x in (decay, drive)
  ]
  chunks = _from_zero(graph, tokens, (batch, count, *rest), dtype)
  before = _before(graph, start, chunks, (batch, *rest), dtype, axis=1)
  states = _after(graph, before, chunks.decays, chunks.states)
  ordered = graph.node("Transpose", states, perm=[1, 2, 0, *others])
  return graph.plain(graph.reshape(computed(ordered, cut), shape))


def chunks_recurrence(
  graph: Graph,
  decay: str,
  drive: str,
  first: Tensor,
  shape: Sequence[Size],
  count: int,
  dtype: Any,
) -> str:
  """Adds a recurrence whose chunks are along axis 0, before the batch.

  Args:
    graph: the graph, in which the symbolic batch size stands for `count` times
      the batch size.
    decay: name of a value of this shape.
    drive: name of a value of this shape.
    first: the state before the first chunk, without axis 1.
    shape: the sizes of the states, of the tokens of a chunk along axis 1.
    count: number of chunks.
    dtype: the dtype of the states.

  Returns:
    The name of the states.
  """
  batch, _, *rest = shape
  token = batch, *rest
  order = 1, 0, *range(2, len(shape))
  tokens = [graph.ordered(computed(x, shape), order) for x in (decay, drive)]
  chunks = _from_zero(graph, tokens, token, dtype)
  with graph.batch_times(1):
    last, product = (
      graph.plain(graph.reshape(computed(x, token), (count, *token)))
      for x in (chunks.last, chunks.decay)
    )
    ends = chunks._replace(last=last, decay=product)
    before = _before(graph, graph.plain(first), ends, token, dtype, axis=0)
  before = graph.plain(graph.reshape(computed(before, (count, *token)), token))
  states = _after(graph, before, chunks.decays, chunks.states)
  return graph.node("Transpose", states, perm=list(order))


class _Chunks(NamedTuple):
  """Chunks that begin at 0, tokens along axis 0.

  The states of a chunk are linear in the state before it: decays * before +
  states.

  Attributes:
    last: the last state of each chunk.
    decay: the product of the decays of each chunk.
    states: the state of each token.
    decays: the product of the decays of a chunk up to each token.
  """

  last: str
  decay: str
  states: str
  decays: str


def _from_zero(graph, tokens, sizes, dtype):
  """Scans decays and inputs of chunks, whose tokens are along axis 0."""

  def step(state, product, decay, drive):
    after = _after(graph, state, decay, drive)
    product = graph.node("Mul", decay, product)
    return [after, product], [after, product]

  starts = [_filled(graph, number, sizes, dtype) for number in (0, 1)]
  return _Chunks(*_loop(graph, step, starts, tokens, sizes, dtype, axis=0))


def _before(graph, start, chunks, sizes, dtype, *, axis):
  """Returns the state before each chunk; chunks are along this axis."""

  def step(before, decay, last):
    return [_after(graph, before, decay, last)], [before]

  ends = chunks.decay, chunks.last
  return _loop(graph, step, [start], ends, sizes, dtype, axis=axis)[1]


def _after(graph, state, decay, drive):
  return graph.node("Add", graph.node("Mul", decay, state), drive)


def _filled(graph, number, sizes, dtype):
  value = constant(np.full((1,) * len(sizes), number, dtype))
  return graph.full(value, sizes)


def _loop(
  graph: Graph,
  step: Callable[..., tuple[list[str], list[str]]],
  starts: Sequence[str],
  tokens: Sequence[str],
  sizes: Sequence[Size],
  dtype: Any,
  *,
  axis: int,
) -> list[str]:
  """Adds a `Scan`, all of whose states, tokens and outputs have one shape.

  Args:
    graph: the graph.
    step: (*states, *tokens) -> the next states, and the outputs of a step.
    starts: the first states.
    tokens: what is scanned.
    sizes: sizes of a state.
    dtype: of all.
    axis: the axis of tokens and outputs that is scanned.

  Returns:
    The last states, and the outputs.
  """
  names = [graph.unique("token") for _ in (*starts, *tokens)]
  graph.begin_body()
  states, outputs = step(*names)
  results = [*states, *map(graph.copy, outputs)]
  body = graph.end_body(
    [graph.info(name, sizes, dtype) for name in names],
    [graph.info(name, sizes, dtype) for name in results],
  )
  return graph.nodes(
    "Scan",
    [*starts, *tokens],
    len(results),
    body=body,
    num_scan_inputs=len(tokens),
    scan_input_axes=[axis] * len(tokens),
    scan_output_axes=[axis] * len(outputs),
  )
