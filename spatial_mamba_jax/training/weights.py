"""Reads weights in any format, to evaluate them or to start a run from them."""

import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from spatial_mamba_jax.convert.architecture import (
  Heads,
  abstract_model,
  abstract_segmentor,
  with_head_bias,
)
from spatial_mamba_jax.convert.families import (
  FamilyNames,
  names_of,
  names_of_paths,
)
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
)
from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.names import (
  fitting_array,
  from_torch,
  is_counter,
  torch_tensors,
  variables,
)
from spatial_mamba_jax.convert.pretrained import from_pretrained, model_of
from spatial_mamba_jax.convert.pretrained_config import CONFIG
from spatial_mamba_jax.convert.tables import UPERNET, PartTables
from spatial_mamba_jax.convert.trained import Trained, trained_model
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.models.backbone import Classifier, Trunk
from spatial_mamba_jax.models.mixers import MixerConfig
from spatial_mamba_jax.models.pure import (
  LAYERED,
  PureModel,
  Weights,
  backbones,
  unstacked,
)
from spatial_mamba_jax.models.segmentor import HEADS, Segmentor
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.checkpoint import RemovedError, open_checkpoint
from spatial_mamba_jax.training.config import TrainingError

# Attempts to read a checkpoint, which its run may remove meanwhile.
_ATTEMPTS = 5
# Path of a weight of a backbone's first block; the group is the prefix of all
# paths in the backbone.
_FIRST_BLOCK = re.compile(r"((?:.*?\.)?)stages\.0\.blocks\.0\.")
# The table of a segmentor's heads, and the path of a weight that only UPerNet
# has.
_OF_HEADS = PartTables(dict.fromkeys(HEADS, UPERNET))
_OF_UPERNET = "decode_head.bottleneck.conv.kernel"


