"""Paths visit every token once, in the order of the authors' code."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from spatial_mamba_jax.models.mixers import scans
from spatial_mamba_jax.models.mixers.scans import Path

ORDERS = ("raster", "snake", "diagonals", "spiral")


def indices(path, height, width):
  """The raster index of the token of each step."""
  image = np.arange(height * width, dtype=np.float32)
  tokens = path.tokens(jnp.asarray(image.reshape(1, height, width, 1)))
  return np.asarray(tokens, int).ravel().tolist()


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    (scans.RASTER, [0, 1, 2, 3, 4, 5]),
    (scans.COLUMNS, [0, 3, 1, 4, 2, 5]),
    (scans.ROW_SNAKE, [0, 1, 2, 5, 4, 3]),
    (scans.COLUMN_SNAKE, [0, 3, 4, 1, 2, 5]),
    (scans.COLUMN_SNAKE.reversed(), [5, 2, 1, 4, 3, 0]),
    (Path("diagonals"), [0, 1, 3, 4, 2, 5]),
    (Path("spiral"), [0, 1, 2, 5, 4, 3]),
    (Path("spiral", mirror="rows"), [3, 4, 5, 2, 1, 0]),
    (Path("diagonals", mirror="columns"), [2, 1, 5, 4, 0, 3]),
  ],
)
def test_paths_over_two_rows_of_three(path, expected):
  assert indices(path, 2, 3) == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (4, 7)])
def test_every_path_visits_every_token_and_leads_back(height, width):
  image = np.random.default_rng(0).standard_normal((2, height, width, 3))
  for order, transpose, mirror, reverse in itertools.product(
    ORDERS, (False, True), (None, "rows", "columns"), (False, True)
  ):
    path = Path(order, transpose, mirror, reverse)
    assert sorted(indices(path, height, width)) == list(range(height * width))
    tokens = path.tokens(jnp.asarray(image))
    back = path.image(tokens, height, width)
    np.testing.assert_array_equal(back, jnp.asarray(image))
