"""What can be read off kernels that Mosaic compiled for a GPU."""

import os
import re
from typing import Any


def dump_to(folder: str) -> dict[str, str]:
  """Environment variables that have Mosaic leave its programs in a folder."""
  return {
    "MOSAIC_GPU_DUMP_TO": folder,
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
  }


def kernels(folder: str) -> list[dict[str, Any]]:
  """Each kernel compiled: what it takes of a multiprocessor.

  Returns:
    `name`; `registers` of a thread; `spilled_bytes` of a thread; `smem_bytes`
    of a program; and `loop_instructions`: of the longest loop, in PTX, with
    each branch taken and each loop in it run once.
  """
  return [
    _kernel(os.path.join(folder, name.removesuffix(".ptx")))
    for name in sorted(os.listdir(folder))
    if name.endswith(".ptx")
  ]


def _kernel(path):
  ptx, ptxas, passes = (
    _read(path + ending) for ending in (".ptx", ".ptxas", ".mlir-passes.log")
  )
  spills = re.findall(r"(\d+) bytes spill", ptxas)
  registers = re.search(r"Used (\d+) registers", ptxas)
  assert spills
  assert registers
  return {
    "name": re.sub(r"_\d+$", "", os.path.basename(path)),
    "registers": int(registers[1]),
    "spilled_bytes": sum(map(int, spills)),
    "smem_bytes": _shared_memory(passes),
    "loop_instructions": longest_loop(ptx),
  }


def _read(path):
  with open(path) as file:
    return file.read()


def _shared_memory(passes):
  """The bytes that the host's code asks for when it launches the kernel."""
  start = passes.rindex("dynamic_shared_memory_size")
  value = re.escape(passes[start:].split()[1])
  constants = re.findall(
    rf"{value} = llvm.mlir.constant\((\d+) : i32\)", passes[:start]
  )
  return int(constants[-1])


_LABEL = re.compile(r"^(\$\w+):")
_INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)\b(.*);")


def longest_loop(ptx: str) -> int:
  """Instructions of the longest loop, from its label to the branch back."""
  count, labels, longest = 0, {}, 0
  for line in ptx.splitlines():
    if label := _LABEL.match(line):
      labels[label[1]] = count
    elif instruction := _INSTRUCTION.match(line):
      count += 1
      target = instruction[2].split()[-1:] or [""]
      if instruction[1].startswith("bra") and target[0] in labels:
        longest = max(longest, count - labels[target[0]])
  return longest
