"""Settings of every test of models."""

import pytest


@pytest.fixture(autouse=True)
def refuse_promotion(strict):
  """As programs are run whose authors look for their own mistakes."""
