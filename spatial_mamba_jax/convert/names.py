"""Converts weights to and from the authors' names and PyTorch's layout.

Two tables define the conversion: one of names, and one of array layouts.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.models.backbone import Trunk

# Counters that PyTorch's tools add to a state dict: thop for each module it
# profiles, and torch.optim.swa_utils for its averages.
COUNTERS = ("total_ops", "total_params", "n_averaged")
# BatchNorm's count of updates, which does not affect any result.
_UPDATES = "num_batches_tracked"

# Replacements that turn our path into the authors' name, applied in order.
_NAMES = (
  (r"^stem\.", "patch_embed."),
  (r"^stages\.", "layers."),
  (r"^downsamples\.(\d+)\.expand\.", r"layers.\1.downsample.conv.0.conv."),
  (r"^downsamples\.(\d+)\.conv\.", r"layers.\1.downsample.conv.1.conv."),
  (r"^downsamples\.(\d+)\.project\.", r"layers.\1.downsample.conv.2."),
  (r"^norms\.(\d+)\.", r"outnorm\1."),
  (r"(blocks\.\d+)\.conv(\d)\.", r"\1.cpe\2."),
  (r"(blocks\.\d+)\.norm(\d)\.", r"\1.ln_\2."),
  (r"\.mixer\.conv\.", ".mixer.conv2d."),
  (r"\.mixer\.norm\.", ".mixer.out_norm."),
  (r"\.mixer\.fusion\.", ".mixer.state_fusion."),
  (r"\.mixer\.", ".self_attention."),
  (r"\.x_proj\.kernel$", ".x_proj_weight"),
  (r"\.dt_proj\.kernel$", ".dt_projs_weight"),
  (r"\.dt_bias$", ".dt_projs_bias"),
  (r"\.A_log$", ".A_logs"),
  (r"\.D$", ".Ds"),
  (r"\.(kernel|scale)$", ".weight"),
  (r"\.mean$", ".running_mean"),
  (r"\.var$", ".running_var"),
  (r"\.num_batches$", ".num_batches_tracked"),
)
_FUSION_KERNELS = ("kernel_3", "kernel_3_1", "kernel_3_2")


class _Layout(NamedTuple):
  """Converts one of our arrays to one or several PyTorch tensors, and back."""

  to_torch: Callable[[np.ndarray], Sequence[np.ndarray]]
  from_torch: Callable[[Sequence[np.ndarray]], np.ndarray]


_SAME = _Layout(lambda x: [x], lambda t: t[0])
_LINEAR = _Layout(lambda x: [x.T], lambda t: t[0].T)
_CONV_1X1 = _Layout(
  lambda x: [x.T[:, :, None, None]], lambda t: t[0][:, :, 0, 0].T
)
_CONV_3X3 = _Layout(
  lambda x: [x.transpose(3, 2, 0, 1)], lambda t: t[0].transpose(2, 3, 1, 0)
)
_DEPTHWISE = _Layout(
  lambda x: [x.transpose(2, 0, 1)[:, None]],
  lambda t: t[0][:, 0].transpose(1, 2, 0),
)
_FUSION = _Layout(
  lambda x: [tensor for k in x for tensor in _DEPTHWISE.to_torch(k)],
  lambda t: np.stack([_DEPTHWISE.from_torch([k]) for k in t]),
)


class Mismatch(NamedTuple):
  """The tensor names in which a state dict and a model differ.

  Attributes:
    missing: tensors that the model has and the state dict lacks.
    unexpected: tensors that the state dict has and the model lacks.

  A missing `num_batches_tracked` and the unexpected counters of thop or of
  PyTorch's averages are never errors.
  """

  missing: tuple[str, ...]
  unexpected: tuple[str, ...]


def to_torch(model: Trunk) -> dict[str, np.ndarray]:
  """Returns a model's weights with the authors' names and PyTorch's layout.

  Args:
    model: from `create_model` or `create_backbone`.

  Returns:
    {tensor name: array}, of float32 (float64 for a float64 model), and of int64
    for `num_batches_tracked`.
  """
  return torch_tensors(
    {path: variable[...] for path, variable in variables(model)}
  )


def torch_tensors(arrays: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
  """Converts arrays as `to_torch` does.

  Args:
    arrays: {path in the model: array}, e.g. of "head.kernel".
  """
  state_dict = {}
  for path, values in arrays.items():
    array = np.asarray(values)
    if array.dtype == np.int32:
      array = array.astype(np.int64)
    tensors = _layout(path, array.ndim).to_torch(array)
    for name, tensor in zip(_torch_names(path), tensors, strict=True):
      state_dict[name] = np.array(tensor, order="C")
  return state_dict


def from_torch(
  model: Trunk, state_dict: Mapping[str, np.ndarray], *, strict: bool = True
) -> Mismatch:
  """Sets the model's weights to those of a state dict, in place.

  Args:
    model: from `create_model` or `create_backbone`.
    state_dict: {tensor name: array}, as PyTorch's `state_dict()` names them.
    strict: whether missing and unexpected tensors are errors. Otherwise missing
      weights keep their values, and unexpected tensors are ignored.

  Returns:
    The missing and unexpected names.

  Raises:
    ValueError: tensors are missing or unexpected and `strict` is true, or have
      a wrong shape or a complex type. The model is then unchanged.
  """
  mismatch = check_tensors(model, state_dict, strict=strict)
  for path, variable in variables(model):
    names = _torch_names(path)
    if all(name in state_dict for name in names):
      tensors = [np.asarray(state_dict[name]) for name in names]
      array = _layout(path, variable.ndim).from_torch(tensors)
      # Copied, because the caller may change its array.
      variable.set_value(jnp.array(array, variable.dtype))
  return mismatch


def check_tensors(
  model: Trunk, state_dict: Mapping[str, np.ndarray], *, strict: bool = True
) -> Mismatch:
  """Checks names, shapes and types for `from_torch`, but reads no values."""
  unexpected = dict.fromkeys(state_dict)
  missing, unfit = [], []
  for path, variable in variables(model):
    names = _torch_names(path)
    # Takes no memory; a shape from a file can be huge.
    like = np.broadcast_to(np.float32(0), variable.shape)
    wanted = _layout(path, variable.ndim).to_torch(like)
    for name, x in zip(names, wanted, strict=True):
      if name not in state_dict:
        missing.append(name)
        continue
      unexpected.pop(name, None)
      tensor = np.asarray(state_dict[name])
      if tensor.shape != x.shape:
        unfit.append(
          f"{name} is {list(tensor.shape)} instead of {list(x.shape)}"
        )
      elif not _is_real(tensor.dtype):
        unfit.append(f"{name} is {tensor.dtype}")
  mismatch = Mismatch(tuple(missing), tuple(unexpected))
  _check(mismatch if strict else Mismatch((), ()), unfit)
  return mismatch


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


def _torch_names(path: str) -> list[str]:
  name = path
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  if name.endswith("state_fusion.kernels"):
    prefix = name.removesuffix("kernels")
    return [prefix + kernel for kernel in _FUSION_KERNELS]
  return [name]


def _layout(path: str, ndim: int) -> _Layout:
  """Returns the layout of a parameter, by its path and number of axes."""
  if path.endswith("fusion.kernels"):
    return _FUSION
  if not path.endswith("kernel"):
    return _SAME
  if ndim == 2:
    is_conv = _torch_names(path)[0].endswith(".conv.weight")
    return _CONV_1X1 if is_conv else _LINEAR
  return _DEPTHWISE if ndim == 3 else _CONV_3X3
