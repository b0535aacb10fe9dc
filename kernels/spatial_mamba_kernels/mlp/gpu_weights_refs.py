"""The references that the kernel of `gpu_weights` takes, in bundles."""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
  """References to the kernel's inputs.

  Attributes:
    x_ref: [T, C].
    dy_ref: [T, C].
    scales_ref: [T].
    w1_ref: [F, C], transposed.
    w2_ref: [F, C].
    b1_ref: [F].
  """

  x_ref: Any
  dy_ref: Any
  scales_ref: Any
  w1_ref: Any
  w2_ref: Any
  b1_ref: Any


class Outputs(NamedTuple):
  """References to the kernel's results; also their types.

  Attributes:
    dw1_ref: [splits, F, C].
    dw2_ref: [splits, F, C].
    db1_ref: [splits, F].
    dx_ref: [T, C], or None unless a program has all hidden units.
    db2_ref: [tiles, C], or None as well.
  """

  dw1_ref: Any
  dw2_ref: Any
  db1_ref: Any
  dx_ref: Any = None
  db2_ref: Any = None


class ToInput(NamedTuple):
  """Scratch for the cotangents of tokens; references in the kernel.

  Attributes:
    exchanged_ref: [warpgroups, EXCHANGED], for sums over rows.
    hidden_ref: [turns, warpgroups, chunks, UNITS, TOKENS], the cotangents of
      hidden units.
    made: barriers, one a turn; both warpgroups have stored theirs.
    read: barriers, one a turn; the one whose turn it was has read them.
  """

  exchanged_ref: Any
  hidden_ref: Any
  made: Any
  read: Any


class Scratch(NamedTuple):
  """References to the kernel's scratch; also its types.

  Attributes:
    biases_ref: [warpgroups, chunks, UNITS].
    loaded: barriers, one a slot; a tile of tokens is loaded.
    to_input: see `ToInput`; None unless a program has all hidden units.
    images_ref: [STAGES, 2, TOKENS, C], tiles of x and of dy.
    scales_ref: [STAGES, TOKENS].
    used: barriers, one a slot; both warpgroups are done with the tile.
    weights_ref: [warpgroups, chunks, 2, UNITS, C], of w1 and of w2.
    weights_loaded: a barrier; all weights are loaded.
  """

  biases_ref: Any
  loaded: Any
  to_input: Any
  images_ref: Any
  scales_ref: Any
  used: Any
  weights_ref: Any
  weights_loaded: Any
