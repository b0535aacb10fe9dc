"""The time of a training step by the rates of the hardware alone.

A part of a step takes as long as its work at the hardware's peak rate.
Arithmetic and memory traffic overlap; collectives do not overlap with them.
"""

import dataclasses
from collections.abc import Sequence

from spatial_mamba_jax.forecast.collectives import Collective, passes, share
from spatial_mamba_jax.hardware import Accelerator


@dataclasses.dataclass(frozen=True)
class Work:
  """The work of one device in a step.

  Attributes:
    flops: floating-point operations.
    memory: bytes read from and written to device memory.
    link: bytes sent to other devices of the slice or the host.
    network: bytes sent to devices of other slices or hosts.
  """

  flops: float
  memory: float
  link: float
  network: float


@dataclasses.dataclass(frozen=True)
class StepTime:
  """The parts of a step, in seconds; see this module.

  Attributes:
    compute: of the arithmetic.
    memory: of the traffic to device memory.
    link: of the collectives over TPU links or NVLink.
    network: of the collectives over the network of hosts or slices.
  """

  compute: float
  memory: float
  link: float
  network: float

  @property
  def total(self) -> float:
    """Seconds of the step."""
    return max(self.compute, self.memory) + self.link + self.network

  @property
  def bound(self) -> str:
    """The longest part."""
    parts = dataclasses.asdict(self)
    return max(parts, key=lambda name: parts[name])


def step_time(work: Work, accelerator: Accelerator) -> StepTime:
  """Divides the work by the rates; a host's devices share its network."""
  network = accelerator.network_rate / accelerator.host_devices
  return StepTime(
    compute=work.flops / accelerator.flops,
    memory=work.memory / accelerator.memory_rate,
    link=work.link / accelerator.link_rate,
    network=work.network / network,
  )


def sent_by_device(
  collectives: Sequence[Collective], domains: Sequence[int]
) -> tuple[float, float]:
  """Returns the bytes that a device sends over links and over the network.

  A collective among several slices or hosts is made inside of each first, so
  that each device sends its share of the array alone over the network.

  Args:
    collectives: of a device's program.
    domains: the slice or the host of each device, by its position in the mesh.
  """
  link = network = 0.0
  for each in collectives:
    inside, outside = _shares(each, domains)
    size = each.times * each.size * passes(each.kind)
    link += size * inside
    network += size * outside
  return link, network


def _shares(each, domains):
  """The shares of an array that a device sends over links and the network."""
  kind, group = each.kind, each.groups[0]
  if each.is_between_slices:
    return 0.0, share(kind, float(len(group)))
  if kind == "collective-permute":
    crosses = any(domains[a] != domains[b] for a, b in each.groups)
    return (0.0, 1.0) if crosses else (1.0, 0.0)
  count = float(len({domains[x] for x in group}))
  members = len(group) / count
  if kind == "all-to-all":  # Each device has a part for each other device.
    return share(kind, members) / count, share(kind, count)
  return share(kind, members), share(kind, count) / members


def mfu(model_flops: float, seconds: float, accelerator: Accelerator) -> float:
  """The model FLOP of a step on one device over what its peak would do."""
  return model_flops / (seconds * accelerator.flops)
