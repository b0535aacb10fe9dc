"""The families of networks whose authors' files can be read and written."""

from collections.abc import Iterable
from typing import NamedTuple

from flax import nnx

from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.tables import (
  KINDS,
  MIXERS,
  SPATIAL_MAMBA,
  UPERNET,
  VMAMBA,
  MixedTable,
  Names,
  PartTables,
  Table,
)
from spatial_mamba_jax.models import spatial_mamba, vmamba
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.config import Family
from spatial_mamba_jax.models.mixers import SS2DConfig, StructureAwareConfig
from spatial_mamba_jax.models.mixers.base import MixerConfig
from spatial_mamba_jax.models.segmentor import HEADS, Segmentor

# Of a mixer of one's own, whose weights keep their names.
_OWN_NAMES = Table(())


class FamilyNames(NamedTuple):
  """What the authors of a family call it and its tensors.

  Attributes:
    family: the parts of its networks.
    mixer: the config of the authors' mixer.
    title: the family's name in text.
    paper: the address of its paper.
    repository: the address of the authors' code.
    table: the names and layouts of all tensors, with the authors' mixer.
    stem: the name of a tensor that only this family's stem has.
    norm: the name of the first norm in a block, e.g. "norm".
    branch: the name of the mixer in a block, e.g. "op".
    end: the prefix of a classifier's norm and head, e.g. "classifier.".
  """

  family: Family
  mixer: type[MixerConfig]
  title: str
  paper: str
  repository: str
  table: Table
  stem: str
  norm: str
  branch: str
  end: str

  def table_with(self, mixer: MixerConfig) -> Names:
    """Returns the names and layouts of all tensors, with any mixer."""
    if type(mixer) is self.mixer:
      return self.table
    module = KINDS.get(type(mixer), object)
    return MixedTable(self.table, MIXERS.get(module, _OWN_NAMES))

  @property
  def anchor(self) -> str:
    """The beginning of names that hardly any other model has."""
    return f"layers.0.blocks.0.{self.branch}."

  @property
  def head_weight(self) -> str:
    """The name of the matrix of a classifier's head."""
    return f"{self.end}head.weight"

  @property
  def head_bias(self) -> str:
    """The name of the bias of a classifier's head, if it has one."""
    return f"{self.end}head.bias"


FAMILIES = (
  FamilyNames(
    spatial_mamba.SPATIAL_MAMBA,
    StructureAwareConfig,
    "Spatial-Mamba",
    "https://arxiv.org/abs/2410.15091",
    "https://github.com/EdwardChasel/Spatial-Mamba",
    SPATIAL_MAMBA,
    stem="patch_embed.conv1.conv.weight",
    norm="ln_1",
    branch="self_attention",
    end="",
  ),
  FamilyNames(
    vmamba.VMAMBA,
    SS2DConfig,
    "VMamba",
    "https://arxiv.org/abs/2401.10166",
    "https://github.com/MzeroMiko/VMamba",
    VMAMBA,
    stem="patch_embed.0.weight",
    norm="norm",
    branch="op",
    end="classifier.",
  ),
)
TITLES = " or ".join(names.title for names in FAMILIES)


def named(family: Family) -> FamilyNames:
  """Returns the names of one of the families in `FAMILIES`."""
  return next(names for names in FAMILIES if names.family == family)


def names_of(model: Trunk) -> FamilyNames:
  """Returns the names of a network's family.

  A family of one's own has those of the family whose stem it has; with another
  stem, those of Spatial-Mamba.
  """
  stem = model.config.family.stem
  return next((x for x in FAMILIES if x.family.stem is stem), FAMILIES[0])


def names_of_paths(paths: Iterable[str]) -> FamilyNames:
  """Returns the same as `names_of`, from the paths of a network's weights."""
  stem = [path for path in paths if path.startswith("stem.")]
  for names in FAMILIES:
    if any(names.stem in names.table.tensors(path) for path in stem):
      return names
  return FAMILIES[0]


def names_of_tensors(tensors: Iterable[str]) -> FamilyNames:
  """Returns the names of the family that has these tensors.

  Raises:
    ValueError: no family has them.
  """
  tensors = list(tensors)
  for names in FAMILIES:
    if any(name.startswith(names.anchor) for name in tensors):
      return names
  anchors = " or ".join(f"{names.anchor}*" for names in FAMILIES)
  raise ValueError(
    f"not the weights of a {TITLES}: {anchors} is missing among"
    f" {len(tensors)} tensors ({listed(tensors) or 'none'})"
  )


def table_of(module: nnx.Module) -> Names:
  """Returns the table of a network, or of one of the mixers in `MIXERS`.

  Raises:
    ValueError: it is neither.
  """
  if isinstance(module, Trunk):
    return names_of(module).table_with(module.config.mixer)
  if isinstance(module, Segmentor):
    backbone = table_of(module.backbone)
    heads = dict.fromkeys(HEADS, UPERNET)
    return PartTables({"backbone": backbone, **heads})
  if type(module) not in MIXERS:
    raise ValueError(
      f"a {type(module).__name__} is no network, and no mixer whose authors'"
      " tensor names are known"
    )
  return MIXERS[type(module)]
