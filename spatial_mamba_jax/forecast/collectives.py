"""The collectives of a compiled program: kinds, bytes, and who takes part.

Between slices of TPUs, a program sends arrays to its host, whose runtime
(`xla_megascale_runtime`) sums or exchanges them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from spatial_mamba_jax.forecast.hlo import Program

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# What a program sends to its host for other slices, numbered from 1: {1,2} or
# {1:4} times devices.
_BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,:]*)\}')
# A fusion of an all-reduce with the slice that a device keeps.
_SCATTERING = "all-reduce-scatter"
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})?\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_MESH = re.compile(
  r"replica_groups=mesh\[([^\]]*)\]"
  r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective that a program runs.

  Attributes:
    kind: one of `KINDS`.
    size: bytes of the whole array, each time: what an all-gather has in the
      end, and all others in the beginning.
    groups: the devices that take part together, by their position in the mesh;
      of a `collective-permute`, each source with its target. Between slices,
      the indices of the slices.
    times: how often it runs.
    is_async: whether other work can run meanwhile.
    is_between_slices: whether every device of a slice takes part, with those at
      its position in the other slices.
  """

  kind: str
  size: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  is_async: bool
  is_between_slices: bool = False

  @property
  def sent(self) -> float:
    """Bytes that a device sends in all runs, by the best algorithm.

    Of n devices each sends (n - 1) / n of the array; in an all-reduce, which is
    a reduce-scatter and an all-gather, twice.
    """
    part = share(self.kind, float(len(self.groups[0])))
    return self.times * self.size * passes(self.kind) * part


def passes(kind: str) -> int:
  """How often each device sends its share of the array."""
  return 2 if kind == "all-reduce" else 1


def share(kind: str, count: float) -> float:
  """The share of an array that one of `count` devices sends."""
  if kind == "collective-permute":
    return 1.0
  return (count - 1) / count


def collectives_of(program: Program) -> list[Collective]:
  """Returns the collectives among more than one device."""
  found = []
  for launch in program.launches():
    found += _between_slices(launch)
    for part in [launch, *program.fused(launch)]:
      found += _collective(launch, part, program.devices)
  return [each for each in found if len(each.groups[0]) > 1]


def _between_slices(launch):
  line = launch.instruction.line
  match = _BETWEEN.search(line)
  if launch.instruction.opcode != "send" or not match:
    return []
  first, *last = (_numbers(x) for x in match[1].split(":"))
  slices = range(first[0], last[0][0] + 1) if last else first
  is_permute = '_transfer_type="ONE_TO_ONE"' in line
  kind = "collective-permute" if is_permute else "all-reduce"
  groups = (tuple(slices),)
  return [Collective(kind, launch.operands, groups, launch.times, True, True)]


def _collective(launch, part, devices):
  """Of a launched instruction, or of a part of a launched fusion."""
  kind = part.instruction.opcode.removesuffix("-start")
  if kind not in KINDS:
    return []
  groups = _groups(part.instruction.line, devices)
  size = part.operands
  if kind == "all-gather":
    size *= len(groups[0])
  (body,) = launch.instruction.called.get("calls", ("",))
  if body.startswith(_SCATTERING):
    kind = "reduce-scatter"
  is_async = part.instruction.opcode.endswith("-start")
  return [Collective(kind, size, groups, launch.times, is_async)]


def total(
  collectives: Sequence[Collective],
) -> dict[str, tuple[int, float]]:
  """Returns {kind: (number of runs, bytes that a device sends)}."""
  counts = collections.defaultdict(int)
  sent = collections.defaultdict(float)
  for each in collectives:
    counts[each.kind] += each.times
    sent[each.kind] += each.sent
  return {kind: (counts[kind], sent[kind]) for kind in KINDS if counts[kind]}


def _numbers(text: str | None) -> list[int]:
  return [int(x) for x in re.findall(r"\d+", text or "")]


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
  if match := _IOTA.search(line):
    ids = _iota(match[2], match[3]).reshape(_numbers(match[1]))
  elif match := _MESH.search(line):
    ids = _along_axes(match, devices)
  elif match := _LISTED.search(line) or _PAIRS.search(line):
    listed = re.findall(r"\{([\d,]+)\}", match[1] or "")
    return tuple(tuple(_numbers(x)) for x in listed) or (tuple(range(devices)),)
  else:
    raise ValueError(f"no replica groups: {line[:80]}")
  return tuple(tuple(group) for group in ids.tolist())


def _iota(shape: str, order: str | None) -> np.ndarray:
  sizes = _numbers(shape)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(order)) if order else ids


def _along_axes(match, devices):
  """Groups [G, N] along some axes of a mesh.

  An axis may be named in part, 'axis_0':(4)2: after splitting it in 4 and more,
  the next 2.
  """
  axes, shape, order, named = match.groups()
  sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
  taken = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
  dimensions, grouped = [], []
  for name, size in sizes.items():
    start = 1
    for _, before, part in sorted(
      (x for x in taken if x[0] == name), key=lambda x: int(x[1] or 1)
    ):
      dimensions += [int(before or 1) // start, int(part or size)]
      grouped += [False, True]
      start = int(before or 1) * int(part or size)
    dimensions.append(size // start)
    grouped.append(False)
  ids = _iota(shape, order) if shape else np.arange(devices)
  ids = ids.reshape(dimensions)
  rest = [i for i, is_grouped in enumerate(grouped) if not is_grouped]
  along = [i for i, is_grouped in enumerate(grouped) if is_grouped]
  count = math.prod(dimensions[i] for i in along)
  return ids.transpose(*rest, *along).reshape(-1, count)
