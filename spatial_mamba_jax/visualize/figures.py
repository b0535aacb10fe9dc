"""Draws the arrays that `maps` computes."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_mamba_jax.visualize.maps import StateMaps

if TYPE_CHECKING:
  import matplotlib.figure

# A perceptually uniform colour map, whose lightness rises with the value, so
# that prints in grey remain readable.
_COLOURS = "viridis"
# Powers of ten that a logarithmic scale spans below its greatest value.
_DECADES = 4
_MARK = "#D55E00"  # Colour of the marks of tokens.
_SMALL = 9  # Size of the font, in points.


def draw_receptive_fields(
  fields: dict[str, np.ndarray], title: str
) -> "matplotlib.figure.Figure":
  """Draws effective receptive fields, {name: [H, W]}, on one scale."""
  figure = _figure(2.6 * len(fields) + 1.2, 3.5)
  figure.suptitle(title, fontsize=11, wrap=True)
  grid = figure.subplots(1, len(fields), squeeze=False)[0]
  shown = None
  for axes, (name, field) in zip(grid, fields.items(), strict=True):
    shown = _show(axes, field, _logarithmic(1.0))
    share = f"half of the sum in {_share(field):.0%} of the pixels"
    axes.set_title(f"{name}\n{share}", fontsize=_SMALL)
  _colour_bar(figure, shown, grid, "gradient, of the greatest")
  return figure


def draw_states(
  image: np.ndarray, maps: StateMaps, title: str
) -> "matplotlib.figure.Figure":
  """Draws an image and states: before fusion above, after fusion below."""
  columns = 2 + len(maps.places)
  figure = _figure(1.9 * columns + 0.6, 3.9)
  figure.suptitle(title, fontsize=11, wrap=True)
  grid = figure.subplots(2, columns)
  _show(grid[0, 0], image)
  grid[0, 0].set_title("image", fontsize=_SMALL)
  grid[1, 0].axis("off")
  panels = [("mean of |h|", maps.mean)]
  panels += [
    (f"channel {d}, state {n}", maps.single[:, i])
    for i, (d, n) in enumerate(maps.places)
  ]
  for column, (name, pair) in zip(grid.T[1:], panels, strict=True):
    column[0].set_title(name, fontsize=_SMALL)
    for axes, states, when in zip(
      column, pair, ("before", "after"), strict=True
    ):
      # Fusion changes the scale of the states, so that each map has its own.
      shown = _show(axes, states)
      _colour_bar(figure, shown, axes, "")
      if name == panels[0][0]:
        axes.set_ylabel(f"{when} fusion", fontsize=_SMALL)
  return figure


def draw_mixing(
  image: np.ndarray,
  tokens: Sequence[tuple[int, int]],
  maps: np.ndarray,
  title: str,
) -> "matplotlib.figure.Figure":
  """Draws an image with output tokens, and the weights of tokens in each."""
  figure = _figure(2.1 * (1 + len(tokens)) + 0.8, 2.7)
  figure.suptitle(title, fontsize=11, wrap=True)
  grid = figure.subplots(1, 1 + len(tokens))
  height, width = maps.shape[1:]
  # In units of tokens, so that the marks fit.
  grid[0].imshow(image, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
  _bare(grid[0])
  grid[0].set_title("image and output tokens", fontsize=_SMALL)
  maps = np.stack(list(map(_without_token, maps, tokens)))
  scale = _logarithmic(float(np.nanmax(maps)))
  shown = None
  for number, (axes, token, weights) in enumerate(
    zip(grid[1:], tokens, maps, strict=True), start=1
  ):
    shown = _show(axes, weights, scale)
    axes.set_title(f"output token {number}", fontsize=_SMALL)
    for panel in (grid[0], axes):
      _mark(panel, token, str(number) if panel is grid[0] else "")
  _colour_bar(figure, shown, grid, "mean of |M|\nover channels")
  return figure


def draw_mixers(
  sheet: dict[
    str, tuple[np.ndarray, tuple[tuple[int, int], np.ndarray] | None]
  ],
  title: str,
) -> "matplotlib.figure.Figure":
  """Draws a line for each mixer.

  Args:
    sheet: {name: (receptive field, row)}. A row is an output token and the
      weights of all tokens in it; None for a mixer without a matrix.
    title: above all of them.
  """
  figure = _figure(6.4, 2.8 * len(sheet) + 0.7)
  figure.suptitle(title, fontsize=11, wrap=True)
  grid = figure.subplots(len(sheet), 2, squeeze=False)
  shown = None
  for axes, (name, (field, row)) in zip(grid, sheet.items(), strict=True):
    shown = _show(axes[0], field, _logarithmic(1.0))
    axes[0].set_ylabel(name, fontsize=_SMALL)
    if row is None:
      _bare(axes[1])
      axes[1].text(0.5, 0.5, "not linear", ha="center", fontsize=_SMALL)
      continue
    token, weights = row
    weights = _without_token(weights, token)
    _show(axes[1], weights / np.nanmax(weights), _logarithmic(1.0))
    _mark(axes[1], token, "")
  grid[0, 0].set_title("effective receptive field", fontsize=_SMALL)
  grid[0, 1].set_title("weights of other tokens, |M|", fontsize=_SMALL)
  _colour_bar(figure, shown, grid, "of the greatest")
  return figure


def draw_heat(
  panels: Sequence[tuple[np.ndarray, np.ndarray, str]], *, columns: int
) -> "matplotlib.figure.Figure":
  """Draws images, and beside each what speaks for a class in it.

  Args:
    panels: an image [H, W, 3], its map [h, w] and a title. Red speaks for the
      class and blue against it; each map has a scale of its own.
    columns: most panels side by side.
  """
  columns = min(columns, len(panels))
  rows = -(-len(panels) // columns)
  figure = _figure(2.1 * columns, 3.9 * rows)
  grid = figure.subplots(2 * rows, columns, squeeze=False)
  for axes in grid.flat:
    _bare(axes)
  for i, (image, heat, title) in enumerate(panels):
    above, below = grid[2 * (i // columns) :, i % columns][:2]
    above.imshow(image)
    above.set_title(title, fontsize=_SMALL, wrap=True)
    below.imshow(image.mean(axis=-1), cmap="gray", alpha=0.6)
    most = float(np.abs(heat).max()) or 1.0
    below.imshow(
      heat,
      cmap="RdBu_r",
      vmin=-most,
      vmax=most,
      alpha=0.6,
      interpolation="bilinear",
      extent=below.get_images()[0].get_extent(),
    )
  return figure


def picture(figure: "matplotlib.figure.Figure", suffix: str) -> bytes:
  """Returns a figure as a file of this kind, ".png" or ".svg"."""
  file = io.BytesIO()
  figure.savefig(file, format=suffix[1:].lower(), dpi=200)
  return file.getvalue()


def _without_token(weights: np.ndarray, token: tuple[int, int]) -> np.ndarray:
  """Leaves out the token's own weight, which the skip connection dominates."""
  others = weights.copy()
  others[token] = np.nan
  return others


def _figure(width: float, height: float) -> "matplotlib.figure.Figure":
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _logarithmic(greatest: float) -> Any:
  from matplotlib.colors import LogNorm

  return LogNorm(greatest / 10**_DECADES, greatest, clip=True)


def _show(axes: Any, values: np.ndarray, scale: Any = None) -> Any:
  _bare(axes)
  # A logarithmic scale has no zero.
  return axes.imshow(
    values if scale is None else np.maximum(values, scale.vmin),
    cmap=_COLOURS,
    norm=scale,
    interpolation="nearest",
  )


def _bare(axes: Any) -> None:
  axes.set_xticks([])
  axes.set_yticks([])
  for side in axes.spines.values():
    side.set_visible(False)


def _mark(axes: Any, token: tuple[int, int], text: str) -> None:
  row, column = token
  axes.plot(column, row, "o", mfc="none", mec="white", markersize=9, mew=2.5)
  axes.plot(column, row, "o", mfc="none", mec=_MARK, markersize=9, mew=1.3)
  if text:
    axes.annotate(
      text,
      (column, row),
      (8, 5),
      textcoords="offset points",
      color="white",
      fontsize=9,
      fontweight="bold",
      bbox={"facecolor": _MARK, "edgecolor": "none", "pad": 1.5},
    )


def _colour_bar(figure: Any, shown: Any, axes: Any, label: str) -> None:
  is_clipped = getattr(shown.norm, "clip", False)
  bar = figure.colorbar(
    shown,
    ax=axes,
    shrink=0.8,
    pad=0.02,
    extend="min" if is_clipped else "neither",
  )
  bar.set_label(label, fontsize=_SMALL)
  bar.ax.tick_params(labelsize=7)
  bar.outline.set_visible(False)


def _share(field: np.ndarray) -> float:
  """The least share of the pixels whose sum is half of the whole sum."""
  values = np.sort(field.ravel())[::-1].cumsum()
  return float(1 + np.searchsorted(values, values[-1] / 2)) / values.size
