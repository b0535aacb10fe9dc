"""Tables of predictions, as CSV files."""

import csv
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from spatial_mamba_jax.errors import naming


def write_csv(path: pathlib.Path, rows: Iterable[Sequence[Any]]) -> None:
  """Writes rows, of which the first is the header.

  Raises:
    OSError: the file cannot be written.
  """
  # A file's name may not be UTF-8: `surrogateescape` writes its bytes.
  with (
    naming(path),
    path.open("w", -1, "utf-8", "surrogateescape", newline="") as file,
  ):
    csv.writer(file).writerows(rows)
