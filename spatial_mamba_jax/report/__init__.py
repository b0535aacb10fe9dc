"""Draws the log of a run as a picture and an HTML page.

  python -m spatial_mamba_jax.report WORKDIR

reads `metrics.jsonl`, `run.json`, `goodput.jsonl` and `examples.png`. It writes
`WORKDIR/report.png`, a picture of the curves, and `WORKDIR/report.html`, a page
with the curves, the scores, the times, the config and `examples.png`.
The run may still be going on.
"""

import argparse
import io
import pathlib
import warnings

from spatial_mamba_jax.errors import run_command, tell
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.report.figure import draw
from spatial_mamba_jax.report.html_page import page
from spatial_mamba_jax.report.run_log import RunLog, TaskReport, read_run
from spatial_mamba_jax.training.digests import write_whole

__all__ = [
  "RunLog",
  "TaskReport",
  "draw",
  "main",
  "page",
  "read_run",
  "write_report",
]


def write_report(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes the picture and the page; returns their paths.

  Raises:
    ValueError: there is nothing to draw.
    OSError: a file cannot be read or written.
  """
  workdir = local_path(workdir, "the workdir")
  run = read_run(workdir)
  picture = io.BytesIO()
  with warnings.catch_warnings():
    # The font may lack letters of the directory's name; boxes stand for them.
    warnings.filterwarnings("ignore", message="Glyph ")
    draw(run).savefig(picture, format="png")
  contents = {
    "report.png": picture.getvalue(),
    "report.html": page(run).encode(),
  }
  paths = [workdir / name for name in contents]
  for path, content in zip(paths, contents.values(), strict=True):
    write_whole(path, content)
  return paths


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.report",
    description="Draws the log of a run.",
  )
  parser.add_argument(
    "workdir", type=pathlib.Path, help="the --workdir of train.py"
  )
  workdir = parser.parse_args(arguments).workdir
  return run_command(
    "report",
    lambda: tell("\n".join(map(str, write_report(workdir)))),
    (OSError, ValueError),
  )
