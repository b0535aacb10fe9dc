"""An ONNX graph under construction, and the tensors in it.

Two things are lazy. A broadcast is not computed, because ONNX's elementwise
operators broadcast by themselves. A transposition is not computed where
operators work on any order of the axes; that saves most transpositions around
convolutions, whose channels come second in ONNX.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from jax.export import is_symbolic_dim
from onnx import helper, numpy_helper

# The version of ONNX's operators, of onnx 1.15 and onnxruntime 1.17. It is the
# first with Gelu.
OPSET = 20
# The version of the file format that came with it.
IR_VERSION = 9

# Size of an axis: an int, or a symbolic dimension.
Size = Any
Sizes = tuple[Size, ...]


class Tensor(NamedTuple):
  """What a variable of a jaxpr is in the graph.

  Attributes:
    value: the name of a value, or a constant.
    sizes: size of each axis of the variable; 1 where `value` broadcasts.
    order: the variable's axis that each axis of `value` is.
  """

  value: str | np.ndarray
  sizes: Sizes
  order: tuple[int, ...]

  @property
  def is_constant(self) -> bool:
    """Whether the value is known at export."""
    return not isinstance(self.value, str)


def constant(array: Any) -> Tensor:
  """Returns a constant as a tensor."""
  array = np.asarray(array)
  return Tensor(array, array.shape, tuple(range(array.ndim)))


def computed(name: str, sizes: Sequence[Size]) -> Tensor:
  """Returns a value of the graph whose axes are in order."""
  return Tensor(name, tuple(sizes), tuple(range(len(sizes))))


class _Scope(NamedTuple):
  """The nodes of the graph, or of the body of a loop.

  Attributes:
    nodes: in the order of their computation.
    known: {operator, inputs and attributes: outputs} of nodes with the same
      result wherever they are.
  """

  nodes: list[onnx.NodeProto]
  known: dict[Any, list[str]]


class Graph:
  """Nodes and constants. Equal ones are stored once."""

  def __init__(self, images: str, batch: Size):
    """Creates an empty graph.

    Args:
      images: the name of the graph's input.
      batch: the symbolic size of its first axis.
    """
    self._images, self._batch = images, batch
    self._scopes = [_Scope([], {})]
    self._constants: dict[Any, onnx.TensorProto] = {}
    self._arrays: dict[str, np.ndarray] = {}
    self._made_by: dict[str, tuple[str, list[str]]] = {}
    self._reshaped: dict[str, Tensor] = {}
    self._counts: dict[str, Iterator[int]] = {}
    self._carried: dict[str, tuple[str, int]] = {}
    self._factor = 1

  @contextlib.contextmanager
  def batch_times(self, factor: int) -> Iterator[None]:
    """Makes the symbolic batch size stand for a multiple of the batch size."""
    before, self._factor = self._factor, factor
    try:
      yield
    finally:
      self._factor = before

  def unique(self, word: str) -> str:
    """Returns a new name that begins with a word."""
    count = self._counts.setdefault(word, itertools.count())
    return f"{word}_{next(count)}"

  def constant(self, array: np.ndarray) -> str:
    """Returns the name of a constant."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    digest = hashlib.sha256(array.tobytes()).digest()
    key = array.dtype.str, array.shape, digest
    if key not in self._constants:
      name = self.unique("constant")
      self._constants[key] = numpy_helper.from_array(array, name)
      self._arrays[name] = array
    return self._constants[key].name

  def integers(self, values: Sequence[Size]) -> str:
    """Returns the name of a constant vector, for sizes and axes."""
    return self.constant(np.array(values, np.int64))

  def nodes(
    self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any
  ) -> list[str]:
    """Adds a node, unless there is an equal one; returns its outputs' names."""
    key = op, tuple(inputs), repr(sorted(attributes.items()))
    for scope in self._scopes:
      if key in scope.known:
        return scope.known[key]
    names = [self.unique(op.lower()) for _ in range(outputs)]
    node = helper.make_node(op, inputs, names, name=names[0], **attributes)
    self._scopes[-1].nodes.append(node)
    self._scopes[-1].known[key] = names
    self._made_by |= dict.fromkeys(names, (op, list(inputs)))
    return names

  def node(self, op: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node of one output; see `nodes`."""
    return self.nodes(op, inputs, 1, **attributes)[0]

  def copy(self, name: str, copied: str | None = None) -> str:
    """Adds a node whose output is this value under a name of its own."""
    copied = copied or self.unique("copy")
    node = helper.make_node("Identity", [name], [copied], name=copied)
    self._scopes[-1].nodes.append(node)
    return copied

  def made_by(self, name: str, op: str) -> list[str]:
    """Returns the inputs of the node that has this output; [] if not `op`."""
    made, inputs = self._made_by.get(name, ("", []))
    return inputs if made == op else []

  def array(self, name: str) -> np.ndarray | None:
    """Returns the constant of a name, or None."""
    return self._arrays.get(name)

  def ordered(self, x: Tensor, order: Sequence[int]) -> str:
    """Returns the name of a tensor whose axes are in this order."""
    axes = [x.order.index(axis) for axis in order]
    if not isinstance(x.value, str):
      return self.constant(np.transpose(x.value, axes))
    if axes == list(range(len(axes))):
      return x.value
    return self.node("Transpose", x.value, perm=axes)

  def plain(self, x: Tensor) -> str:
    """Returns the name of a tensor whose axes are the variable's."""
    return self.ordered(x, range(len(x.sizes)))

  def full(self, x: Tensor, sizes: Sequence[Size]) -> str:
    """Returns the name of a tensor with the variable's axes and sizes."""
    if x.sizes == tuple(sizes):
      return self.plain(x)
    if not isinstance(x.value, str) and not any(map(is_symbolic_dim, sizes)):
      return self.constant(np.broadcast_to(x.value, sizes))
    return self.node("Expand", self.plain(x), self.shape(sizes))

  def shape(self, sizes: Sequence[Size]) -> str:
    """Returns the name of a vector of sizes."""
    if not any(map(is_symbolic_dim, sizes)):
      return self.integers(sizes)
    parts = [
      self._images_times(self._multiple(size))
      if is_symbolic_dim(size)
      else self.integers([size])
      for size in sizes
    ]
    if len(parts) == 1:
      return parts[0]
    return self.node("Concat", *parts, axis=0)

  def _multiple(self, size):
    factor = size // self._batch
    if is_symbolic_dim(factor):
      raise NotImplementedError(
        "ONNX export needs sizes that are multiples of the batch size"
      )
    return factor * self._factor

  def _images_times(self, factor):
    batch = self.node("Shape", self._images, start=0, end=1)
    if factor == 1:
      return batch
    return self.node("Mul", batch, self.integers([factor]))

  def reshape(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Reshapes a tensor, without its broadcasts, to these sizes."""
    if not isinstance(x.value, str):
      return constant(x.value.reshape(sizes))
    name = self.plain(x)
    x = self._reshaped.get(name, computed(name, x.sizes))
    if x.sizes == tuple(sizes):
      return x
    symbolic = sum(map(is_symbolic_dim, sizes))
    shape = (
      self.integers([-1 if is_symbolic_dim(n) else n for n in sizes])
      if symbolic < 2
      else self.shape(sizes)
    )
    name = self.node("Reshape", str(x.value), shape)
    self._reshaped[name] = x
    return computed(name, sizes)

  def carry(self, name: str, start: str, count: int) -> None:
    """Makes a name stand for the states before chunks computed side by side.

    Args:
      name: the name; no node makes it.
      start: the state before the first chunk.
      count: number of chunks.
    """
    self._carried[name] = start, count

  def carried_state(self, x: Tensor) -> tuple[Tensor, int] | None:
    """Returns the first of the states that `x` stands for, and their number.

    Returns:
      None if `x` does not stand for the states before chunks.
    """
    if not isinstance(x.value, str) or x.value not in self._carried:
      return None
    start, count = self._carried[x.value]
    return x._replace(value=start), count

  def begin_body(self) -> None:
    """Begins the body of a loop: nodes are added to it until `end_body`."""
    self._scopes.append(_Scope([], {}))

  def end_body(
    self,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
  ) -> onnx.GraphProto:
    """Returns the body of a loop, without nodes whose results are unused."""
    nodes = _used(self._scopes.pop().nodes, [x.name for x in outputs])
    return helper.make_graph(nodes, self.unique("body"), inputs, outputs)

  def info(self, name: str, sizes: Sequence[Size], dtype: Any) -> Any:
    """Returns the description of an input or output."""
    shape = [self._size_name(n) if is_symbolic_dim(n) else n for n in sizes]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, shape)

  def _size_name(self, size):
    factor = self._multiple(size)
    return "batch" if factor == 1 else f"batch_{factor}"

  def model(
    self,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    **properties: Any,
  ) -> onnx.ModelProto:
    """Returns the file's content, without what no output depends on."""
    nodes = _used(self._scopes[0].nodes, [x.name for x in outputs])
    names = {name for node in nodes for name in _reads(node)}
    weights = [x for x in self._constants.values() if x.name in names]
    graph = helper.make_graph(nodes, "model", inputs, outputs, weights)
    return helper.make_model(
      graph,
      ir_version=IR_VERSION,
      opset_imports=[helper.make_opsetid("", OPSET)],
      **properties,
    )


def _used(nodes, outputs):
  """Returns the nodes that the outputs depend on."""
  needed, used = set(outputs), []
  for node in reversed(nodes):
    if needed.intersection(node.output):
      used.append(node)
      needed.update(_reads(node))
  return used[::-1]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
  """Yields the names that a node and its bodies read."""
  yield from node.input
  for attribute in node.attribute:
    for inner in attribute.g.node:
      yield from _reads(inner)
