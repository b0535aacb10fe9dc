"""The authors' tensor names and PyTorch's layouts, a table for each network.

Names of `torch.nn.Module.state_dict`; layouts as PyTorch has them: linear
kernels are [out, in], those of convolutions [out, in / groups, rows, columns].
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from spatial_mamba_jax.models.mixers.evss import EVSS, EVSSConfig
from spatial_mamba_jax.models.mixers.linear_attention import (
  LinearAttention,
  LinearAttentionConfig,
)
from spatial_mamba_jax.models.mixers.mamba import Mamba, MambaConfig
from spatial_mamba_jax.models.mixers.mhs import MHS, MHSConfig
from spatial_mamba_jax.models.mixers.plain_mamba import (
  PlainMamba,
  PlainMambaConfig,
)
from spatial_mamba_jax.models.mixers.ss2d import SS2D, SS2DConfig
from spatial_mamba_jax.models.mixers.structure_aware import (
  StructureAwareConfig,
  StructureAwareSSM,
)
from spatial_mamba_jax.models.mixers.v2m import V2M, V2MConfig
from spatial_mamba_jax.models.mixers.vim import Vim, VimConfig


class Layout(NamedTuple):
  """Converts one of our arrays to one or several PyTorch tensors, and back."""

  to_torch: Callable[[np.ndarray], Sequence[np.ndarray]]
  from_torch: Callable[[Sequence[np.ndarray]], np.ndarray]


def matrix(tensor: np.ndarray) -> np.ndarray:
  """Returns [out, in] for the [out, in, 1, 1] of a 1 x 1 convolution.

  The authors of VMamba store linear layers in either shape.
  """
  return tensor[:, :, 0, 0] if tensor.shape[2:] == (1, 1) else tensor


SAME = Layout(lambda x: [x], lambda t: t[0])
# [..., in, out]; leading axes are of several matrices in one tensor.
LINEAR = Layout(
  lambda x: [x.swapaxes(-1, -2)], lambda t: matrix(t[0]).swapaxes(-1, -2)
)
CONV_1X1 = Layout(lambda x: [x.T[:, :, None, None]], lambda t: matrix(t[0]).T)
CONV_3X3 = Layout(
  lambda x: [x.transpose(3, 2, 0, 1)], lambda t: t[0].transpose(2, 3, 1, 0)
)
DEPTHWISE = Layout(
  lambda x: [x.transpose(2, 0, 1)[:, None]],
  lambda t: t[0][:, 0].transpose(1, 2, 0),
)
SEQUENCE_CONV = Layout(lambda x: [x.T[:, None]], lambda t: t[0][:, 0].T)
_FUSION = Layout(
  lambda x: [tensor for k in x for tensor in DEPTHWISE.to_torch(k)],
  lambda t: np.stack([DEPTHWISE.from_torch([k]) for k in t]),
)
# Layouts of kernels by their number of axes.
_KERNELS = {2: LINEAR, 3: DEPTHWISE, 4: CONV_3X3}
_FUSION_KERNELS = ("kernel_3", "kernel_3_1", "kernel_3_2")


@runtime_checkable
class Names(Protocol):
  """The authors' names of weights, and their layouts."""

  def tensors(self, path: str) -> list[str]:
    """Returns the names of the tensors of one of our weights."""
    ...

  def layout(self, path: str, ndim: int) -> Layout:
    """Returns the layout of one of our weights."""
    ...


class Table(NamedTuple):
  """How the weights of a network or a mixer are named and laid out.

  Attributes:
    names: pairs of a pattern and its replacement, which turn our path into the
      authors' name when they are applied in order.
    layouts: pairs of a pattern of our path and its layout; the first match
      counts. Without a match, the name of the weight and its number of axes
      decide.
    copies: {name: name of the tensor that it repeats} of tensors that the
      authors' files have twice.
    constants: names of the authors' tensors that are not weights.
  """

  names: Sequence[tuple[str, str]]
  layouts: Sequence[tuple[str, Layout]] = ()
  copies: Mapping[str, str] = MappingProxyType({})
  constants: tuple[str, ...] = ()

  def tensors(self, path: str) -> list[str]:
    """Returns the names of the tensors of one of our weights."""
    name = path
    for pattern, replacement in (*self.names, *_ENDINGS):
      name = re.sub(pattern, replacement, name)
    if name.endswith("fusion.kernels"):
      prefix = name.removesuffix("kernels")
      return [prefix + kernel for kernel in _FUSION_KERNELS]
    return [name]

  def layout(self, path: str, ndim: int) -> Layout:
    """Returns the layout of one of our weights."""
    for pattern, layout in self.layouts:
      if re.search(pattern, path):
        return layout
    if path.endswith("fusion.kernels"):
      return _FUSION
    return _KERNELS.get(ndim, SAME) if path.endswith("kernel") else SAME


