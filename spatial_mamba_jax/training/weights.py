"""Weights of any kind, to evaluate or to start a run from."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  infer_model,
  with_head_bias,
)
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
)
from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.names import (
  from_torch,
  is_counter,
  torch_tensors,
  variables,
)
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.models.backbone import Classifier, Trunk
from spatial_mamba_jax.models.pure import (
  LAYERED,
  PureModel,
  Weights,
  backbones,
  unstacked,
)
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.checkpoint import RemovedError, open_checkpoint
from spatial_mamba_jax.training.config import TrainingError

# Of reading a checkpoint while its run saves others and removes it.
_ATTEMPTS = 5
# The path of a weight of a backbone's first block, after the backbone's own.
_ANCHOR = re.compile(r"((?:.*?\.)?)stages\.0\.blocks\.0\.")
# The name of a tensor after the stages of a classifier or of a backbone.
_END = re.compile(r"(norm|head|outnorm\d+)\.")


def load_weights(
  path: pathlib.Path, model: PureModel, like: Weights
) -> tuple[int | None, dict[str, Weights]]:
  """The weights in a file or directory of any kind, to be evaluated.

  Args:
    path: a checkpoint as `open_checkpoint` takes it, or a file or directory as
      `convert.files.read_file` takes it; relative or with "~", too.
    model: the network that they must fit.
    like: its shapes, on the shardings wanted.

  Returns:
    The step of a run's checkpoint, None of a file; and "ema", a run's moving
    average, and "raw", the weights themselves. A file gives one of the two,
    which `read_file` chooses.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  path = local_path(path)
  if not is_of_weights(path):
    return _restore(path, like)
  network = model.abstract()
  if not isinstance(network, Classifier):
    raise TrainingError(
      f"{path} holds a classifier or a backbone: a {type(network).__name__} is"
      " evaluated from a run's checkpoint"
    )
  found = read_weights(path)
  classifier = abstract_model(network.config)
  _fill(path, classifier, found.state_dict)
  weights = _placed(PureModel.weights_of(classifier), like)
  return None, {"ema" if found.is_average else "raw": weights}


def start_from(
  path: pathlib.Path, model: PureModel, fresh: Weights
) -> tuple[Weights, str]:
  """The weights in a file or directory of any kind, to be trained further.

  The stem and the stages of the network's backbone, under whatever path it is,
  become those of `path`. All else, heads and the norms before them, stays as it
  is in `fresh` where `path` has none, or a head of other classes.

  Args:
    path: as `load_weights` takes it; of a run, the moving average is taken.
    model: the network.
    fresh: random weights of it.

  Returns:
    The weights, where `fresh` lives, and in words what stayed random.

  Raises:
    TrainingError: there are no weights, they are of another model, or the
      network has not one backbone.
  """
  # Copied, because arrays of several processes' devices cannot be unstacked.
  network = model.bind(jax.tree.map(jnp.asarray, jax.device_get(fresh)))
  prefix, backbone = _backbone(network)
  found, others = _read(local_path(path))
  random, said = _fill_backbone(path, backbone, found.state_dict)
  taken, rest = _fill_rest(network, prefix, others)
  random = [*(prefix + name for name in random), *rest]
  modules = dict.fromkeys(name.rpartition(".")[0] for name in random)
  if modules:
    said += f"; drawn at random: {listed(modules, 6)}"
  left_out = [x for x in found.left_out if not is_counter(x) and x not in taken]
  if left_out:
    said += f"; left out {len(left_out)} tensors ({listed(left_out)})"
  weights = _placed(PureModel.weights_of(network), fresh)
  return weights, f"starting from {path}{said}"


def _backbone(network: nnx.Module) -> tuple[str, Trunk]:
  """Returns the prefix of all paths in a network's backbone, and it."""
  found = backbones(network)
  if len(found) != 1:
    raise TrainingError(
      "config.init_from fills a network's one backbone, and a"
      f" {type(network).__name__} has {len(found) or 'none'}"
    )
  ((path, backbone),) = found.items()
  return f"{path}." if path else "", backbone


def _fill_backbone(
  path: pathlib.Path, backbone: Trunk, state_dict: dict[str, np.ndarray]
) -> tuple[list[str], str]:
  """Fills a backbone; the norms and the head that are missing stay random.

  Returns:
    The backbone's paths that stay random; for a classifier instead, in words
    what became of the head.
  """
  ends = {
    name: variable[...]
    for name, variable in variables(backbone)
    if name.split(".")[0] not in LAYERED
  }
  names = torch_tensors(ends).keys()
  tensors = {
    name: tensor
    for name, tensor in state_dict.items()
    # A classifier has no use for a backbone's norms, nor a backbone for a head.
    if name in names or not _END.match(name)
  }
  random, words = [], ""
  if isinstance(backbone, Classifier):
    own, words = _random_head(tensors, backbone.config.num_classes)
  else:
    own = random = [
      name
      for name, array in ends.items()
      if not torch_tensors({name: array}).keys() <= tensors.keys()
    ]
  tensors |= torch_tensors({name: ends[name] for name in own})
  _fill(path, backbone, tensors)
  return random, words


