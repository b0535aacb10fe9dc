"""Accelerators' figures, from their vendors' data sheets.

A rate is a peak, in one direction, that no program reaches.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device as JAX counts them: a TPU chip or a GPU.

  Attributes:
    name: the short name, as in a topology ("v5e:2x2", "h200:8").
    kinds: the values that JAX's `device_kind` has for this device.
    flops: floating-point operations a second of dense bfloat16 products.
    memory: bytes of device memory.
    memory_rate: bytes a second to and from device memory.
    link_rate: bytes a second that a device sends to the others of its slice
      or host, over all its links together.
    host_devices: devices that a host has.
    cores: processor cores (vCPU) of the cloud's usual host.
    network_rate: bytes a second that a host sends to hosts outside of its
      slice; for GPUs to all other hosts.
  """

  name: str
  kinds: tuple[str, ...]
  flops: float
  memory: float
  memory_rate: float
  link_rate: float
  host_devices: int
  cores: int
  network_rate: float


GB = 1e9
TERA = 1e12
GIB = 2.0**30

# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. The interconnect's rate
# there counts both directions; half of it times the chips of a pod is the pod's
# all-reduce rate there (of a v4 only that is given). GPUs: nvidia.com's data
# sheets of the SXM boards, whose NVLink rate counts both directions, too; hosts
# as in DGX and in the clouds, with a network card of 50 GB/s a GPU (25 on an
# A100). Cores are the cloud's virtual ones.
ACCELERATORS = (
  Accelerator(
    name="v4",
    kinds=("TPU v4",),
    flops=275 * TERA,
    memory=32 * GIB,
    memory_rate=1200 * GB,
    link_rate=270 * GB,
    host_devices=4,
    cores=240,
    network_rate=25 * GB,
  ),
  Accelerator(
    name="v5e",
    kinds=("TPU v5 lite", "TPU v5e"),
    flops=197 * TERA,
    memory=16 * GIB,
    memory_rate=819 * GB,
    link_rate=200 * GB,
    host_devices=4,
    cores=112,
    network_rate=12.5 * GB,
  ),
  Accelerator(
    name="v5p",
    kinds=("TPU v5", "TPU v5p"),
    flops=459 * TERA,
    memory=95 * GIB,
    memory_rate=2765 * GB,
    link_rate=600 * GB,
    host_devices=4,
    cores=208,
    network_rate=25 * GB,
  ),
  Accelerator(
    name="v6e",
    kinds=("TPU v6 lite", "TPU v6e"),
    flops=918 * TERA,
    memory=32 * GIB,
    memory_rate=1638 * GB,
    link_rate=400 * GB,
    host_devices=4,
    cores=180,
    network_rate=25 * GB,
  ),
  Accelerator(
    name="a100",
    kinds=("NVIDIA A100-SXM4-80GB",),
    flops=312 * TERA,
    memory=80 * GIB,
    memory_rate=2039 * GB,
    link_rate=300 * GB,
    host_devices=8,
    cores=96,
    network_rate=200 * GB,
  ),
  Accelerator(
    name="h100",
    kinds=("NVIDIA H100 80GB HBM3",),
    flops=989 * TERA,
    memory=80 * GIB,
    memory_rate=3350 * GB,
    link_rate=450 * GB,
    host_devices=8,
    cores=208,
    network_rate=400 * GB,
  ),
  Accelerator(
    name="h200",
    kinds=("NVIDIA H200",),
    flops=989 * TERA,
    memory=141 * GIB,
    memory_rate=4800 * GB,
    link_rate=450 * GB,
    host_devices=8,
    cores=208,
    network_rate=400 * GB,
  ),
  Accelerator(
    name="b200",
    kinds=("NVIDIA B200",),
    flops=2250 * TERA,
    memory=180 * GB,
    memory_rate=7700 * GB,
    link_rate=900 * GB,
    host_devices=8,
    cores=224,
    network_rate=400 * GB,
  ),
)


def by_name(name: str) -> Accelerator | None:
  """Returns the accelerator of a topology's name; None if it is not listed."""
  return next((x for x in ACCELERATORS if x.name == name.lower()), None)


def by_kind(kind: str) -> Accelerator | None:
  """Returns the accelerator of a `device_kind`; None if it is not listed."""
  return next((x for x in ACCELERATORS if kind in x.kinds), None)