# Applied after a table's own replacements.
_ENDINGS = (
  (r"\.(kernel|scale)$", ".weight"),
  (r"\.mean$", ".running_mean"),
  (r"\.var$", ".running_var"),
  (r"\.num_batches$", ".num_batches_tracked"),
)
_PROJECTIONS = (r"\.(x|dt)_proj$", LINEAR)
_SEQUENCE = (
  r"(branch|first|second|selected)(\.|_)conv\.kernel$",
  SEQUENCE_CONV,
)

SPATIAL_MAMBA = Table(
  (
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
  ),
  # The stem and the downsampling have linear layers for 1 x 1 convolutions.
  (
    (r"^stem\.conv3\.1\.conv\.kernel$", CONV_1X1),
    (r"^downsamples\.\d+\.(expand|project\.conv)\.kernel$", CONV_1X1),
  ),
)


# UPerNet's heads in mmsegmentation, `decode_head` and `auxiliary_head`.
UPERNET = Table(
  (
    (r"^psp_convs\.(\d+)\.", r"psp_modules.\1.1."),
    (r"\.norm\.", ".bn."),
    (r"^classifier\.linear\.", "conv_seg."),
  ),
  ((r"^(psp_convs|lateral_convs|classifier)\..*kernel$", CONV_1X1),),
)


class MixedTable(NamedTuple):
  """The table of a network with another mixer than its authors'.

  A mixer's tensors have the names of the mixer's authors, after the prefix that
  the network's authors give to their own mixer.

  Attributes:
    network: the table of the network.
    mixer: the table of the mixer.
  """

  network: Table
  mixer: Table

  def tensors(self, path: str) -> list[str]:
    """Returns the names of the tensors of one of our weights."""
    block, mixer, rest = path.partition(".mixer.")
    if not mixer:
      return self.network.tensors(path)
    (prefix,) = self.network.tensors(block + mixer)
    return [prefix + name for name in self.mixer.tensors(rest)]

  def layout(self, path: str, ndim: int) -> Layout:
    """Returns the layout of one of our weights."""
    _, mixer, rest = path.partition(".mixer.")
    if mixer:
      return self.mixer.layout(rest, ndim)
    return self.network.layout(path, ndim)


class PartTables(NamedTuple):
  """The tables of the parts of a network.

  Attributes:
    parts: {attribute of the network: table of this part}. The authors' names
      begin with the same attribute.
  """

  parts: Mapping[str, Names]

  def tensors(self, path: str) -> list[str]:
    """Returns the names of the tensors of one of our weights."""
    part, _, rest = path.partition(".")
    return [f"{part}.{name}" for name in self.parts[part].tensors(rest)]

  def layout(self, path: str, ndim: int) -> Layout:
    """Returns the layout of one of our weights."""
    part, _, rest = path.partition(".")
    return self.parts[part].layout(rest, ndim)


def _scans(before: str, after: str) -> tuple[tuple[str, str], ...]:
  """Returns the replacements for an SSM whose scans share tensors."""
  names = {
    "x_proj": "x_proj_weight",
    "dt_proj": "dt_projs_weight",
    "dt_bias": "dt_projs_bias",
    "A_log": "A_logs",
    "D": "Ds",
  }
  return tuple(
    (rf"{before}{own}$", f"{after}{name}") for own, name in names.items()
  )


def _cross(before: str, after: str) -> tuple[tuple[str, str], ...]:
  """Returns the replacements for the mixers called SS2D."""
  return (
    (rf"{before}conv\.", f"{after}conv2d."),
    (rf"{before}norm\.", f"{after}out_norm."),
    *_scans(rf"{before}ssm\.", after),
  )


