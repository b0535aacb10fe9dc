"""Settings of every test of models."""

import pytest


@pytest.fixture(autouse=True)
def refuse_promotion(strict):
  """Runs every test where JAX refuses implicit promotion."""