def load_weights(
  path: pathlib.Path, model: PureModel, like: Weights
) -> tuple[int | None, dict[str, Weights]]:
  """Reads the weights in a file or directory, to evaluate them.

  Args:
    path: a checkpoint (see `open_checkpoint`), or a file or directory of
      weights (see `convert.files.read_file`); may be relative or begin with
      "~".
    model: the network.
    like: the shapes and shardings of the network's weights.

  Returns:
    The step of a run's checkpoint, None for a file; and the moving average,
    "ema", and the weights themselves, "raw". A file gives only one of the two,
    which `read_file` chooses.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  path = local_path(path)
  if not is_of_weights(path):
    step, weights, _ = _restore(path, like)
    return step, weights
  network = model.abstract()
  found = read_weights(path)
  if isinstance(network, Classifier):
    filled = abstract_model(network.config)
    _fill(path, filled, with_head_bias(found.state_dict, filled))
  elif isinstance(network, Segmentor):
    filled = abstract_segmentor(network.config, Heads(*network.channels))
    _fill(path, filled, found.whole)
  else:
    raise TrainingError(
      f"{path} holds a classifier, a backbone or a segmentor: a"
      f" {type(network).__name__} is evaluated from a run's checkpoint"
    )
  weights = _with_shardings(PureModel.weights_of(filled), like)
  return None, {"ema" if found.is_average else "raw": weights}


def start_from(
  path: pathlib.Path, model: PureModel, fresh: Weights
) -> tuple[Weights, str]:
  """Reads the weights in a file or directory, to train them further.

  They replace the stem and the stages of the network's backbone, which may have
  any path. A norm after the stages or a head is replaced if `path` has one that
  fits.

  Args:
    path: as for `load_weights`; of a run, the moving average is read.
    model: the network.
    fresh: random weights of the network, for what `path` does not replace.

  Returns:
    The weights, with the shardings of `fresh`, and a message about what keeps
    its random values.

  Raises:
    TrainingError: there are no weights, they are of another model, or the
      network does not have exactly one backbone.
  """
  # Gathered, because arrays on devices of other processes cannot be unstacked.
  gathered = multihost_utils.process_allgather(fresh, tiled=True)
  network = model.bind(jax.tree.map(jnp.asarray, gathered))
  prefix, backbone = _backbone(network)
  found, others = _read(local_path(path), mixer=backbone.config.mixer)
  random, message = _fill_backbone(path, backbone, found.state_dict)
  heads = _head_arrays(network, found.heads)
  filled, rest = _fill_rest(network, prefix, others | heads)
  random = [*(prefix + name for name in random), *rest]
  modules = dict.fromkeys(name.rpartition(".")[0] for name in random)
  if modules:
    message += f"; initialised at random: {listed(modules, 6)}"
  weights = _with_shardings(PureModel.weights_of(network), fresh)
  used = (name for path in heads for name in _OF_HEADS.tensors(path))
  unused = {*found.left_out, *others, *found.heads}.difference(filled, used)
  return weights, f"starting from {path}{message}{_left_out(unused)}"


def _left_out(unused: Iterable[str]) -> str:
  """Returns the end of a message that names the tensors left out."""
  names = sorted(name for name in unused if not is_counter(name))
  return f"; left out {len(names)} tensors ({listed(names)})" * bool(names)


def _backbone(network: nnx.Module) -> tuple[str, Trunk]:
  """Returns the prefix of the paths in a network's backbone, and the backbone.

  Raises:
    TrainingError: the network does not have exactly one.
  """
  found = backbones(network)
  if len(found) != 1:
    raise TrainingError(
      "config.init_from needs a network with one backbone, and a"
      f" {type(network).__name__} has {len(found) or 'none'}"
    )
  ((path, backbone),) = found.items()
  return f"{path}." if path else "", backbone


def _fill_backbone(
  path: pathlib.Path, backbone: Trunk, state_dict: dict[str, np.ndarray]
) -> tuple[list[str], str]:
  """Fills a backbone; norms and a head without tensors stay random.

  Returns:
    The paths in the backbone that stay random, and a message. For a classifier
    the message replaces the paths.
  """
  ends = {
    name: variable[...]
    for name, variable in variables(backbone)
    if name.split(".")[0] not in LAYERED
  }
  names = names_of(backbone)
  own = torch_tensors(ends, names.table).keys()
  of_ends = (f"{names.end}norm.", f"{names.end}head.", "outnorm")
  # Without the norms and the head that only the other kind of network has.
  tensors = {
    name: tensor
    for name, tensor in state_dict.items()
    if name in own or not name.startswith(of_ends)
  }
  random, message = [], ""
  if isinstance(backbone, Classifier):
    kept, message = _random_head(tensors, backbone.config.num_classes, names)
  else:
    kept = random = [
      name
      for name in ends
      if not set(names.table.tensors(name)) <= tensors.keys()
    ]
  tensors |= torch_tensors({name: ends[name] for name in kept}, names.table)
  _fill(path, backbone, with_head_bias(tensors, backbone))
  return random, message


def _head_arrays(
  network: nnx.Module, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Returns {path: array} of the tensors that fit a segmentor's heads."""
  if not isinstance(network, Segmentor):
    return {}
  arrays = {}
  for path, variable in variables(network):
    if path.startswith(HEADS):
      array = fitting_array(path, variable, tensors, _OF_HEADS)
      if array is None and path.endswith(".num_batches"):
        array = np.asarray(variable[...])  # A count changes no result.
      if array is not None:
        arrays[path] = array
  return arrays


def _fill_rest(
  network: nnx.Module, prefix: str, arrays: dict[str, np.ndarray]
) -> tuple[list[str], list[str]]:
  """Fills the variables outside the backbone that have an array of equal shape.

  Returns:
    The paths that were filled, and the paths that stay random.
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
  tensors: dict[str, np.ndarray], num_classes: int, names: FamilyNames
) -> tuple[list[str], str]:
  """Returns the paths in a classifier's end that stay random, and a message."""
  head = tensors.get(names.head_weight)
  # `_fill` refuses a head that is not a matrix.
  if head is not None and (head.ndim != 2 or len(head) == num_classes):
    return [], ", including its head"
  kept = ["head.kernel", "head.bias"]
  norm = f"{names.end}norm."
  if head is None and not any(name.startswith(norm) for name in tensors):
    kept += ["norm.scale", "norm.bias"]
  found_head = "no head" if head is None else f"{len(head)} classes"
  return kept, f", with a random head: it has {found_head}"


def _fill(
  path: pathlib.Path, model: nnx.Module, state_dict: dict[str, np.ndarray]
) -> None:
  """Fills a model with tensors, which must fit it."""
  try:
    from_torch(model, state_dict)
  except ValueError as error:
    raise TrainingError(
      f"{path} holds a model other than config.model: {error}"
    ) from error


