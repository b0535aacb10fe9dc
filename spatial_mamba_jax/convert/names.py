"""Converts weights to and from the authors' names and PyTorch's layout.

The tables of `convert.tables` define the conversion.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from spatial_mamba_jax.convert.families import table_of
from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.tables import (
  LINEAR,
  SPATIAL_MAMBA,
  Names,
  Table,
  matrix,
)

# Counters that PyTorch's tools add to a state dict: thop for each module it
# profiles, and torch.optim.swa_utils for its averages.
COUNTERS = ("total_ops", "total_params", "n_averaged")
# BatchNorm's count of updates, which does not affect any result.
_UPDATES = "num_batches_tracked"


class Mismatch(NamedTuple):
  """The tensor names in which a state dict and a model differ.

  Attributes:
    missing: tensors that the model has and the state dict lacks.
    unexpected: tensors that the state dict has and the model lacks.

  A missing `num_batches_tracked`, the unexpected counters of thop or of
  PyTorch's averages, and tensors that are no weights or repeat another one are
  never errors.
  """

  missing: tuple[str, ...]
  unexpected: tuple[str, ...]


def to_torch(model: nnx.Module) -> dict[str, np.ndarray]:
  """Returns a model's weights with the authors' names and PyTorch's layout.

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`, or one
      of our mixers.

  Returns:
    {tensor name: array}, of float32 (float64 for a float64 model), and of int64
    for `num_batches_tracked`. If the mixer is another one than the network's
    authors have, its tensors have the names of the mixer's authors, after the
    prefix of the network's mixer; and those of a mixer of your own its own
    names.
  """
  arrays = {path: variable[...] for path, variable in variables(model)}
  table = table_of(model)
  tensors = torch_tensors(arrays, table)
  if isinstance(table, Table):
    tensors |= {name: tensors[of] for name, of in table.copies.items()}
  return tensors


def torch_tensors(
  arrays: Mapping[str, ArrayLike], table: Names = SPATIAL_MAMBA
) -> dict[str, np.ndarray]:
  """Converts arrays as `to_torch` does.

  Args:
    arrays: {path in the model: array}, e.g. of "head.kernel".
    table: the names and layouts of the model's authors.
  """
  state_dict = {}
  for path, values in arrays.items():
    array = np.asarray(values)
    if array.dtype == np.int32:
      array = array.astype(np.int64)
    tensors = table.layout(path, array.ndim).to_torch(array)
    for name, tensor in zip(table.tensors(path), tensors, strict=True):
      state_dict[name] = np.array(tensor, order="C")
  return state_dict


def from_torch(
  model: nnx.Module,
  state_dict: Mapping[str, np.ndarray],
  *,
  strict: bool = True,
) -> Mismatch:
  """Sets the model's weights to those of a state dict, in place.

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`, or one
      of our mixers.
    state_dict: {tensor name: array}, as PyTorch's `state_dict()` names them.
      The matrix of a linear layer may be [out, in] or [out, in, 1, 1].
    strict: whether missing and unexpected tensors are errors. Otherwise missing
      weights keep their values, and unexpected tensors are ignored.

  Returns:
    The missing and unexpected names.

  Raises:
    ValueError: tensors are missing or unexpected and `strict` is true, or have
      a wrong shape or a complex type. The model is then unchanged.
  """
  mismatch = check_tensors(model, state_dict, strict=strict)
  table = table_of(model)
  for path, variable in variables(model):
    names = table.tensors(path)
    if all(name in state_dict for name in names):
      tensors = [np.asarray(state_dict[name]) for name in names]
      array = table.layout(path, variable.ndim).from_torch(tensors)
      # Copied, because the caller may change its array.
      variable.set_value(jnp.array(array, variable.dtype))
  return mismatch


def check_tensors(
  model: nnx.Module,
  state_dict: Mapping[str, np.ndarray],
  *,
  strict: bool = True,
) -> Mismatch:
  """Checks names, shapes and types for `from_torch`, but reads no values."""
  table = table_of(model)
  unexpected = dict.fromkeys(state_dict)
  if isinstance(table, Table):
    for name in (*table.copies, *table.constants):
      unexpected.pop(name, None)
  missing, unfit = [], []
  for path, variable in variables(model):
    names = table.tensors(path)
    # Takes no memory; a shape from a file can be huge.
    like = np.broadcast_to(np.float32(0), variable.shape)
    layout = table.layout(path, variable.ndim)
    wanted = layout.to_torch(like)
    for name, x in zip(names, wanted, strict=True):
      if name not in state_dict:
        missing.append(name)
        continue
      unexpected.pop(name, None)
      tensor = np.asarray(state_dict[name])
      fits = matrix(tensor) if layout is LINEAR else tensor
      if fits.shape != x.shape:
        unfit.append(
          f"{name} is {list(tensor.shape)} instead of {list(x.shape)}"
        )
      elif not _is_real(tensor.dtype):
        unfit.append(f"{name} is {tensor.dtype}")
  mismatch = Mismatch(tuple(missing), tuple(unexpected))
  _check(mismatch if strict else Mismatch((), ()), unfit)
  return mismatch


def fitting_array(
  path: str,
  variable: nnx.Variable,
  state_dict: Mapping[str, np.ndarray],
  table: Names,
) -> np.ndarray | None:
  """Returns the array of a weight; None if a tensor is missing or misshapen."""
  names = table.tensors(path)
  if not all(name in state_dict for name in names):
    return None
  layout = table.layout(path, variable.ndim)
  like = np.broadcast_to(np.float32(0), variable.shape)
  tensors = [np.asarray(state_dict[name]) for name in names]
  for tensor, x in zip(tensors, layout.to_torch(like), strict=True):
    if (matrix(tensor) if layout is LINEAR else tensor).shape != x.shape:
      return None
  return layout.from_torch(tensors)


def is_counter(name: str) -> bool:
  """Whether a tensor is one of `COUNTERS`, in any module."""
  return name.rpartition(".")[2] in COUNTERS


def _is_real(dtype: np.dtype) -> bool:
  # By JAX, because NumPy does not know the types of ml_dtypes.
  kinds = (jnp.floating, jnp.integer, jnp.bool_)
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _check(mismatch: Mismatch, misshapen: Sequence[str]) -> None:
  missing = [x for x in mismatch.missing if not x.endswith(_UPDATES)]
  unexpected = [x for x in mismatch.unexpected if not is_counter(x)]
  problems = [
    f"{len(names)} {kind} ({listed(names)})"
    for kind, names in (
      ("missing", missing),
      ("unexpected", unexpected),
      ("misshapen", misshapen),
    )
    if names
  ]
  if problems:
    raise ValueError(
      "the state dict does not fit the tensors of this model: "
      + "; ".join(problems)
    )


def variables(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
  """Yields every parameter and statistic with its path, e.g. head.kernel."""
  for path, variable in nnx.iter_graph(model):
    if isinstance(variable, nnx.Param | nnx.BatchStat):
      yield ".".join(map(str, path)), variable
