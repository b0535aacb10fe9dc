"""Describes the machine of a measurement."""

import datetime
import os
import platform
from typing import Any

import jax

from benchmarks import timing
from spatial_mamba_jax.training import provenance

# Packages and variables on which speed may depend.
PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "torch"),
  *("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"),
)
ENVIRONMENT = ("GLIBC_TUNABLES", "JAX_OPTIMIZATION_LEVEL", "XLA_FLAGS")


def describe() -> dict[str, Any]:
  """Returns the properties of the machine on which speed may depend."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "devices": jax.device_count(),
    "platform": device.platform,
    "host": platform.machine(),
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "versions": provenance.versions(PACKAGES),
    "environment": {x: os.environ[x] for x in ENVIRONMENT if x in os.environ},
    "commit": provenance.commit() or "unknown",
    "date": datetime.date.today().isoformat(),
    "protocol": timing.__doc__,
  }