def _with_shardings(weights: Weights, like: Weights) -> Weights:
  """Returns the weights with the shardings of `like`."""
  return jax.tree.map(_sharded_like, weights, like)


def load_model(path: pathlib.Path) -> Trunk | Segmentor:
  """Reads the model in a file or directory, in eval mode.

  Args:
    path: as for `load_weights`.

  Raises:
    TrainingError: there is no model.
  """
  path = local_path(path)
  if is_of_weights(path) and (path / CONFIG).is_file():
    try:
      return from_pretrained(path)
    except (OSError, ValueError) as error:
      raise TrainingError(one_line(error)) from error
  found = read_weights(path)
  try:
    model = model_of(found)
  except ValueError as error:
    raise TrainingError(f"{path}: {error}") from error
  return model


def read_weights(path: pathlib.Path, *, raw: bool = False) -> Found:
  """Reads the weights in a file or directory, of any architecture.

  Args:
    path: as for `load_weights`.
    raw: whether to prefer the weights themselves to their moving average.

  Raises:
    TrainingError: there are no weights.
  """
  return _read(local_path(path), raw=raw)[0]


def _read(
  path: pathlib.Path, *, raw: bool = False, mixer: MixerConfig | None = None
) -> tuple[Found, dict[str, np.ndarray]]:
  """Reads weights, and {path: array} of what is no backbone and no head.

  Args:
    path: the file or directory.
    raw: as for `read_weights`.
    mixer: the mixer of a checkpoint that does not name one of `MIXERS`; None
      for that of the family's authors.
  """
  if not is_of_weights(path):
    return _read_checkpoint(path, raw=raw, mixer=mixer)
  try:
    return read_file(path, raw=raw), {}
  except FileNotFoundError as error:
    raise TrainingError(
      f"{path} does not exist: train first, or correct the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(one_line(error)) from error


def read_checkpoint(path: pathlib.Path, *, raw: bool = False) -> Found:
  """Reads the weights of a checkpoint of this project; see `read_weights`."""
  return _read_checkpoint(path, raw=raw)[0]


def _read_checkpoint(
  path: pathlib.Path, *, raw: bool, mixer: MixerConfig | None = None
) -> tuple[Found, dict[str, np.ndarray]]:
  """Reads the same as `_read`, of a checkpoint."""
  step, weights, trained = _restore(path)
  name = "raw" if raw else "ema"
  if name not in weights:
    raise TrainingError(f"{path} has no raw weights, only one set")
  arrays = unstacked(weights[name])
  matches = map(_FIRST_BLOCK.match, arrays)
  prefix = min({match[1] for match in matches if match}, key=len, default="")
  backbone = {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
  others = {
    name: np.asarray(array)
    for name, array in arrays.items()
    if not name.startswith(prefix)
  }
  prefixes = (prefix,) * bool(prefix)
  names = names_of_paths(backbone)
  mixer = trained.mixer or mixer
  table = names.table if mixer is None else names.table_with(mixer)
  tensors = torch_tensors(backbone, table)
  # Another network may have parts of the same names.
  of_heads = HEADS if _OF_UPERNET in others else ()
  heads = {path: x for path, x in others.items() if path.startswith(of_heads)}
  others = {path: x for path, x in others.items() if path not in heads}
  found = Found(
    tensors,
    f"step {step}",
    tuple(others),
    prefixes,
    heads=torch_tensors(heads, _OF_HEADS),
    trained=trained,
  )
  return found, others


def _restore(
  path: pathlib.Path, like: Weights | None = None
) -> tuple[int, dict[str, Weights], Trained]:
  """Restores a checkpoint, retrying if it is removed.

  Returns:
    The step, the weights, and what their run stores of the model.
  """
  for attempt in range(_ATTEMPTS):
    try:
      with open_checkpoint(path) as (checkpoints, step):
        weights = checkpoints.restore_weights(step, like)
        trained = Trained()
        if "raw" in weights:
          trained = trained_model(
            checkpoints.experiment(step), checkpoints.evaluation(step)
          )
        return step, weights, trained
    except RemovedError:
      if attempt == _ATTEMPTS - 1:
        raise
  raise AssertionError


def _sharded_like(
  x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
  # `device_put` cannot reach devices of other processes.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )
