"""What the figures of the benchmarks share."""

import io
from typing import Any


def files(figure: Any, salt: str) -> dict[str, bytes]:
  """Returns {suffix: file} of a matplotlib figure, as PNG and SVG.

  Args:
    figure: the figure.
    salt: makes the identifiers in the SVG; the same for the same figure.
  """
  from matplotlib import rc_context

  content = {}
  # Text stays text, which a page can search, and a file does not change by
  # itself.
  with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
    for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
      file = io.BytesIO()
      figure.savefig(file, format=suffix[1:], dpi=200, metadata=metadata)
      content[suffix] = file.getvalue()
  return content


def bare(axes: Any) -> None:
  """Leaves of a plot's frame the axes and a pale grid."""
  axes.tick_params(labelsize=8, which="both")
  axes.grid(visible=True, color="0.9")
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