VMAMBA = Table(
  (
    (r"^stem\.conv1\.", "patch_embed.0."),
    (r"^stem\.norm1\.", "patch_embed.2."),
    (r"^stem\.conv2\.", "patch_embed.5."),
    (r"^stem\.norm2\.", "patch_embed.7."),
    (r"^stages\.", "layers."),
    (r"^downsamples\.(\d+)\.conv\.", r"layers.\1.downsample.1."),
    (r"^downsamples\.(\d+)\.norm\.", r"layers.\1.downsample.3."),
    (r"^norms\.(\d+)\.", r"outnorm\1."),
    (r"^(norm|head)\.", r"classifier.\1."),
    (r"(blocks\.\d+)\.norm1\.", r"\1.norm."),
    *_cross(r"\.mixer\.", ".op."),
    (r"\.mixer\.", ".op."),
  ),
  (_PROJECTIONS,),
)


def _mamba(
  branch: str, suffix: str, *, A_log: str
) -> tuple[tuple[str, str], ...]:
  """Returns the replacements for one branch of Mamba."""
  return (
    (rf"^{branch}\.conv\.", f"conv1d{suffix}."),
    (rf"^{branch}\.ssm\.x_proj$", f"x_proj{suffix}.weight"),
    (rf"^{branch}\.ssm\.dt_proj$", f"dt_proj{suffix}.weight"),
    (rf"^{branch}\.ssm\.dt_bias$", f"dt_proj{suffix}.bias"),
    (rf"^{branch}\.ssm\.A_log$", A_log),
    (rf"^{branch}\.ssm\.D$", f"D{suffix}"),
  )


_MAMBA = _mamba("branch", "", A_log="A_log")
_HEADS = "CXSZ"

MIXERS: dict[type, Table] = {
  StructureAwareSSM: Table(
    (
      (r"^conv\.", "conv2d."),
      (r"^norm\.", "out_norm."),
      (r"^fusion\.", "state_fusion."),
      (r"^x_proj\.kernel$", "x_proj_weight"),
      (r"^dt_proj\.kernel$", "dt_projs_weight"),
      (r"^dt_bias$", "dt_projs_bias"),
      (r"^A_log$", "A_logs"),
      (r"^D$", "Ds"),
    )
  ),
  Mamba: Table(_MAMBA, (_PROJECTIONS, _SEQUENCE)),
  Vim: Table(
    (*_MAMBA, *_mamba("backward_branch", "_b", A_log="A_b_log")),
    (_PROJECTIONS, _SEQUENCE),
  ),
  V2M: Table(
    (
      *_mamba("first", "", A_log="A_log"),
      *_mamba("second", "_2", A_log="A_2_log"),
    ),
    (_PROJECTIONS, _SEQUENCE),
  ),
  PlainMamba: Table(
    (
      (r"^ssm\.x_proj$", "x_proj.weight"),
      (r"^ssm\.dt_proj$", "dt_proj.weight"),
      (r"^ssm\.dt_bias$", "dt_proj.bias"),
      (r"^ssm\.", ""),
      (r"^conv\.", "conv2d."),
      (r"^direction_B$", "direction_Bs"),
    ),
    (_PROJECTIONS,),
  ),
  SS2D: Table(_cross("^", ""), (_PROJECTIONS,)),
  EVSS: Table(
    ((r"^selected_conv\.", "x_conv."), *_cross("^", "")),
    (_PROJECTIONS, _SEQUENCE),
  ),
  MHS: Table(
    (
      *(
        pair
        for i, letter in enumerate(_HEADS)
        for pair in _scans(
          rf"^heads\.{i}\.", f"mhs.scanhead_{letter}.mambaeng."
        )
      ),
      (r"^head_proj\.kernel$", "mhs.x_ssproj_W"),
      (r"^(cat_norm|y_proj)\.", r"mhs.\1."),
      *_cross("^", ""),
    ),
    (_PROJECTIONS,),
    copies={"mhs.x_ssproj.weight": "mhs.x_ssproj_W"},
  ),
  LinearAttention: Table(
    ((r"^conv\.", "dwc."), (r"^(qk|lepe)\.", r"attn.\1.")),
    constants=("attn.rope.rotations",),
  ),
}

# {config of a mixer: its module}.
KINDS: dict[type, type] = {
  StructureAwareConfig: StructureAwareSSM,
  MambaConfig: Mamba,
  VimConfig: Vim,
  V2MConfig: V2M,
  PlainMambaConfig: PlainMamba,
  SS2DConfig: SS2D,
  EVSSConfig: EVSS,
  MHSConfig: MHS,
  LinearAttentionConfig: LinearAttention,
}
