"""Machines that are not there, described to JAX for ahead-of-time compilation.

A target is a TPU topology ("v5e:16x16"), several slices of one
("2xv5e:16x16"), or a number of GPUs ("h200:8"). Needed are libtpu for TPUs, and
for GPUs JAX's CUDA plugin and a ptxas: `pip install ".[aot]"`.
"""

import contextlib
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from spatial_mamba_jax.errors import UserError, one_line
from spatial_mamba_jax.forecast.gpu_targets import TARGETS as GPUS
from spatial_mamba_jax.hardware import Accelerator, by_name

# A host of one v5e that is not there either. Nothing is computed, so processes
# may share it.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# XLA's search for a fusion of small products needs a GPU to try them on.
_FLAG = "--xla_gpu_enable_triton_gemm=false"
_SLICES = re.compile(r"([0-9]+)x([a-z].*)", re.IGNORECASE)


class TopologyError(UserError):
  """A target that nothing here describes or compiles for."""


def use_compilers() -> None:
  """Prepares this process to compile for other machines; it runs on its CPU.

  Call it before JAX has a device and before the first target is described.
  """
  jax.config.update("jax_platforms", "cpu")
  os.environ.update(environment())


def environment() -> dict[str, str]:
  """Returns the environment variables with which a process can compile."""
  flags = os.environ.get("XLA_FLAGS", "")
  return {**ENVIRONMENT, "XLA_FLAGS": f"{flags} {_FLAG}".strip()}


def platform_of(target: str) -> str:
  """Of a target: "tpu", or "cuda" for one of `gpu_targets`."""
  return "cuda" if _gpu(target) in GPUS else "tpu"


def accelerator_of(target: str) -> Accelerator:
  """The figures of a target's devices.

  Raises:
    TopologyError: there are none, or they are not of a whole chip.
  """
  slices, name = _slices(target)
  if not slices or (slices > 1 and platform_of(name) == "cuda"):
    raise TopologyError(
      f"--topology={target}: only TPUs have slices, one or more (2xv5e:16x16);"
      " of GPUs give the number of all (H200:16)"
    )
  accelerator = by_name(name.partition(":")[0])
  if accelerator is None:
    raise TopologyError(
      f"--topology={target}: no figures for {name.partition(':')[0]} in"
      " spatial_mamba_jax/hardware.py"
    )
  if accelerator.name == "v4":
    raise TopologyError(
      f"--topology={target}: there is no forecast for a v4, of which libtpu"
      " describes each of a chip's two cores as a device"
    )
  return accelerator


def devices_of(target: str) -> list[Any]:
  """Describes the devices of a target.

  Raises:
    TopologyError: nothing here compiles for it; the message says what to do.
  """
  try:
    return list(_describe(target).devices)
  except TopologyError:
    raise
  # All that JAX and its plugins raise is one of these.
  except (RuntimeError, ValueError) as error:
    raise TopologyError(
      f"nothing here compiles for {target}: give a TPU topology such as v5e:2x2"
      f" or 2xv5e:16x16, or one of {', '.join(GPUS)} with a number (H200:4),"
      " and"
      f' install ".[aot]" ({one_line(error)[:200]})'
    ) from error


def domain_of(device: Any) -> int:
  """Returns the index of a device's TPU slice, or of a GPU's host.

  Fast links join the devices of a slice or host.

  Args:
    device: one of `devices_of`.
  """
  if device.platform == "tpu":
    return getattr(device, "slice_index", None) or 0
  return device.process_index


def as_default_device(target: str) -> Any:
  """A context in which a GPU target is JAX's default device.

  Kernels ask which GPU it is, and models whether to recompute. For a TPU the
  default device stays.
  """
  if platform_of(target) == "tpu":
    return contextlib.nullcontext()
  return jax.default_device(devices_of(target)[0])


def _slices(target: str) -> tuple[int, str]:
  """The number of slices, and the target of one."""
  match = _SLICES.fullmatch(target)
  return (int(match[1]), match[2]) if match else (1, target)


def _gpu(target: str) -> str:
  return target.partition(":")[0].upper()


def _describe(target):
  if platform_of(target) == "cuda":
    return _describe_gpus(target)
  slices, name = _slices(target)
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if name.endswith(":1x1"):
    options["chips_per_host_bounds"] = (1, 1, 1)
  return topologies.get_topology_desc(
    platform="tpu", topology_name=name, **options
  )


def _describe_gpus(target):
  count = target.partition(":")[2] or "1"
  hosts, each = 1, count
  accelerator = by_name(_gpu(target))
  if accelerator and count.isdecimal() and int(count):
    each = accelerator.host_devices
    hosts, left = divmod(int(count), each)
    if int(count) < each:
      hosts, each = 1, int(count)
    elif left:
      raise TopologyError(
        f"--topology={target}: a host has {each} of these GPUs, so more than"
        f" {each} must be a multiple of it"
      )
  # Slices, hosts of each, devices of each.
  return topologies.get_topology_desc(
    platform="cuda",
    target_config=GPUS[_gpu(target)],
    topology=f"1x{hosts}x{each}",
  )
