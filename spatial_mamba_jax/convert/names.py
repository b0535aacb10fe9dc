"""The authors' PyTorch weights in and out, as dictionaries of NumPy arrays.

What maps to what is two tables: names, and the layouts of arrays.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from spatial_mamba_jax.models.spatial_mamba import Trunk

# Our path -> the authors', applied one after the other.
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
  """How one of our arrays stands in PyTorch: as one tensor, or as several."""

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
  """Names by which a state dict and a model differ.

  Attributes:
    missing: tensors that the model has and the state dict lacks.
    unexpected: tensors that the state dict has and the model lacks.
  """

  missing: tuple[str, ...]
  unexpected: tuple[str, ...]


def to_torch(model: Trunk) -> dict[str, np.ndarray]:
  """The model's weights under the authors' names and in PyTorch's layout.

  Args:
    model: from `create_model` or `create_backbone`.

  Returns:
    {tensor name: array}, float32 (float64 for a float64 model), and int64 for
    `num_batches_tracked`.
  """
  return torch_tensors(
    {path: variable[...] for path, variable in _variables(model)}
  )


def torch_tensors(arrays: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
  """The same of {path in the model: array}, e.g. of "head.kernel"."""
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
  """Replaces the model's weights by those of the authors' model, in place.

  Args:
    model: from `create_model` or `create_backbone`.
    state_dict: {tensor name: array}, as PyTorch's `state_dict()` names them.
    strict: whether every tensor must find its place. Otherwise what is missing
      keeps its value, and what is unexpected is left out.

  Returns:
    What was missing and unexpected.

  Raises:
    ValueError: tensors are missing or unexpected (where strict) or misshapen
      (always). The model is then unchanged.
  """
  unexpected = dict.fromkeys(state_dict)
  missing, misshapen, updates = [], [], []
  for path, variable in _variables(model):
    names = _torch_names(path)
    for name in names:
      unexpected.pop(name, None)
    absent = [name for name in names if name not in state_dict]
    missing += absent
    if absent:
      continue
    layout = _layout(path, variable.ndim)
    tensors = [np.asarray(state_dict[name]) for name in names]
    wanted = layout.to_torch(np.empty(variable.shape))
    wrong = [
      f"{name} is {list(tensor.shape)} instead of {list(like.shape)}"
      for name, tensor, like in zip(names, tensors, wanted, strict=True)
      if tensor.shape != like.shape
    ]
    misshapen += wrong
    if not wrong:
      updates.append((variable, layout.from_torch(tensors)))
  mismatch = Mismatch(tuple(missing), tuple(unexpected))
  _check(mismatch if strict else Mismatch((), ()), misshapen)
  for variable, array in updates:
    variable.set_value(jnp.asarray(array, variable.dtype))
  return mismatch


def _check(mismatch: Mismatch, misshapen: Sequence[str]) -> None:
  problems = [
    f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    for kind, names in (
      ("missing", mismatch.missing),
      ("unexpected", mismatch.unexpected),
      ("misshapen", misshapen),
    )
    if names
  ]
  if problems:
    raise ValueError(
      "the state dict does not fit this model, of its tensors: "
      + "; ".join(problems)
    )


def _variables(model: Trunk) -> Iterator[tuple[str, nnx.Variable]]:
  """Every parameter and statistic with its path, e.g. head.kernel."""
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
  """The layout of a parameter by its path and number of axes."""
  if path.endswith("fusion.kernels"):
    return _FUSION
  if not path.endswith("kernel"):
    return _SAME
  if ndim == 2:
    is_conv = _torch_names(path)[0].endswith(".conv.weight")
    return _CONV_1X1 if is_conv else _LINEAR
  return _DEPTHWISE if ndim == 3 else _CONV_3X3