def _fill_rest(
  network: nnx.Module, prefix: str, arrays: dict[str, np.ndarray]
) -> tuple[list[str], list[str]]:
  """Fills what is outside of a backbone with arrays of equal paths and shapes.

  Returns:
    The paths that were filled, and those that stay random.
  """
  filled, random = [], []
  for name, variable in variables(network):
    if name.startswith(prefix):
      continue
    fits = name in arrays and arrays[name].shape == variable.shape
    (filled if fits else random).append(name)
    if fits:
      variable.set_value(jnp.asarray(arrays[name], variable.dtype))
  return filled, random


def _random_head(
  tensors: dict[str, np.ndarray], num_classes: int
) -> tuple[list[str], str]:
  """Returns the paths of a classifier's end that stay random, and words."""
  head = tensors.get("head.weight")
  # One that is no matrix is refused later.
  if head is not None and (head.ndim != 2 or len(head) == num_classes):
    return [], ", head included"
  random = ["head.kernel", "head.bias"]
  if head is None and not {"norm.weight", "norm.bias"} & tensors.keys():
    random += ["norm.scale", "norm.bias"]
  classes = "none" if head is None else f"{len(head)} classes"
  return random, f" with a head drawn at random: it has {classes}"


def _fill(
  path: pathlib.Path, model: Trunk, state_dict: dict[str, np.ndarray]
) -> None:
  try:
    from_torch(model, with_head_bias(state_dict))
  except ValueError as error:
    raise TrainingError(
      f"{path} holds another model than config.model asks for: {error}"
    ) from error


def _placed(weights: Weights, like: Weights) -> Weights:
  """The same weights, on the shardings of others."""
  return jax.tree.map(_placed_like, weights, like)


def load_model(path: pathlib.Path) -> Trunk:
  """The model in a file or directory of any kind, in eval mode.

  Raises:
    TrainingError: there is none.
  """
  tensors = read_weights(path).state_dict
  try:
    model = infer_model(tensors)
    from_torch(model, tensors)
  except ValueError as error:
    raise TrainingError(f"{path}: {error}") from error
  return model


def read_weights(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in a file or directory of any kind, of whatever model.

  Args:
    path: as `load_weights` takes it.
    raw: whether to take the weights that have a moving average themselves.

  Raises:
    TrainingError: there are no weights.
  """
  return _read(local_path(path), raw=raw)[0]


def _read(
  path: pathlib.Path, *, raw: bool = False
) -> tuple[Found, dict[str, np.ndarray]]:
  """As `read_weights`; and a run's arrays outside the backbone, by path."""
  if not is_of_weights(path):
    return _read_checkpoint(path, raw=raw)
  try:
    return read_file(path, raw=raw), {}
  except FileNotFoundError as error:
    raise TrainingError(
      f"{path} does not exist: train first, or mend the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(one_line(error)) from error


def read_checkpoint(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in one of this project's checkpoints; as `read_weights`."""
  return _read_checkpoint(path, raw=raw)[0]


def _read_checkpoint(
  path: pathlib.Path, *, raw: bool
) -> tuple[Found, dict[str, np.ndarray]]:
  step, weights = _restore(path)
  name = "raw" if raw else "ema"
  if name not in weights:
    raise TrainingError(f"{path} holds one set of weights alone")
  arrays = unstacked(weights[name])
  prefixes = {match[1] for match in map(_ANCHOR.match, arrays) if match}
  prefix = min(prefixes, key=len, default="")
  tensors = torch_tensors(
    {
      name.removeprefix(prefix): array
      for name, array in arrays.items()
      if name.startswith(prefix)
    }
  )
  others = {
    name: np.asarray(array)
    for name, array in arrays.items()
    if not name.startswith(prefix)
  }
  prefixes = (prefix,) * bool(prefix)
  found = Found(tensors, f"step {step}", tuple(others), prefixes)
  return found, others


def _restore(
  path: pathlib.Path, like: Weights | None = None
) -> tuple[int, dict[str, Weights]]:
  """The step and the weights of a checkpoint, which a run may remove."""
  for attempt in range(_ATTEMPTS):
    try:
      with open_checkpoint(path) as (checkpoints, step):
        return step, checkpoints.restore_weights(step, like)
    except RemovedError:
      if attempt == _ATTEMPTS - 1:
        raise
  raise AssertionError


def _placed_like(
  x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
  # `device_put` cannot reach other processes' devices.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )
