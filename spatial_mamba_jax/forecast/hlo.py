"""Counts the bytes that a compiled program moves, from its HLO text.

A launched instruction reads its operands and writes its result. Of an operand
that it slices it reads the slice; of a result that it updates in place it
writes the update. A loop's body counts once for each iteration. A conditional
counts as its costliest branch, or as its cheapest.
"""

import collections
import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"(calls|body|condition|to_apply|branch_computations|true_computation"
  r"|false_computation)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')

# Opcodes that launch nothing.
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id", "optimization-barrier"),
  *("iota", "domain", "add-dependency"),
}
# Custom calls that launch nothing: an uninitialised buffer, and slices that a
# TPU has already copied next to each other.
_FREE_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')

_SLICES = ("slice", "dynamic-slice", "gather")
# Asynchronous copies, whose result includes their operand.
COPY_STARTS = ("copy-start", "slice-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: its name, unique in the computation.
    opcode: its operation.
    size: bytes of its result in device memory; for the start of a copy, bytes
      read and written there.
    extent: bytes of its result in any memory.
    operands: names of its operands.
    called: {attribute: computations that it runs}.
    line: its text after the operands.
    is_root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  size: int
  extent: int
  operands: tuple[str, ...]
  called: dict[str, tuple[str, ...]]
  line: str
  is_root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Launch:
  """An instruction that the device runs.

  Attributes:
    instruction: the instruction.
    size: bytes read and written each time.
    times: how often it runs.
    operands: bytes of its operands in any memory.
  """

  instruction: Instruction
  size: int
  times: int
  operands: int


class Program:
  """A compiled program's text, `compiled.as_text()`.

  Attributes:
    devices: the number of devices that run it together.
  """

  def __init__(self, text: str, *, cheapest: bool = False):
    """Reads the text.

    Args:
      text: of the program.
      cheapest: whether a conditional counts as its cheapest branch.
    """
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    self.devices = int(partitions[1]) if partitions else 1
    self._branch = min if cheapest else max
    self._computations: dict[str, Computation] = {}
    self._frames = _Frames(text)
    entry, current = "", {}
    for line in text.splitlines():
      if (header := _HEADER.match(line)) and " = " not in line:
        current = self._computations.setdefault(header[2], {})
        entry = header[2] if header[1] else entry
      elif match := _INSTRUCTION.match(line):
        instruction = _parse(match[2], match[3], is_root=bool(match[1]))
        current[instruction.name] = instruction
    self._entry = entry

  def __contains__(self, name: str) -> bool:
    """Returns whether an instruction has this name, including loops."""
    return any(name in body for body in self._computations.values())

  def launches(self) -> list[Launch]:
    """Returns everything that runs, in the order of the text."""
    return self._of(self._entry)

  def fused(self, launch: Launch) -> list[Launch]:
    """Returns what a fusion is made of, as if each part was launched."""
    if launch.instruction.opcode != "fusion":
      return []
    (body,) = launch.instruction.called["calls"]
    return self._of(body)

  def functions(self, instruction: Instruction) -> tuple[str, ...]:
    """Returns its scopes, then its Python functions, the innermost first."""
    scopes = re.search(r'op_name="([^"]*)"', instruction.line)
    names = scopes[1].split("/")[::-1] if scopes else ()
    return *names, *self._frames.functions(instruction.line)

  @functools.cache  # noqa: B019  A program lives as long as its text is read.
  def _of(self, name):
    launches = []
    for instruction in self._computations[name].values():
      launches += self._run(instruction, self._computations[name])
    return launches

  def _run(self, instruction, computation):
    opcode, called = instruction.opcode, instruction.called
    if opcode in _FREE or opcode.endswith("-done"):
      return []
    if opcode == "custom-call" and _FREE_CALL.search(instruction.line):
      return []
    if opcode == "while":
      trips = self._trips(instruction)
      return [
        dataclasses.replace(launch, times=trips * launch.times)
        for launch in self._of(*called["body"])
      ]
    if opcode == "conditional":
      branches = [self._of(x) for names in called.values() for x in names]
      return self._branch(branches, key=total_bytes)
    if opcode in ("call", "async-start"):
      (body,) = called.get("to_apply") or called["calls"]
      return self._of(body)
    size = self._size(instruction, computation)
    operands = sum(computation[x].extent for x in instruction.operands)
    return [Launch(instruction, size, 1, operands)]

  def _trips(self, loop):
    if known := _TRIPS.search(loop.line):
      return int(known[1])
    # A TPU's program has no trip count, but JAX counts from 0 to a constant.
    condition = self._computations[loop.called["condition"][0]]
    for end in condition.values():
      if end.is_root and end.opcode == "compare" and "direction=LT" in end.line:
        _, bound = (condition[name] for name in end.operands)
        if bound.opcode == "constant":
          return int(bound.line.partition(",")[0])
    raise ValueError(f"cannot tell how often {loop.name} runs")

  def _size(self, instruction, computation):
    sizes = [computation[x].size for x in instruction.operands]
    if instruction.opcode in COPY_STARTS:
      return instruction.size
    if instruction.opcode in ("slice", "dynamic-slice"):
      return (instruction.extent if sizes[0] else 0) + instruction.size
    if instruction.opcode == "dynamic-update-slice":
      update = computation[instruction.operands[1]]
      return update.size + (update.extent if instruction.size else 0)
    if instruction.opcode in ("fusion", "fusion-start"):
      (body,) = instruction.called["calls"]
      reads, size = self._fused(body)
      return int(size + sum(x * y for x, y in zip(reads, sizes, strict=True)))
    # An operand that is given twice is read once.
    distinct = dict(zip(instruction.operands, sizes, strict=True))
    return instruction.size + sum(distinct.values())

  @functools.cache  # noqa: B019  As above.
  def _fused(self, computation):
    """Returns the share of each operand that a fusion reads; bytes written."""
    body = self._computations[computation]
    # {value: the share needed}. Shares of slices add up; any other use needs
    # the same share as its result.
    needed = collections.defaultdict(float)
    sliced = collections.defaultdict(float)
    reads, written = {}, sum(x.size for x in body.values() if x.is_root)
    for instruction in reversed(body.values()):
      name, operands = instruction.name, instruction.operands
      share = max(instruction.is_root, needed[name], min(sliced[name], 1.0))
      shares, new = [1.0] * len(operands), instruction.size
      if instruction.opcode == "parameter":
        index = re.match(r"\d+", instruction.line)
        assert index is not None
        reads[int(index[0])] = share
      elif instruction.opcode in _SLICES:
        shares[0] = instruction.extent / max(body[operands[0]].extent, 1)
      elif instruction.opcode == "dynamic-update-slice":
        # It is in place, as in a loop that fills an array step by step.
        shares[0], new = 0.0, body[operands[1]].extent
      elif instruction.opcode == "fusion":
        (nested,) = instruction.called["calls"]
        shares, new = self._fused(nested)
      if instruction.size:
        written -= share * (instruction.size - new)
      for operand, part in zip(operands, shares, strict=True):
        if part < 1:
          sliced[operand] += share * part
        else:
          needed[operand] = max(needed[operand], share)
    return [reads[index] for index in sorted(reads)], max(written, 0)


def total_bytes(launches: list[Launch]) -> int:
  """Returns the bytes that all of them read and write."""
  return sum(launch.size * launch.times for launch in launches)


def estimated_cycles(launches: list[Launch]) -> int:
  """Returns the cycles that a TPU's compiler estimates, but for kernels."""
  estimates = [
    (_CYCLES.search(launch.instruction.line), launch.times)
    for launch in launches
  ]
  return sum(int(found[1]) * times for found, times in estimates if found)


def total_launches(launches: list[Launch]) -> int:
  """Returns the number of launches."""
  return sum(launch.times for launch in launches)


def _parse(name, text, *, is_root):
  end = _end_of_type(text)
  kind, rest = text[:end], text[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _matching(rest)
  operands, line = rest[:end], rest[end + 1 :]
  if opcode in ("parameter", "constant"):
    operands, line = "", operands + line
  called = {
    key: tuple(x.strip(" %") for x in names.split(","))
    for key, names in _CALLED.findall(line)
  }
  names = tuple(re.findall(r"%([\w.\-]+)", operands))
  size = _copied(kind) if opcode in COPY_STARTS else _bytes(kind)
  extent = sum(map(_array_bytes, _ARRAY.findall(kind)))
  return Instruction(name, opcode, size, extent, names, called, line, is_root)


def _end_of_type(text):
  if not text.startswith("("):
    return text.index(" ")
  return _matching(text[1:]) + 2


def _matching(text):
  """Returns the index of the bracket that closes an open one."""
  depth = 1
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  raise ValueError(f"no end: {text[:80]}")


def _bytes(kind):
  """Returns the bytes of a type in device memory, without a TPU's own."""
  arrays = _ARRAY.findall(kind)
  return sum(map(_array_bytes, filter(_is_in_device_memory, arrays)))


def _copied(kind):
  """Returns the bytes that a copy reads and writes in device memory."""
  arrays = _ARRAY.findall(kind)[:2]
  size = min(map(_array_bytes, arrays))
  return size * sum(map(_is_in_device_memory, arrays))


def _array_bytes(array):
  name, shape, _ = array
  bits = _BITS.get(name) or int(re.sub(r"\D*(\d*).*", r"\1", name) or 0)
  return math.prod(int(x) for x in shape.split(",") if x) * bits // 8


def _is_in_device_memory(array):
  # S(1) is a TPU's vector memory, S(2) a smaller one.
  *_, layout = array
  return "S(1)" not in layout and "S(2)" not in layout


class _Frames:
  """The tables of a program's text that name the source of instructions."""

  def __init__(self, text):
    self._functions = dict(
      re.findall(r'^(\d+) "([^"]*)"$', _section(text, "FunctionNames"), re.M)
    )
    self._locations = dict(
      re.findall(
        r"^(\d+) \{.*?function_name_id=(\d+).*\}$",
        _section(text, "FileLocations"),
        re.M,
      )
    )
    self._frames = {
      number: (location, parent)
      for number, location, parent in re.findall(
        r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}$",
        _section(text, "StackFrames"),
        re.M,
      )
    }

  @functools.cache  # noqa: B019  As above.
  def functions(self, line):
    match = re.search(r"stack_frame_id=(\d+)", line)
    number = match[1] if match else None
    found = []
    while number in self._frames:
      location, parent = self._frames[number]
      found.append(self._functions[self._locations[location]])
      number = None if parent == number else parent
    return tuple(found)


def _section(text, name):
  match = re.search(rf"^{name}\n(.*?)\n\n", text, re.M | re.S)
  return match[1] if match else ""
