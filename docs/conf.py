"""Configures the documentation site: `make docs`."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project = "spatial_mamba_jax"
author = "The spatial_mamba_jax authors"
copyright = author
html_theme = "furo"
html_title = project
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
# Headings get the anchors that GitHub gives them.
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True


def as_rst(app, what, name, obj, options, lines):
  """Turns plain-text docstrings into reStructuredText.

  Names between single backticks become code. Stars, bars and trailing
  underscores are escaped. An example, indented by four spaces, becomes a code
  block.
  """
  del app, what, name, obj, options
  result, is_code, indent = [], False, 0
  for line in lines:
    if line.strip():
      before, indent = indent, len(line) - len(line.lstrip())
      if is_code and indent < 4:
        is_code = False
      elif indent >= 4 and before == 0 and result and not result[-1]:
        is_code = True
        result += ["::", ""]
    result.append(line if is_code else _escaped(line))
  lines[:] = result


def _escaped(line):
  line = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line)
  parts = line.split("``")
  # Every second part is code.
  parts[::2] = [
    re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", x) for x in parts[::2]
  ]
  return "``".join(parts)


def setup(app):
  """Registers the conversion of docstrings."""
  app.connect("autodoc-process-docstring", as_rst, priority=400)
